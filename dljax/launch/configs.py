"""The config that the flags ask for, and the folder of its run."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_collections
from absl import flags

from dljax import config as config_lib
from dljax.errors import UserError
from dljax.train.workdir import Workdir

GetConfig = Callable[[str], ml_collections.ConfigDict]


def resolve(
    values: flags.FlagValues, overrides: Sequence[str], config: ml_collections.ConfigDict,
    get_config: GetConfig, presets: Mapping[str, str],
) -> tuple[ml_collections.ConfigDict, Workdir]:
  """The validated config, and the run's folder, which may not exist yet.

  Args:
    values: the parsed flags.
    overrides: arguments --config.FIELD=VALUE.
    config: the preset's config, which the overrides change in place.
    get_config: preset -> config.
    presets: the names that `get_config` knows.

  Raises:
    UserError: an override is bad; or, in evaluation and prediction, the folder holds no run of
      this family.
  """
  trains, preset = values.mode == "train", config.preset
  plain = config_lib.identity(config)
  if trains or not values.workdir:  # a run that is named brings its own config
    config_lib.apply_overrides(config, overrides)
    config.seed = values.seed
    config_lib.validate(config)
  name = f"{config.family}-{preset}"
  if (identity := config_lib.identity(config)) != plain:
    name += "-" + hashlib.sha256(identity.encode()).hexdigest()[:8]
  folder = Workdir(values.workdir or Path("runs", name))
  return (config if trains else _as_it_ran(folder, overrides, config, get_config, presets)), folder


def _as_it_ran(
    folder: Workdir, overrides: Sequence[str], config: ml_collections.ConfigDict,
    get_config: GetConfig, presets: Mapping[str, str],
) -> ml_collections.ConfigDict:
  """The config of the folder's run, with the overrides; refuses a run of another family."""
  family, config = config.family, folder.read_config()
  ran, preset = config.get("family", family), config_lib.preset_of(
      config, presets, folder.config_file)
  if ran != family:
    raise UserError(
        f"--workdir={folder.path} holds a run of {ran}; use python -m experiments.{ran}")
  like = get_config(preset) if preset in presets else config_lib.base_config(family, preset)
  config_lib.check_complete(config, like, folder.config_file)
  config_lib.apply_overrides(config, overrides, like)
  config_lib.validate(config)
  return config
