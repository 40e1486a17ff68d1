"""Checks of configs and requests that all recipes share, and pictures as files."""

import io
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dljax import report
from dljax.config import Field, one_of
from dljax.errors import UserError
from dljax.train.experiment import Inputs, Request


_DTYPES = ("float32", "bfloat16")


def model_fields(variant: str) -> dict[str, Field]:
  """The fields of `config.model` that all families have.

  Args:
    variant: the preset's network, a key of the family's VARIANTS.
  """
  return {
      "variant": Field(variant, "The network, one of the family's variants."),
      "dtype": Field("float32", one_of("The dtype of the computation; parameters stay float32",
                                       _DTYPES)),
      "remat": Field(False, "Whether the backward pass recomputes activations, which saves memory."),
  }


def dtype(config: ml_collections.ConfigDict) -> jnp.dtype:
  """The compute dtype that `config.model.dtype` names."""
  known = _DTYPES + (("float64",) if jax.config.jax_enable_x64 else ())
  if config.model.dtype not in known:
    raise UserError(f"--config.model.dtype={config.model.dtype}: must be float32, bfloat16 or "
                    "(with JAX_ENABLE_X64=1) float64")
  return jnp.dtype(config.model.dtype)


def check_model(model: ml_collections.ConfigDict) -> None:
  """Refuses sizes and rates out of range, among the fields of `config.model` that families share.

  Raises:
    UserError: a size is not above 0, or a rate is not in [0, 1).
  """
  for field in ("width_factor", "pooled_size", "hidden_width"):
    if field in model and not 0 < model[field] < math.inf:
      raise UserError(f"--config.model.{field}={model[field]}: must be above 0")
  for field in ("dropout", "stochastic_depth"):
    if field in model and not 0 <= model[field] < 1:
      raise UserError(f"--config.model.{field}={model[field]}: must be at least 0 and below 1")


# Part of a `Request` -> its flag with an example, and what a family does that has no use for it.
_PARTS = {
    "paths": ("--input=FILE_OR_FOLDER", "reads no files"),
    "texts": ("--prompt=TEXT", "generates no text"),
    "count": ("--count=N", "predicts each input once"),
    "labels": ("--label=NAME", "generates nothing by its class"),
}


def check_request(
    request: Request, family: str, takes: Collection[str], together: Collection[str] = (),
) -> None:
  """Refuses a request that an experiment cannot fulfil.

  Args:
    request: the user's request.
    family: the family's name, for the message.
    takes: the parts of a `Request` of which exactly one is needed.
    together: the parts that may be added to any of those.

  Raises:
    UserError: a part without a meaning is given, none or two of `takes` are, or the count is not
      positive.
  """
  given = [part for part in _PARTS if getattr(request, part) not in (None, (), [])]
  instead = " or ".join(_PARTS[part][0] for part in takes)
  for part in given:
    if part not in takes and part not in together:
      flag, reason = _PARTS[part]
      raise UserError(f"{flag.partition('=')[0]}: {family} {reason}; use {instead}")
  alone = [_PARTS[part][0].partition("=")[0] for part in given if part in takes]
  if not alone:
    raise UserError(f"--mode=predict needs {instead}")
  if len(alone) > 1:
    raise UserError(f"{alone[1]} and {alone[0]} do not go together; drop one of them")
  if request.count is not None and request.count < 1:
    raise UserError(f"--count={request.count}: give a positive number")


def saw_images(
    pixels: Callable[[np.ndarray], np.ndarray], inputs: Inputs, rows: Sequence[Mapping[str, Any]],
) -> Iterator[bytes]:
  """The images of a batch as the network saw them, for `Experiment.saw`.

  Args:
    pixels: a normalised image f32[H, W, C] -> the image as it was before, from 0 to 1.
    inputs: rows with "image" f32[H, W, C], normalised.
    rows: see `Experiment.saw`.
  """
  for image, row in zip(inputs.batch["image"], rows, strict=True):
    yield png(report.picture(report.seen(pixels(image), row)))[1]


def png(picture: Any) -> tuple[str, bytes]:
  """The (suffix, bytes) that `Experiment.draw` gives for a `PIL.Image.Image`."""
  content = io.BytesIO()
  picture.save(content, "PNG")
  return ".png", content.getvalue()
