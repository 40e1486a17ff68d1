"""The experiment that all forecasters share, from a config and a model; and the baselines.

Zeng et al. 2023, table 2, publish for the preset etth1 (horizon 96, all 7 channels, normalised
values): DLinear mse 0.375, mae 0.399. Their code leaves out the last windows of the test, which do
not fill a batch. Here all windows count. DLinear after 2560 steps of Adam at 5e-4, with 32 windows
each, has mse 0.371 and mae 0.394 at the best checkpoint (0.370 and 0.392 at the last), after half
a minute on two CPU cores. A linear map of the window by least squares, solved exactly, has 0.370
and 0.392; seasonal-naive has 0.512 and 0.433.
"""

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from dljax import optim
from dljax.config import Field, Group, base_config, one_of
from dljax.data.series import windows
from dljax.errors import UserError, choose
from dljax.models import baselines
from dljax.recipes import common
from dljax.tasks import forecasting
from dljax.train.experiment import Assets, Experiment, Inputs, Request

# The values of fields of `config.data` for the series that presets use.
DATA = {
    "temperatures": {"name": "temperatures", "missing": "mask"},  # one hour is missing
    "etth1": {"name": "etth1", "channels": ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"),
              # 12, 4 and 4 months of 30 days
              "train": "8640", "validation": "2880", "test": "2880",
              "window": 336, "horizon": 96, "covariates": ("hour_of_day", "day_of_week")},
}
LOSSES = ("mse", "pinball")


def config(
    family: str, preset: str, data: str, variant: str, optimizer: str,
) -> ml_collections.ConfigDict:
  """The shared fields of a forecaster's config, for the preset to change.

  Args:
    family: the name of the experiment's file.
    preset: one of its presets.
    data: a key of `DATA`.
    variant: a key of the family's VARIANTS or of `baselines.VARIANTS`.
    optimizer: a name that `optim.default_config` knows.
  """
  data_config = windows.default_config()
  data_config.update(DATA[data])
  return base_config(
      family, preset, task="forecasting",
      monitor="validation/loss", optimizer=optim.default_config(optimizer),
      data=data_config, model=Group({
          **common.model_fields(variant),
          "loss": Field("mse", one_of('The loss; with "pinball" the quantiles are forecast',
                                      LOSSES)),
          "quantiles": Field((0.1, 0.5, 0.9), 'The quantiles that the loss "pinball" forecasts.'),
          "season": Field(24, "The number of rows in a season, for seasonal_naive and for a "
                          "network that corrects it."),
          "kernel_size": Field(25, "The number of rows in dlinear's moving average."),
      }))


def resolve(
    config: ml_collections.ConfigDict, given: Collection[str],
) -> Mapping[str, Any]:
  """What a series of the user's own decides, and prints what it holds; see `windows.find`."""
  fields = [field.removeprefix("data.") for field in given if field.startswith("data.")]
  found, lines = windows.find(config.data, fields)
  print(*lines, sep="\n", end="\n" * bool(lines))
  return {f"data.{field}": value for field, value in found.items()}


def quantiles(config: ml_collections.ConfigDict) -> tuple[float, ...]:
  """The quantiles to forecast; () if the loss is the squared error."""
  choose("--config.model.loss", config.model.loss, dict.fromkeys(LOSSES))
  if config.model.loss == "mse":
    return ()
  if not config.model.quantiles:
    raise UserError("--config.model.quantiles: name those that --config.model.loss=pinball is to "
                    "find, such as 0.1,0.5,0.9")
  if not all(0 < quantile < 1 for quantile in config.model.quantiles):
    raise UserError(f"--config.model.quantiles={','.join(map(str, config.model.quantiles))}: each "
                    "must be above 0 and below 1")
  return tuple(config.model.quantiles)


def baseline(config: ml_collections.ConfigDict, dtype: jnp.dtype) -> nn.Module:
  """The baseline that `config.model.variant` names, one of `baselines.VARIANTS`."""
  own = {"seasonal_naive": {"season": config.model.season},
         "dlinear": {"kernel_size": config.model.kernel_size}}
  name = config.model.variant
  return choose("--config.model.variant", name,
                baselines.VARIANTS)(horizon=config.data.horizon,
                                    num_quantiles=len(quantiles(config)), dtype=dtype,
                                    remat=config.model.remat, **own[name])


def build(config: ml_collections.ConfigDict, model: nn.Module) -> Experiment:
  """The experiment that trains `model` on the series of `config.data`. Opens no data.

  Args:
    config: a config with the fields that `config()` gives.
    model: the network, see `Forecasting`; it has as many quantiles as `quantiles()` gives.
  """
  data = windows.SeriesSet(config.data).pipelines(
      batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed)
  task = forecasting.Forecasting(model=model, quantiles=quantiles(config))
  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None,
      read=functools.partial(_read, config), show=_show, draw=functools.partial(_draw, task.band))


def _read(config: ml_collections.ConfigDict, request: Request, assets: Assets) -> Inputs:
  """Reads the user's files; see `windows.encode`."""
  common.check_request(request, config.family, ["paths"])
  return Inputs(*windows.encode(request.paths, config.data,
                                windows.Normaliser.from_assets(assets)))


def _show(inputs: Inputs, predictions: Any, assets: Assets) -> Iterator[Mapping[str, Any]]:
  return forecasting.decode(inputs.batch, predictions, assets)


def _draw(
    band: str, inputs: Inputs, predictions: Any, assets: Assets,
) -> Iterator[tuple[str, bytes]]:
  return map(common.png, forecasting.pictures(inputs.batch, predictions, assets, band))
