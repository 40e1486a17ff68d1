"""The name of a run's folder: the family, the data, and what differs from the preset."""

import hashlib
import re
from collections.abc import Iterable

import ml_collections

from dljax import config as config_lib

_LONGEST = 60  # characters; beyond them a hash stands for what differs
_LONGEST_DATA = 40
# Other characters have a meaning in paths, patterns or shells, or in the name itself, as "=" has.
_UNFIT = re.compile(r"[^\w.,+-]+")


def run_name(
    config: ml_collections.ConfigDict, preset: ml_collections.ConfigDict, *,
    default: str, epochs: float | None = None,
) -> str:
  """Returns the default name of a run's folder, such as "lenet-digits-learning_rate=0.4-seed=7".

  It starts with the family and the preset, or with the family and the data where these are not the
  preset's. A field goes by the last part of its name, or by as many parts as tell it from all
  others: "optimizer.name" beside "data.name". A path goes by its last part. Two different configs
  have two names: a hash follows where a value cannot stand in the name as it is, and replaces what
  differs where the name would have more than 60 characters.

  Args:
    config: the run's config.
    preset: the config of its preset.
    default: the preset that is run without --preset.
    epochs: the value of --epochs, or None.
  """
  usual, fields = config_lib.flatten(_of_variant(preset, config)), config_lib.flatten(config)
  usual["model.variant"] = config_lib.flatten(preset).get("model.variant")
  data = config_lib.data_field(config)
  if not data or fields[data] == usual.get(data):
    label, whole, parts = config.preset, True, []
  else:
    label, whole = _fit(str(fields[data]))
    label, whole = label[:_LONGEST_DATA], whole and len(label) <= _LONGEST_DATA
    parts = [] if config.preset == default else [f"preset={config.preset}"]
    usual[data] = fields[data]
  for name, value in fields.items():
    if value != usual.get(name) and name != "seed" and config_lib.decides_training(name):
      text, same = _fit(config_lib.format_value(value))
      parts.append(f"{_short(name, fields)}={text}")
      whole = whole and same
  if epochs is not None:
    parts.append(f"epochs={epochs:.12g}")
  if config.seed != preset.seed:
    parts.append(f"seed={config.seed}")
  identity = config_lib.identity(config) + ("" if epochs is None else str(epochs))
  digest = "-" + hashlib.sha256(identity.encode()).hexdigest()[:8]
  start = f"{config.family}-{label}"
  full = "-".join([start, *parts]) + ("" if whole else digest)
  return full if len(full) <= _LONGEST else start + digest


def _of_variant(
    preset: ml_collections.ConfigDict, config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """The preset with the config's variant, whose own values of other fields go without saying."""
  if "model" not in preset or preset.model.get("variant") == config.model.get("variant"):
    return preset
  preset = preset.copy_and_resolve_references()
  preset.model.variant = config.model.variant
  return preset


def _fit(text: str) -> tuple[str, bool]:
  """The text as part of a file's name, and whether that says the same."""
  last = re.split(r"[/\\]+", text.rstrip("/\\"))[-1]
  fit = _UNFIT.sub("_", last).strip("_")
  return fit, fit == text


def _short(name: str, fields: Iterable[str]) -> str:
  """The shortest end of a field's name, in whole parts, that no other field shares."""
  parts = name.split(".")
  ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
  return next(end for end in ends
              if sum(f".{other}".endswith(f".{end}") for other in fields) == 1)
