"""XOR in the plane, which a perceptron cannot learn (Minsky & Papert, "Perceptrons", 1969)."""

from typing import Any

import numpy as np

from dljax.config import Field, Group
from dljax.data.pipeline import HostBatch, IndexedPipeline, InMemory, Plan, Pipeline, rng
from dljax.data.splits import Data, batch_spec
from dljax.errors import UserError

SPLITS = ("train", "validation", "test")
MOST_POINTS = 10**6


def default_config() -> Group:
  """The fields of `config.data`."""
  return Group({
      "noise": Field(0.15, "The standard deviation around the four corners (+-1, +-1)."),
      "train": Field(800, "The number of points to train on."),
      "validation": Field(100, "The number of validation points."),
      "test": Field(400, "The number of test points."),
  })


def validate(config: Any) -> None:
  """Checks the ranges of `config.data`; raises `UserError`."""
  if not 0 <= config.noise <= 1:
    raise UserError(f"--config.data.noise={config.noise}: give a value from 0 to 1")
  for split in SPLITS:
    if not 4 <= config[split] <= MOST_POINTS:
      raise UserError(f"--config.data.{split}={config[split]}: give 4 to {MOST_POINTS} points")


def points(split: str, size: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
  """The points of a split around the corners (-1, -1), (-1, 1), (1, -1) and (1, 1).

  Args:
    split: one of `SPLITS`; each has points of its own.
    size: the number of points.
    noise: the standard deviation around a corner.

  Returns:
    f32[size, 2] coordinates and i32[size] labels, which are 1 where the corner's signs differ. The
    corners take turns, and the points are the same on every machine.
  """
  draw = rng(0, 0, f"xor {split}")
  corner = np.arange(size) % 4
  signs = np.stack([corner // 2, corner % 2], axis=1) * 2 - 1
  noisy = signs + noise * draw.standard_normal(signs.shape)
  return noisy.astype(np.float32), (signs[:, 0] != signs[:, 1]).astype(np.int32)


def pipelines(config: Any, *, batch_size: int, eval_batch_size: int, seed: int) -> Data:
  """The pipelines of the points; see `DataSet.pipelines`. A batch holds image f32[b, 2], label,
  mask and id.

  Args:
    config: see `default_config`.
    batch_size: the number of rows of a global training batch.
    eval_batch_size: the number of rows of a global evaluation batch.
    seed: the run's seed, which decides the order only; the points are the same for every seed.
  """
  validate(config)

  def make(split: str, rows: int) -> Pipeline:
    image, label = points(split, config[split], config.noise)
    examples = InMemory({"image": image, "label": label})
    return IndexedPipeline(lambda _: examples, _finish, batch_size=rows, seed=seed,
                           train=split == "train")

  shapes = {"image": ((2,), np.float32), "label": ((), np.int32)}
  return Data(
      name="xor", train=make("train", batch_size),
      evals={split: make(split, eval_batch_size) for split in SPLITS[1:]},
      batch_spec=batch_spec(batch_size, shapes),
      fingerprint=lambda: ", ".join(f"{key} {config[key]}" for key in sorted(config)),
      assets=lambda: {"classes": ["same", "different"]})


def _finish(examples: InMemory, plan: Plan) -> HostBatch:
  return examples.gather(plan, plan.rows)
