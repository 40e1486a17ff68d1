"""What the experiments of image classifiers share."""

import itertools
import math
import re

import pytest

from dljax.data.image import labelled
from dljax.errors import UserError
from dljax.recipes import image_classification
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
