"""The experiment that every family of object detectors shares: from a config, a model and its anchors."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np

from dljax import optim
from dljax.config import base_config
from dljax.data.image import scenes
from dljax.errors import UserError
from dljax.tasks import boxes, detection
from dljax.train.experiment import Experiment

# Field values of `config.data` for the sets that presets use.
DATA = {
    "digit_scenes": {"name": "digit_scenes"},
    "emoji_scenes": scenes.EMOJI_SCENES,
    # No image of COCO has a longer side than 640 pixels: all are seen as they are, on black. Mean and std are those of
    # ImageNet, from which the backbone comes. A few boxes of the set have no area.
    "coco": {"name": "coco/2017", "image_shape": (640, 640, 3), "num_classes": 80, "mean": (0.485, 0.456, 0.406),
             "std": (0.229, 0.224, 0.225), "train": "train[:99%]", "validation": "train[99%:]", "test": "validation",
             "max_boxes": 100, "bad_boxes": "drop", "flip": True},
}
_OF_TASK = ("alpha", "gamma", "smooth_l1_beta", "score_threshold", "nms_threshold", "max_detections")


def config(family: str, preset: str, data: str, variant: str, optimizer: str) -> ml_collections.ConfigDict:
  """The shared fields of a detector's config, for the preset to change.

  Those of `config.model` beside the variant are: how the network computes (dtype, remat), the fields of `Detection`,
  and the anchors: three sizes on each level, `anchor_scale` times its stride and up to an octave above, each with
  every height / width of `anchor_ratios`.

  Args:
    family: the name of the experiment's file.
    preset: one of its presets.
    data: a key of `DATA`.
    variant: a key of the family's VARIANTS.
    optimizer: a name that `optim.default_config` knows.
  """
  data_config = scenes.default_config()
  data_config.update(DATA[data])
  defaults = {field: getattr(detection.Detection, field) for field in _OF_TASK}
  return base_config(
      family, preset, optimizer=optim.default_config(optimizer), data=data_config, model=ml_collections.ConfigDict({
          "variant": variant, "dtype": "float32", "remat": False, "anchor_scale": 4, "anchor_ratios": (0.5, 1.0, 2.0),
          **defaults}))


def anchors(config: ml_collections.ConfigDict, strides: Sequence[int]) -> boxes.Anchors:
  """Those that `config.model` describes, for levels with so many pixels between their cells.

  Raises:
    UserError: they have no size or no shape.
  """
  scale, ratios = config.model.anchor_scale, tuple(config.model.anchor_ratios)
  if scale < 1:
    raise UserError(f"--config.model.anchor_scale={scale}: give a positive number of strides")
  if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
    raise UserError(f"--config.model.anchor_ratios={ratios}: give one or more of height / width, such as 0.5,1,2")
  return boxes.Anchors.octaves([scale * stride for stride in strides], ratios)


def build(config: ml_collections.ConfigDict, model: nn.Module, anchors: boxes.Anchors) -> Experiment:
  """The experiment that trains `model` on the scenes of `config.data`. Opens no data.

  Args:
    config: with the fields of the function above.
    model: see `Detection`.
    anchors: that the model has outputs for.
  """
  data = scenes.SceneSet(config.data, ["boxes"]).pipelines(
      batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed)
  task = detection.Detection(
      model=model, num_classes=config.data.num_classes, anchors=anchors,
      **{field: config.model[field] for field in _OF_TASK})
  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None,
      encode=functools.partial(_encode, config.data), decode=detection.decode)


def _encode(
    data_config: Any, paths: Sequence[str], assets: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
  """See `scenes.encode`; the batch says too where each image lies, so that its boxes are in its own pixels."""
  del assets
  batch, names, skipped = scenes.encode(paths, data_config)
  size = batch["host/size"]  # height, width
  places = [scenes.Placement.of(s, data_config.image_shape[:2], data_config.resize) for s in size]
  batch["place"] = np.array(
      [(p.left, p.top, p.left + p.width, p.top + p.height) for p in places], np.float32).reshape(-1, 4)
  batch["size"] = size[:, ::-1].astype(np.float32)
  return batch, names, skipped
