"""timm's names."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from dljax.errors import UserError
from dljax.interop.table import CONV, LINEAR, SAME, Table, patches
from dljax.models import vit


def _vit(model: vit.ViT) -> Table:
  """timm/models/vision_transformer.py, as vit_tiny_patch16_224 and the like have it."""
  if model.pool != "token" or model.positions != "learned":
    raise UserError("the table of timm's ViT is for a class token and learned positions: use pool='token', "
                    "positions='learned'")
  names = {"qkv": "attn.qkv", "project": "attn.proj", "mlp1": "mlp.fc1", "mlp2": "mlp.fc2"}
  rules = [
      ("params/class_token", "cls_token", SAME),
      ("params/positions", "pos_embed", SAME),
      ("params/patches/kernel", "patch_embed.proj.weight", CONV),
      ("params/patches/bias", "patch_embed.proj.bias", SAME),
      ("params/head/kernel", "head.weight", LINEAR),
      ("params/head/bias", "head.bias", SAME),
      (r"params/norm/scale", "norm.weight", SAME),
      (r"params/norm/bias", "norm.bias", SAME),
      (r"params/block(\d+)/(norm[12])/scale", r"blocks.\1.\2.weight", SAME),
      (r"params/block(\d+)/(norm[12])/bias", r"blocks.\1.\2.bias", SAME),
  ]
  for ours, theirs in names.items():
    rules += [(rf"params/block(\d+)/{ours}/kernel", rf"blocks.\1.{theirs}.weight", LINEAR),
              (rf"params/block(\d+)/{ours}/bias", rf"blocks.\1.{theirs}.bias", SAME)]
  return Table(rules, inputs=patches(model.patch_size, "patch_embed.proj.weight", "pos_embed"))


TABLES: Mapping[type[nn.Module], Callable[[Any], Table]] = {vit.ViT: _vit}
