"""The config of an experiment: the fields that all experiments share, and overrides by flags."""

import functools
import json
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from dljax.errors import UserError, check_local, unknown

_FROM_FLAGS = ("family", "preset", "task", "seed", "found")  # that --config.<field> cannot set
_MOST_STEPS = 2**31 - 1  # the step is an int32
# The largest whole numbers by the last part of a field's name. Some are counts of what is traced or
# computed one after the other, which would never end; others are sizes of arrays.
_LARGEST = {
    "seed": 2**32 - 1, "batch_size": 2**20, "eval_batch_size": 2**20, "accumulation": 2**20,
    "keep_checkpoints": _MOST_STEPS, "examples": _MOST_STEPS, "per_class": _MOST_STEPS,
    "train": _MOST_STEPS, "validation": _MOST_STEPS, "test": _MOST_STEPS,
    "num_train_examples": _MOST_STEPS, "class_counts": _MOST_STEPS, "skip_corrupt": _MOST_STEPS,
    "early_stopping_patience": _MOST_STEPS, "plateau_patience": _MOST_STEPS,
    "max_new_tokens": 2**20, "min_new_tokens": 2**20, "top_k": 2**20,
    "num_layers": 1000, "num_pools": 16, "beam": 1024,
    "randaugment_layers": 100, "time_masks": 1000, "frequency_masks": 1000, "buckets": 1000,
    "num_mels": 512, "sample_rate": 2**19, "image_shape": 2**15, "num_classes": 2**15,
    "mask_classes": 2**15, "stem": 1000, "strides": 1000, "background": 255}
_LARGEST_SIZE = 2**20  # of the other sizes in the groups below
_SIZES = ("model", "data")
_LARGEST_NUMBER = 1e9  # of the numbers in these groups; windows of sound are in seconds
_LARGEST_NUMBERS = {"window": 1.0, "hop": 10.0, "target_mean": 1e38, "target_std": 1e38}
_LARGEST_INTEGER = 2**63 - 1  # of all others
_LONGEST_TUPLE = 1000
# Tuples that have a value for each class.
_BY_CLASS = {name: 2**15 for name in ("classes", "class_counts", "class_weights")}
_LENGTHS = {"image_shape": (3, "height, width and channels"), "scale": (2, "the ends of a range"),
            "stem": (3, "kernel size, stride and padding")}
# What decides the training: these groups, these fields of other groups, and every field outside of
# groups.
_TRAINING = ("optimizer", "optimizers", "model", "data", "init", "eval.examples")


# The fields of `config.data` that say which data these are; the first that is set counts.
_DATA = ("folder", "file", "table", "name")


class Field(NamedTuple):
  """A field of a config with the sentence that --help shows for it."""

  value: Any
  sentence: str


def one_of(sentence: str, choices: Iterable[str]) -> str:
  """Returns the sentence of a field that has one of a few values, with these values."""
  return f"{sentence}: {', '.join(choices)}."


class Group(ml_collections.ConfigDict):
  """A group of a config's fields, each with a sentence that --help shows.

  Attributes:
    sentences: field -> sentence.
  """

  def __init__(self, fields: Mapping[str, Any] | None = None, **options: Any):
    """
    Args:
      fields: name -> a `Field`, or a value that `describe` gives a sentence.
      **options: those of a `ConfigDict`.
    """
    sentences = dict(getattr(fields, "sentences", {}))
    object.__setattr__(self, "sentences", sentences)
    if isinstance(fields, dict):
      described = {name: field for name, field in fields.items() if isinstance(field, Field)}
      sentences.update({name: field.sentence for name, field in described.items()})
      fields = {**fields, **{name: field.value for name, field in described.items()}}
    super().__init__(fields, **options)

  def describe(self, sentences: Mapping[str, str]) -> None:
    """Gives fields their sentences, or other ones; of fields that this group lacks, nothing."""
    self.sentences.update(sentences)

  def copy_and_resolve_references(self, visit_map: Any = None) -> "Group":
    copied = super().copy_and_resolve_references(visit_map)
    object.__setattr__(copied, "sentences", dict(self.sentences))
    return copied


class ModelConfig(Group):
  """`config.model` of a family whose variants decide some of its fields.

  Setting `variant` sets the fields that this variant decides; any of them can be set afterwards.
  """

  def __init__(
      self, fields: Mapping[str, Any] | None = None,
      variants: Mapping[str, Mapping[str, Any]] | None = None, **options: Any,
  ):
    """
    Args:
      fields: the model's fields with their values, `variant` among them.
      variants: a variant's name -> the values of the fields that it decides.
      **options: those of a `ConfigDict`.
    """
    object.__setattr__(self, "variants", {})  # none while the fields are filled in
    super().__init__(fields, **options)
    object.__setattr__(self, "variants", variants or {})

  def __setitem__(self, key: str, value: Any) -> None:
    super().__setitem__(key, value)
    if key == "variant":
      for field, decided in self.variants.get(value, {}).items():
        super().__setitem__(field, decided)

  def copy_and_resolve_references(self, visit_map: Any = None) -> "ModelConfig":
    copied = super().copy_and_resolve_references(visit_map)
    object.__setattr__(copied, "variants", self.variants)
    return copied


def base_config(family: str, preset: str, **fields: Any) -> ml_collections.ConfigDict:
  """Returns a config with the fields that every experiment has.

  Args:
    family: the name of the experiment's file.
    preset: the name of one of its presets.
    **fields: other values of these fields, and the groups optimizer, model and data.
  """
  config = Group({
      "family": family,
      "preset": preset,
      "found": Field((), "The fields that were looked up in the user's own data when the run "
                     "started, such as data.num_classes; evaluation and prediction never look "
                     "again."),
      "seed": 0,
      "total_steps": Field(1000, "The number of updates of the parameters."),
      "batch_size": Field(128, "The number of examples per update, over all devices and "
                          "micro-batches."),
      "eval_batch_size": Field(512, "The number of examples per batch in evaluation and "
                               "prediction."),
      "log_every": Field(20, "The interval of logged points, in steps."),
      "eval_every": Field(200, "The interval of evaluations, in steps."),
      "checkpoint_every": Field(200, "The interval of checkpoints, in steps."),
      "full_eval_every": Field(0, "The interval, in steps, of evaluations with whole-set metrics "
                               "(average precision, error rates); 0 computes them in every "
                               "evaluation if one of them is the monitor, else only at the end."),
      "keep_checkpoints": Field(2, "The number of newest checkpoints to keep besides the best."),
      "accumulation": Field(1, "The number of micro-batches per update."),
      "ema_decay": Field(0.0, "The decay of the averages of parameters and batch statistics that "
                         "evaluation uses; 0 is off."),
      "shard_above": Field(4 * 2**20, "The size in bytes from which on the mesh axis fsdp splits "
                           "an array that no sharding rule of its family names; smaller arrays "
                           "lie whole on every device."),
      "monitor": Field("", 'The metric, as "split/metric", that decides the best checkpoint, early '
                       'stopping and the plateau; "" is none.'),
      "early_stopping_patience": Field(0, "The number of evaluations without improvement after "
                                       "which training stops; 0 is off."),
      "init": Group({
          "source": Field("", "The weights to start from: the workdir of a run (its best "
                          "checkpoint), a .safetensors file, a folder written by `python -m "
                          'dljax.interop`, or hub:OWNER/NAME; "" trains from scratch.'),
          "format": Field("", "The library whose names the tensors of init.source have (dljax, "
                          'torchvision, ...); "" detects it.'),
          "new_head": Field(False, "Whether the head is initialised from scratch even if "
                            "init.source has as many classes, which may be different ones.")}),
      "eval": Group({
          "corruptions": Field("", 'The corruptions of the test images in a final evaluation: '
                               '"all", names separated by commas, or "" for none.'),
          "examples": Field(0, "The number of examples that whole-set metrics are computed over, a "
                            "sample fixed by the seed; 0 takes all.")}),
  })
  config.update(fields)
  return config


def decides_training(field: str) -> bool:
  """Says whether a field, such as "optimizer.learning_rate", affects what is trained.

  Fields of groups outside of `_TRAINING` say what is done with the trained network.
  """
  if field == "found":  # it only says where the values of other fields come from
    return False
  group, dot, _ = field.partition(".")
  return not dot or group in _TRAINING or field in _TRAINING


def check_complete(
    config: ml_collections.ConfigDict, like: ml_collections.ConfigDict,
    file: str | os.PathLike[str],
) -> None:
  """Checks the config of a run, stored in `file`, against the config of its preset.

  Whole numbers that stand in place of numbers become numbers.

  Args:
    config: the stored config, which is changed in place.
    like: the preset's config. Fields that it lacks are not checked.
    file: the file, for the message.

  Raises:
    UserError: a field of `like` is missing, has a value of another type, or is a group in one of
      the two and none in the other; or family, preset or task differ.
  """
  mend = "restore it from a copy, or train again in another --workdir"
  stored, wanted = flatten(config), flatten(like)
  if lacks := sorted(wanted.keys() - stored.keys()):
    raise UserError(f"{file} lacks {', '.join(lacks[:3])}; {mend}")
  if "model" in like and (more := sorted(stored.keys() - wanted.keys())):
    raise UserError(f"{file} has {', '.join(more[:3])}, which the preset {like.preset} does not "
                    f"have; {mend}")
  for name, default in wanted.items():
    value = stored[name]
    if name in ("family", "preset", "task") and value != default:
      raise UserError(f"{file}: {name} is {value!r} and should be {default!r}; {mend}")
    if not _is_like(value, default):
      raise UserError(f"{file}: {name} is {value!r} and should be {_kind(default)}, such as "
                      f"{format_value(default)!r}; {mend}")
    with config.ignore_type():
      config.update_from_flattened_dict({name: _as_type_of(value, default)})


def preset_of(
    config: ml_collections.ConfigDict, presets: Iterable[str], file: str | os.PathLike[str],
) -> str:
  """Returns the preset that the config of a run, stored in `file`, comes from.

  Raises:
    UserError: its name is no text.
  """
  preset = config.get("preset", "")
  if not isinstance(preset, str):
    raise UserError(f"{file}: preset is {preset!r} and should be one of {', '.join(presets)}; "
                    "restore it from a copy, or train again in another --workdir")
  return preset


def _kind(like: Any) -> str:
  """What a value of the type of `like` is, in words."""
  kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text",
           tuple: "a list of values"}
  return kinds.get(type(like), "a value")


def _is_like(value: Any, like: Any) -> bool:
  """Says whether a stored value has the type of `like`."""
  if isinstance(like, tuple):
    # An empty tuple says only that its elements are texts or numbers.
    return isinstance(value, tuple) and all(
        _is_like(item, like[0]) if like else isinstance(item, (str, int, float)) for item in value)
  if isinstance(like, float):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  return like is None or type(value) is type(like)


def _as_type_of(value: Any, like: Any) -> Any:
  """A value that `_is_like` accepts, with whole numbers as floats where `like` has floats."""
  if isinstance(like, tuple):
    return tuple(_as_type_of(item, like[0]) if like else item for item in value)
  return _float(value) if isinstance(like, float) else value


def _float(value: int | float) -> float:
  try:
    return float(value)
  except OverflowError:
    return math.inf


def data_field(config: Mapping[str, Any]) -> str:
  """Returns the field that says which data these are, such as "data.file"; "" if none does."""
  data = config.get("data", {})
  named = [f"data.{name}" for name in _DATA if data.get(name)]
  return named[0] if named else ""


def title(config: Mapping[str, Any]) -> str:
  """Returns what a run is called where people read it: its family and its data."""
  field = data_field(config)
  data = str(flatten(config)[field]).rstrip("/") if field else config["preset"]
  # A path has a suffix or is a folder's; a slash in the name of a set is no path.
  if field != "data.name" or Path(data).suffix == ".csv":
    data = os.path.basename(os.path.abspath(os.path.expanduser(data)))  # of "." too
  return f"{config['family']} {data}".encode(errors="backslashreplace").decode()


def identity(config: ml_collections.ConfigDict) -> str:
  """Returns a text that is the same for two configs if they train the same network."""
  fields = {name: value for name, value in flatten(config).items() if decides_training(name)}
  return json.dumps(fields, sort_keys=True)


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks the ranges of the shared fields, and that no number or tuple is beyond all bounds.

  Each part of the project checks the ranges of its own fields.

  Raises:
    UserError: a value is out of range.
  """
  for field in ("total_steps", "batch_size", "eval_batch_size", "log_every", "eval_every",
                "checkpoint_every", "keep_checkpoints", "accumulation"):
    if config[field] < 1:
      raise UserError(f"--config.{field}={config[field]}: must be at least 1")
  if config.total_steps > _MOST_STEPS:
    raise UserError(f"--config.total_steps={config.total_steps}: must be at most {_MOST_STEPS}")
  for field in ("full_eval_every", "eval.examples"):
    if (value := flatten(config)[field]) < 0:
      raise UserError(f"--config.{field}={value}: must be at least 0")
  if not 0 <= config.ema_decay < 1:
    raise UserError(f"--config.ema_decay={config.ema_decay}: must be at least 0 and below 1; "
                    "0 is off")
  if config.shard_above < 0:
    raise UserError(f"--config.shard_above={config.shard_above}: must be at least 0 bytes; "
                    "0 splits arrays of any size")
  if config.early_stopping_patience < 0:
    raise UserError(f"--config.early_stopping_patience={config.early_stopping_patience}: must be "
                    "at least 0; 0 is off")
  if config.early_stopping_patience and not config.monitor:
    raise UserError("--config.early_stopping_patience needs --config.monitor=SPLIT/METRIC")
  for field, value in flatten(config).items():
    _check_bounds(field, value)


def _check_bounds(field: str, value: Any) -> None:
  """Refuses what would take all memory or time, no number at all, and tuples of a wrong length."""
  group, name = field.partition(".")[0], field.rpartition(".")[2]
  start = f"--config.{field}={format_value(value)}"
  if isinstance(value, tuple):
    count, what = _LENGTHS.get(name, (len(value), ""))
    if len(value) != count:
      raise UserError(f"{start}: give {count} values, {what}")
    if len(value) > (most := _BY_CLASS.get(name, _LONGEST_TUPLE)):
      raise UserError(f"--config.{field}: has {len(value)} values; give at most {most}")
    for item in value:
      _check_bounds(field, item)
  elif isinstance(value, str) and "\0" in value:
    raise UserError(f"--config.{field}={value!r}: holds a null character; drop it")
  elif isinstance(value, str) and "://" in value and name not in ("classes", "stop_texts"):
    check_local(f"--config.{field}", value)
  elif isinstance(value, float) and group in _SIZES:
    if not math.isfinite(value):
      raise UserError(f"{start}: must be a finite number")
    if abs(value) > (most := _LARGEST_NUMBERS.get(name, _LARGEST_NUMBER)):
      raise UserError(f"{start}: must be at most {most:g}")
  elif isinstance(value, int):
    most = _LARGEST.get(name, _LARGEST_SIZE if group in _SIZES else _LARGEST_INTEGER)
    if name == "seed" and value < 0:
      raise UserError(f"{start}: must be at least 0")
    if value > most:
      raise UserError(f"{start}: must be at most {most}")


def apply_overrides(
    config: ml_collections.ConfigDict, arguments: Sequence[str],
    preset: ml_collections.ConfigDict | None = None,
) -> None:
  """Sets the fields that flags such as --config.optimizer.learning_rate=0.4 name.

  A new value has the type of the old one. Tuples are written with commas:
  --config.data.mean=0.5,0.5,0.5

  Args:
    config: the config to change, in place.
    arguments: the flags; of two flags for one field the later one wins. A flag for a field that the
      model's variant decides wins over --config.model.variant, wherever it stands.
    preset: the config that says what type the elements of an empty tuple in `config` have; by
      default `config` itself, as it was before the change.

  Raises:
    UserError: a field is unknown (the message names the nearest), or a value is missing or has the
      wrong type.
  """
  preset = config if preset is None else preset
  typed = flatten(preset)
  if isinstance(preset.get("model"), ModelConfig) and preset is not config:  # a stored run's is plain
    config.model = ModelConfig(config.model, preset.model.variants)
  # A variant's fields yield to the other flags, wherever it stands among them.
  for argument in sorted(arguments, key=lambda text: not text.startswith("--config.model.variant=")):
    flag, equals, text = argument.partition("=")
    name = flag.removeprefix("--config.")
    *parents, field = name.split(".")
    place = config
    for parent in parents:
      place = place.get(parent) if isinstance(place, ml_collections.ConfigDict) else None
    if not isinstance(place, ml_collections.ConfigDict) or field not in place:
      fields = [field for field in flatten(config) if field not in _FROM_FLAGS]
      raise unknown("--config", name, fields)
    if isinstance(place[field], ml_collections.ConfigDict):
      fields = ", ".join(f"{flag}.{key}" for key in place[field])
      raise UserError(f"{flag} is a group; set one of its fields: {fields}")
    if not equals:
      raise UserError(f"{flag} needs a value: write {flag}={format_value(place[field])}")
    if name in _FROM_FLAGS:
      instead = f"--seed={text}" if name == "seed" else "--preset"
      raise UserError(f"{flag} cannot be set; use {instead}")
    if name == "data.folder":
      text = text.rstrip("/") or text  # the same folder with and without, to one and the same run
    place[field] = _parse(flag, text, typed.get(name, ()) if place[field] == () else place[field])


def _parse(flag: str, text: str, like: Any) -> Any:
  """Returns `text` as a value of the type of `like`."""
  if isinstance(like, tuple):
    items = _texts(text)
    # Tuples that are empty by default hold patterns. Other elements have the default's type.
    return tuple(_parse(flag, item, like[0] if like else "") for item in items)
  kinds = {bool: "true or false", int: "a whole number", float: "a number"}
  try:
    if isinstance(like, bool):
      return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(like, int):
      return int(text)
    return float(text) if isinstance(like, float) else text
  except (KeyError, ValueError):
    raise UserError(
        f"{flag}={text}: must be {kinds[type(like)]}, such as {format_value(like)}") from None


def _texts(text: str) -> list[str]:
  """The elements of a tuple: those of a JSON list of texts, else what stands between commas."""
  try:
    items = json.loads(text)
  except (ValueError, RecursionError):
    items = None
  if isinstance(items, list) and all(isinstance(item, str) for item in items):
    return items
  return [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]


def format_value(value: Any) -> str:
  """Returns a value as it is written on the command line, such as 0.5,0.5 for (0.5, 0.5)."""
  if isinstance(value, tuple):
    items = [format_value(v) for v in value]
    return ",".join(items) if items == _texts(",".join(items)) else json.dumps(items)
  return str(value).lower() if isinstance(value, bool) else str(value)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns {"optimizer.name": "sgd"} for {"optimizer": {"name": "sgd"}}."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, (Mapping, ml_collections.ConfigDict)):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = value
  return flat


def describe(config: ml_collections.ConfigDict) -> str:
  """Returns each field that can be set, as it is written on the command line, with its sentence."""
  lines = []
  for name, value in flatten(config).items():
    if name not in _FROM_FLAGS:
      lines.append(f"  --config.{name}={format_value(value)}")
      lines += wrap(sentence(config, name))
  return "\n".join(lines)


def wrap(text: str) -> list[str]:
  """Returns the lines of --help that explain a flag or a field."""
  return textwrap.wrap(text, 96, initial_indent=6 * " ", subsequent_indent=6 * " ")


def sentence(config: ml_collections.ConfigDict, field: str) -> str:
  """Returns the sentence of a field, such as "optimizer.learning_rate"; "" if it has none."""
  *groups, name = field.split(".")
  group = functools.reduce(lambda place, part: place[part], groups, config)
  return getattr(group, "sentences", {}).get(name, "")
