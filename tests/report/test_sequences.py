"""Forecasts, texts and recordings: everything stands at its time."""

import numpy as np
import pytest

from dljax import report


def test_forecasts_stand_after_their_window_and_beside_the_truth():
  draw = np.random.default_rng(0)
  fields = {"window": draw.normal(size=(9, 2)), "forecast": draw.normal(size=(3, 2)),
            "truth": draw.normal(size=(3, 2)), "low": np.full((3, 2), -2.0),
            "high": np.full((3, 2), 2.0)}
  fields["truth"][1, 1] = np.nan
  figure = report.forecasts({"best": fields, "worst": fields}, ["load", "price"],
                            band="0.1 to 0.9 quantile", step="1 hour")
  assert [axes.get_title() for axes in figure.axes] == ["load", "price"] * 2
  assert [axes.get_ylabel() for axes in figure.axes] == ["best", "", "worst", ""]
  assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "hours ahead", "hours ahead"]
  for i, axes in enumerate(figure.axes):
    window, truth, forecast = axes.lines[:3]
    np.testing.assert_array_equal(window.get_xdata(), np.arange(-5, 1))  # twice the horizon
    np.testing.assert_array_equal(window.get_ydata(), fields["window"][-6:, i % 2])
    for line, name in (truth, "truth"), (forecast, "forecast"):
      np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
      np.testing.assert_array_equal(line.get_ydata(), fields[name][:, i % 2])
    band = axes.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose(band.get_points(), [[1, -2], [3, 2]])
  assert [text.get_text() for text in figure.legends[0].texts] == ["window", "truth", "forecast",
                                                                   "0.1 to 0.9 quantile"]
  plain = report.forecasts({"from now": {name: fields[name] for name in ("window", "forecast")}},
                           ["load", "price"])
  assert [text.get_text() for text in plain.legends[0].texts] == ["window", "forecast"]
  picture = report.picture(plain)
  assert picture.mode == "RGB" and min(picture.size) > 200 and len(np.unique(picture)) > 3


@pytest.mark.parametrize("step, label", [
    ("", "steps ahead"), ("1", "steps ahead"), ("2", "steps of 2 ahead"), ("1 business day", "business days ahead"),
    ("15 minutes", "steps of 15 minutes ahead")])
def test_forecasts_count_in_the_steps_of_the_series(step, label):
  fields = {"window": np.zeros((2, 1)), "forecast": np.ones((2, 1))}
  axes, = report.forecasts({"least error": fields}, ["sales"], step=step).axes
  assert axes.get_xlabel() == label
  assert (axes.get_title(), axes.get_ylabel()) == ("least error", "sales")


def test_recordings_have_an_axis_in_seconds():
  """Two frames of features for each of the output; both panels lie over the same time."""
  figure = report.alignments([np.eye(200, 4)], [np.full((100, 2), 0.5)], ["", "a"], ["x"], frame=0.01)
  _, lower = figure.axes
  ticks = {label.get_text(): place for place, label in zip(lower.get_xticks(), lower.get_xticklabels())}
  assert ticks["0"] == -0.5 and ticks["2"] == 99.5 and ticks["1"] == 49.5
  assert lower.get_xlabel() == "seconds"
  without, = report.alignments([np.eye(4)], [np.full((4, 2), 0.5)], ["", "a"], ["x"]).axes[1:]
  assert not len(without.get_xticks()) and not without.get_xlabel()
  heard = report.seen(np.zeros((4, 30)), {"input": "a.wav", "text": "e"}, duration=0.3).axes[0]
  assert heard.get_xlabel() == "seconds" and heard.get_xticklabels()[-1].get_text() == "0.3"
  assert heard.get_xticks()[-1] == pytest.approx(29.5)
  assert not len(report.seen(np.zeros((4, 30)), {"input": "a.png"}).axes[0].get_xticks())


def test_alignments_name_each_run_of_a_symbol_at_its_peak():
  shares = np.full((8, 3), 0.1)
  path = [(0, 0.9), (1, 0.5), (1, 0.8), (0, 0.9), (1, 0.9), (2, 0.6), (2, 0.5), (0, 0.9)]
  for frame, (symbol, share) in enumerate(path):
    shares[frame, symbol] = share
  figure = report.alignments([np.eye(16, 4)] * 2, [shares, shares[:0]], ["", "a", " "],
                             ["said: aa \nread: aa ", "nothing"])
  upper, lower = figure.axes[:2]
  assert upper.images[0].get_array().shape == (4, 16)
  assert [(text.get_position()[0], text.get_text())
          for text in lower.texts] == [(2, "a"), (4, "a"), (5, "␣")]
  assert len(lower.lines) == 3 and not figure.axes[3].texts
  assert upper.get_title(loc="left") == "said: aa \nread: aa "
  figure.draw_without_rendering()


def test_a_text_stands_on_the_bits_that_it_took():
  figure = report.surprise(["ab", "c d", "\n", "$x$"], [1.0, 2.0, 3.0, 9.0], columns=4, lines=3)
  axes = figure.axes[0]
  np.testing.assert_array_equal(axes.images[0].get_array().filled(-1),
                                [[1, 1, 2, 2], [2, 3, -1, -1], [9, 9, 9, -1]])
  assert [text.get_text() for text in axes.texts] == ["a", "b", "c", "d", "↵", "$", "x", "$"]
  assert axes.texts[-1].get_color() == "white" and axes.texts[0].get_color() != "white"
  figure.draw_without_rendering()
  longer = report.surprise(["abcdefgh\n"] * 5, [1.0] * 5, columns=4, lines=3)
  assert longer.axes[0].images[0].get_array().shape == (3, 4)
  assert report.surprise([], []).axes[0].images[0].get_array().shape == (1, 92)


def test_a_page_has_the_lines_of_its_text_broken_at_the_last_column():
  page = report.page("abcdefgh\n\nxy", columns=4)
  short, line = report.page("a", columns=4), report.page("a\nb", columns=4).height
  line -= short.height
  assert page.size == (short.width, short.height + 3 * line) and line > 10
  assert report.page("", columns=4).size == short.size
  pixels = np.asarray(page)
  assert (pixels[:8] == 255).all() and (pixels[:, :8] == 255).all()
  inked = [(pixels[8 + i * line:8 + (i + 1) * line] < 128).any() for i in range(4)]
  assert inked == [True, True, False, True]  # abcd, efgh, nothing, xy
  np.testing.assert_array_equal(page, report.page("abcd\nefgh\n\nxy", columns=4))


def test_a_page_shows_what_cannot_be_printed():
  np.testing.assert_array_equal(report.page("a\0b"), report.page("a\N{REPLACEMENT CHARACTER}b"))
  np.testing.assert_array_equal(report.page("\tb"), report.page("    b"))
  assert not np.array_equal(report.page("a\0b"), report.page("a b"))


def test_attention_has_the_looking_token_as_the_row():
  weights = np.tril(np.arange(1, 17).reshape(1, 4, 4) / 16).repeat(5, 0)
  figure = report.attention(["a", " b", "\n", "d"], weights, [f"head {i}" for i in range(5)], longest=3)
  panels = [axes for axes in figure.axes if axes.get_title()]
  assert [axes.get_title() for axes in panels] == [f"head {i}" for i in range(5)]
  np.testing.assert_allclose(panels[4].images[0].get_array(), weights[4, :3, :3])
  assert [text.get_text() for text in panels[0].get_xticklabels()] == ["a", "␣b", "↵"]
