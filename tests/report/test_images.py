"""Grids of images, and maps over them."""

import numpy as np
import pytest

from dljax import report


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_image_grid_stretches_each_image(shape):
  images = [np.random.default_rng(i).normal(10 * i, i + 1, size=shape) for i in range(3)]
  figure = report.image_grid(images, ["one", "two", "three"], columns=2)
  drawn = [axes for axes in figure.axes if axes.images]
  assert [axes.get_title() for axes in drawn] == ["one", "two", "three"]
  for axes in drawn:
    shown = axes.images[0].get_array()
    assert (shown.min(), shown.max()) == (0, 1)


def test_image_grid_shows_a_flat_image():
  shown = report.image_grid([np.full((4, 4), 7.0)]).axes[0].images[0].get_array()
  assert not shown.any()


def test_long_titles_do_not_run_into_each_other():
  images = [np.eye(8)] * 4
  figure = report.image_grid(images,
                             ["truth: a very long class name\nguess: another very long one"] * 4)
  figure.draw_without_rendering()
  boxes = [axes.title.get_window_extent() for axes in figure.axes]
  assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


def test_heat_maps_lie_over_their_images():
  images = [np.random.default_rng(i).normal(size=(4, 4, 3)) for i in range(2)]
  heat = np.abs(np.random.default_rng(2).normal(size=(2, 4, 4)))
  figure = report.heat_maps(images, {"saliency": heat, "signed": heat - 1}, ["cat", "dog"])
  rows = [figure.axes[:3], figure.axes[3:]]
  for i, (plain, one, signed) in enumerate(rows):
    assert len(plain.images) == 1 and plain.get_title() == ["cat", "dog"][i]
    np.testing.assert_allclose(one.images[1].get_array(), heat[i], rtol=1e-6)
    assert one.images[1].get_clim() == (0, pytest.approx(heat[i].max()))
    low, high = signed.images[1].get_clim()
    assert low == -high == pytest.approx(-np.abs(heat[i] - 1).max())  # white is 0
  assert [axes.get_title() for axes in rows[0][1:]] == ["saliency", "signed"]
  report.heat_maps([np.zeros((2, 2))], {"nothing": np.zeros((1, 2, 2))})
