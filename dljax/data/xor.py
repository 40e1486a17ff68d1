"""XOR in the plane: what a perceptron cannot learn (Minsky & Papert, "Perceptrons", 1969)."""

from collections.abc import Mapping

import numpy as np

from dljax.data.pipeline import HostBatch, IndexedPipeline, InMemory, Plan, Pipeline, rng

NOISE = 0.15  # standard deviation around the four corners
SIZES = {"train": 800, "validation": 100, "test": 400}


def points(split: str) -> tuple[np.ndarray, np.ndarray]:
  """The points of a split around the corners (-1, -1), (-1, 1), (1, -1) and (1, 1).

  Returns:
    f32[n, 2] coordinates and i32[n] labels: 1 where the corner's signs differ. The corners are even, and the
    same on every machine.
  """
  draw = rng(0, 0, f"xor {split}")
  corner = np.arange(SIZES[split]) % 4
  signs = np.stack([corner // 2, corner % 2], axis=1) * 2 - 1
  noisy = signs + NOISE * draw.standard_normal(signs.shape)
  return noisy.astype(np.float32), (signs[:, 0] != signs[:, 1]).astype(np.int32)


def pipelines(batch_size: int, eval_batch_size: int, seed: int) -> tuple[Pipeline, Mapping[str, Pipeline]]:
  """(train, {"validation": ..., "test": ...}); fields image f32[b, 2], label, mask and "host/id"."""
  def make(split, size, train):
    image, label = points(split)
    examples = InMemory({"image": image, "label": label})
    return IndexedPipeline(lambda _: examples, _finish, batch_size=size, seed=seed, train=train)

  return make("train", batch_size, True), {s: make(s, eval_batch_size, False) for s in ("validation", "test")}


def _finish(examples: InMemory, plan: Plan) -> HostBatch:
  ids = plan.indices[plan.rows]
  return {**examples.gather(plan, plan.rows), "mask": (ids >= 0).astype(np.float32), "host/id": ids}
