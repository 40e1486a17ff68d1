"""What the suite costs: CPU-seconds by family and by file, printed at the end of every run.

A test costs what its process and the processes it started and waited for have used, fixtures included; a fixture
shared by several tests counts for the first that asks for it. Workers send each cost with the report of the test's
teardown, and what they used in all when they finish. A family has a share, so that there is room for twenty. With
CI=true a family that takes more than `TIMES_SHARE` times its share fails the run, and so does a quick suite that is too
dear in all.
"""

import collections
import dataclasses
import os
import re
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

SHARE = {"quick": 25.0, "slow": 90.0}  # CPU-seconds of a family
# How many times its share a family may take before a run in CI fails: on a loaded machine the same tests take up to
# twice as many CPU-seconds.
TIMES_SHARE = {"quick": 2.0, "slow": 2.0}
QUICK_IN_ALL = 1000.0  # CPU-seconds; the aim is 900
FILES_SHOWN = 12
FAMILIES = sorted(
    path.stem for path in (Path(__file__).parents[1] / "experiments").glob("*.py") if path.stem != "__init__")


def cpu_seconds() -> float:
  """User and system time of this process and of its children that have ended."""
  children = resource.getrusage(resource.RUSAGE_CHILDREN)
  return _own_seconds() + children.ru_utime + children.ru_stime


def _own_seconds() -> float:
  own = resource.getrusage(resource.RUSAGE_SELF)
  return own.ru_utime + own.ru_stime


@dataclasses.dataclass(frozen=True)
class Cost:
  """One test's cost: its node id, "quick" or "slow", and CPU-seconds."""

  nodeid: str
  kind: str
  seconds: float


def carries(nodeid: str, family: str) -> bool:
  """Whether a node id has a family's name as a word: `test_vit.py`, `[vit-digits]`, `[vit_tiny]`; not `[vitro]`."""
  return re.search(f"(?<![a-zA-Z0-9]){re.escape(family)}(?![a-zA-Z0-9])", nodeid) is not None


def by_family(costs: Sequence[Cost], families: Sequence[str] = FAMILIES) -> dict[str, Mapping[str, float]]:
  """CPU-seconds of every family that ran, by kind; a test that names two families counts for both."""
  found = {}
  for family in families:
    seconds = collections.Counter()
    for cost in costs:
      if carries(cost.nodeid, family):
        seconds[cost.kind] += cost.seconds
    if seconds:
      found[family] = seconds
  return found


def by_file(costs: Sequence[Cost]) -> dict[str, Mapping[str, float]]:
  """CPU-seconds of every file that ran, by kind, the dearest first."""
  found = collections.defaultdict(collections.Counter)
  for cost in costs:
    found[cost.nodeid.partition("::")[0]][cost.kind] += cost.seconds
  return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))


def over(table: Mapping[str, Mapping[str, float]], times: Mapping[str, float] | None = None) -> list[str]:
  """One line for every row that takes more than its share, or than so many `times` its share, by kind."""
  most = {kind: share * (times[kind] if times else 1) for kind, share in SHARE.items()}
  return [
      f"{name}: {seconds[kind]:.1f} {kind} CPU-seconds; at most {most[kind]:g}"
      for name, seconds in table.items() for kind in SHARE if seconds.get(kind, 0) > most[kind]]


def refusals(costs: Sequence[Cost], quick: float, families: Sequence[str] = FAMILIES) -> list[str]:
  """Why a run in CI fails although its tests pass; `quick` are the quick suite's CPU-seconds in all."""
  lines = over(by_family(costs, families), times=TIMES_SHARE)
  if quick > QUICK_IN_ALL:
    lines.append(f"the quick suite: {quick:.1f} CPU-seconds; at most {QUICK_IN_ALL:g}")
  return lines


class Plugin:
  """Measures where tests run, and adds up and prints where results are collected."""

  def __init__(self):
    self._started = 0.0
    self._workers = 0.0
    self._refusals: list[str] = []
    self.costs: list[Cost] = []

  @pytest.hookimpl(tryfirst=True)
  def pytest_runtest_logstart(self) -> None:
    self._started = cpu_seconds()

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if call.when == "teardown":
      report.user_properties.append(("cpu_seconds", cpu_seconds() - self._started))
      report.user_properties.append(("kind", "slow" if item.get_closest_marker("slow") else "quick"))
    return report

  def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
    if report.when == "teardown":
      measured = dict(report.user_properties)
      self.costs.append(Cost(report.nodeid, measured["kind"], measured["cpu_seconds"]))

  @pytest.hookimpl(optionalhook=True)
  def pytest_testnodedown(self, node) -> None:
    self._workers += getattr(node, "workeroutput", {}).get("cpu_seconds", 0.0)

  @pytest.hookimpl(tryfirst=True)
  def pytest_sessionfinish(self, session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
      session.config.workeroutput["cpu_seconds"] = cpu_seconds()
      return
    if os.environ.get("CI") == "true":
      self._refusals = refusals(self.costs, self.quick_in_all())
      if self._refusals and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

  def quick_in_all(self) -> float:
    """What all processes have used, but for the slow tests; 0.0 where no quick test ran."""
    if not any(cost.kind == "quick" for cost in self.costs):
      return 0.0
    slow = sum(cost.seconds for cost in self.costs if cost.kind == "slow")
    # Workers are children of this process: they have counted for themselves.
    return (self._workers + _own_seconds() if self._workers else cpu_seconds()) - slow

  def pytest_terminal_summary(self, terminalreporter) -> None:
    if not self.costs:
      return
    write, files = terminalreporter.write_line, by_file(self.costs)

    def row(name: str, seconds: Mapping[str, float]) -> None:
      write(f"{seconds.get('quick', 0):9.1f}{seconds.get('slow', 0):9.1f}  {name}")

    terminalreporter.section("CPU-seconds")
    write(f"{'quick':>9}{'slow':>9}")
    for family, seconds in by_family(self.costs).items():
      row(family, seconds)
    for file in list(files)[:FILES_SHOWN]:
      row(file, files[file])
    row("all tests", {
        kind: sum(cost.seconds for cost in self.costs if cost.kind == kind) for kind in SHARE})
    write(f"with start-up and collection the quick suite took {self.quick_in_all():.1f}")
    for line in over(by_family(self.costs)) + over(files):
      write(f"more than a family's share: {line}")
    for line in self._refusals:
      terminalreporter.write_line(f"error: {line}", red=True)
