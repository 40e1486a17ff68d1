"""Multi-label classification: any number of the classes for each image.

The loss is the binary cross-entropy of each class, meant over classes and examples. Average
precision is that of a retrieval by class; its mean over the classes is the metric of Everingham et
al. 2010, "The Pascal Visual Object Classes (VOC) Challenge", here as a sum of steps.

Dimensions: B batch, C classes, N examples.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax import report
from dljax.errors import UserError
from dljax.tasks import scores
from dljax.tasks.base import (
    ALL, MAX, MIN, Array, Batch, Findings, LossOutput, PyTree, Sums, TaskBase, Variables, Worst,
    at_least_float32, class_names)

THRESHOLD = 0.5  # the probability from which on a class counts as guessed
MAX_PICTURED = 24
MAX_LISTED = 5


@dataclasses.dataclass(frozen=True)
class MultiLabel(TaskBase):
  """Gives each image those of `num_classes` labels that hold.

  Batches have image [B, ...], label f32[B, C] (1 where the class holds) and mask f32[B]. If labels
  were mixed, they also have mix_label f32[B, C] and mix_weight f32[B], the share of `label`.

  Attributes:
    model: called as `model(image, mask, train=...)`, gives logits [B, C].
    num_classes: C.
    label_smoothing: the share of the target that is 1/2 instead, in [0, 1), in training.
    class_weights: the weight in the training loss of a class that holds, against 1 of one that does
      not; () if all are 1. The loss stays a mean over all examples and classes, as with
      `pos_weight` of torch.nn.BCEWithLogitsLoss.
    groups: the NAMEs of batch fields "host/group/NAME", by whose values evaluation groups rows.

  Raises:
    UserError: the label smoothing is out of range, or the weights are not one for each class.
  """

  model: nn.Module
  num_classes: int
  label_smoothing: float = 0.0
  class_weights: tuple[float, ...] = ()
  groups: tuple[str, ...] = ()

  evaluate_reads = ("label", scores.GROUP)
  evaluate_draws = ("image",)

  def __post_init__(self):
    if not 0 <= self.label_smoothing < 1:
      raise UserError(f"--config.model.label_smoothing={self.label_smoothing}: "
                      "give a number in [0, 1)")
    if self.class_weights and len(self.class_weights) != self.num_classes:
      raise UserError(f"--config.data.class_weights: {len(self.class_weights)} numbers for "
                      f"{self.num_classes} classes; give one for each")

  @property
  def goals(self) -> Mapping[str, str]:
    """See `Task.goals`."""
    goals = {"loss": MIN, "accuracy": MAX, "mean_average_precision": MAX, "macro_f1": MAX}
    return goals | {f"worst_{group}_accuracy": MAX for group in self.groups}

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    return self.model.init({"params": rng}, batch["image"], train=False)

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of examples, not counting padding."""
    return {"examples": jnp.sum(batch["mask"])}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: loss, and accuracy: the share of images whose classes are all
    guessed right."""
    del player  # one player: all parameters
    logits, model_state = self.apply(
        params, model_state, batch, rng, train, batch["image"], batch["mask"])
    logits = at_least_float32(logits)
    label, mask = batch["label"].astype(logits.dtype), batch["mask"].astype(logits.dtype)
    losses = self._losses(logits, label, train)
    if "mix_label" in batch:
      share = batch["mix_weight"].astype(logits.dtype)
      other = self._losses(logits, batch["mix_label"].astype(logits.dtype), train)
      losses = share * losses + (1 - share) * other
    total, count = jnp.sum(losses * mask), jnp.sum(mask)
    right = jnp.all((logits > 0) == (label > 0.5), axis=-1)
    metrics = {"loss": (total, count), "accuracy": (jnp.sum(right * mask), count)}
    examples = jnp.maximum(denominators["examples"], 1)  # there may be nothing but padding
    return LossOutput(loss=total / examples, metrics=metrics, model_state=model_state)

  def _losses(self, logits: Array, label: Array, train: bool) -> Array:
    """The mean binary cross-entropy over the classes of each example, [B]."""
    weight = jnp.ones((), logits.dtype)
    if train:
      label = (1 - self.label_smoothing) * label + self.label_smoothing / 2
      if self.class_weights:
        weight = jnp.asarray(self.class_weights, logits.dtype)
    holds, fails = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.mean(weight * label * holds + (1 - label) * fails, axis=-1)

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """{"probabilities": f32[B, C]}, each class for itself."""
    del rng, context  # nothing is drawn
    logits = self.model.apply(variables, batch["image"], batch["mask"], train=False)
    return {"probabilities": jax.nn.sigmoid(logits.astype(jnp.float32))}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums,
      assets: Mapping[str, Any],
  ) -> Findings:
    """Scores by class, and the images whose classes were guessed worst.

    Metrics: mean_average_precision, the mean over the classes that some image has; macro_f1;
    worst_NAME_accuracy for each batch field "host/group/NAME". As everywhere, accuracy is the share
    of images whose classes are all guessed right.
    Tables: classes (average_precision, precision, recall, f1, support); group_NAME (accuracy,
    support), sorted by the groups' names.
    Figures: mistakes, up to `MAX_PICTURED` images, those with the largest loss first.
    """
    del sums
    names = class_names(assets, self.num_classes)
    probabilities, labels, worst = [np.zeros((0, self.num_classes))], [
        np.zeros((0, self.num_classes), bool)], Worst(MAX_PICTURED)
    groups = scores.Groups()
    for predictions, batch in rows:
      p, label = np.asarray(predictions["probabilities"]), np.asarray(batch["label"]) > 0.5
      probabilities.append(p)
      labels.append(label)
      groups.add(batch, ((p >= THRESHOLD) == label).all(axis=-1))
      if len(batch["image"].shape) == 4:
        _keep_worst(worst, batch["image"], p, label, names)
    score, truth = np.concatenate(probabilities), np.concatenate(labels)
    guess = score >= THRESHOLD
    counts = [x.sum(axis=0).astype(np.float64) for x in (guess & truth, truth, guess)]
    by_class = scores.by_class(*counts)
    precision = np.array([
        scores.average_precision(score[:, i], truth[:, i]) for i in range(self.num_classes)])
    known = ~np.isnan(precision)
    columns = zip(names, precision, by_class.precision, by_class.recall, by_class.f1,
                  by_class.support)
    table = [{"class": name, "average_precision": float(ap), "precision": float(p),
              "recall": float(r), "f1": float(f), "support": int(n)}
             for name, ap, p, r, f, n in columns]
    figures = {}
    if worst.rows:
      images, titles = zip(*worst.rows)
      figures["mistakes"] = functools.partial(
          report.image_grid, images, titles,
          caption=f"The largest losses among {len(truth):,} images")
    by_group, tables = groups.findings()
    return Findings({
        "mean_average_precision": float(precision[known].mean()) if known.any() else float("nan"),
        "macro_f1": scores.macro_f1(*counts), **by_group}, figures, {"classes": table, **tables})


def _keep_worst(
    worst: Worst, images: Any, p: np.ndarray, label: np.ndarray, names: list[str],
) -> None:
  """Adds (image, title) of the images with the largest loss."""
  losses = -np.log(np.maximum(np.where(label, p, 1 - p), 1e-30)).mean(axis=-1)

  def look(kept: np.ndarray) -> list[tuple[np.ndarray, str]]:
    truths, guesses = (
        [", ".join(np.array(names, object)[row]) or "none" for row in rows[kept]]
        for rows in (label, p >= THRESHOLD))
    return [(image, f"truth: {truth}\nguess: {guess}")
            for image, truth, guess in zip(np.asarray(images[kept]), truths, guesses)]

  worst.add((-losses).tolist(), look)


def decode(predictions: PyTree, assets: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
  """One row for each prediction, to print and to write.

  Args:
    predictions: the result of `MultiLabel.predict`, {"probabilities": [B, C]}.
    assets: the run's assets; "classes" are the class names.

  Yields:
    {"labels": the names of the classes that hold, separated by ";", "probabilities": {name: p}};
    the last has up to `MAX_LISTED` classes, the most probable first, and all that hold.
  """
  probabilities = np.asarray(predictions["probabilities"])
  names = class_names(assets, probabilities.shape[-1])
  for p in probabilities:
    order = np.argsort(-p, kind="stable")
    holds = [i for i in order if p[i] >= THRESHOLD]
    yield {"labels": ";".join(names[i] for i in holds),
           "probabilities": {names[i]: float(p[i]) for i in order[:max(MAX_LISTED, len(holds))]}}
