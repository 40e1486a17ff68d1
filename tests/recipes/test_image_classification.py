"""What the experiments of image classifiers share."""

import itertools
import math
import re

import jax
import numpy as np
import pytest

from dljax.data.image import labelled
from dljax.errors import UserError
from dljax.recipes import image_classification
from dljax.tasks.multilabel import MultiLabel
from dljax.tasks.regression import Regression
from tests.data.image import own_images
from tests.families import EXPERIMENTS

WRONG = {"width_factor": (0.0, math.inf, math.nan), "pooled_size": (0,), "hidden_width": (0,),
         "dropout": (-0.1, 1.0, math.nan), "stochastic_depth": (-0.1, 1.0, math.nan)}
CONFIGS = {family: module.get_config(next(iter(module.PRESETS))) for family, module in EXPERIMENTS.items()
           if hasattr(module, "image_classification")}
CASES = [(family, field, value) for family, config in CONFIGS.items() for field, values in WRONG.items()
         if field in config.model for value in values]


@pytest.mark.parametrize("family, field, value", CASES)
def test_sizes_and_rates_out_of_range_are_refused(family, field, value):
  config = CONFIGS[family].copy_and_resolve_references()
  config.model[field] = value
  with pytest.raises(UserError, match=f"--config.model.{field}={value}: must be "):
    EXPERIMENTS[family].build(config)


def test_every_such_field_is_some_familys():
  assert {field for _, field, _ in CASES} == set(WRONG)


def test_the_label_smoothing_reaches_the_task():
  config = CONFIGS["resnet"].copy_and_resolve_references()
  config.model.label_smoothing = 0.125
  assert EXPERIMENTS["resnet"].build(config).task.label_smoothing == 0.125


@pytest.mark.parametrize("name", sorted(image_classification.DATA))
def test_the_splits_of_a_set_are_three_and_share_no_example(name):
  """Of "train[:90%]" and "train[90%:]" the one begins where the other ends."""
  config = {**labelled.default_config(), **image_classification.DATA[name]}
  parts = []
  for split in ("train", "validation", "test"):
    base, begin, end = re.fullmatch(r"(\w+)(?:\[(\d*)%?:(\d*)%?\])?", config[split]).groups()
    parts.append((base, int(begin or 0), int(end or 100)))
  assert all(a[0] != b[0] or a[2] <= b[1] or b[2] <= a[1] for a, b in itertools.combinations(parts, 2))
  assert parts[0][0] == "train" and parts[2][0] != "train"


# The user's own data


def _own(family, root, **fields):
  """An experiment on the images in `root`, as the command line builds it."""
  config = CONFIGS[family].copy_and_resolve_references()
  config.data.folder = str(root)
  config.update_from_flattened_dict(fields)
  found = image_classification.resolve(config, ("data.folder", *fields))
  assert found.keys().isdisjoint(fields)
  config.update_from_flattened_dict(found)
  return EXPERIMENTS[family].build(config)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_has_the_classes_and_channels_of_the_users_folder(family, tmp_path):
  experiment = _own(family, own_images.folders(tmp_path, {"cat": 5, "dog": 5, "eel": 5}))
  sides = CONFIGS[family].data.image_shape[:2]
  assert experiment.config.data.image_shape == (*sides, 3) and experiment.task.model.num_classes == 3
  batch = {"image": np.zeros((1, *sides, 3), np.float32), "mask": np.ones(1, np.float32)}
  variables = jax.eval_shape(experiment.task.init, jax.random.key(0), batch)
  predicted = jax.eval_shape(
      lambda variables: experiment.task.predict(variables, batch, jax.random.key(0), {}), variables)
  assert predicted["probabilities"].shape == (1, 3)
  assert experiment.monitor == CONFIGS[family].monitor


def test_the_labels_decide_the_task_and_the_monitor(tmp_path):
  several = _own("mlp", own_images.table(tmp_path / "several", "file,label", ["a;b", "b", "", "a"]),
                 **{"data.class_weights": ("balanced",)})
  assert isinstance(several.task, MultiLabel) and several.monitor == "validation/mean_average_precision"
  assert len(several.task.class_weights) == several.task.num_classes == 2
  grouped = own_images.table(tmp_path / "grouped", "file,label,camera", ["a;b,x", "b,x", "a,y"])
  assert "worst_camera_accuracy" in _own("mlp", grouped, **{"data.groups": ("camera",)}).task.goals
  number = _own("mlp", own_images.table(tmp_path / "number", "file,label", ["1.5", "2.5"]))
  assert isinstance(number.task, Regression) and number.monitor == "validation/mae"
  assert 1.5 < number.task.mean[0] < 2.5 and number.task.model.num_classes == 1
  with pytest.raises(UserError, match="--config.data.groups: numbers have no accuracy"):
    _own("mlp", tmp_path / "number", **{"data.groups": ("file",)})
  kept = _own("mlp", tmp_path / "number", monitor="validation/loss")
  assert kept.monitor == "validation/loss"
  assert _own("mlp", tmp_path / "number", **{"data.validation": ""}).monitor is None


def test_what_presets_say_of_classes_is_switched_off_for_numbers(tmp_path):
  root = own_images.table(tmp_path, "file,label", ["1.5", "2.5"])
  config = EXPERIMENTS["vit"].get_config("imagenet2012")
  config.data.folder = str(root)
  found = image_classification.resolve(config, ("data.folder", "data.image_shape"))
  assert found["data.mixup"] == 0 and (found["data.train"], found["data.test"]) == ("train", "test")
  with pytest.raises(UserError, match="--config.data.mixup=0.2: has no meaning where an image has a number; set it to 0"):
    _own("mlp", root, **{"data.mixup": 0.2})
  with pytest.raises(UserError, match="label_smoothing=0.1: has no meaning for numbers"):
    _own("mlp", root, **{"model.label_smoothing": 0.1})
  with pytest.raises(UserError, match="--config.model.criterion=perceptron: has no meaning for --config.data.labels=number"):
    _own("mlp", root, **{"model.criterion": "perceptron"})
  with pytest.raises(UserError, match="--config.data.labels='number': goes with a table of your own"):
    _own("mlp", "", **{"data.labels": "number"})


def test_points_have_nothing_to_look_up():
  assert image_classification.resolve(EXPERIMENTS["mlp"].get_config("xor"), ()) == {}
