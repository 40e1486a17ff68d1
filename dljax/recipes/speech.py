"""The experiment that all speech recognisers share, from a config and a model."""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import ml_collections

from dljax import optim, report
from dljax.config import Field, Group, base_config
from dljax.data.audio import recordings
from dljax.recipes import common
from dljax.tasks import transcription
from dljax.train.experiment import Assets, Experiment, Inputs, Request

# The values of fields of `config.data` for the sets that presets use.
DATA = {
    "morse": {"name": "morse", "test": "test_10db", "max_text": 16, "max_frames": 880,
              "lowest": 300.0, "highest": 1000.0, "num_mels": 16, "buckets": 3},
    "telephone_prompts": {"name": "telephone_prompts", "alphabet": " abcdefghijklmnopqrstuvwxyz'",
                          "max_text": 440, "max_frames": 3120},
    "librispeech": {"name": "librispeech", "alphabet": " ABCDEFGHIJKLMNOPQRSTUVWXYZ'",
                    "audio_feature": "speech", "train": "train_clean100",
                    "validation": "dev_clean", "test": "test_clean", "max_text": 600,
                    "max_frames": 3600, "sample_rate": 16000, "num_mels": 80, "window": 0.025,
                    "buckets": 8, "time_masks": 2, "time_mask": 40, "frequency_masks": 2,
                    "frequency_mask": 27},
}


def config(
    family: str, preset: str, data: str, variant: str, optimizer: str,
) -> ml_collections.ConfigDict:
  """The shared fields of a speech recogniser's config, for the preset to change.

  Args:
    family: the name of the experiment's file.
    preset: one of its presets.
    data: a key of `DATA`.
    variant: a key of the family's VARIANTS.
    optimizer: a name that `optim.default_config` knows.
  """
  data_config = recordings.default_config()
  data_config.update(DATA[data])
  return base_config(
      family, preset, task="speech",
      monitor="validation/loss", optimizer=optim.default_config(optimizer),
      data=data_config, model=Group({
          **common.model_fields(variant),
          "beam": Field(8, "The number of texts that the search keeps; 1 takes the best label of "
                        "each frame.")}))


def resolve(
    config: ml_collections.ConfigDict, given: Collection[str],
) -> Mapping[str, Any]:
  """What recordings of the user's own decide, and prints what they are; see `recordings.look_up`.
  """
  fields = [field.removeprefix("data.") for field in given if field.startswith("data.")]
  found, lines = recordings.look_up(config.data, config.seed, fields)
  print(*lines, sep="\n", end="\n" * bool(lines))
  named = {f"data.{field}": value for field, value in found.items()}
  if found and not found.get("validation", config.data.validation) and "monitor" not in given:
    named["monitor"] = ""
  return named


def build(config: ml_collections.ConfigDict, model: nn.Module) -> Experiment:
  """The experiment that trains `model` on the recordings of `config.data`. Opens no data.

  Args:
    config: a config with the fields that `config()` gives.
    model: the network, see `Transcription`.
  """
  data = recordings.AudioSet(config.data, model.output_length).pipelines(
      batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed)
  task = transcription.Transcription(
      model=model, alphabet=config.data.alphabet, beam=config.model.beam, frame=config.data.hop)
  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None,
      read=functools.partial(_read, config), show=functools.partial(_show, config.model.beam),
      saw=functools.partial(_saw, config.data.hop))


def _read(config: ml_collections.ConfigDict, request: Request, assets: Assets) -> Inputs:
  """Reads the user's recordings; see `recordings.encode`."""
  del assets
  common.check_request(request, config.family, ["paths"])
  return Inputs(*recordings.encode(request.paths, config.data))


def _saw(
    hop: float, inputs: Inputs, rows: Sequence[Mapping[str, Any]],
) -> Iterator[bytes]:
  """Draws the bands of each recording over time, the lowest at the bottom."""
  for features, length, row in zip(inputs.batch["features"], inputs.batch["length"], rows,
                                   strict=True):
    heard = features[:length].T[::-1]
    low, high = heard.min(initial=0), heard.max(initial=0)
    shown = (heard - low) / max(high - low, 1e-6)
    figure = report.seen(shown, row, cmap="magma", duration=hop * len(heard[0]))
    yield common.png(report.picture(figure))[1]


def _show(
    beam: int, inputs: Inputs, predictions: Any, assets: Assets,
) -> Iterator[Mapping[str, Any]]:
  del inputs
  return transcription.decode(predictions, assets, beam)
