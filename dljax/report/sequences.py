"""Pictures of sequences: forecasts of series, texts, recordings and their symbols."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dljax.report import common
from dljax.report.common import COLORS, INK, MARGIN, MORE_COLORS

COLUMNS = 92  # characters in a line of a drawn text


def alignments(
    features: Sequence[np.ndarray], probabilities: Sequence[np.ndarray], symbols: Sequence[str],
    titles: Sequence[str], *, frame: float = 0.0,
) -> Any:
  """The features of recordings, and below them the probability of each symbol over time.

  Args:
    features: the features [t, F] of each recording, drawn with the lowest band at the bottom.
    probabilities: the probabilities [T, V] of each recording. Symbol 0, the blank, is drawn as a
      thin line; another is drawn and named if it is the most probable anywhere.
    symbols: the V symbols.
    titles: a title for each recording.
    frame: the time from one frame of the features to the next, in seconds; with 0 the time axis
      has no numbers.

  Returns:
    The figure, with a pair of panels for each recording.
  """
  figure = common.blank(9, 2.6 * len(features) + 0.4)
  panels = figure.subplots(2 * len(features), 1, squeeze=False,
                           height_ratios=[3, 2] * len(features))[:, 0]
  colors = [COLORS["test"], COLORS["validation"], *MORE_COLORS]
  for upper, lower, bands, shares, title in zip(panels[::2], panels[1::2], features, probabilities,
                                                titles):
    upper.imshow(np.asarray(bands).T, origin="lower", aspect="auto", cmap="magma",
                 interpolation="nearest")
    upper.set(xticks=[], yticks=[])
    upper.set_ylabel("band", fontsize=8, color=INK)
    upper.set_title(common.plain(title, 110), fontsize=8, color=INK, loc="left",
                    family="monospace")
    times = np.arange(len(shares))
    guess = np.argmax(shares, axis=1)
    lower.plot(times, shares[:, 0], color=COLORS["train"], linewidth=0.7, linestyle=":")
    for i, symbol in enumerate(sorted(set(guess.tolist()) - {0})):
      lower.plot(times, shares[:, symbol], color=colors[i % len(colors)], linewidth=1.2)
    start = 0
    for symbol, run in itertools.groupby(guess.tolist()):
      end = start + len(list(run))
      if symbol:
        at = start + int(np.argmax(shares[start:end, symbol]))
        lower.text(at, 1.04, common.plain(symbols[symbol].replace(" ", "␣")), ha="center",
                   fontsize=8, color=INK)
      start = end
    lower.set_xlim(-0.5, max(len(shares), 1) - 0.5)
    lower.set_ylim(0, 1.25)
    lower.set(yticks=[0, 1])
    lower.set_ylabel("probability", fontsize=8, color=INK)
    common.seconds(lower, frame * len(bands))
    lower.tick_params(labelsize=8, colors=INK)
    lower.spines[["top", "right"]].set_visible(False)
  return figure


def page(text: str, *, columns: int = COLUMNS) -> Any:
  """A text in black on white, in a monospaced font.

  Args:
    text: any text. Characters that cannot be printed are drawn as the replacement character.
    columns: the number of characters in a line; the rest of a longer line is drawn in the next.

  Returns:
    The `PIL.Image.Image`, as high as the text needs.
  """
  from matplotlib import font_manager
  from PIL import Image, ImageDraw, ImageFont

  font = ImageFont.truetype(font_manager.findfont("monospace"), 14)
  lines = [line[start:start + columns] for line in text.expandtabs(4).split("\n")
           for start in range(0, max(len(line), 1), columns)]
  width, height = round(font.getlength("m" * columns)), sum(font.getmetrics()) + 2
  image = Image.new("L", (width + 2 * MARGIN, len(lines) * height + 2 * MARGIN), 255)
  pen = ImageDraw.Draw(image)
  for i, line in enumerate(lines):
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    pen.text((MARGIN, MARGIN + i * height), shown, 0, font)
  return image


def surprise(
    pieces: Sequence[str], bits: Sequence[float], *, columns: int = COLUMNS, lines: int = 26,
) -> Any:
  """A text on a background that is darker where a token was less expected.

  Args:
    pieces: the text of each token; the end of a line is drawn as an arrow.
    bits: -log2 of each token's probability.
    columns, lines: the largest numbers of characters in a line, and of lines, that are drawn. The
      rest of a longer line is drawn in the next.

  Returns:
    The figure.
  """
  ground, texts, line, column = np.full((lines, columns), np.nan), [], 0, 0
  for character, value in ((c, b) for piece, b in zip(pieces, bits) for c in piece):
    if column == columns:
      line, column = line + 1, 0
    if line == lines:
      break
    ground[line, column] = value
    if character == "\n":
      texts.append((column, line, "↵"))
      line, column = line + 1, 0
    else:
      if character.isprintable() and character != " ":
        texts.append((column, line, character))
      column += 1
  ground = ground[:max(line + (column > 0), 1)]
  figure = common.blank(10.5, 0.2 * len(ground) + 0.9)
  axes = figure.add_subplot()
  image = axes.imshow(ground, cmap="OrRd", vmin=0, vmax=8, aspect="auto", interpolation="nearest")
  for x, y, character in texts:
    color = "white" if ground[y, x] > 5 else INK
    # Without `parse_math=False`, "$" in a text would start a formula.
    axes.text(x, y, character, ha="center", va="center_baseline", fontsize=8, family="monospace",
              color=color, parse_math=False)
  axes.set(xticks=[], yticks=[])
  axes.spines[:].set_visible(False)
  bar = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.4, aspect=40, pad=0.02,
                        extend="max")
  bar.set_label("bits of a token", fontsize=9)
  bar.ax.tick_params(labelsize=8)
  bar.outline.set_visible(False)
  return figure


def attention(
    pieces: Sequence[str], weights: np.ndarray, titles: Sequence[str], *, longest: int = 60,
) -> Any:
  """What each token of a text attends to, a panel for each layer or head.

  Args:
    pieces: the texts of N tokens; only the first `longest` are drawn.
    weights: [panels, N, N]; a row is a token that looks, and a column one that is looked at.
    titles: a title for each panel.
    longest: the number of tokens that are drawn, at most.

  Returns:
    The figure.
  """
  names = ["↵" if piece == "\n" else common.plain(piece.replace(" ", "␣"), 12)
           for piece in pieces[:longest]]
  across = min(len(titles), 4)
  down = -(-len(titles) // across)
  side = max(2.4, 0.15 * len(names))
  figure = common.blank(side * across + 0.8, side * down + 0.4 * down + 0.6)
  panels = figure.subplots(down, across, squeeze=False)
  image = None
  for i, axes in enumerate(panels.flat):
    if i >= len(titles):
      axes.set_visible(False)
      continue
    shown = np.asarray(weights[i], np.float32)[:len(names), :len(names)]
    image = axes.imshow(shown, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(common.plain(titles[i], 40), fontsize=9, color=INK)
    places = np.arange(len(names))
    axes.set_xticks(places, names, rotation=90, family="monospace", parse_math=False)
    axes.set_yticks(places, names if i % across == 0 else [""] * len(names), family="monospace",
                    parse_math=False)
    axes.tick_params(labelsize=7, length=0, colors=INK)
  bar = figure.colorbar(image, ax=panels, shrink=0.6, aspect=30, pad=0.02)
  bar.set_label("weight", fontsize=9)
  bar.ax.tick_params(labelsize=8)
  bar.outline.set_visible(False)
  return figure


def forecasts(
    rows: Mapping[str, Mapping[str, np.ndarray]], channels: Sequence[str], *, band: str = "",
    caption: str = "", step: str = "",
) -> Any:
  """Forecasts of time series, each after the window that it was made from.

  Args:
    rows: title -> "window" [W, C], "forecast" [H, C], and if they are known "truth" [H, C] and the
      limits "low" and "high" [H, C] of a band. NaN is left out.
    channels: the C names of the channels.
    band: the band's name, for the legend.
    caption: a title above all panels.
    step: the time from one row to the next, such as "1 hour"; "" if it is not known.

  Returns:
    The figure, with a row of panels for each title and a column for each channel. Of the window,
    the last rows are shown, up to twice the horizon.
  """
  figure, panels = common.panels(len(channels), len(rows), max(2.6, 7.0 / len(channels)), 1.9)
  handles = {}
  for r, (title, fields) in enumerate(rows.items()):
    horizon = len(fields["forecast"])
    shown = min(len(fields["window"]), 2 * horizon)
    before, after = np.arange(1 - shown, 1), np.arange(1, 1 + horizon)
    for c, name in enumerate(channels):
      axes = panels[r * len(channels) + c]
      past = np.asarray(fields["window"])[-shown:, c]
      handles["window"], = axes.plot(before, past, color=COLORS["train"], linewidth=1.2,
                                     label="window")
      if "low" in fields:
        handles["band"] = axes.fill_between(after, fields["low"][:, c], fields["high"][:, c],
                                            color=COLORS["test"], alpha=0.25, linewidth=0,
                                            label=band)
      if "truth" in fields:
        handles["truth"], = axes.plot(after, fields["truth"][:, c], color=INK, linewidth=1.2,
                                      label="truth")
      handles["forecast"], = axes.plot(after, fields["forecast"][:, c], color=COLORS["validation"],
                                       linewidth=1.5, label="forecast")
      axes.axvline(0.5, color=INK, linewidth=0.6, linestyle=":")
      # A title is that of a whole row. Above the first of several panels it would seem to be the
      # channel's, and be too wide.
      above, beside = (name, title.replace(": ", ":\n")) if len(channels) > 1 else (title, name)
      axes.set_title(common.plain(above, 40), fontsize=9, color=INK)
      if c == 0:
        axes.set_ylabel(common.plain(beside, 28), fontsize=9, color=INK)
      axes.tick_params(labelsize=8, colors=INK)
      axes.grid(alpha=0.25, linewidth=0.6)
      axes.spines[["top", "right"]].set_visible(False)
      if r == len(rows) - 1:
        axes.set_xlabel(_ahead(step), fontsize=9)
  if caption:
    figure.suptitle(common.plain(caption), fontsize=12, color=INK)
  drawn = [name for name in ("window", "truth", "forecast", "band") if name in handles]
  common.legend(figure, [handles[name] for name in drawn],
                [common.plain(band if name == "band" else name) for name in drawn],
                loc="outside lower center", ncols=4, frameon=False, fontsize=9)
  return figure


def _ahead(step: str) -> str:
  """The label of an axis that counts steps: "hours ahead", "steps of 15 minutes ahead"."""
  count, _, unit = step.partition(" ")
  if count == "1" and unit:
    return f"{unit}s ahead"
  return f"steps of {step} ahead" if step not in ("", "1") else "steps ahead"
