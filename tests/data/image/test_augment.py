"""Each transform against a closed form, or where it must do nothing."""

import numpy as np
import pytest

from dljax.data.image import augment


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def images(request):
  return np.random.default_rng(0).integers(0, 256, (6, 9, 12, request.param), dtype=np.uint8)


def test_normalise(images):
  mean, std = (0.1, 0.2, 0.3)[:images.shape[-1]], (0.5, 0.25, 0.2)[:images.shape[-1]]
  out = augment.normalise(images, mean, std)
  assert out.dtype == np.float32
  np.testing.assert_allclose(out, (images / 255 - np.array(mean)) / np.array(std), atol=1e-6)


def test_pad_and_crop_shifts(images):
  n = len(images)
  still = np.zeros(n, int)
  np.testing.assert_array_equal(augment.pad_and_crop(images, 3, still, still), images)
  out = augment.pad_and_crop(images, 3, np.array([2, 0, 0, -3, 0, 0]), np.array([0, 0, -1, 1, 0, 0]))
  np.testing.assert_array_equal(out[0, :-2], images[0, 2:])  # the window moved down: content moves up
  assert not out[0, -2:].any()
  np.testing.assert_array_equal(out[2, :, 1:], images[2, :, :-1])
  assert not out[2, :, 0].any()
  np.testing.assert_array_equal(out[3, 3:, :-1], images[3, :-3, 1:])


def test_flip_twice_is_the_identity(images):
  which = np.array([True, False, True, True, False, False])
  once = augment.flip(images, which)
  np.testing.assert_array_equal(once[0], images[0, :, ::-1])
  np.testing.assert_array_equal(once[~which], images[~which])
  np.testing.assert_array_equal(augment.flip(once, which), images)


def test_resize_of_a_plane_is_a_plane():
  ramp = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (4, 16, 1))
  out = augment.resize(ramp, 4, 8)[0, :, 0].astype(int)
  assert (abs(np.diff(out)[1:-1] - 20) <= 1).all()
  assert augment.resize(ramp, 7, 5).shape == (7, 5, 1)


def test_resize_is_bilinear():
  """Between the centres of two pixels the values lie on a line, and beyond them they stay."""
  step = np.array([40, 40, 200, 200], np.uint8)[None, :, None]
  np.testing.assert_array_equal(augment.resize(step, 1, 8)[0, :, 0], [40, 40, 40, 80, 160, 200, 200, 200])


def test_centre_crop_takes_the_centre():
  picture = np.zeros((20, 40, 3), np.uint8)
  picture[5:15, 15:25] = 255
  np.testing.assert_array_equal(augment.centre_crop(picture, 10, 10, 0.5), np.full((10, 10, 3), 255))
  assert augment.centre_crop(picture, 10, 10, 1.0).mean() < 100  # the whole shorter side


def test_letterbox_keeps_small_images_and_shrinks_large_ones(images):
  out = augment.letterbox(images[0], 13, 16)
  np.testing.assert_array_equal(out[2:11, 2:14], images[0])
  assert int(out.astype(int).sum()) == int(images[0].astype(int).sum())
  white = np.full((50, 100, 1), 255, np.uint8)
  small = augment.letterbox(white, 8, 8)
  assert (small[2:6] == 255).all() and not small[:2].any() and not small[6:].any()


def test_random_crop_box_has_the_area_and_ratio_asked_for():
  box = augment.random_crop_box(100, 200, np.array([0.25]), np.array([np.log(4 / 3)]), np.array([0.999, 0.0]))
  left, top, right, bottom = box
  assert (left, bottom) == (0, 100)  # as far down and left as it goes
  assert abs((right - left) * (bottom - top) / 20000 - 0.25) < 0.01
  assert abs((right - left) / (bottom - top) - 4 / 3) < 0.02
  second = augment.random_crop_box(100, 200, np.array([9.0, 1.0]), np.log([1.0, 2.0]), np.zeros(2))
  assert second == (0, 0, 200, 100)  # the first candidate does not fit, the second is the whole image
  none_fits = augment.random_crop_box(100, 200, np.array([9.0]), np.zeros(1), np.zeros(2))
  assert none_fits == (0, 0, 200, 100)


def test_color_jitter(images):
  n = len(images)
  one, zero = np.ones(n), np.zeros(n)
  np.testing.assert_allclose(augment.color_jitter(images, one, one, one), images, atol=1e-3)
  assert not augment.color_jitter(images, zero, one, one).any()
  np.testing.assert_allclose(augment.color_jitter(images, one / 2, one, one), images / 2, atol=1e-3)
  flat = augment.color_jitter(images, one, zero, one)
  assert np.ptp(flat, axis=(1, 2, 3)).max() < 1e-3
  np.testing.assert_allclose(flat[:, 0, 0, 0], augment.grey(images).mean(axis=(1, 2, 3)), rtol=1e-5)
  dull = augment.color_jitter(images, one, one, zero)
  np.testing.assert_allclose(np.broadcast_to(augment.grey(images), images.shape), dull, atol=1e-3)


def test_cutout_covers_size_squared_pixels(images):
  fill = np.arange(1, images.shape[-1] + 1) * 300.0  # a value no image has
  y, x = np.array([4, 0, 8, 4, 4, 4]), np.array([6, 0, 11, 0, 6, 6])
  out = augment.cutout(images, y, x, 4, fill)
  covered = (out == fill).all(-1)
  assert covered.sum(axis=(1, 2)).tolist() == [16, 4, 9, 8, 16, 16]  # clipped at the borders
  assert covered[0, 2:6, 4:8].all()
  np.testing.assert_array_equal(out[~covered], images[~covered])
  assert images.dtype == np.uint8  # untouched


def test_mixup_weights(images):
  partners = images[::-1]
  np.testing.assert_allclose(augment.mixup(images, partners, 0.3), 0.3 * images + 0.7 * partners, rtol=1e-5)
  np.testing.assert_array_equal(augment.mixup(images, partners, 1.0), images)


def test_cutmix_weight_is_the_share_that_stayed():
  ours, theirs = np.zeros((2, 20, 30, 3), np.float32), np.ones((2, 20, 30, 3), np.float32)
  for weight, y, x in (0.75, 0.5, 0.5), (0.3, 0.0, 0.9), (1.0, 0.2, 0.2):
    out, stayed = augment.cutmix(ours, theirs, augment.cutmix_box(20, 30, weight, y, x))
    np.testing.assert_allclose(1 - out.mean(), stayed, rtol=1e-6)
    if y == 0.5:
      assert abs(stayed - weight) < 0.05  # not clipped: equation 2 of the paper
    assert stayed >= weight - 0.05
  assert stayed == 1 and not out.any()


@pytest.mark.parametrize("op", augment.RANDAUGMENT_OPS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_rand_augment_at_magnitude_0_is_the_identity(images, op, sign):
  ops = np.array([augment.RANDAUGMENT_OPS.index(op)])
  image = np.tile(images[0] // 2 + 50, (4, 3, 1))
  still = augment.rand_augment(image, ops, np.array([sign]), 0.0)
  assert still.shape == image.shape and still.dtype == np.uint8
  if op in ("autocontrast", "equalize"):  # these have no magnitude: they stretch the values
    assert np.ptp(still) > 1.5 * np.ptp(image)
  else:
    np.testing.assert_array_equal(still, image)
  moved = augment.rand_augment(image, ops, np.array([sign]), 20.0)
  idle = op in ("identity", "autocontrast", "equalize") or (op == "color" and image.shape[-1] == 1)
  assert (moved == still).all() == idle


def test_rand_augment_moves_and_inverts_as_it_says():
  image = np.zeros((33, 33, 1), np.uint8)
  image[16, 16] = 200
  index = augment.RANDAUGMENT_OPS.index
  apply = lambda op, sign, magnitude: augment.rand_augment(
      image, np.array([index(op)]), np.array([sign]), magnitude)[..., 0]
  shift = int(150 / 331 * 33 * 10 / 30)
  assert apply("translate_x", 1, 10.0)[16, 16 - shift] == 200
  assert apply("translate_y", -1, 10.0)[16 + shift, 16] == 200
  np.testing.assert_array_equal(apply("solarize", 1, 30.0), 255 - image[..., 0])
  assert apply("posterize", 1, 30.0)[16, 16] == 200 & 0b11110000
  twice = augment.rand_augment(image, np.array([index("translate_x")] * 2), np.array([1, -1]), 10.0)
  np.testing.assert_array_equal(twice, image)  # layers follow each other
