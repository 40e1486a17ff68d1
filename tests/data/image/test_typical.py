"""Brightness: images that are unlike the training images are told, and others are not."""

import numpy as np
import pytest
from PIL import Image

from dljax.data.image import decode, labelled, typical


@pytest.fixture(scope="module")
def config():
  config = labelled.default_config()
  config.update({"image_shape": (12, 12, 1), "mean": (0.25,), "std": (0.5,)})
  return config


def _digit(seed, paper=0):
  """u8[12, 12, 1]: ink in the middle of black (or, with 255, of white) paper."""
  rng = np.random.default_rng(seed)
  image = np.zeros((12, 12, 1), np.uint8)
  image[3:9, 3:9] = rng.integers(0, 256, (6, 6, 1))
  return np.abs(paper - image.astype(int)).astype(np.uint8)


class _Records:
  """Records of PNG files, as `sources.Records` gives them."""

  def __init__(self, images):
    self._files = images

  def __len__(self):
    return len(self._files)

  def __getitem__(self, rows):
    return [{"image": [self._files[row]]} for row in rows]


def _png(image, tmp_path):
  Image.fromarray(image[..., 0]).save(tmp_path / "image.png")
  return (tmp_path / "image.png").read_bytes()


@pytest.fixture(scope="module")
def known(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("png")
  files = [_png(_digit(seed), folder) for seed in range(40)]
  return {typical.ASSET: typical.measure(_Records([*files, b"no image"]), config)}


def _batch(images, config):
  return (np.stack(images) / 255 - config.mean[0]) / np.float32(config.std[0])


def test_measured_are_the_whole_image_and_its_border(known):
  values = [_digit(seed).mean() / 255 for seed in range(40)]
  found = known[typical.ASSET]
  np.testing.assert_allclose(found["mean"], [[np.mean(values)], [0]], atol=1e-6)
  np.testing.assert_allclose(found["std"], [[np.std(values)], [0]], atol=1e-6)


def test_images_like_those_of_the_training_are_not_warned_of(known, config):
  images = [_digit(seed) for seed in range(100, 200)]
  assert typical.warnings(_batch(images, config), [str(i) for i in range(100)], config, known) == []


def test_ink_on_white_paper_is_warned_of_and_told_how_to_mend(known, config):
  images = _batch([_digit(100), *(_digit(seed, paper=255) for seed in range(4))], config)
  line, = typical.warnings(images, list("abcde"), config, known)
  assert line.startswith("4 of 5 images (b, c, d, ...) are much darker or brighter")
  assert line.endswith("--config.data.invert=true")
  inverted = config.copy_and_resolve_references()
  inverted.invert = True  # these were read inverted although they should not have been
  assert typical.warnings(images, list("abcde"), inverted, known)[0].endswith("invert=false")


def test_grey_images_are_warned_of_without_a_wrong_advice(known, config):
  grey = _batch([np.full((12, 12, 1), 128, np.uint8)], config)
  line, = typical.warnings(grey, ["a"], config, known)
  assert line.startswith("a is much darker or brighter than the images of the training")
  assert "may be wrong" in line and "invert" not in line


@pytest.mark.parametrize("assets", [{}, {typical.ASSET: {}}])
def test_a_run_that_measured_nothing_warns_of_nothing(config, assets):
  assert typical.warnings(_batch([_digit(0, 255)], config), ["a"], config, assets) == []


def test_pixels_are_those_before_the_normalisation(config):
  image = _digit(3)
  np.testing.assert_allclose(typical.pixels(_batch([image], config), config)[0], image / 255,
                             atol=1e-6)


@pytest.mark.parametrize("resize", ["pad", "bilinear", "crop"])
def test_invert_swaps_black_and_white_before_an_image_is_fitted(config, resize):
  inverted = config.copy_and_resolve_references()
  inverted.update({"invert": True, "resize": resize})
  plain = config.copy_and_resolve_references()
  plain.resize = resize
  image = _digit(1)[:, :8]
  np.testing.assert_array_equal(decode.fit(image, inverted), decode.fit(255 - image, plain))
