"""Adapters of a low rank among a network's parameters: what `models.blocks.Projection` calls them.

Edward J. Hu et al. "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
https://arxiv.org/abs/2106.09685
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

_ADAPTERS = ("lora_down", "lora_up")


def is_adapter(path: str) -> bool:
  """Whether a parameter's path, such as "block0/qkv/lora_up", is that of a `Projection`'s adapter."""
  return path.rpartition("/")[2] in _ADAPTERS


def merge(params: Mapping[str, Any], factor: float) -> dict[str, Any]:
  """The parameters of the same network without adapters: they are added to the kernels.

  Args:
    params: nested parameters, of float32 or wider.
    factor: lora_alpha / lora_rank.
  """
  down, up = (params.get(name) for name in _ADAPTERS)
  merged = {name: merge(value, factor) if isinstance(value, Mapping) else value
            for name, value in params.items() if name not in _ADAPTERS}
  if down is not None:
    merged["kernel"] = params["kernel"] + factor * np.tensordot(down, up, axes=1)
  return merged
