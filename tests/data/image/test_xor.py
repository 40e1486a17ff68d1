"""The points of XOR."""

import numpy as np
import pytest

from dljax.data.image import xor
from dljax.errors import UserError


def _points(config):
  """Split -> image and label of all its points, in order."""
  data = xor.pipelines(config, batch_size=config.train, eval_batch_size=50, seed=3)
  train, evals = data.train, data.evals
  for pipeline in (train, *evals.values()):
    pipeline.open()
  batches = {"train": [train.batch(0)]}
  batches |= {name: [p.batch(step) for step in range(p.num_batches)] for name, p in evals.items()}
  joined = lambda parts, key: np.concatenate([part[key][part["mask"] > 0] for part in parts])
  return {name: (joined(parts, "image"), joined(parts, "label")) for name, parts in batches.items()}


def test_the_config_says_how_many_and_how_noisy():
  config = xor.default_config()
  config.update({"noise": 0.0, "train": 40, "validation": 8, "test": 101})
  for split, (image, label) in _points(config).items():
    assert len(image) == len(label) == config[split]
    np.testing.assert_array_equal(abs(image), 1)  # without noise, the corners
    np.testing.assert_array_equal(label, image[:, 0] != image[:, 1])
    assert np.ptp(np.unique(image, axis=0, return_counts=True)[1]) <= 1

  config.noise = 0.2
  noisy = _points(config)
  assert abs(np.std(abs(noisy["test"][0])) - 0.2) < 0.03
  everything = np.concatenate([image for image, _ in noisy.values()])
  assert len(np.unique(everything, axis=0)) == 40 + 8 + 101, "two splits share a point"


@pytest.mark.parametrize("field, value", [
    ("noise", -0.1), ("noise", 1.5), ("noise", float("nan")), ("train", 3), ("validation", 0), ("test", 10**7)])
def test_values_out_of_range_are_named(field, value):
  config = xor.default_config()
  config[field] = value
  with pytest.raises(UserError, match=f"^--config.data.{field}={value}: give"):
    xor.pipelines(config, batch_size=4, eval_batch_size=4, seed=0)
