"""The config that the flags and the user's own data ask for, and the folder of its run."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from dljax import config as config_lib
from dljax.errors import UserError
from dljax.launch import names
from dljax.train.experiment import Experiment
from dljax.train.workdir import Workdir

GetConfig = Callable[[str], ml_collections.ConfigDict]
Build = Callable[[ml_collections.ConfigDict], Experiment]
_SHOWN = 20  # the number of values of a tuple that are shown
# A recipe's function of (config, names of the fields that the user has given) that looks at the
# user's own data and returns field -> value, such as {"data.num_classes": 3}.
Resolve = Callable[[ml_collections.ConfigDict, Collection[str]], Mapping[str, Any]]


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
  trains = values.mode == "train"
  if trains or not values.workdir:  # a run that is named brings its own config
    config_lib.apply_overrides(config, overrides)
    config.seed = values.seed
    config_lib.validate(config)
  folder = Workdir(values.workdir or Path("runs", names.run_name(
      config, get_config(config.preset), default=next(iter(presets)), epochs=values.epochs)))
  return (config if trains else _as_it_ran(folder, overrides, config, get_config, presets)), folder


def look_up(
    resolve: Resolve, config: ml_collections.ConfigDict, overrides: Sequence[str],
    folder: Workdir, resume: str,
) -> None:
  """Sets the fields that the user's own data decide, unless the user has given them.

  The data are looked at once, when a run starts. A run that continues takes the values from its
  config.json, even if the data have changed since.

  Args:
    resolve: the recipe's function, see `Resolve`.
    config: the config to change, in place.
    overrides: the arguments --config.FIELD=VALUE.
    folder: the run's folder, which may not exist yet.
    resume: the value of --resume.

  Raises:
    UserError: the data are missing or cannot be used; or --resume=never, and there is a run.
  """
  given = [argument.partition("=")[0].removeprefix("--config.") for argument in overrides]
  if folder.config_file.exists():
    if resume == "never":
      folder.check(config, resume)
    stored = folder.read_config()
    values, names_found = config_lib.flatten(stored), stored.get("found", ())
    if not isinstance(names_found, tuple) or not all(isinstance(x, str) for x in names_found):
      raise UserError(f"{folder.config_file}: found={names_found!r} is no list of names; "
                      "restore the file from a copy, or train again in another --workdir")
    found = {name: values[name] for name in names_found if name in values and name not in given}
  else:
    found = dict(resolve(config, given))
    for name, value in found.items():
      print(_found(name, value))
  config.update_from_flattened_dict(found)
  config.found = tuple(sorted(found))
  config_lib.validate(config)


def _found(name: str, value: Any) -> str:
  """The line on a field that was looked up, of which a long value is shown in part."""
  more = ""
  if isinstance(value, tuple) and len(value) > _SHOWN:
    more, value = f",... ({len(value):,} in all)", value[:_SHOWN]
  line = f"found {name}={config_lib.format_value(value)}{more}"
  return line.encode(errors="backslashreplace").decode()  # the name of a file may be no Unicode


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
