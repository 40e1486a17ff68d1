"""Pictures: what is drawn is what was measured, and a half-written file is never seen."""

import concurrent.futures
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dljax import report

ROWS = [
    {"step": 10, "split": "train", "loss": 2.0, "accuracy": 0.3, "learning_rate": 0.1, "step_seconds": 1.0},
    {"step": 20, "split": "train", "loss": 1.0, "accuracy": 0.6, "learning_rate": 0.05, "grad_norm": 3.0},
    {"step": 20, "split": "validation", "loss": 1.5, "accuracy": 0.5},
    {"step": 10, "split": "validation", "loss": 2.5, "accuracy": 0.2},
    {"step": 20, "split": "test", "loss": 1.6, "accuracy": 0.45},
]


def panels(figure):
  return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def line(axes, label):
  return next(line for line in axes.lines if line.get_label() == label)


def test_learning_curves_show_the_logged_points():
  drawn = panels(report.learning_curves(ROWS))
  assert list(drawn) == ["loss", "accuracy", "learning rate"]  # no norms, no times
  np.testing.assert_array_equal(line(drawn["loss"], "validation").get_xydata(), [[10, 2.5], [20, 1.5]])
  np.testing.assert_array_equal(line(drawn["accuracy"], "test").get_xydata(), [[20, 0.45]])
  np.testing.assert_array_equal(drawn["learning rate"].lines[0].get_xydata(), [[10, 0.1], [20, 0.05]])
  assert {axes.get_xlabel() for axes in drawn.values()} == {"step"}


def test_learning_curves_leave_out_what_is_not_finite():
  rows = ROWS + [{"step": 30, "split": "validation", "loss": float("nan"), "accuracy": float("inf")}]
  drawn = panels(report.learning_curves(rows))
  assert len(line(drawn["loss"], "validation").get_xdata()) == 2


def test_learning_curves_of_nothing_can_be_saved(tmp_path):
  report.save(report.learning_curves([]), tmp_path / "curves.png")
  assert (tmp_path / "curves.png").exists()


def test_the_moving_average_keeps_a_line_and_calms_noise():
  ramp = np.arange(200.0)
  np.testing.assert_allclose(report._moving_average(ramp)[10:-10], ramp[10:-10])
  noise = np.random.default_rng(0).normal(size=2000)
  assert report._moving_average(noise).std() < 0.2
  np.testing.assert_array_equal(report._moving_average(np.array([3.0])), [3.0])


def test_relative_bars_go_from_one_to_the_value_with_the_range_across():
  figure = report.relative_bars({"train": {"a": {"x": (0.5, 0.25, 0.75), "y": (4, 3, 8)}}, "inference": {}}, "ratio")
  axes = panels(figure)["train"]
  assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(1, -0.5), (1, 3)]
  ranges = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_color() == report.INK]
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
  figure = report.image_grid(images, ["truth: a very long class name\nguess: another very long one"] * 4)
  figure.draw_without_rendering()
  boxes = [axes.title.get_window_extent() for axes in figure.axes]
  assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


def test_a_reliability_diagram_shows_accuracy_by_confidence():
  figure = report.calibration([0, 4, 6], [0, 2.4, 5.4], [0, 1, 6])
  upper, lower = figure.axes
  bars = [(round(bar.get_x(), 3), bar.get_height()) for bar in upper.patches]
  assert bars == [(0.333, 0.25), (0.667, 1)]  # none where there is nothing
  points = next(line for line in upper.lines if line.get_linewidth() == 0)
  np.testing.assert_allclose(points.get_xydata(), [[0.6, 0.25], [0.9, 1]])
  assert [bar.get_height() for bar in lower.patches] == [0, 0.4, 0.6]
  assert upper.get_title() == "10 guesses, calibration error 20.00%"
  report.calibration([0], [0], [0])


def test_strengths_have_a_curve_each_and_the_clean_value_as_a_line():
  curves = {"accuracy": {"noise": [0.9, 0.8], "blur": [0.7, 0.5]}, "loss": {"noise": [1, 2], "blur": [2, 3]}}
  drawn = panels(report.strengths(curves, {"accuracy": 0.95, "loss": 0.5}))
  assert list(drawn) == ["accuracy", "loss"]
  np.testing.assert_array_equal(line(drawn["accuracy"], "blur").get_xydata(), [[1, 0.7], [2, 0.5]])
  np.testing.assert_array_equal(line(drawn["loss"], "clean").get_ydata(), [0.5, 0.5])
  colors = {line(drawn["accuracy"], name).get_color() for name in ("noise", "blur", "clean")}
  assert len(colors) == 3


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


def test_save_replaces_as_a_whole(tmp_path):
  path = tmp_path / "figures" / "grid.png"
  report.save(report.image_grid([np.eye(8)]), path)
  before = path.read_bytes()
  assert Image.open(path).width >= 4 * report.DPI

  class Broken:
    def savefig(self, target, **_):
      with open(target, "wb") as file:
        file.write(b"half")
      raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    report.save(Broken(), path)
  assert path.read_bytes() == before
  assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_threads_draw_at_once(tmp_path):
  def draw(i):
    report.save(report.confusion_matrix(np.eye(4) * i, list("abcd")), tmp_path / f"{i}.png")
    return (tmp_path / f"{i}.png").read_bytes()
  alone = draw(3)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    together = list(pool.map(draw, range(6)))
  assert together[3] == alone


def test_importing_needs_no_matplotlib_and_drawing_no_pyplot():
  code = ("import sys; from dljax import report; assert 'matplotlib' not in sys.modules; "
          "import numpy; report.image_grid([numpy.eye(2)]); assert 'matplotlib.pyplot' not in sys.modules")
  subprocess.run([sys.executable, "-c", code], check=True)


def test_a_confusion_matrix_in_per_cent():
  matrix = np.array([[990, 10], [0, 500]])
  texts = lambda **how: [text.get_text() for text in report.confusion_matrix(matrix, ["a", "b"], **how).axes[0].texts]
  assert texts() == ["990", "10", "500"]
  assert texts(per_cent=True) == ["99.0", "1.0", "100.0"]


def test_classes_of_pixels_are_laid_over_the_image():
  image = np.linspace(0, 1, 16).reshape(4, 4, 1)
  truth = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, -1, -1], [2, 2, -1, -1]])
  figure = report.segmentations([image, image], {"truth": [truth, 0 * truth], "found": [truth, truth]},
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


def test_forecasts_stand_after_their_window_and_beside_the_truth():
  draw = np.random.default_rng(0)
  fields = {"window": draw.normal(size=(9, 2)), "forecast": draw.normal(size=(3, 2)), "truth": draw.normal(size=(3, 2)),
            "low": np.full((3, 2), -2.0), "high": np.full((3, 2), 2.0)}
  fields["truth"][1, 1] = np.nan
  figure = report.forecasts({"best": fields, "worst": fields}, ["load", "price"], band="0.1 to 0.9 quantile")
  assert [axes.get_title() for axes in figure.axes] == ["load\nbest", "price\nbest", "load\nworst", "price\nworst"]
  for i, axes in enumerate(figure.axes):
    window, truth, forecast = axes.lines[:3]
    np.testing.assert_array_equal(window.get_xdata(), np.arange(-5, 1))  # twice the horizon
    np.testing.assert_array_equal(window.get_ydata(), fields["window"][-6:, i % 2])
    for line, name in (truth, "truth"), (forecast, "forecast"):
      np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
      np.testing.assert_array_equal(line.get_ydata(), fields[name][:, i % 2])
    band = axes.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose(band.get_points(), [[1, -2], [3, 2]])
  assert [text.get_text() for text in figure.legends[0].texts] == ["window", "truth", "forecast", "0.1 to 0.9 quantile"]
  plain = report.forecasts({"from now": {name: fields[name] for name in ("window", "forecast")}}, ["load", "price"])
  assert [text.get_text() for text in plain.legends[0].texts] == ["window", "forecast"]
  picture = report.picture(plain)
  assert picture.mode == "RGB" and min(picture.size) > 200 and len(np.unique(picture)) > 3


def test_alignments_name_each_run_of_a_symbol_at_its_peak():
  shares = np.full((8, 3), 0.1)
  path = [(0, 0.9), (1, 0.5), (1, 0.8), (0, 0.9), (1, 0.9), (2, 0.6), (2, 0.5), (0, 0.9)]
  for frame, (symbol, share) in enumerate(path):
    shares[frame, symbol] = share
  figure = report.alignments(
      [np.eye(16, 4)] * 2, [shares, shares[:0]], ["", "a", " "], ["said: aa \nread: aa ", "nothing"])
  upper, lower = figure.axes[:2]
  assert upper.images[0].get_array().shape == (4, 16)
  assert [(text.get_position()[0], text.get_text()) for text in lower.texts] == [(2, "a"), (4, "a"), (5, "␣")]
  assert len(lower.lines) == 3 and not figure.axes[3].texts
  assert upper.get_title(loc="left") == "said: aa \nread: aa "
  figure.draw_without_rendering()


def test_a_text_stands_on_the_bits_that_it_took():
  figure = report.surprise(["ab", "c d", "\n", "$x$"], [1.0, 2.0, 3.0, 9.0], columns=4, lines=3)
  axes = figure.axes[0]
  np.testing.assert_array_equal(axes.images[0].get_array().filled(-1), [[1, 1, 2, 2], [2, 3, -1, -1], [9, 9, 9, -1]])
  assert [text.get_text() for text in axes.texts] == ["a", "b", "c", "d", "↵", "$", "x", "$"]
  assert axes.texts[-1].get_color() == "white" and axes.texts[0].get_color() != "white"
  figure.draw_without_rendering()
  longer = report.surprise(["abcdefgh\n"] * 5, [1.0] * 5, columns=4, lines=3)
  assert longer.axes[0].images[0].get_array().shape == (3, 4)
  assert report.surprise([], []).axes[0].images[0].get_array().shape == (1, 92)
