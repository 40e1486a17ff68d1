"""The measurements as tables for a terminal, and as a picture."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dljax import report as pictures
from experiments.benchmark.models import LABELS, OURS, peer_side


def render(report: Mapping[str, Any]) -> list[Any]:
  """The tables of the result of `measure`, for a `rich` console."""
  return [_verdicts(report), *([_sides(report["models"])] if "models" in report else [])]


def _verdicts(report: Mapping[str, Any]) -> Any:
  machine = report["machine"]
  table = _table(
      f"{machine['device']}, {machine['cores']} cores, jax {machine['jax']}; load average "
      f"{machine['load_before']:.1f} before, {machine['load_after']:.1f} after",
      "row", "on", "what", right=("value", "bound", "min..max"))
  table.add_column("verdict")
  for m in report["rows"]:
    spread = "" if m["low"] is None else f"{m['low']:.3g}..{m['high']:.3g}"
    bound = "" if m["bound"] is None else f"{'>=' if m['at_least'] else '<='} {m['bound']:g}"
    verdict = {True: "holds", False: "missed", None: ""}[m["holds"]]
    table.add_row(m["row"], m["name"], m["what"], f"{m['value']:.3f}", bound, spread, verdict)
  return table


def _sides(models: Mapping[str, Any]) -> Any:
  peaks = [result["peak_flops_per_second"] / 1e9 for result in models["cases"].values()]
  peers = ", ".join(f"{name} {version}"
                    for name, version in models["peers"]["found"].items()) or "no peer"
  table = _table(
      f"models: threads of each side: {models['threads']}; {peers}; a matrix product in float32 runs at "
      f"{min(peaks):.0f} to {max(peaks):.0f} GFLOP/s",
      "case", "side",
      right=("train ms (min..max)", "inference ms", "compile s", "first step s", "peak MB", "GFLOP/s", "of peak"))
  for case, result in models["cases"].items():
    table.add_section()
    for i, (side, facts) in enumerate(result["sides"].items()):
      train, inference = (facts["seconds"][quantity] for quantity in LABELS)
      speed, peak = result["train_flops"] / statistics.median(train), result["peak_flops_per_second"]
      compiled, held = facts.get("compile_seconds"), facts["peak_bytes"]
      table.add_row("" if i else case, side, _milliseconds(train), _milliseconds(inference),
                    "-" if compiled is None else f"{compiled:.1f}",
                    f"{facts['first_step_seconds']:.1f}", "-" if held is None
                    else f"{held / 1e6:.0f}", f"{speed / 1e9:.1f}", f"{speed / peak:.0%}")
  return table


def _table(title: str, *left: str, right: Sequence[str]) -> Any:
  from rich.table import Table  # pylint: disable=g-import-not-at-top

  table = Table(title=title, title_justify="left")
  for column in left:
    table.add_column(column)
  for column in right:
    table.add_column(column, justify="right", no_wrap=True)
  return table


def _milliseconds(turns: Sequence[float]) -> str:
  """[0.1, 0.2, 0.3] -> "200 (100..300)"."""
  short = lambda seconds: f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"
  return f"{short(statistics.median(turns))} ({short(min(turns))}..{short(max(turns))})"


def draw(models: Mapping[str, Any]) -> Any:
  """Draws each side's time for each case, as a multiple of the peer's faster layout.

  Without a peer, it is a multiple of our time.

  Args:
    models: the result of `measure_models`.

  Returns:
    A `matplotlib.figure.Figure`.
  """
  panels = {label: {} for label in LABELS.values()}
  for case, result in models["cases"].items():
    for quantity, label in LABELS.items():
      sides = result["sides"]
      unit = statistics.median(sides[peer_side(sides, quantity) or OURS]["seconds"][quantity])
      panels[label][case] = {
          side: [f(facts["seconds"][quantity]) / unit for f in (statistics.median, min, max)]
          for side, facts in sides.items()}
  return pictures.relative_bars(panels, "time / time of torch (of dljax where torch is not there)")
