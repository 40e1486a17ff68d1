"""How the authors of a folder of weights generate text from them.

transformers keeps that beside the weights, in generation_config.json, or in older folders in
config.json: the tokens that end a text, and how tokens are drawn.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dljax import errors

FILES = ("generation_config.json", "config.json")
# transformers' field -> the attribute of `dljax.tasks.decoding.Sampling`, and the kind of its value.
_FIELDS = {
    "max_new_tokens": ("max_new_tokens", int), "min_new_tokens": ("min_new_tokens", int),
    "repetition_penalty": ("repetition_penalty", float),
    "no_repeat_ngram_size": ("no_repeat_ngram", int),
}
_DRAWN = {"temperature": ("temperature", float), "top_k": ("top_k", int),
          "top_p": ("top_p", float), "min_p": ("min_p", float)}
# What transformers takes where it draws tokens and no file says otherwise.
_WHERE_SILENT = {"temperature": 1.0, "top_k": 50}
# What chooses other tokens and is not known here -> the values that change nothing.
_OFF = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "typical_p": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": (), "dola_layers": (), "bad_words_ids": (),
    "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,), "force_words_ids": (),
    "constraints": (), "forced_bos_token_id": (), "forced_eos_token_id": (), "suppress_tokens": (),
    "begin_suppress_tokens": (), "sequence_bias": (), "exponential_decay_length_penalty": (),
    "guidance_scale": (1,), "watermarking_config": (), "token_healing": (False,),
    "stop_strings": (),
}


def generation(path: str | Path) -> dict[str, Any]:
  """The settings of `dljax.tasks.decoding.Sampling` that a folder states.

  Args:
    path: the folder of a model in transformers' form.

  Returns:
    Keyword arguments of `Sampling`, such as {"temperature": 0.6, "top_k": 20, "stop_tokens":
    (151645, 151643)}. The temperature is 0 if the most probable token is always taken, as it is
    where the folder says nothing.

  Raises:
    UserError: a file is damaged or a value is of another kind; or a setting chooses tokens in a
      way that is not known here.
  """
  path = Path(path).expanduser()
  # A field of the first file wins, and null says nothing.
  fields = {key: value for file in reversed(FILES) for key, value in _read(path / file).items()
            if value is not None}
  for key, off in _OFF.items():
    if key in fields and fields[key] not in (*off, [], {}):
      raise errors.UserError(f"{path}: its texts are generated with {key}={fields[key]!r}, which is not known here; "
                             "give the settings of Sampling yourself")
  drawn = bool(fields.get("do_sample", False))
  known = {**_FIELDS, **(_DRAWN if drawn else {})}
  fields = {**(_WHERE_SILENT if drawn else {}), **fields}
  found = {ours: _number(path, key, fields[key], kind)
           for key, (ours, kind) in known.items() if key in fields}
  ends = fields.get("eos_token_id", [])
  ends = ends if isinstance(ends, list) else [ends]
  tokens = tuple(_number(path, "eos_token_id", end, int) for end in ends)
  return {"temperature": 0.0, **found, "stop_tokens": tokens}


def _number(path: Path, key: str, value: Any, kind: type) -> Any:
  if isinstance(value, bool) or not isinstance(value, (int, kind)):
    what = "whole number" if kind is int else "number"
    raise errors.UserError(f"{path}: {key} is {value!r}; it must be a {what}")
  return kind(value)


def _read(file: Path) -> Mapping[str, Any]:
  """The fields of a file; none if there is no such file."""
  try:
    fields = json.loads(file.read_text("utf-8"))
    if not isinstance(fields, dict):
      raise ValueError("it is no object")
    return fields
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(
        f"{file} is no JSON object ({errors.one_line(e)}); get it again") from e
