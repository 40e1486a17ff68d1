"""The result of every row of the benchmark: a number, its bound, and its spread."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Settings:
  """How long to measure.

  Attributes:
    steps: the train steps of one turn, in the rows on the engine.
    repeats: the turns of each side.
    turn_seconds: the approximate time of one turn of the row "models", which has at least one
      step.
  """

  steps: int = 200
  repeats: int = 7
  turn_seconds: float = 1.0


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One line of the table.

  Attributes:
    name: the network, or the part of the engine, that was measured.
    what: the quantity that was measured.
    value: the number, often a ratio.
    bound: the bound of the value, or None if the value is only reported.
    at_least: whether it should be at least the bound; otherwise at most.
    low, high: the smallest and the largest ratio of a turn, or None.
    details: the numbers behind the value, with units in their names.
  """

  name: str
  what: str
  value: float
  bound: float | None
  at_least: bool = False
  low: float | None = None
  high: float | None = None
  details: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def holds(self) -> bool | None:
    if self.bound is None:
      return None
    return self.value >= self.bound if self.at_least else self.value <= self.bound


def ratio(
    name: str, what: str, over: Mapping[str, Sequence[float]],
    under: Mapping[str, Sequence[float]], bound: float | None, *, at_least: bool = False,
) -> Measurement:
  """The ratio of two sides that took turns; each is {name of its median in the details: seconds
  per turn}.
  """
  (over_name, over_turns), = over.items()
  (under_name, under_turns), = under.items()
  medians = {over_name: statistics.median(over_turns), under_name: statistics.median(under_turns)}
  turns = [a / b for a, b in zip(over_turns, under_turns, strict=True)]
  value = medians[over_name] / medians[under_name]
  return Measurement(name, what, value, bound, at_least, min(turns), max(turns), medians)
