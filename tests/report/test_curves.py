"""Learning curves, corruptions and bars: what is drawn is what was measured."""

import json

import numpy as np
import pytest

from dljax import report
from dljax.report import common, curves
from dljax.tasks.forecasting import Forecasting

ROWS = [{"step": 10, "split": "train", "loss": 2.0, "accuracy": 0.3, "learning_rate": 0.1,
         "step_seconds": 1.0}, {"step": 20, "split": "train", "loss": 1.0, "accuracy": 0.6,
                                "learning_rate": 0.05, "grad_norm": 3.0},
        {"step": 20, "split": "validation", "loss": 1.5, "accuracy": 0.5},
        {"step": 10, "split": "validation", "loss": 2.5, "accuracy": 0.2},
        {"step": 20, "split": "test", "loss": 1.6, "accuracy": 0.45},]


def panels(figure):
  return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def line(axes, label):
  return next(line for line in axes.lines if line.get_label() == label)


def test_learning_curves_show_the_logged_points():
  drawn = panels(report.learning_curves(ROWS))
  assert list(drawn) == ["loss", "accuracy", "learning rate"]  # no norms, no times
  np.testing.assert_array_equal(line(drawn["loss"], "validation").get_xydata(),
                                [[10, 2.5], [20, 1.5]])
  np.testing.assert_array_equal(line(drawn["accuracy"], "test").get_xydata(), [[20, 0.45]])
  np.testing.assert_array_equal(drawn["learning rate"].lines[0].get_xydata(),
                                [[10, 0.1], [20, 0.05]])
  assert {axes.get_xlabel() for axes in drawn.values()} == {"step"}


def test_learning_curves_show_nothing_that_is_constant_or_twice_the_same():
  rows = [row for step in (1, 2) for row in (
      {"step": step, "split": "train", "loss": 3.0 / step, "mse": 3.0 / step, "mae": 1.0 / step,
       "top_5_accuracy": step / 2, "learning_rate": 0.5},
      {"step": step, "split": "validation", "loss": 2.0 / step, "mse": 2.0 / step, "mae": 2.0 / step,
       "top_5_accuracy": 1.0, "too_short": 0.0})]
  figure = report.learning_curves(rows)
  # The errors' size differs in training alone.
  assert list(panels(figure)) == ["loss, mean squared error", "mean absolute error"]
  assert figure.legends[0].get_title().get_text() == "constant: too short 0, top-5 accuracy 100 %, learning rate 0.5"
  once = report.learning_curves([{"step": 1, "split": "validation", "loss": 2.0, "ap": 0.5,
                                  "too_short": 0.0}])
  assert list(panels(once)) == ["loss", "AP"]  # one point may be the first of many


def test_learning_curves_have_the_titles_of_their_task():
  rows = [{"step": step, "split": "validation", "loss": 1 / step, "mse": 1 / step, "mae": 2.0 + step, "macro_f1": step}
          for step in (1, 2, 3)]
  figure = report.learning_curves(rows, Forecasting.titles)
  assert [axes.get_title() for axes in figure.axes[:3]] == [
      "loss, normalised mean squared error", "macro F1", "normalised mean absolute error"]
  plain = report.learning_curves(rows).axes
  assert plain[0].get_title() == "loss, mean squared error"


def test_learning_curves_leave_out_what_is_not_finite():
  rows = ROWS + [{"step": 30, "split": "validation", "loss": float("nan"),
                  "accuracy": float("inf")}]
  drawn = panels(report.learning_curves(rows))
  assert len(line(drawn["loss"], "validation").get_xdata()) == 2


def test_learning_curves_of_nothing_can_be_saved(tmp_path):
  report.save(report.learning_curves([]), tmp_path / "curves.png")
  assert (tmp_path / "curves.png").exists()


def test_the_moving_average_keeps_a_line_and_calms_noise():
  ramp = np.arange(200.0)
  np.testing.assert_allclose(curves._moving_average(ramp)[10:-10], ramp[10:-10])
  noise = np.random.default_rng(0).normal(size=2000)
  assert curves._moving_average(noise).std() < 0.2
  np.testing.assert_array_equal(curves._moving_average(np.array([3.0])), [3.0])


def test_relative_bars_go_from_one_to_the_value_with_the_range_across():
  figure = report.relative_bars({"train": {"a": {"x": (0.5, 0.25, 0.75), "y": (4, 3, 8)}},
                                 "inference": {}}, "ratio")
  axes = panels(figure)["train"]
  assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(1, -0.5), (1, 3)]
  ranges = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2
            and line.get_color() == common.INK]
  np.testing.assert_allclose(ranges, [[0.25, 0.75], [3, 8], [1, 1]])  # the last is the line at 1
  assert [text.get_text() for text in axes.texts] == ["0.50", "4.00"]
  assert axes.get_xscale() == "log" and axes.get_xlim()[0] < 0.25 and axes.get_xlim()[1] > 8


def test_read_metrics_skips_a_line_that_was_cut_short(tmp_path):
  path = tmp_path / "metrics.jsonl"
  text = "".join(json.dumps(row) + "\n" for row in ROWS)
  path.write_text(text)
  assert report.read_metrics(path) == ROWS
  path.write_text(text[:-20])
  assert report.read_metrics(path) == ROWS[:-1]
  path.write_text("nonsense\n" + text)
  with pytest.raises(json.JSONDecodeError):
    report.read_metrics(path)


def test_strengths_have_a_curve_each_and_the_clean_value_as_a_line():
  curves = {"accuracy": {"noise": [0.9, 0.8], "blur": [0.7, 0.5]},
            "loss": {"noise": [1, 2], "blur": [2, 3]}}
  drawn = panels(report.strengths(curves, {"accuracy": 0.95, "loss": 0.5}))
  assert list(drawn) == ["accuracy", "loss"]
  np.testing.assert_array_equal(line(drawn["accuracy"], "blur").get_xydata(), [[1, 0.7], [2, 0.5]])
  np.testing.assert_array_equal(line(drawn["loss"], "clean").get_ydata(), [0.5, 0.5])
  colors = {line(drawn["accuracy"], name).get_color() for name in ("noise", "blur", "clean")}
  assert len(colors) == 3
