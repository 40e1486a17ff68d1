r"""Deep Speech 2: text from sound.

  python -m experiments.deepspeech

After 2.1 minutes on two shared CPU cores with AVX-512 no character of the 300 Morse test recordings
at 10 dB is wrong, and 1.93 % are wrong at 0 dB. The second number comes, after the training, from
  python -m experiments.deepspeech --mode=eval --workdir=runs/deepspeech-morse \
      --config.data.test=test_0db

The prompts are a package of Debian, with 17 minutes of speech for training:
  python -m dljax.data.prepare telephone_prompts
  python -m experiments.deepspeech --preset=telephone_prompts
After 4.5 minutes on such cores 20.0 % of the test's characters and 57.8 % of its words are wrong.
No test sentence occurs in the training set, and there is no dictionary.

TFDS prepares the hundred hours of LibriSpeech, with TensorFlow; that preset has not been run here:
  python -m dljax.data.prepare librispeech
"""

from collections.abc import Mapping

import ml_collections

from dljax import errors, launch
from dljax.config import one_of
from dljax.recipes import common, speech
from dljax.errors import UserError
from dljax.models import deepspeech
from dljax.train.experiment import Experiment

PRESETS: Mapping[str, str] = {
    "morse": "The small form on Morse code under noise, which dljax synthesises; offline.",
    "telephone_prompts": "The small form on the announcements of a telephone exchange (Debian): one speaker, 23 minutes.",
    "librispeech": "Deep Speech 2 on the 100 hours of LibriSpeech's train_clean100.",
}


def _config(preset: str, variant: str) -> ml_collections.ConfigDict:
  """The fields that all presets share."""
  config = speech.config("deepspeech", preset, data=preset, variant=variant, optimizer="adamw")
  config.optimizer.update({"learning_rate": 3e-3, "warmup_fraction": 0.1, "clip_norm": 1.0})
  return config


def _morse() -> ml_collections.ConfigDict:
  config = _config("morse", "deepspeech_small")
  config.model.dropout = 0.0
  config.update({
      "total_steps": 2500, "batch_size": 16, "eval_batch_size": 64, "log_every": 20,
      "eval_every": 500, "checkpoint_every": 500})
  return config


def _telephone_prompts() -> ml_collections.ConfigDict:
  config = _config("telephone_prompts", "deepspeech_small")
  config.model.dropout = 0.2
  config.data.update({"time_masks": 2, "frequency_masks": 2})
  config.update({
      "total_steps": 2500, "batch_size": 16, "eval_batch_size": 32, "log_every": 20,
      "eval_every": 500, "checkpoint_every": 500})
  return config


def _librispeech() -> ml_collections.ConfigDict:
  config = _config("librispeech", "deepspeech2")
  config.model.dropout = 0.1
  config.optimizer.update({"learning_rate": 5e-4, "warmup_fraction": 0.05})
  config.update({
      "total_steps": 90_000, "batch_size": 32, "eval_batch_size": 32, "log_every": 50,
      "eval_every": 2000, "checkpoint_every": 2000})
  return config


_CONFIGS = {
    "morse": _morse, "telephone_prompts": _telephone_prompts, "librispeech": _librispeech}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = _CONFIGS[preset]()
  config.model.describe({
      "variant": one_of("The network", deepspeech.VARIANTS),
      "dropout": "The probability of dropping a value between recurrent layers in training."})
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  variant = errors.choose("--config.model.variant", config.model.variant, deepspeech.VARIANTS)
  if not 0 <= config.model.dropout < 1:
    raise UserError(f"--config.model.dropout={config.model.dropout}: must be at least 0 and below 1")
  model = variant(
      vocab_size=1 + len(config.data.alphabet), dropout=config.model.dropout,
      dtype=common.dtype(config), remat=config.model.remat)
  return speech.build(config, model)


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS, speech.resolve)
