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
from dljax.train.experiment import Experiment
from dljax.train.program import RunOptions
from dljax.train.workdir import Workdir


def predict(
    experiment: Experiment, folder: Workdir, options: RunOptions, values: flags.FlagValues,
) -> int:
  """Predicts for --input or --prompt; gives the exit status: `FAILED` if inputs were skipped."""
  prompted = values["prompt"].present
  if prompted and experiment.prompt is None:
    raise UserError(
        f"--prompt: {experiment.config.family} writes no text; use --input=FILE_OR_FOLDER")
  if prompted and values.input:
    raise UserError("--prompt and --input do not go together; drop one of them")
  if not values.input and not prompted:
    raise UserError("--mode=predict needs --input=FILE_OR_FOLDER"
                    + " or --prompt=TEXT" * bool(experiment.prompt))
  place = Path(values.output) if values.output else None
  if place:
    output.check(place, experiment.pictures is not None)
  assets = folder.read_assets()
  if assets:
    experiment.data.restore(assets)
  if prompted:
    return _generate(experiment, folder, options, values, assets, place)
  paths = [os.path.expanduser(path) for path in values.input]
  batch, names, skipped = experiment.encode(paths, assets)
  if not names:
    rest = [f"and {len(skipped) - 3} more"] if len(skipped) > 3 else []
    raise UserError(
        "--input: " + ("; ".join(skipped[:3] + rest) or f"{','.join(values.input)} holds no file"))
  for line in skipped:
    print(f"skipped {line}", file=sys.stderr)
  program, _, state = runs.restore(experiment, folder, options, values.step)
  predictions = predict_rows(experiment, program, options.parallelism, state, batch)
  rows = [{"input": name, **row}
          for name, row in zip(names, experiment.decode(predictions, assets), strict=True)]
  if jax.process_index() == 0:
    for row in rows:
      print("  ".join(f"{v:.4f}" if isinstance(v, float) else v
                      for v in row.values() if not isinstance(v, dict)))
    if place:
      output.write(place, rows, lambda: experiment.pictures(batch, predictions, assets))
      print(f"{len(rows)} predictions written to {place}")
  return FAILED if skipped else DONE


def _generate(
    experiment: Experiment, folder: Workdir, options: RunOptions, values: flags.FlagValues,
    assets: Mapping[str, Any], place: Path | None,
) -> int:
  """Shows --prompt and the text that the model generates, as it comes."""
  batch = experiment.prompt([values.prompt], ["--prompt"])
  program, _, state = runs.restore(experiment, folder, options, values.step)
  first = jax.process_index() == 0
  show = functools.partial(print, end="", flush=True) if first else lambda text: None
  show(values.prompt)
  parts, text, shown = [], "", 0
  for tokens in generate(experiment, program, options.parallelism, state, batch):
    parts.append(tokens)
    row, = experiment.decode({"tokens": np.concatenate(parts, axis=1)}, assets)
    text = row["text"]
    # The rest may be the first half of a character.
    whole = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    show(text[shown:whole])
    shown = max(shown, whole)
  show(text[shown:] + "\n")
  if place and first:
    output.write(place, [{"input": values.prompt, "text": text}])
    print(f"1 prediction written to {place}")
  return DONE
