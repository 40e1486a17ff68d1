"""The smallest network of a family that has all its kinds of layers, and convolutions that compile fast.

Tests of what surrounds a network, such as a preset's data, schedule and task, or a compiler for another machine, cost
by the number of its layers: most of their time is compilation.
"""

import functools
import importlib
from typing import Any
from unittest import mock

import pytest

from dljax.models import alexnet, efficientnet, layers, resnet, retinanet, vgg, vit
from dljax.ops import conv

NAME = "smallest"  # the variant's
NETWORKS = {
    "alexnet": functools.partial(alexnet.AlexNet, widths=(16,) * 5),
    # One block that expands and has a shortcut: the others have fewer layers.
    "efficientnet": functools.partial(
        efficientnet.EfficientNet, stem_width=8, stages=(efficientnet.Stage(4, 5, 1, 8, 1),)),
    "resnet": functools.partial(resnet.ResNet, block=resnet.BasicBlock, stage_sizes=(1, 1), width=8),
    # Two levels, as the default preset has, of which the coarser is added to the finer.
    "retinanet": functools.partial(
        retinanet.RetinaNet, block=resnet.BasicBlock, stage_sizes=(1, 1), backbone_width=8, small_stem=True,
        first_stage=1, extra_levels=0, width=16, head_depth=1),
    "vgg": functools.partial(vgg.VGG, stage_sizes=(1,) * 5, norm=layers.BatchNorm),
    "vit": functools.partial(vit.ViT, patch_size=4, embed_dim=32, num_layers=1, num_heads=2),
}
# What a preset says of its own network, and this one has otherwise.
FIELDS = {
    "alexnet": {"width_factor": 0.5, "hidden_width": 64},
    "efficientnet": {"strides": "1"},
    "unet": {"width": 4, "num_pools": 1},
    "vgg": {"width_factor": 0.125, "hidden_width": 64},
}

# What makes every variant of a family shallow. Each kind of layer is left, and each layer that the notebook names.
SHALLOW = {
    # The first and the third stage have both kinds of blocks. There are as many stages as the preset has strides.
    "efficientnet": {"stages": tuple(
        stage._replace(depth=depth) for stage, depth in zip(efficientnet.NANO, (1, 0, 1, 0), strict=True))},
    "resnet": {"stage_sizes": (1, 1, 3)},
    "retinanet": {"stage_sizes": (1,) * 3, "first_stage": 2, "head_depth": 1, "width": 16},
    "unet": {"num_pools": 1},
    "vgg": {"stage_sizes": (1,) * 5},
    "vit": {"num_layers": 2},
}


def arguments(family: str, patch: pytest.MonkeyPatch) -> list[str]:
  """The flags that choose a family's smallest network, which is a variant as long as `patch` lasts.

  Empty for a family whose shipped default is small.
  """
  chosen = []
  if family in NETWORKS:
    module = importlib.import_module(f"dljax.models.{family}")
    patch.setitem(module.VARIANTS, NAME, NETWORKS[family])
    chosen.append(f"--config.model.variant={NAME}")
  return chosen + [f"--config.model.{field}={value}" for field, value in FIELDS.get(family, {}).items()]


def native_convolutions() -> Any:
  """A patch, for `with`, `@` or `start()`: XLA's own convolutions, which compile in half the time, in place of ours.

  That ours equal them is the matter of tests/ops/test_conv.py; tests/interop runs whole networks with ours.
  """
  return mock.patch.object(conv, "_by_platform", lambda form, native, *args: native(*args))


def shallow(family: str) -> Any:
  """A patch of a family's `VARIANTS` by the same networks with fewer layers, for programs that compile several."""
  variants = importlib.import_module(f"dljax.models.{family}").VARIANTS
  return mock.patch.dict(
      variants, {name: functools.partial(variant, **SHALLOW.get(family, {})) for name, variant in variants.items()})
