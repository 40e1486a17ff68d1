"""--mode=predict: predictions for files or for a prompt, shown and written."""

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dljax import runs
from dljax.errors import DONE, FAILED, UserError
from dljax.launch import output
from dljax.train.evaluate import generate, predict as predict_rows
from dljax.train.experiment import Assets, Experiment, Inputs, Request
from dljax.train.program import RunOptions
from dljax.train.workdir import Workdir


def predict(
    experiment: Experiment, folder: Workdir, options: RunOptions, values: flags.FlagValues,
) -> int:
  """Predicts what the flags ask for; gives the exit status: `FAILED` if inputs were skipped."""
  place = Path(values.output) if values.output else None
  if place:
    output.check(place, experiment.draw is not None)
  assets = folder.read_assets()
  if assets:
    experiment.data.restore(assets)
  inputs = experiment.read(_request(values), assets)
  if not inputs.names:
    rest = [f"and {len(inputs.skipped) - 3} more"] if len(inputs.skipped) > 3 else []
    raise UserError("--input: " + ("; ".join([*inputs.skipped[:3], *rest])
                                   or f"{','.join(values.input)} holds no file"))
  for line in inputs.skipped:
    print(f"skipped {line}", file=sys.stderr)
  program, _, state = runs.restore(experiment, folder, options, values.step)
  first = jax.process_index() == 0
  if values["prompt"].present and len(inputs.names) <= experiment.config.eval_batch_size:
    parts = generate(experiment, program, options.parallelism, state, inputs.batch)
    predictions, rows = _stream(experiment, inputs, parts, assets, first)
  else:
    predictions = predict_rows(experiment, program, options.parallelism, state, inputs.batch)
    rows = _rows(experiment, inputs, predictions, assets)
    for row in rows if first else ():
      print("  ".join(f"{v:.4f}" if isinstance(v, float) else v
                      for v in row.values() if not isinstance(v, dict)))
  if place and first:
    output.write(place, rows, lambda: experiment.draw(inputs, predictions, assets))
    print(f"{len(rows)} prediction{'s' * (len(rows) > 1)} written to {place}")
  return FAILED if inputs.skipped else DONE


def _request(values: flags.FlagValues) -> Request:
  return Request(
      paths=[os.path.expanduser(path) for path in values.input],
      texts=[values.prompt] if values["prompt"].present else [],
      count=values.count, labels=values.label)


def _rows(
    experiment: Experiment, inputs: Inputs, predictions: Any, assets: Assets,
) -> list[Mapping[str, Any]]:
  shown = experiment.show(inputs, predictions, assets)
  return [{"input": name, **row} for name, row in zip(inputs.names, shown, strict=True)]


def _stream(
    experiment: Experiment, inputs: Inputs, parts: Any, assets: Assets, first: bool,
) -> tuple[Any, list[Mapping[str, Any]]]:
  """Shows prompts and their continuations: the first as it comes, the others when all are done.

  Args:
    experiment: its predictions are tokens.
    inputs: the prompts.
    parts: the tokens [rows, n] as they are generated.
    assets: the run's assets.
    first: whether this is the host that prints.

  Returns:
    The predictions, and a row for each.
  """
  show = functools.partial(print, end="", flush=True) if first else lambda text: None
  show(inputs.names[0])
  predictions, rows, shown = {}, [], 0
  for tokens in parts:
    before = [predictions["tokens"]] if predictions else []
    predictions = {"tokens": np.concatenate([*before, tokens], axis=1)}
    rows = _rows(experiment, inputs, predictions, assets)
    text = rows[0]["text"]
    # The rest may be the first half of a character.
    whole = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    show(text[shown:whole])
    shown = max(shown, whole)
  show(text[shown:] + "\n")
  for i, row in enumerate(rows[1:], 2):
    show(f"\n--- {i} of {len(rows)} ---\n{row['input']}{row['text']}\n")
  return predictions, rows
