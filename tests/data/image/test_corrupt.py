"""Disturbed images: stronger is further from the clean image, and nothing else decides what comes out."""

import numpy as np
import pytest

from dljax.data.image import corrupt, labelled
from dljax.errors import UserError

KINDS = pytest.mark.parametrize("name", corrupt.CORRUPTIONS)


@pytest.fixture(scope="module")
def digits():
  """uint8[64, 8, 8, 1]."""
  from sklearn.datasets import load_digits

  return np.round(load_digits().images[:64] * 255 / 16).astype(np.uint8)[..., None]


def _photos():
  """uint8[6, 60, 80, 3]: smooth colours with edges."""
  draw = np.random.default_rng(0)
  coarse = draw.integers(0, 256, (6, 6, 8, 3))
  return np.repeat(np.repeat(coarse, 10, axis=1), 10, axis=2).astype(np.uint8)


@KINDS
@pytest.mark.parametrize("kind", ["digits", "photos"])
def test_the_change_grows_with_the_strength(name, kind, digits):
  images = digits if kind == "digits" else _photos()
  changes = []
  for strength in corrupt.STRENGTHS:
    found = corrupt.corrupt(images, name, strength, 0, np.arange(len(images)))
    assert found.dtype == np.uint8 and found.shape == images.shape
    changes.append(np.abs(found.astype(float) - images).mean())
  assert changes[0] > 1 and all(np.diff(changes) > 0) and changes[4] > 2 * changes[0], changes


@KINDS
def test_an_example_is_disturbed_alike_wherever_it_stands(name, digits):
  before = digits.copy()
  whole = corrupt.corrupt(digits, name, 3, 7, np.arange(64))
  order = np.random.default_rng(1).permutation(64)
  np.testing.assert_array_equal(corrupt.corrupt(digits[order], name, 3, 7, order), whole[order])
  np.testing.assert_array_equal(digits, before)
  padded = corrupt.corrupt(digits[:2], name, 3, 7, np.array([0, -1]))
  np.testing.assert_array_equal(padded[0], whole[0])
  if name in ("noise", "occlusion", "rotation"):
    assert (corrupt.corrupt(digits, name, 3, 8, np.arange(64)) != whole).any()


def test_noise_keeps_its_pattern_and_grows():
  grey = np.full((1, 16, 16, 1), 128, np.uint8)
  weak, strong = (corrupt.corrupt(grey, "noise", s, 0, np.array([3])).astype(float) - 128 for s in (1, 2))
  inside = np.abs(strong) < 127
  np.testing.assert_allclose(strong[inside], 2 * weak[inside], atol=2)
  assert np.std(weak) == pytest.approx(255 * 0.05, rel=0.15)


def test_a_blur_keeps_flat_images_and_the_sum_of_a_point():
  flat = np.full((1, 9, 12, 3), 77, np.uint8)
  np.testing.assert_array_equal(corrupt.corrupt(flat, "blur", 5, 0, np.array([0])), flat)
  np.testing.assert_allclose(corrupt._gaussian(31, 2.0).sum(axis=1), 1, rtol=1e-6)
  response = corrupt._gaussian(31, 2.0)[15]
  assert np.sqrt(np.sum(response * (np.arange(31) - 15)**2)) == pytest.approx(2, rel=0.01)


def test_contrast_by_hand():
  images = np.array([0, 200], np.uint8).reshape(1, 1, 2, 1)
  assert corrupt.corrupt(images, "contrast", 2, 0, np.array([0])).ravel().tolist() == [40, 160]


def test_what_is_hidden_is_a_square():
  black = np.zeros((20, 10, 10, 1), np.uint8)
  hidden = corrupt.corrupt(black, "occlusion", 3, 0, np.arange(20))[..., 0] == corrupt.GREY
  assert (hidden.sum(axis=(1, 2)) == 25).all()
  assert (hidden.any(axis=1).sum(axis=1) == 5).all() and len({h.tobytes() for h in hidden}) > 5


def test_every_place_may_be_hidden():
  hidden = corrupt.corrupt(np.zeros((200, 4, 4, 1), np.uint8), "occlusion", 3, 0, np.arange(200))[..., 0] > 0
  assert hidden[0].sum() == 4 and len({h.tobytes() for h in hidden}) == 9


def test_names():
  assert corrupt.parse("") == []
  assert corrupt.parse("all") == list(corrupt.CORRUPTIONS)
  assert corrupt.parse("blur, noise") == ["blur", "noise"]
  with pytest.raises(UserError, match="--config.eval.corruptions: there is no 'niose'; did you mean noise"):
    corrupt.parse("blur,niose")
  with pytest.raises(UserError, match="name each once"):
    corrupt.parse("blur,blur")


def test_the_pipelines_disturb_the_test_split_alone(digits_dir, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(digits_dir))
  config = labelled.default_config()
  data = labelled.ImageSet(config).pipelines(
      batch_size=16, eval_batch_size=50, seed=0, corruptions=["blur", "noise"])
  assert list(data.corruptions) == ["blur", "noise"] and list(data.corruptions["blur"]) == list(corrupt.STRENGTHS)
  disturbed, clean = data.corruptions["noise"][4], data.evals["test"]
  assert disturbed.open() and not clean.open(), "they share what was read"
  assert (disturbed.num_examples, disturbed.num_batches) == (clean.num_examples, clean.num_batches)
  last = clean.num_batches - 1
  for step in (0, last):
    one, other = clean.batch(step), disturbed.batch(step)
    for field in ("label", "mask", "id"):
      np.testing.assert_array_equal(one[field], other[field])
    pixels = lambda batch: np.round((batch["image"] * config.std[0] + config.mean[0]) * 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels(other), corrupt.corrupt(
        pixels(one), "noise", 4, 0, np.where(one["mask"] > 0, one["id"], -1)))
  config.test = ""
  with pytest.raises(UserError, match="--config.data.test"):
    labelled.ImageSet(config).pipelines(batch_size=16, eval_batch_size=50, seed=0, corruptions=["blur"])
