"""The flags of every experiment's command line: their definition, parsing and explanation."""

import math
import os
import re
from collections.abc import Mapping, Sequence

import ml_collections
from absl import flags

from dljax import config as config_lib
from dljax import errors
from dljax.errors import UserError


class _PathParser(flags.ArgumentParser):
  """Parses paths, because no shell expands the ~ in --workdir=~/runs."""

  def parse(self, argument):
    return os.path.expanduser(argument)


def define() -> flags.FlagValues:
  """The flags with their defaults, not parsed yet."""
  values = flags.FlagValues()

  def path(name: str, text: str) -> None:
    flags.DEFINE(_PathParser(), name, "", text, flag_values=values)

  def string(name: str, default: str | None, text: str) -> None:
    flags.DEFINE_string(name, default, text, flag_values=values)

  def choice(name: str, choices: Sequence[str], text: str) -> None:
    flags.DEFINE_enum(name, choices[0], choices, text, flag_values=values)

  def switch(name: str, text: str) -> None:
    flags.DEFINE_bool(name, False, text, flag_values=values)

  string("preset", "", "What to run; see --list_presets. The default runs at once, offline.")
  path("workdir", "The run's folder; by default runs/FAMILY-PRESET and what differs from the "
       "preset, as in runs/lenet-digits-seed=7.")
  choice("mode", ["train", "eval", "predict"], "What to do with the run in the workdir.")
  string("step", "best",
         "The checkpoint to evaluate or to predict with: best, latest or a number.")
  flags.DEFINE_list("input", [], "The files or folders to predict for, separated by commas.",
                    flag_values=values)
  string("prompt", None,
         "Text for the model to continue; may be empty. For families that generate "
         "text; the continuation is shown as it comes.")
  flags.DEFINE_integer("count", None,
                       "The number of predictions to draw for each input, for families "
                       "that draw them.", flag_values=values)
  flags.DEFINE_list("label", [],
                    "The classes to draw predictions of, for families that generate by "
                    "class; names separated by commas.", flag_values=values)
  path("output", "The file for predictions (.jsonl, .json or .csv), or a new folder for them with "
       "pictures of what was predicted and of what the network saw; by default they are only "
       "shown.")
  choice("parallelism", ["jit", "pmap"], "How to compile for several devices.")
  string("mesh", "", "Devices per axis, as in data:4,fsdp:2,tensor:1; by default all on data.")
  choice("resume", ["auto", "never", "must"],
         "auto continues the run in the workdir; never refuses a workdir with a run; must refuses "
         "to start a new run.")
  flags.DEFINE_integer("seed", 0, "The seed of everything random.", lower_bound=0,
                       upper_bound=2**32 - 1, flag_values=values)
  flags.DEFINE_float("epochs", None,
                     "How often to train on every example, in place of --config.total_steps; "
                     "fractions are allowed.", flag_values=values)
  path("data_dir", "The TFDS directory; also the variable TFDS_DATA_DIR.")
  string("wandb", "", "A Weights & Biases project to log to.")
  switch("dry_run", "Show the model, the batch and the compiled step's memory, without any data.")
  string("topology", "", "With --dry_run: a machine to compile for, such as v5e:4x4 or h100:4.")
  switch("list_presets", "List the presets.")
  switch("help", "Show this help.")
  return values


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
  """The parsed flags, and the arguments --config.FIELD=VALUE as they stand.

  Args:
    argv: the program's name and its arguments.

  Raises:
    UserError: there is an unknown flag, a bad value or an argument that is no flag.
  """
  values = define()
  overrides = [a for a in argv[1:] if a.startswith("--config.")]
  try:
    # absl's own flag lets wrong names pass.
    if any(re.match("--?undefok(=|$)", a) for a in argv[1:]):
      raise flags.UnrecognizedFlagError("undefok")
    rest = values([argv[0], *(a for a in argv[1:] if a not in overrides)])
  except flags.UnrecognizedFlagError as error:
    known = [f"--{name}" for name in (*values, "config.FIELD")]
    raise errors.unknown("the command line", f"--{error.flagname}", known) from None
  except flags.Error as error:
    raise UserError(str(error).replace("\n", " ")) from None
  for name in ("workdir", "input", "output", "data_dir"):
    given = values[name].value
    for path in [given] if isinstance(given, str) else given:
      errors.check_local(f"--{name}", path)
  if rest[1:]:
    raise UserError(f"{rest[1]!r} is not a flag; write --FLAG=VALUE, and see --help")
  return values, overrides


def check_together(values: flags.FlagValues, overrides: Sequence[str] = ()) -> None:
  """Raises `UserError` if a flag has no meaning together with the others.

  Args:
    values: the parsed flags.
    overrides: arguments --config.FIELD=VALUE.
  """
  if values.epochs is not None:
    if not 0 < values.epochs < math.inf:
      raise UserError(f"--epochs={values.epochs:g}: must be a number above 0")
    if any(re.match("--config.total_steps(=|$)", argument) for argument in overrides):
      raise UserError("--epochs and --config.total_steps do not go together; drop one of them")
  trains, predicts = values.mode == "train", values.mode == "predict"
  named = not trains and values.workdir  # a run that is named brings its own preset and seed
  for name, with_what, there in (
      ("topology", "--dry_run", values.dry_run),
      ("dry_run", "--mode=train", trains),
      ("resume", "--mode=train", trains),
      ("wandb", "--mode=train", trains),
      ("preset", "--mode=train", not named),
      ("seed", "--mode=train", not named),
      ("epochs", "--mode=train", not named),
      ("step", "--mode=eval or --mode=predict", not trains),
      ("input", "--mode=predict", predicts),
      ("prompt", "--mode=predict", predicts),
      ("count", "--mode=predict", predicts),
      ("label", "--mode=predict", predicts),
      ("output", "--mode=predict", predicts)):
    if values[name].present and not there:
      raise UserError(f"--{name} goes with {with_what}; add it, or drop --{name}")


def explain(
    values: flags.FlagValues, config: ml_collections.ConfigDict, presets: Mapping[str, str],
) -> str:
  """The text of --help: flags, presets, and the config with the preset's values."""
  lines = [f"usage: python -m experiments.{config.family} [--FLAG=VALUE ...]", "",
           "presets (the first is the default):"]
  lines += [f"  {name:16}{text}" for name, text in presets.items()]
  lines += ["", "flags:"]
  for name in values:
    flag = values[name]
    default = f"={flag.default}" if flag.default not in (None, False, "", []) else ""
    lines += [f"  --{name}{default}", *config_lib.wrap(flag.help)]
  lines += ["", f"config of preset {config.preset} (any field can be set):",
            config_lib.describe(config)]
  return "\n".join(lines)
