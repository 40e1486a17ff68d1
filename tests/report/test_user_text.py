"""Texts from the user are drawn as they are: none is a formula, a pattern or left out."""

import numpy as np
import pytest

from dljax import report
from dljax.report import common

NAMES = ["$0_to_$50", r"_a\$b_{$", "x$\0\udcff"]
SHOWN = ["$0_to_$50", r"_a\$b_{$", "x$\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"]


def _drawn(figure):
  """All texts of a figure as Matplotlib would draw them, but for formulas."""
  from matplotlib.text import Text

  for axes in figure.axes:  # gives the ticks their texts
    axes.get_xticklabels(), axes.get_yticklabels()
  texts = [text._preprocess_math(text.get_text()) for text in figure.findobj(Text)]
  return "\n".join(text for text, formula in texts if not formula)


def _figures():
  image, zeros = np.eye(4), np.zeros((3, 3))
  box = {"boxes": np.array([[0, 0, 2, 2]]), "labels": np.array([0]), "scores": np.array([0.5])}
  classes = np.arange(16).reshape(4, 4) % 4
  bars = {name: (1.0, 0.5, 2.0) for name in NAMES}
  series = {"window": zeros, "forecast": zeros, "low": zeros, "high": zeros}
  rows = [{"step": 1, "split": "_s$a$b", "loss": 1.0, **dict.fromkeys(NAMES, 2.0)}]
  return {
      "confusion": lambda: report.confusion_matrix(np.eye(3), NAMES),
      "grid": lambda: report.image_grid([image] * 3, NAMES, caption="".join(NAMES)),
      "heat": lambda: report.heat_maps([image] * 3, dict.fromkeys(NAMES, [image] * 3), NAMES),
      "curves": lambda: report.learning_curves(rows),
      "strengths": lambda: report.strengths({n: {m: [1.0] for m in NAMES} for n in NAMES}, dict.fromkeys(NAMES, 1.0)),
      "bars": lambda: report.relative_bars({n: {m: bars for m in NAMES} for n in NAMES}, "".join(NAMES)),
      "detections": lambda: report.detections([image] * 3, [box] * 3, [
          {**box, "labels": np.array([i])} for i in range(3)], NAMES, caption=NAMES[0]),
      "segmentations": lambda: report.segmentations([image], {n: [classes] for n in NAMES}, ["ground", *NAMES]),
      "alignments": lambda: report.alignments([image] * 3, [np.eye(4)] * 3, ["", *NAMES], NAMES),
      "attention": lambda: report.attention(NAMES, np.eye(3)[None].repeat(3, 0), NAMES),
      "forecasts": lambda: report.forecasts(dict.fromkeys(NAMES, series), NAMES, band=NAMES[0], caption=NAMES[1]),
  }


@pytest.mark.parametrize("kind", _figures())
def test_every_figure_shows_a_text_as_it_is(kind):
  drawn = _drawn(_figures()[kind]())
  for text in SHOWN:  # the name of a metric is drawn with spaces
    assert (text.replace("_", " ") if kind == "curves" else text) in drawn, drawn


def test_a_figure_with_such_names_can_be_drawn():
  assert report.picture(report.confusion_matrix(np.eye(3), NAMES)).width


def test_a_name_that_begins_with_a_dash_is_in_the_legend():
  figure = report.segmentations([np.eye(2)], {"truth": [np.eye(2, dtype=int)]}, ["ground", "_road"])
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_road"]


def test_texts_are_shortened_line_by_line():
  assert common.plain("abcdef\nab\0", 4) == "abc…\nab\N{REPLACEMENT CHARACTER}"
  assert common.plain("$$$$$", 3) == r"\$\$…"
