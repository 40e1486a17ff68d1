"""What every kind of experiment checks of its config."""

import math

import jax
import jax.numpy as jnp
import ml_collections

from dljax.errors import UserError


def dtype(config: ml_collections.ConfigDict) -> jnp.dtype:
  """The compute dtype that `config.model.dtype` names."""
  known = ("float32", "bfloat16", "float64") if jax.config.jax_enable_x64 else ("float32", "bfloat16")
  if config.model.dtype not in known:
    raise UserError(f"--config.model.dtype={config.model.dtype}: must be float32, bfloat16 or (with "
                    "JAX_ENABLE_X64=1) float64")
  return jnp.dtype(config.model.dtype)


def check_model(model: ml_collections.ConfigDict) -> None:
  """Refuses sizes and rates out of range, as far as `config.model` has these fields that families share.

  Raises:
    UserError: a size is not above 0, or a rate not in [0, 1).
  """
  for field in ("width_factor", "pooled_size", "hidden_width"):
    if field in model and not 0 < model[field] < math.inf:
      raise UserError(f"--config.model.{field}={model[field]}: must be above 0")
  for field in ("dropout", "stochastic_depth"):
    if field in model and not 0 <= model[field] < 1:
      raise UserError(f"--config.model.{field}={model[field]}: must be at least 0 and below 1")
