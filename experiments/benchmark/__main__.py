"""The command line of the benchmark.

  python -m experiments.benchmark --output=benchmark.json

Two things that are compared take turns in one run, so that other load on the machine slows both. A
ratio is that of the medians of all turns; the smallest and the largest ratio of a turn stand next
to it. Leave the machine alone during a run.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dljax import errors, report
from dljax.errors import DONE, UserError, exit_with
from dljax.train import topology
from dljax.train.workdir import write_json
from experiments.benchmark import engine, sharding, tables
from experiments.benchmark.cases import CASES
from experiments.benchmark.measurement import Settings
from experiments.benchmark.models import Peers, find_peers, measure_models

_FLAGS = flags.FlagValues()
_ROWS = flags.DEFINE_list("rows", [], "The rows to measure, separated by commas; by default all.",
                          flag_values=_FLAGS)
_MODELS = flags.DEFINE_list("models", [],
                            "Cases of the row models, separated by commas; by default all: "
                            f"{', '.join(CASES)}.", flag_values=_FLAGS)
_PEER_PYTHON = flags.DEFINE_string(
    "peer_python", "", "The Python that has torch, torchvision, timm and transformers, for the row models; "
    "by default this one, if it has them.", flag_values=_FLAGS)
_STEPS = flags.DEFINE_integer("steps", 200, "The train steps of one turn; in the row models a turn takes a second.",
                              lower_bound=1, flag_values=_FLAGS)
_REPEATS = flags.DEFINE_integer("repeats", 7, "The turns of each side.", lower_bound=1,
                                flag_values=_FLAGS)
_OUTPUT = flags.DEFINE_string("output", "", "A .json file for the numbers; the row models also draws a .png with the "
                              "same name. By default they are only shown.", flag_values=_FLAGS)
_HELP = flags.DEFINE_bool("help", False, "Show this help.", flag_values=_FLAGS)

MODELS, SHARDING = "models", "sharding"
ROWS: Mapping[str, Callable[..., Any]] = {**engine.ROWS, MODELS: measure_models}


def measure(
    rows: Sequence[str], settings: Settings, cases: Sequence[str] = (),
    peers: Peers | None = None,
) -> dict[str, Any]:
  """Measures the rows, each in a new process, or with a process for each side.

  Args:
    rows: keys of `ROWS`.
    settings: how long to measure.
    cases, peers: the arguments of the row "models", see `measure_models`.

  Returns:
    JSON-able: "machine" (device, cores, load averages before and after, versions), "settings",
    "rows": one dict for each `Measurement`, with its "row" and whether it "holds"; and for the row
    "models" all its turns, "models".
  """
  machine = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0],
             "jax": importlib.metadata.version("jax"),
             "python": ".".join(map(str, sys.version_info[:3]))}
  found, extra = [], {}
  for row in rows:
    print(f"{row}: {_first_line(row)}", file=sys.stderr, flush=True)
    if row == MODELS:
      print(peers.describe(), file=sys.stderr, flush=True)
      measurements, extra[row] = measure_models(settings, cases, peers)
      machine["device"] = extra[row]["device"]
    else:
      with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        machine["device"], measurements = pool.submit(engine.measure_row, row, settings).result()
    found += [{"row": row, **dataclasses.asdict(m), "holds": m.holds} for m in measurements]
  machine["load_after"] = os.getloadavg()[0]
  return {"machine": machine, "settings": dataclasses.asdict(settings), "rows": found, **extra}


def _run(argv: Sequence[str]) -> int:
  try:
    rest = _FLAGS(argv)
  except flags.Error as error:
    raise UserError(str(error).replace("\n", " ")) from None
  if rest[1:]:
    raise UserError(f"{rest[1]!r} is not a flag; write --FLAG=VALUE, and see --help")
  if _HELP.value:
    print(_help())
    return DONE
  rows, cases = _ROWS.value or list(ROWS), _MODELS.value or list(CASES)
  for row in rows:
    errors.choose("--rows", row, ROWS)
  for case in cases:
    errors.choose("--models", case, CASES)
  for flag in (_MODELS, _PEER_PYTHON):
    if flag.value and MODELS not in rows:
      raise UserError(f"--{flag.name} is for the row {MODELS}, which --rows leaves out; drop one of the two")
  output = Path(_OUTPUT.value) if _OUTPUT.value else None
  if output and output.suffix != ".json":
    raise UserError(f"--output={output}: must end in .json")
  if output and not output.absolute().parent.is_dir():
    raise UserError(f"--output={output}: there is no folder {output.absolute().parent}; make it first")
  peers = find_peers(_PEER_PYTHON.value) if MODELS in rows else None
  if SHARDING in rows and (missing := topology.missing_compiler(sharding.MACHINE)):
    if _ROWS.value:
      raise UserError(f"--rows={SHARDING}: {missing}")
    print(f"{SHARDING}: left out, as {missing}", file=sys.stderr)
    rows.remove(SHARDING)
  measured = measure(rows, Settings(_STEPS.value, _REPEATS.value), cases, peers)
  from rich.console import Console  # pylint: disable=g-import-not-at-top

  console = Console(width=None if sys.stdout.isatty() else 140)
  for table in tables.render(measured):
    console.print(table)
  if output:
    write_json(output, measured)
    print(f"written to {output}")
    if MODELS in rows:
      picture = output.with_suffix(".png")
      with errors.writing(picture):
        report.save(tables.draw(measured[MODELS]), picture)
      print(f"written to {picture}")
  return DONE


def _help() -> str:
  lines = ["usage: python -m experiments.benchmark [--FLAG=VALUE ...]", "", "rows:"]
  lines += [f"  {name:12}{_first_line(name)}" for name in ROWS]
  lines += ["", "flags:"]
  for name in _FLAGS:
    flag = _FLAGS[name]
    lines += [f"  --{name}" + (f"={flag.default}" if flag.default else ""), f"      {flag.help}"]
  return "\n".join(lines)


def _first_line(row: str) -> str:
  return ROWS[row].__doc__.splitlines()[0]


def main() -> None:
  """Runs the command line, and exits.

  The exit status is 0 when all rows were measured, 1 after a failure, 2 on bad input, and 75 after
  Ctrl-C or SIGTERM.
  """
  exit_with(lambda: _run(sys.argv), "stopped; nothing is written")


if __name__ == "__main__":
  main()
