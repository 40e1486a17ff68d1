r"""Recurrent networks: language models, and forecasters of time series.

  python -m experiments.rnn
  python -m experiments.rnn --mode=predict --prompt="The with statement"

After 1.3 minutes on two shared CPU cores with AVX-512 the first gives 2.61 bits per byte on the
validation topics and 2.85 on the test topics with Python 3.13.0; the documentation differs between
versions, and 3.11.7 gives 2.42 and 2.62. --config.model.variant chooses another network, such as
rnn_gru or rnn_awd_lstm, with the sizes of its paper.

Shakespeare must be prepared first:
  python -m dljax.data.prepare tiny_shakespeare
  python -m experiments.rnn --preset=tiny_shakespeare
  python -m experiments.rnn --preset=tiny_shakespeare --config.model.cell=gru   (or tanh)
The LSTM, the GRU and Elman's network reach validation losses of 1.360, 1.404 and 1.646 nats per
character, after 33, 46 and 10 minutes on the same cores with other load.

Forecasters, and the baselines to compare them with, each in at most 3.5 minutes:
  python -m experiments.rnn --preset=temperatures                                (offline)
  python -m experiments.rnn --preset=temperatures --config.model.variant=seasonal_naive
  python -m experiments.rnn --preset=temperatures --config.model.variant=dlinear \
      --config.optimizer.learning_rate=2e-2
  python -m dljax.data.prepare etth1
  python -m experiments.rnn --preset=etth1
  python -m experiments.rnn --preset=etth1 --config.model.variant=dlinear \
      --config.optimizer.learning_rate=5e-4
The test mse and mae of the LSTM, the GRU, seasonal-naive and DLinear are 0.0008 and 0.023, 0.0008
and 0.023, 0.0007 and 0.021, 0.0007 and 0.020 on the temperatures, and 0.466 and 0.484, 0.469 and
0.493, 0.512 and 0.433, 0.370 and 0.392 on etth1.

lm1b (Chelba et al. 2013, "One Billion Word Benchmark") reads its 30 million sentences one by one,
in batches of similar length, and holds them in memory as int32 tokens: 4 GB or more for its almost
one billion words. That preset has not been run here.

etth1 (Zhou et al. 2021) measures errors as the literature does; published for DLinear at this
horizon of 96 hours: mse 0.375, mae 0.399 (Zeng et al. 2023, table 2).
"""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import ml_collections

from dljax import errors, launch
from dljax.config import ModelConfig, one_of
from dljax.recipes import common, forecasting, language_modeling
from dljax.errors import UserError
from dljax.models import baselines, rnn
from dljax.train.experiment import Experiment

PRESETS: Mapping[str, str] = {
    "pydoc": "An LSTM on the bytes of Python's own documentation, which ships inside Python; offline, minutes.",
    "tiny_shakespeare": "An LSTM on the characters of 40,000 lines of Shakespeare; half an hour on two cores.",
    "lm1b": "An LSTM on the One Billion Word Benchmark, in sub-words.",
    "temperatures": "An LSTM that forecasts a day of hourly temperatures in two cities; offline, minutes.",
    "etth1": "An LSTM that forecasts four days of a transformer's loads and oil temperature (ETTh1).",
}


def _language_model(preset: str) -> ml_collections.ConfigDict:
  """The fields that the presets of language models share."""
  config = language_modeling.config(
      "rnn", preset, data=preset, variant="rnn_lstm", optimizer="adamw")
  config.model.update({
      "cell": "lstm", "embed_dim": 64, "hidden_size": 256, "num_layers": 2, "dropout": 0.1,
      "embed_dropout": 0.0, "weight_dropout": 0.0, "variational": False, "tied": False,
      "layer_norm": False})
  config.optimizer.update({
      "learning_rate": 3e-3, "clip_norm": 1.0, "weight_decay": 0.01, "warmup_fraction": 0.05})
  return config


def _pydoc() -> ml_collections.ConfigDict:
  config = _language_model("pydoc")
  config.update({
      "total_steps": 1000, "batch_size": 32, "eval_batch_size": 16, "log_every": 20,
      "eval_every": 200, "checkpoint_every": 200})
  return config


def _tiny_shakespeare() -> ml_collections.ConfigDict:
  config = _language_model("tiny_shakespeare")
  config.model.update({"hidden_size": 512, "dropout": 0.4})
  config.optimizer.update({"learning_rate": 2e-3, "weight_decay": 0.05})
  config.update({
      "total_steps": 4000, "batch_size": 64, "eval_batch_size": 16, "log_every": 25,
      "eval_every": 250, "checkpoint_every": 250})
  return config


def _lm1b() -> ml_collections.ConfigDict:
  config = _language_model("lm1b")
  config.model.update({"embed_dim": 512, "hidden_size": 2048})
  config.optimizer.update({"learning_rate": 1e-3, "warmup_fraction": 0.01})
  config.update({
      "total_steps": 500_000, "batch_size": 512, "eval_batch_size": 512, "log_every": 100,
      "eval_every": 10_000, "checkpoint_every": 10_000})
  return config


def _forecaster(preset: str) -> ml_collections.ConfigDict:
  """The fields that the presets of forecasters share."""
  config = forecasting.config(
      "rnn", preset, data=preset, variant="rnn_forecaster", optimizer="adamw")
  config.model.update({
      "cell": "lstm", "hidden_size": 64, "num_layers": 1, "dropout": 0.0, "relative": "last"})
  config.optimizer.update({"learning_rate": 2e-3, "clip_norm": 1.0, "warmup_fraction": 0.05})
  config.update({"batch_size": 32, "eval_batch_size": 64, "log_every": 20})
  return config


def _temperatures() -> ml_collections.ConfigDict:
  config = _forecaster("temperatures")
  config.model.relative = "season"
  config.update({"total_steps": 600, "eval_every": 60, "checkpoint_every": 60})
  return config


def _etth1() -> ml_collections.ConfigDict:
  config = _forecaster("etth1")
  config.update({"total_steps": 2000, "eval_every": 200, "checkpoint_every": 200})
  return config


_CONFIGS = {
    "pydoc": _pydoc, "tiny_shakespeare": _tiny_shakespeare, "lm1b": _lm1b,
    "temperatures": _temperatures, "etth1": _etth1}
# The variants for each task; of a language model, a variant decides these fields.
_LANGUAGE_MODELS = {
    name: variant for name, variant in rnn.VARIANTS.items() if name != "rnn_forecaster"}
_FORECASTERS = {"rnn_forecaster": rnn.VARIANTS["rnn_forecaster"], **baselines.VARIANTS}
_DECIDED = ("cell", "embed_dim", "hidden_size", "num_layers", "dropout", "embed_dropout",
            "weight_dropout", "variational", "tied", "layer_norm")


_FIELDS = {
    "cell": one_of("The recurrent cell", rnn.CELLS),
    "embed_dim": "The width of a token's vector.",
    "hidden_size": "The width of a cell's state.",
    "num_layers": "The number of recurrent layers.",
    "dropout": "The probability of dropping a value between layers in training.",
    "embed_dropout": "The probability of dropping a word from all of a row in training.",
    "weight_dropout": "The probability of dropping a recurrent weight in training.",
    "variational": "Whether all steps of a row drop the same values.",
    "tied": "Whether the head's kernel is the embedding, and the last layer has its width.",
    "layer_norm": "Whether both products of a cell are normalised.",
    "relative": one_of("What the network predicts: values (no), differences from the last value, "
                       "or from the value a season before", rnn.RELATIVE),
}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = _CONFIGS[preset]()
  of_task = _LANGUAGE_MODELS if config.task == "language_modeling" else _FORECASTERS
  config.model.describe({**_FIELDS, "variant": one_of("The network", of_task)})
  if config.task == "language_modeling":
    config.model = ModelConfig(config.model, {
        name: {field: getattr(variant(vocab_size=1), field) for field in _DECIDED}
        for name, variant in _LANGUAGE_MODELS.items()})
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  model = config.model
  errors.choose("--config.model.cell", model.cell, rnn.CELLS)
  for field in ("embed_dim", "hidden_size", "num_layers"):
    if field in model and model[field] < 1:
      raise UserError(f"--config.model.{field}={model[field]}: must be at least 1")
  for field in ("dropout", "embed_dropout", "weight_dropout"):
    if field in model and not 0 <= model[field] < 1:
      raise UserError(
          f"--config.model.{field}={model[field]}: must be at least 0 and below 1")
  if config.task == "forecasting":
    return forecasting.build(config, _build_forecaster(config))
  variant = errors.choose("--config.model.variant", model.variant, _LANGUAGE_MODELS)
  network = variant(
      vocab_size=config.data.vocab_size, **{field: model[field] for field in _DECIDED},
      dtype=common.dtype(config), remat=model.remat)
  return language_modeling.build(config, network, stateful=True)


def _resolve(config: ml_collections.ConfigDict, given: Collection[str]) -> Mapping[str, Any]:
  """What the user's own data decide."""
  recipe = forecasting if config.task == "forecasting" else language_modeling
  return recipe.resolve(config, given)


def _build_forecaster(config: ml_collections.ConfigDict) -> nn.Module:
  """The network, or the baseline, that `config.model.variant` names."""
  model, dtype = config.model, common.dtype(config)
  variant = errors.choose("--config.model.variant", model.variant, _FORECASTERS)
  if model.variant in baselines.VARIANTS:
    return forecasting.baseline(config, dtype)
  errors.choose("--config.model.relative", model.relative, rnn.RELATIVE)
  if model.relative == "season" and not 1 <= model.season <= config.data.window:
    raise UserError(f"--config.model.season={model.season}: must be from 1 to the window's "
                    f"{config.data.window} rows")
  return variant(
      horizon=config.data.horizon, cell=model.cell, hidden_size=model.hidden_size,
      num_layers=model.num_layers, dropout=model.dropout,
      num_quantiles=len(forecasting.quantiles(config)) or None, relative=model.relative,
      season=model.season, dtype=dtype, remat=model.remat)


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS, _resolve)
