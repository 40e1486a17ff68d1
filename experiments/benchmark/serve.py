"""A worker of the row "models": it builds one side of a case, then takes turns on request.

A worker's argument is one JSON object. It writes JSON lines: first the facts about what it built,
then one answer to each line that it reads (the name of a quantity, such as "train"): {"seconds":
of one step, "steps": their number in the turn, "peak_bytes": the peak so far}. It ends when there is nothing more
to read. Between two turns it waits for a line, which costs no CPU.

Imports the standard library only, as the peer's interpreter runs it too.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Run = Callable[[int], float]  # steps -> seconds per step
Describe = Callable[[], Mapping[str, Any]]

# All sides do the same work. The rate is so small that the numbers stay near their initial values:
# finite, and none of them denormal, which would be slow on some sides.
LEARNING_RATE, MOMENTUM = 1e-4, 0.9
PRODUCT = 2048  # rows and columns of the matrices whose product gives the machine's peak
INPUTS = ("image", "features", "tokens")  # the network reads the first of these in a batch


def input_field(batch: Mapping[str, Any]) -> str:
  """The field of a batch that the network reads."""
  return next(name for name in INPUTS if name in batch)


def serve(build: Callable[[Mapping[str, Any]], tuple[Describe, Mapping[str, Run]]],
          device_peak: Callable[[], int | None]) -> None:
  """Runs a worker. Call it after all imports: time and memory are counted from here on.

  Args:
    build: argument -> (a function that gives the facts, quantity -> a function that runs steps);
      "train" is among the quantities.
    device_peak: () -> the most bytes that the accelerator held, or None for a CPU.
  """
  spec = json.loads(sys.argv[1])
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)  # a library's output must not pass for an answer
  held = _process_bytes("VmRSS")

  def peak_bytes() -> int | None:
    device, process = device_peak(), _process_bytes("VmHWM")
    return device if device is not None or process is None or held is None else process - held

  def say(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)

  start = time.perf_counter()
  describe, runs = build(spec)
  runs["train"](1)
  facts = {"first_step_seconds": time.perf_counter() - start, **describe()}
  say(facts)
  steps = {}
  for line in sys.stdin:
    quantity = json.loads(line)
    run = runs[quantity]
    if quantity not in steps:
      steps[quantity] = steps_of_a_turn(run, spec["turn_seconds"])
    # The system took memory away while the other sides ran. On a virtual machine it takes seconds
    # to get it back.
    run(1)
    say({"seconds": run(steps[quantity]), "steps": steps[quantity], "peak_bytes": peak_bytes()})


def steps_of_a_turn(run: Run, seconds: float) -> int:
  """The number of steps that take about `seconds`; at least one."""
  run(1)  # the first step may be slower
  steps = 1
  while (taken := steps * run(steps)) < seconds / 4:
    steps *= 2
  return max(1, math.ceil(steps * seconds / taken))


def _process_bytes(field: str) -> int | None:
  """A field of /proc/self/status, if there is one; "VmHWM" is the peak of the memory held."""
  try:
    with open("/proc/self/status", encoding="ascii") as status:
      return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status.read())[1])
  except (OSError, TypeError):
    return None
