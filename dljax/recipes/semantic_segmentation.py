"""The experiment that all segmenters share, from a config and a model."""

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np

from dljax import optim, report
from dljax.config import Field, Group, base_config
from dljax.data.image import scenes, typical
from dljax.data.image.geometry import Placement
from dljax.recipes import common
from dljax.tasks import segmentation
from dljax.train.experiment import Assets, Experiment, Inputs, Request

# The values of fields of `config.data` for the sets that presets use.
DATA = {
    "digit_scenes": {"name": "digit_scenes"},
    "emoji_scenes": scenes.EMOJI_SCENES,
    # The set's own values are 1 for the animal, 2 for the ground, and 3 for the animal's border,
    # which is hard to tell from either. Mean and std are ImageNet's.
    "oxford_iiit_pet": {"name": "oxford_iiit_pet", "image_shape": (128, 128, 3),
                        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
                        "train": "train[:90%]", "validation": "train[90%:]",
                        "resize": "bilinear", "mask_feature": "segmentation_mask", "mask_classes": 3,
                        "mask_values": (2, 1, 3), "mask_names": ("ground", "pet", "border")},
}
_OF_TASK = {
    "cross_entropy_weight": "The weight of the cross-entropy in the loss.",
    "dice_weight": "The weight of the Dice loss.",
    "ground": "Whether the first class, the ground, counts in the mean IoU and in Dice.",
}
_NOWHERE = 255  # marks the pixels, in a picture of classes, that the network gives no class


def config(
    family: str, preset: str, data: str, variant: str, optimizer: str,
) -> ml_collections.ConfigDict:
  """The shared fields of a segmenter's config, for the preset to change.

  Args:
    family: the name of the experiment's file.
    preset: one of its presets.
    data: a key of `DATA`.
    variant: a key of the family's VARIANTS.
    optimizer: a name that `optim.default_config` knows.
  """
  data_config = scenes.default_config()
  data_config.update(DATA[data])
  defaults = {field: Field(getattr(segmentation.Segmentation, field), sentence)
              for field, sentence in _OF_TASK.items()}
  return base_config(
      family, preset, task="semantic_segmentation",
      monitor="validation/mean_iou", optimizer=optim.default_config(optimizer),
      data=data_config, model=Group({**common.model_fields(variant), **defaults}))


def build(config: ml_collections.ConfigDict, model: nn.Module) -> Experiment:
  """The experiment that trains `model` on the scenes of `config.data`. Opens no data.

  Args:
    config: a config with the fields that `config()` gives.
    model: the network, see `Segmentation`.
  """
  data = scenes.SceneSet(config.data, ["segmentation"]).pipelines(
      batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed)
  task = segmentation.Segmentation(
      model=model, num_classes=config.data.mask_classes,
      **{field: config.model[field] for field in _OF_TASK})
  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None,
      read=functools.partial(_read, config), show=functools.partial(_show, config),
      draw=functools.partial(_draw, config.data),
      saw=functools.partial(
          common.saw_images, functools.partial(typical.pixels, config=config.data)))


def resolve(config: ml_collections.ConfigDict, given: Collection[str]) -> dict[str, Any]:
  """Looks up what the user's own images and masks decide; see `launch.main`.

  Args:
    config: the config, with the user's overrides.
    given: the names of the fields that the user has given.

  Returns:
    Field -> value. All classes count, as none need be the ground.

  Raises:
    UserError: the data are missing or cannot be used.
  """
  found, _ = scenes.look_up(config, given, "segmentation")
  if found and "model.ground" not in given:
    found["model.ground"] = True
  return found


def _read(config: ml_collections.ConfigDict, request: Request, assets: Assets) -> Inputs:
  """Reads the user's images; see `scenes.encode`."""
  common.check_request(request, config.family, ["paths"])
  batch, names, skipped = scenes.encode(request.paths, config.data)
  return Inputs(batch, names, skipped,
                typical.warnings(batch["image"], names, config.data, assets))


def _show(
    config: ml_collections.ConfigDict, inputs: Inputs, predictions: Any, assets: Assets,
) -> Iterator[Mapping[str, Any]]:
  del inputs
  # The first class of the user's own may be any.
  return segmentation.decode(
      predictions, assets, ground=bool(config.data.folder) and config.model.ground)


def _draw(
    data_config: ml_collections.ConfigDict, inputs: Inputs, predictions: Any, assets: Assets,
) -> Iterator[tuple[str, bytes]]:
  """Draws, for each of the user's images, a picture of its size with the class of each pixel."""
  del assets
  canvas = data_config.image_shape[:2]
  for classes, size in zip(predictions["classes"], inputs.batch["host/size"]):
    margin = [(side - have) // 2 for side, have in zip(canvas, classes.shape)]
    seen = np.full(canvas, _NOWHERE, np.uint8)
    seen[margin[0]:margin[0] + classes.shape[0], margin[1]:margin[1] + classes.shape[1]] = classes
    place = Placement.of(size, canvas, data_config.resize)
    yield common.png(report.class_map(place.back(seen, size)))
