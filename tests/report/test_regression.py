"""Guesses of numbers against the truth, as a picture."""

import numpy as np
import pytest

from dljax import report


def test_a_right_guess_lies_on_the_line_and_every_number_has_a_panel():
  truths = np.array([[1.0, 10.0, 5.0], [3.0, 30.0, 5.0]])
  figure = report.numbers(truths, truths, ["age", "a_$b$", "constant"])
  shown = [axes for axes in figure.axes if axes.get_visible()]
  assert [axes.get_title() for axes in shown] == ["age", r"a_\$b\$", "constant"]
  for axes, column in zip(shown, truths.T):
    dots, = axes.collections
    np.testing.assert_array_equal(dots.get_offsets(), np.column_stack([column, column]))
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlim()[0] < column.min() and axes.get_xlim()[1] > column.max()
  assert shown[0].get_xlim() == pytest.approx((0.9, 3.1))
  report.picture(figure)


def test_of_many_numbers_the_first_are_drawn():
  truths = np.zeros((3, 20))
  assert len(report.numbers(truths, truths, [str(i) for i in range(20)]).axes) == 16
