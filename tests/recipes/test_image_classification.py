"""What the experiments of image classifiers share."""

import math

import pytest

from dljax.errors import UserError
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
