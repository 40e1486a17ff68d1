"""What a network saw: the pixels as they are, and the prediction in words and bars."""

import numpy as np

from dljax import report


def test_an_image_is_shown_as_it_is_with_its_shares_as_bars():
  image = np.full((4, 4, 1), 0.75)
  row = {"input": "a_$b.png", "label": "$x", "probability": 0.5,
         "probabilities": {f"c{i}": 0.5 / (i + 1) for i in range(7)}}
  left, right = report.seen(image, row).axes
  np.testing.assert_array_equal(left.images[0].get_array(), image[..., 0])
  assert left.images[0].get_clim() == (0, 1)  # not stretched
  assert left.get_title() == r"a_\$b.png"
  assert [bar.get_width() for bar in right.patches] == [0.5 / (i + 1) for i in range(5)]
  assert right.get_title() == r"\$x, probability 0.5"


def test_a_recording_has_its_text_below(tmp_path):
  figure = report.seen(np.zeros((16, 300)), {"input": "a.wav", "text": "HELLO $5"}, cmap="magma")
  upper, lower = figure.axes
  assert upper.images[0].get_array().shape == (16, 300)
  assert lower.texts[0].get_text() == r"HELLO \$5"
  report.save(figure, tmp_path / "seen.png")
