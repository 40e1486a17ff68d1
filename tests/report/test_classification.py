"""Confusion matrices and calibration: the numbers drawn are those that were counted."""

import numpy as np

from dljax import report


def test_confusion_matrix_writes_counts_and_colours_by_truth():
  matrix = np.array([[30, 10, 0], [0, 5, 0], [0, 0, 0]])
  axes, bar = report.confusion_matrix(matrix, ["cat", "dog", "newt"]).axes
  shares = axes.images[0].get_array()
  np.testing.assert_allclose(shares, [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
  cells = {text.get_position(): text.get_text() for text in axes.texts}
  assert cells == {(0, 0): "30", (1, 0): "10", (1, 1): "5"}
  assert (axes.get_ylabel(), axes.get_xlabel()) == ("truth", "guess")
  assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog", "newt"]
  assert "35 of 45 right (77.78%)" == axes.get_title()


def test_a_large_confusion_matrix_has_no_text_to_overlap():
  axes = report.confusion_matrix(np.eye(100), [f"class {i}" for i in range(100)]).axes[0]
  assert not axes.texts
  assert len(axes.get_xticklabels()) < 20


def test_a_confusion_matrix_in_per_cent():
  matrix = np.array([[990, 10], [0, 500]])
  texts = lambda **how: [text.get_text() for text in report.confusion_matrix(matrix, ["a", "b"],
                                                                             **how).axes[0].texts]
  assert texts() == ["990", "10", "500"]
  assert texts(per_cent=True) == ["99.0", "1.0", "100.0"]


def test_a_reliability_diagram_shows_accuracy_by_confidence():
  figure = report.calibration([0, 4, 6], [0, 2.4, 5.4], [0, 1, 6])
  upper, lower = figure.axes
  bars = [(round(bar.get_x(), 3), bar.get_height()) for bar in upper.patches]
  assert bars == [(0.333, 0.25), (0.667, 1)]  # none where there is nothing
  points, = upper.collections
  np.testing.assert_allclose(points.get_offsets(), [[0.6, 0.25], [0.9, 1]])
  # The dots are whole at the ends of the axes, and their areas are as their counts.
  assert not points.get_clip_on()
  np.testing.assert_allclose(points.get_sizes() / points.get_sizes()[-1], [4 / 6, 1])
  assert [bar.get_height() for bar in lower.patches] == [0, 0.4, 0.6]
  assert upper.get_title() == "10 guesses, calibration error 20.00%"
  report.calibration([0], [0], [0])
