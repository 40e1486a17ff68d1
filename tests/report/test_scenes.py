"""Classes of pixels over their image, and as a file of their own."""

import numpy as np
from PIL import Image

from dljax import report


def test_classes_of_pixels_are_laid_over_the_image():
  image = np.linspace(0, 1, 16).reshape(4, 4, 1)
  truth = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, -1, -1], [2, 2, -1, -1]])
  figure = report.segmentations([image, image],
                                {"truth": [truth, 0 * truth], "found": [truth, truth]},
                                ["ground", "cat", "dog", "cow"], caption="two")
  drawn = [axes.images[0].get_array() for axes in figure.axes]
  assert len(drawn) == 6 and all(pixels.shape == (4, 4, 3) for pixels in drawn)
  np.testing.assert_allclose(drawn[0], np.repeat(image, 3, axis=-1))
  tinted, colors = drawn[2], report.class_colors(3) / 255
  np.testing.assert_allclose(tinted[:2, :2], drawn[0][:2, :2])  # the ground
  np.testing.assert_allclose(tinted[0, 2], 0.35 * image[0, 2, 0] + 0.65 * colors[1])
  np.testing.assert_allclose(tinted[3, 0], 0.35 * image[3, 0, 0] + 0.65 * colors[2])
  np.testing.assert_allclose(tinted[2:, 2:], 1)
  np.testing.assert_allclose(drawn[3], drawn[1])  # nothing but ground
  assert [text.get_text() for text in figure.legends[0].texts] == ["cat", "dog"]
  assert [axes.get_ylabel() for axes in figure.axes] == ["", "", "truth", "", "found", ""]


def test_a_map_of_classes_holds_them_as_values_and_shows_their_colours(tmp_path):
  classes = np.arange(256, dtype=np.uint8).reshape(16, 16)
  report.class_map(classes).save(tmp_path / "map.png")
  with Image.open(tmp_path / "map.png") as picture:
    np.testing.assert_array_equal(picture, classes)
    shown = np.asarray(picture.convert("RGB")).reshape(-1, 3)
  np.testing.assert_array_equal(shown[:255], report.class_colors(255))
  assert (shown[255] == 255).all() and (shown[0] == 0).all()
  assert len(np.unique(shown[:51], axis=0)) == 51, "classes of one colour"


def test_the_label_of_a_box_lies_within_the_image():
  """Above the box where there is room, and no further to the right than the box."""
  found = {"boxes": np.array([[-2.0, 0, 30, 30], [60, 50, 99, 90], [10, 50, 40, 90]]), "labels": [0, 0, 0],
           "scores": [1.0, 1.0, 1.0]}
  figure = report.detections([np.zeros((96, 96, 1))], [{"boxes": []}], [found], ["a rather long name"])
  figure.draw_without_rendering()
  axes, = figure.axes
  frame = axes.get_window_extent()
  for text in axes.texts:
    box = text.get_window_extent()
    assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1 and box.y1 <= frame.y1 + 1
  assert [text.get_position() for text in axes.texts] == [(0, 0), (95.5, 50), (10, 50)]
