"""The real mnist and fashion_mnist, where they are prepared beside the repository."""

import pathlib
import time

import numpy as np
import pytest

from dljax.data.image import labelled

ROOT = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tfds"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "mnist").is_dir(), reason=f"no prepared mnist in {ROOT}")]


@pytest.mark.parametrize("name, first_class", [("mnist", "0"), ("fashion_mnist", "T-shirt/top")])
def test_real_sets(name, first_class, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(ROOT))
  config = labelled.default_config()
  config.update(name=name, train="train[:90%]", validation="train[90%:]", image_shape=(28, 28, 1))
  data = labelled.ImageSet(config).pipelines(batch_size=128, eval_batch_size=1000, seed=0)
  classes = data.assets()["classes"]
  assert classes[0] == first_class and len(classes) == 10
  sizes = (data.evals["validation"], 6000), (data.evals["test"], 10000), (data.train, 54000)
  for pipeline, examples in sizes:
    pipeline.open()
    assert pipeline.num_examples == examples
  test = data.evals["test"]
  labels = np.concatenate([test.batch(step)["label"] for step in range(test.num_batches)])
  assert np.bincount(labels, minlength=10).min() > 800
  start = time.perf_counter()
  for step in range(50):
    data.train.batch(step)
  assert (time.perf_counter() - start) / 50 < 0.02  # far from the goal: only a blunder is this slow
