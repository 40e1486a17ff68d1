"""Runs an experiment's command line inside the test's process: starting one takes seconds."""

import ast
import contextlib
import dataclasses
import functools
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from dljax.report import common
from dljax import errors, launch, report

_DATA = Path(__file__).parents[1] / "dljax" / "data" / "README.md"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What `python -m experiments.x` gives: the exit status, and what it wrote."""

  status: int
  out: str
  err: str


def xla_flags(devices: int) -> str:
  """XLA_FLAGS for a process with so many CPU devices, which compiles as this one does."""
  return re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])


def run(experiment: ModuleType, *arguments: str) -> Outcome:
  """`python -m experiments.x ARGUMENTS`."""
  out, err = io.StringIO(), io.StringIO()
  argv = [experiment.__file__, *map(str, arguments)]
  with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      launch.main(experiment.get_config, experiment.build, experiment.PRESETS, _resolve(experiment))
    except SystemExit as end:
      status = end.code
  return Outcome(status, out.getvalue(), err.getvalue())


def _resolve(experiment: ModuleType) -> Any:
  """What the last line of an experiment's file hands to `launch.main` to look up the user's data; or None."""
  if not isinstance(experiment, ModuleType):  # one that a test has made
    return getattr(experiment, "resolve", None)
  call = ast.parse(Path(experiment.__file__).read_text()).body[-1].body[-1].value
  return functools.reduce(getattr, ast.unparse(call.args[3]).split("."), experiment) if len(call.args) > 3 else None


def refuse(experiment: ModuleType, *arguments: str) -> str:
  """The one line by which a command line is refused, without its "error: "."""
  outcome = run(experiment, *arguments)
  assert outcome.status == errors.BAD_INPUT, outcome
  assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
  return outcome.err.removeprefix("error: ").strip()


def documented(section: str) -> list[tuple[str, list[str]]]:
  """The commands in the first block of a section of dljax/data/README.md, each as (family, arguments)."""
  block = _DATA.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0].split("```")[1].replace("\\\n", " ")
  lines = [shlex.split(line, comments=True) for line in block.strip().splitlines()]
  return [(words[2].removeprefix("experiments."), words[3:]) for words in lines]


@contextlib.contextmanager
def plain_pictures() -> Iterator[None]:
  """Draws empty figures for those of a classifier: half of a short run's time, where no test looks at them."""
  with contextlib.ExitStack() as stack:
    for name in ("learning_curves", "confusion_matrix", "calibration", "image_grid"):
      stack.enter_context(mock.patch.object(report, name, lambda *_, **__: common.blank(1, 1)))
    yield
