"""The config of an experiment: the fields that all experiments share, and overrides by flags."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from dljax.errors import UserError, unknown

_FROM_FLAGS = ("family", "preset", "task", "seed")  # fields that --config.<field> cannot set
_MOST_STEPS = 2**31 - 1  # the step is an int32
# What decides the training: these groups, these fields of other groups, and every field outside of
# groups.
_TRAINING = ("optimizer", "optimizers", "model", "data", "init", "eval.examples")


class ModelConfig(ml_collections.ConfigDict):
  """`config.model` of a family whose variants decide some of its fields.

  Setting `variant` sets the fields that this variant decides; any of them can be set afterwards.
  """

  def __init__(
      self, fields: Mapping[str, Any] | None = None,
      variants: Mapping[str, Mapping[str, Any]] | None = None,
  ):
    """
    Args:
      fields: the model's fields with their values, `variant` among them.
      variants: a variant's name -> the values of the fields that it decides.
    """
    object.__setattr__(self, "variants", {})  # none while the fields are filled in
    super().__init__(fields)
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

  Fields:
    family, preset: the names of the family and the preset that the config comes from.
    task: the kind of experiment, named as its file in dljax.recipes; the preset decides it.
    seed: the seed of everything random.
    total_steps: the number of updates of the parameters.
    batch_size: the number of examples per update, over all devices and micro-batches.
    eval_batch_size: the number of examples per batch in evaluation and prediction.
    log_every, eval_every, checkpoint_every: the intervals in steps.
    full_eval_every: the interval, in steps, of evaluations with whole-set metrics (average
      precision, error rates); 0 computes them in every evaluation if one of them is the monitor,
      else only at the end.
    keep_checkpoints: the number of newest checkpoints to keep besides the best.
    accumulation: the number of micro-batches per update.
    ema_decay: the decay of the averages of parameters and batch statistics that evaluation uses; 0
      is off.
    shard_above: the size in bytes from which on the mesh axis fsdp splits an array that no
      sharding rule of its family names; smaller arrays lie whole on every device.
    monitor: the metric, as "split/metric", that decides the best checkpoint, early stopping and
      the plateau; "" is none.
    early_stopping_patience: the number of evaluations without improvement after which training
      stops; 0 is off.
    init.source: the weights to start from: the workdir of a run (its best checkpoint), a
      .safetensors file, a folder written by `python -m dljax.interop`, or hub:OWNER/NAME; ""
      trains from scratch.
    init.format: the library whose names the tensors of init.source have (dljax, torchvision, ...);
      "" detects it.
    init.new_head: whether the head is initialised from scratch even if init.source has as many
      classes, which may be different ones.
    eval.corruptions: the corruptions of the test images in a final evaluation: "all", names
      separated by commas, or "" for none.
    eval.examples: the number of examples that whole-set metrics are computed over, a sample fixed
      by the seed; 0 takes all.

  Args:
    family: the name of the experiment's file.
    preset: the name of one of its presets.
    **fields: the values of the fields above, and the groups optimizer, model and data.
  """
  config = ml_collections.ConfigDict({
      "family": family,
      "preset": preset,
      "seed": 0,
      "total_steps": 1000,
      "batch_size": 128,
      "eval_batch_size": 512,
      "log_every": 20,
      "eval_every": 200,
      "checkpoint_every": 200,
      "full_eval_every": 0,
      "keep_checkpoints": 2,
      "accumulation": 1,
      "ema_decay": 0.0,
      "shard_above": 4 * 2**20,
      "monitor": "",
      "early_stopping_patience": 0,
      "init": {"source": "", "format": "", "new_head": False},
      "eval": {"corruptions": "", "examples": 0},
  })
  config.update(fields)
  return config


def decides_training(field: str) -> bool:
  """Says whether a field, such as "optimizer.learning_rate", affects what is trained.

  Fields of groups outside of `_TRAINING` say what is done with the trained network.
  """
  group, dot, _ = field.partition(".")
  return not dot or group in _TRAINING or field in _TRAINING


def check_complete(
    config: ml_collections.ConfigDict, like: ml_collections.ConfigDict,
    file: str | os.PathLike[str],
) -> None:
  """Raises a `UserError` if the config of a run, stored in `file`, lacks fields of `like`."""
  if lacks := sorted(flatten(like).keys() - flatten(config).keys()):
    raise UserError(f"{file} lacks {', '.join(lacks[:3])}; restore it from a copy, or train again "
                    "in another --workdir")


def identity(config: ml_collections.ConfigDict) -> str:
  """Returns a text that is the same for two configs if they train the same network."""
  fields = {name: value for name, value in flatten(config).items() if decides_training(name)}
  return json.dumps(fields, sort_keys=True)


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks the ranges of the shared fields; each part of the project checks its own fields."""
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
      raise UserError(f"{flag} needs a value: write {flag}={_format(place[field])}")
    if name in _FROM_FLAGS:
      raise UserError(f"{flag} cannot be set; use --preset and --seed")
    place[field] = _parse(flag, text, typed.get(name, ()) if place[field] == () else place[field])


def _parse(flag: str, text: str, like: Any) -> Any:
  """Returns `text` as a value of the type of `like`."""
  if isinstance(like, tuple):
    items = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
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
        f"{flag}={text}: must be {kinds[type(like)]}, such as {_format(like)}") from None


def _format(value: Any) -> str:
  if isinstance(value, tuple):
    return ",".join(_format(v) for v in value)
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
  """Returns a line for each field that can be set, as it is written on the command line."""
  return "\n".join(f"  --config.{name}={_format(value)}" for name, value in flatten(config).items()
                   if name not in _FROM_FLAGS)
