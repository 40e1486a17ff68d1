"""--mode=predict: predictions for files or for a prompt, shown and written."""

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from dljax.errors import DONE, FAILED
from dljax.launch import output
from dljax.runs import Run
from dljax.train.experiment import Inputs, Request


def predict(run: Run, values: flags.FlagValues) -> int:
  """Predicts what the flags ask for; returns the exit status, `FAILED` if inputs were skipped."""
  place = Path(values.output) if values.output else None
  draw, saw = run.experiment.draw, run.experiment.saw
  if place:
    output.check(place, bool(draw or saw))
  inputs = run.read(_request(values))
  for line in inputs.skipped:
    print(f"skipped {line}", file=sys.stderr)
  for line in inputs.warnings:
    print(f"warning: {line}", file=sys.stderr)
  first = jax.process_index() == 0
  streamed = (values["prompt"].present and hasattr(run.experiment.task, "advance")
              and len(inputs.names) <= run.config.eval_batch_size)
  if streamed:
    predictions, rows = _stream(run, inputs, first)
  else:
    predictions = run.raw(inputs)
    rows = run.rows(inputs, predictions)
  # The file comes first: whoever reads what is printed may stop.
  if place and first:
    output.write(place, rows, draw and (lambda: draw(inputs, predictions, run.assets)),
                 saw and (lambda: saw(inputs, rows)))
  for row in rows if first and not streamed else ():
    print("  ".join(f"{v:.4f}" if isinstance(v, float) else v
                    for v in row.values() if not isinstance(v, (dict, list))))
  if place and first:
    print(f"{len(rows)} prediction{'s' * (len(rows) > 1)} written to {place}")
  if not inputs.skipped:
    return DONE
  count = len(inputs.skipped)
  print(f"{count} input{'s were' if count > 1 else ' was'} skipped, as said above; the exit status is "
        f"{FAILED} because of that", file=sys.stderr)
  return FAILED


def _request(values: flags.FlagValues) -> Request:
  return Request(
      paths=[os.path.expanduser(path) for path in values.input],
      texts=[values.prompt] if values["prompt"].present else [],
      count=values.count, labels=values.label)


def _stream(
    run: Run, inputs: Inputs, first: bool,
) -> tuple[Any, Sequence[Mapping[str, Any]]]:
  """Shows prompts and their continuations: the first as it comes, the others at the end.

  Args:
    run: a run whose predictions are tokens.
    inputs: the prompts.
    first: whether this is the host that prints.

  Returns:
    The predictions, and a row for each.
  """
  show = functools.partial(print, end="", flush=True) if first else lambda text: None
  settled = run.experiment.task.sampling.settled
  predictions, rows, text, shown = {}, [], "", 0
  for predictions in run.generate(inputs):
    if not rows:  # what was compiled for the first part has been said, on lines of its own
      show(inputs.names[0])
    rows = run.rows(inputs, predictions)
    text = rows[0]["text"]
    whole = len(settled(text))
    show(text[shown:whole])
    shown = max(shown, whole)
  show(text[shown:] + "\n" + _numbers(rows[0]))
  for i, row in enumerate(rows[1:], 2):
    show(f"\n--- {i} of {len(rows)} ---\n{row['input']}{row['text']}\n{_numbers(row)}")
  return predictions, rows


def _numbers(row: Mapping[str, Any]) -> str:
  """A line for each number of a row, such as the logarithm of the text's probability."""
  return "".join(f"{name}: {value:.4f}\n" for name, value in row.items() if isinstance(value, float))
