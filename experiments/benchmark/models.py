"""The row "models": train step and inference of every family, against the peer and against plain
Flax.

Each side of a case is a process (`jax_worker.py`, `torch_worker.py`), and only one of them works at
a time: they take turns, so that other load on the machine slows all. These are reported:

- train, inference: seconds per step, the median of the turns. Training is the whole step: forward,
  cross-entropy (of a detector its own loss, of speech CTC), backward, SGD with momentum; a
  language model's starts from the last state of the step before. Inference waits for each
  batch; a detector's ends with what its heads give.
- compile: seconds to trace, lower and compile the train step; an eager peer has nothing to
  compile.
- first step: seconds from the start of building the network, with all imported, to the end of the
  first train step.
- peak memory: the most that the process held beyond what it held with all imported, until it had
  compiled, trained and inferred for one turn; with an accelerator, the most of its memory.
- GFLOP/s of the train step: the operations of the network's definition, as `train/flops.py` counts
  them, over the median. The machine's peak is that of a matrix product in float32, by JAX or by
  the peer, whichever is faster; it has its turns among those of the case. Winograd's convolution
  needs fewer operations than the definition, so that a network of 3x3 kernels may come near the
  peak, or above it.
"""

import contextlib
import dataclasses
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dljax.errors import RunError, UserError
from experiments.benchmark import serve, torch_worker
from experiments.benchmark.cases import CASES
from experiments.benchmark.measurement import Measurement, Settings, ratio

LABELS = {"train": "train step", "inference": "inference"}  # the names of the quantities
OURS, PLAIN = "dljax", "flax"
LONGEST_WAIT = 1800.0  # seconds after which a side counts as hung
PROBE_WAIT = 300.0  # seconds that an interpreter may take to import its packages
PAUSE = 0.25  # seconds between turns: the threads of OpenMP spin for up to 0.2 after their work
HOW_TO_GET = ("python3 -m venv peers && peers/bin/pip install torch torchvision timm transformers, "
              "then --peer_python=peers/bin/python")
OUR_WORKER = (sys.executable, "-m", "experiments.benchmark.jax_worker")
PEER_WORKER = torch_worker.__file__


@dataclasses.dataclass(frozen=True)
class Peers:
  """The packages to compare with.

  Attributes:
    python: the interpreter that has them.
    found: package -> version.
    missing: package -> why it cannot be imported.
  """

  python: str
  found: Mapping[str, str]
  missing: Mapping[str, str]

  def describe(self) -> str:
    """A line for each package, and how to install the missing ones."""
    lines = [f"peer {name} {version}, of {self.python}" for name, version in self.found.items()]
    lines += [f"peer {name}: not found ({why})" for name, why in self.missing.items()]
    return "\n".join(lines + ([f"to get them: {HOW_TO_GET}"] if self.missing else []))


def find_peers(flag: str) -> Peers:
  """Asks an interpreter for its packages.

  Args:
    flag: the value of --peer_python; "" asks the interpreter that runs this.

  Raises:
    UserError: what the flag names is no Python, or has no torch.
  """
  python = flag or sys.executable
  mend = "name the interpreter of an environment that has torch, such as peers/bin/python"
  try:
    done = subprocess.run([python, PEER_WORKER], capture_output=True, encoding="utf-8",
                          stdin=subprocess.DEVNULL, timeout=PROBE_WAIT)
    answer = json.loads(done.stdout.splitlines()[-1])
    peers = Peers(python, answer["found"], answer["missing"])
  except (OSError, subprocess.TimeoutExpired) as error:
    why = getattr(error, "strerror", None) or f"no answer within {PROBE_WAIT:.0f} s"
    raise UserError(f"--peer_python={python} does not run ({why}); {mend}") from None
  except (IndexError, KeyError, TypeError, ValueError):
    raise UserError(f"--peer_python={python} is no working Python (its last words: {_last_words(done.stderr)}); "
                    f"{mend}") from None
  if flag and "torch" not in peers.found:
    raise UserError(f"--peer_python={python} has no torch ({peers.missing['torch']}); "
                    f"run {python} -m pip install torch torchvision timm transformers")
  return peers


class Worker:
  """One side of a case, in its own process, which ends with the context.

  Args:
    name: the names of case and side, for errors.
    command: the command that starts it, without the JSON object.
    job: the JSON object.
    environment: its environment variables.

  Attributes:
    facts: its description of itself.
  """

  def __init__(
      self, name: str, command: Sequence[str], job: Mapping[str, Any],
      environment: Mapping[str, str],
  ):
    self._name = name
    self._stderr = tempfile.TemporaryFile()
    # The session is a new one, so that Ctrl-C reaches only this process, which then ends all
    # others.
    self._process = subprocess.Popen([*command, json.dumps(job)], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, stderr=self._stderr, bufsize=0,
                                     env=environment, start_new_session=True)
    try:
      self.facts = self._answer()
    except BaseException:
      self.__exit__()
      raise

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, *_: Any) -> None:
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()
    self._stderr.close()

  def run(self, quantity: str) -> dict[str, Any]:
    """Runs a turn: {"seconds": the time of one step, "peak_bytes": the peak so far}."""
    with contextlib.suppress(BrokenPipeError):  # the missing answer gives a better message
      self._process.stdin.write(json.dumps(quantity).encode() + b"\n")
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
      if not select.select([self._process.stdout], [], [], LONGEST_WAIT)[0]:
        raise RunError(f"{self._name}: no answer within {LONGEST_WAIT:.0f} s, so it was ended; "
                       f"its last words: {self._words()}")
      part = self._process.stdout.read(65536)
      if not part:
        status = self._process.wait()
        raise RunError(f"{self._name}: its process ended with status {status}; its last words: {self._words()}")
      line += part
    return json.loads(line)

  def _words(self) -> str:
    self._stderr.seek(0)
    return _last_words(self._stderr.read().decode(errors="replace"))


def _last_words(text: str) -> str:
  """The end of a process's output, as one line."""
  words = " / ".join([" ".join(line.split()) for line in text.splitlines() if line.strip()][-3:])
  return words[-400:] or "none"


def measure_models(
    settings: Settings, cases: Sequence[str], peers: Peers,
) -> tuple[list[Measurement], dict[str, Any]]:
  """Train step and inference of every family, against the peer's eager mode and against plain
  Flax.

  Args:
    settings: how long to measure.
    cases: keys of `CASES`.
    peers: the result of `find_peers`. A case whose peer is missing is measured without it.

  Returns:
    The ratios, and all that they come from, JSON-able: "device" (ours), "threads" (of every side),
    "peers", and "cases": for each what `_measure_case` gives.

  Raises:
    RunError: a side failed or hung, or is another network than ours.
  """
  from tqdm import tqdm  # pylint: disable=g-import-not-at-top

  threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  turns = 0
  for case in cases:
    layouts = len(CASES[case].layouts) * (CASES[case].peer in peers.found)
    sides, products = 2 + layouts, 1 + bool(layouts)
    turns += sides + settings.repeats * (len(LABELS) * sides + products)  # each is built first
  # In a file, each refresh would be a new line.
  with tqdm(total=turns, unit="turn", dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 30.0) as bar:
    def tell(text: str) -> None:
      bar.set_description_str(text, refresh=False)
      bar.update(1)

    bench = _Bench(settings, peers, threads, tell)
    results = {case: _measure_case(bench, case) for case in cases}
  found = [m for case, result in results.items() for m in compare(case, result)]
  device = results[cases[0]]["sides"][OURS]["device"]
  return found, {"device": device, "threads": threads, "peers": dataclasses.asdict(peers),
                 "cases": results}


@dataclasses.dataclass(frozen=True)
class _Bench:
  """The values that all cases share: `tell` shows the next turn; see `measure_models`."""

  settings: Settings
  peers: Peers
  threads: int
  tell: Callable[[str], None]

  def start(self, case: str, side: str, command: Sequence[str], **job: Any) -> Worker:
    self.tell(f"{case}, {side}: building")
    count = str(self.threads)
    # Or the first side would take a GPU's memory from the others.
    environment = {**os.environ, "NPROC": count, "OMP_NUM_THREADS": count,
                   "MKL_NUM_THREADS": count, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    job = {"case": case, "side": side, "turn_seconds": self.settings.turn_seconds, **job}
    return Worker(f"models: {case}, {side}", command, job, environment)

  def ours(self, case: str, side: str) -> Worker:
    return self.start(case, side, OUR_WORKER)

  def peer(self, case: str, layout: str, ours: Mapping[str, Any]) -> Worker:
    """Takes `ours`, the facts of our side."""
    return self.start(
        case, f"torch {layout}", (self.peers.python, PEER_WORKER), family=CASES[case].family,
        layout=layout, threads=self.threads, accelerator=ours["platform"] != "cpu",
        batch=ours["batch"], classes=ours["classes"])

  def take_turns(self, case: str, workers: Mapping[str, Worker]) -> dict[str, Any]:
    """Side -> its facts, "seconds" and "steps" (quantity -> of a step, and of a turn),
    "peak_bytes".
    """
    sides = {side: {**worker.facts, "seconds": {}, "steps": {}}
             for side, worker in workers.items()}
    peer = next((side for side in sides if side.startswith("torch ")), OURS)
    for turn in range(self.settings.repeats):
      for quantity in (*LABELS, "product"):
        for side in dict.fromkeys((OURS, peer)) if quantity == "product" else sides:
          self.tell(f"{case}, {side}: {quantity}, turn {turn + 1}")
          time.sleep(PAUSE)
          answer, facts = workers[side].run(quantity), sides[side]
          facts["seconds"].setdefault(quantity, []).append(answer["seconds"])
          facts["steps"][quantity] = answer["steps"]
          if turn == 0 and quantity != "product":  # whose matrices are not the network's
            facts["peak_bytes"] = answer["peak_bytes"]
    return sides


def _measure_case(bench: _Bench, name: str) -> dict[str, Any]:
  """The measurements of a case.

  Returns:
    "experiment" and "arguments" (as in `CASES`), "batch" (field -> shape), "train_flops" (of a
    step), "sides" (of `take_turns`), "peak_flops_per_second" (the machine's).
  """
  case = CASES[name]
  with contextlib.ExitStack() as stack:
    workers = {OURS: stack.enter_context(bench.ours(name, OURS))}
    ours = workers[OURS].facts
    # Which serves one process at a time; and our operators are the native ones there.
    if ours["platform"] != "tpu":
      workers[PLAIN] = stack.enter_context(bench.ours(name, PLAIN))
    if case.peer in bench.peers.found:
      for layout in case.layouts:
        workers[f"torch {layout}"] = stack.enter_context(bench.peer(name, layout, ours))
    for side, worker in workers.items():
      if worker.facts["parameters"] != ours["parameters"]:
        raise RunError(f"models: {name}: {OURS} has {ours['parameters']:,} parameters and {side} "
                       f"{worker.facts['parameters']:,}: they are not the same network, and not compared")
    sides = bench.take_turns(name, workers)
  products = [side["seconds"]["product"] for side in sides.values()
              if "product" in side["seconds"]]
  return {"experiment": case.experiment, "arguments": case.arguments, "batch": ours["batch"],
          "train_flops": ours["train_flops"], "sides": sides,
          "peak_flops_per_second": 2 * serve.PRODUCT**3 / min(map(statistics.median, products))}


def compare(name: str, result: Mapping[str, Any]) -> list[Measurement]:
  """The ratios of a case; `result` is that of `_measure_case`.

  The peer's layout with the smaller median counts, separately for training and inference.
  """
  sides = result["sides"]
  pairs = [(quantity, peer_side(sides, quantity), CASES[name].bound) for quantity in LABELS]
  pairs += [(quantity, PLAIN, None) for quantity in LABELS]
  found = []
  for quantity, other, bound in pairs:
    if other in sides:
      ours, others = ({f"{side} seconds".replace(" ", "_"): sides[side]["seconds"][quantity]}
                      for side in (OURS, other))
      on = f"{name}, {'x'.join(map(str, result['batch'][serve.input_field(result['batch'])]))}"
      found.append(ratio(on, f"{LABELS[quantity]}: {OURS} / {other}", ours, others, bound))
  return found


def peer_side(sides: Mapping[str, Any], quantity: str) -> str | None:
  """The peer's faster layout, or None without a peer."""
  layouts = [side for side in sides if side.startswith("torch ")]
  return min(layouts, key=lambda side: statistics.median(sides[side]["seconds"][quantity]),
             default=None)
