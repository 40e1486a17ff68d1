"""The vision transformer's names.

torchvision: torchvision/models/vision_transformer.py. timm: timm/models/vision_transformer.py, as
vit_tiny_patch16_224 and the like have it.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dljax.errors import UserError
from dljax.interop.table import (
    CONV, LINEAR, SAME, Table, joint_heads, layer, merged_heads, patches)
from dljax.models import vit


def _torchvision(model: vit.ViT) -> Table:
  if model.pool != "token" or model.positions != "learned":
    raise UserError("torchvision's ViT has a class token and learned positions: use pool='token', positions='learned'")
  block, theirs = r"block(\d+)", r"encoder.layers.encoder_layer_\1"
  joint_kernel, joint_bias = joint_heads(3, model.num_heads)
  out, merged = f"{theirs}.self_attention.out_proj", merged_heads(model.num_heads)
  rules = [
      ("params/class_token", "class_token", SAME),
      ("params/positions", "encoder.pos_embedding", SAME),
      *layer("patches", "conv_proj", CONV),
      (f"params/{block}/qkv/kernel", f"{theirs}.self_attention.in_proj_weight", joint_kernel),
      (f"params/{block}/qkv/bias", f"{theirs}.self_attention.in_proj_bias", joint_bias),
      (f"params/{block}/project/kernel", f"{out}.weight", merged),
      (f"params/{block}/project/bias", f"{out}.bias", SAME),
      *layer(f"{block}/mlp1", f"{theirs}.mlp.0", LINEAR),
      *layer(f"{block}/mlp2", f"{theirs}.mlp.3", LINEAR),
      (rf"params/{block}/norm([12])/scale", rf"{theirs}.ln_\2.weight", SAME),
      (rf"params/{block}/norm([12])/bias", rf"{theirs}.ln_\2.bias", SAME),
      ("params/norm/scale", "encoder.ln.weight", SAME),
      ("params/norm/bias", "encoder.ln.bias", SAME),
      *layer("head", "heads.head", LINEAR),
  ]
  return Table(rules,
               inputs=patches(model.patch_size, "conv_proj.weight", "encoder.pos_embedding"))


def _timm(model: vit.ViT) -> Table:
  if model.pool != "token" or model.positions != "learned":
    raise UserError("the table of timm's ViT is for a class token and learned positions: use pool='token', "
                    "positions='learned'")
  layers = {
      "qkv": ("attn.qkv", *joint_heads(3, model.num_heads)),
      "project": ("attn.proj", merged_heads(model.num_heads), SAME),
      "mlp1": ("mlp.fc1", LINEAR, SAME),
      "mlp2": ("mlp.fc2", LINEAR, SAME),
  }
  rules = [
      ("params/class_token", "cls_token", SAME),
      ("params/positions", "pos_embed", SAME),
      *layer("patches", "patch_embed.proj", CONV),
      *layer("head", "head", LINEAR),
      (r"params/norm/scale", "norm.weight", SAME),
      (r"params/norm/bias", "norm.bias", SAME),
      (r"params/block(\d+)/(norm[12])/scale", r"blocks.\1.\2.weight", SAME),
      (r"params/block(\d+)/(norm[12])/bias", r"blocks.\1.\2.bias", SAME),
  ]
  for ours, (theirs, kernel, bias) in layers.items():
    rules += [(rf"params/block(\d+)/{ours}/kernel", rf"blocks.\1.{theirs}.weight", kernel),
              (rf"params/block(\d+)/{ours}/bias", rf"blocks.\1.{theirs}.bias", bias)]
  return Table(rules, inputs=patches(model.patch_size, "patch_embed.proj.weight", "pos_embed"))


def _resample(
    model: vit.ViT, table: np.ndarray, shape: tuple[int, ...], image: tuple[int, int] | None,
    note: Callable[[str], None],
) -> np.ndarray:
  """Learned positions for images of another size, as timm's `resample_abs_pos_embed` gives them.

  Args:
    model: says whether there is a class token, and the size of a patch.
    table: the positions [1, tokens + N, D], which every source has as we do.
    shape: the wanted shape.
    image: the height and width of the wanted images; square ones by default.
    note: gets a line if the positions were interpolated.

  Returns:
    The positions of that shape; `table` itself if nobody can say on which grid it lies.
  """
  tokens = int(model.pool == "token")
  if table.ndim != 3 or (table.shape[0], table.shape[2]) != (shape[0], shape[2]):
    return table
  old, new = table.shape[1] - tokens, shape[1] - tokens
  to = tuple(side // model.patch_size for side in image) if image else _square(new)
  if to is None or math.prod(to) != new:
    return table
  like = tuple(round(side * math.sqrt(old / new)) for side in to)  # images of the same proportions
  grid = _square(old) or (like if math.prod(like) == old else None)
  if grid is None or grid == to:
    return table
  note(f"the positions of {grid[0]}x{grid[1]} patches are interpolated to {to[0]}x{to[1]}")
  return np.asarray(vit.interpolate_positions(table, grid, to), table.dtype)


def _square(count: int) -> tuple[int, int] | None:
  """The square grid of so many patches, if there is one."""
  side = math.isqrt(max(0, count))
  return (side, side) if side and side * side == count else None


# timm's sizes -> ours, and what `model_args` may set of them.
_TIMM_SIZES = {"tiny": "vit_ti16", "small": "vit_s16", "base": "vit_b16", "large": "vit_l16"}
_TIMM_FIELDS = {"patch_size": "patch_size", "embed_dim": "embed_dim", "depth": "num_layers",
                "num_heads": "num_heads"}
_TIMM_IGNORED = ("img_size",)  # which the positions say


def _timm_model(config: Mapping[str, Any]) -> vit.ViT | None:
  """The model of timm's config.json: "architecture", "num_classes" and "model_args"."""
  name = config.get("architecture", "")
  match = re.fullmatch(r"vit_(tiny|small|base|large)_patch(\d+)_\d+", name)
  if not match:
    return None
  sizes = {"patch_size": int(match[2]), "num_classes": config.get("num_classes", 1000)}
  for key, value in config.get("model_args", {}).items():
    if key not in (*_TIMM_FIELDS, *_TIMM_IGNORED):
      raise UserError(f"config.json: the table of timm's {name} does not know model_args {key!r}; only "
                      f"{', '.join(_TIMM_FIELDS)}")
    if key in _TIMM_FIELDS:
      sizes[_TIMM_FIELDS[key]] = value
  for field, value in sizes.items():
    if type(value) is not int or value < 1:
      raise UserError(f"config.json: {field} is {value!r}; it must be a whole number above 0")
  return vit.VARIANTS[_TIMM_SIZES[match[1]]](**sizes)


TABLES = {"torchvision": {vit.ViT: _torchvision}, "timm": {vit.ViT: _timm}}
# Class -> our path -> what fits an array to another size of the images.
RESIZERS = {vit.ViT: {"params/positions": _resample}}
CONFIGS = {"timm": _timm_model}
