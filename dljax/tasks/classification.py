"""Classification: one label for each image.

The loss is the cross-entropy of the softmax, with label smoothing (Szegedy et al. 2016,
"Rethinking the Inception Architecture for Computer Vision", section 7) and mixed labels (Zhang et
al. 2018, "mixup"; Yun et al. 2019, "CutMix"), or the criterion of the perceptron (Rosenblatt 1958,
"The perceptron: a probabilistic model for information storage and organization in the brain").

Dimensions: B batch, C classes.
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
from dljax.errors import UserError, unknown
from dljax.tasks import scores
from dljax.tasks.base import (
    ALL, MAX, MIN, Array, Batch, Findings, LossOutput, PyTree, Sums, TaskBase, Variables, Worst,
    at_least_float32, class_names)

CRITERIA = ("softmax", "perceptron")
MAX_CONFUSION_CLASSES = 200  # a matrix of more is large to add up, and too fine to look at
MAX_PICTURED = 24
MAX_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Classification(TaskBase):
  """Gives each image one of `num_classes` labels.

  Batches have image [B, ...], label i32[B] and mask f32[B]. If labels were mixed, they also have
  mix_label i32[B] and mix_weight f32[B], the share of `label` in the mixture.

  Attributes:
    model: called as `model(image, mask, train=...)`, gives logits [B, C].
    num_classes: C.
    label_smoothing: the share of the target that is spread evenly over all classes in training, in
      [0, 1).
    criterion: "softmax" (cross-entropy) or "perceptron" (the best logit minus the true one; its
      gradient is Rosenblatt's rule: zero where the guess is right, else away from the guess and
      towards the truth).
    class_weights: the weight of each class in the training loss, which is then a weighted mean; ()
      if all weigh the same. Evaluation counts every example once.
    groups: the NAMEs of batch fields "host/group/NAME", by whose values evaluation groups rows.

  Raises:
    UserError: the criterion is unknown, or the label smoothing out of range or without meaning.
  """

  model: nn.Module
  num_classes: int
  label_smoothing: float = 0.0
  criterion: str = "softmax"
  groups: tuple[str, ...] = ()
  class_weights: tuple[float, ...] = ()

  evaluate_reads = ("label", scores.GROUP)
  evaluate_draws = ("image",)

  def __post_init__(self):
    if self.criterion not in CRITERIA:
      raise unknown("--config.model.criterion", self.criterion, CRITERIA)
    if not 0 <= self.label_smoothing < 1:
      raise UserError(f"--config.model.label_smoothing={self.label_smoothing}: "
                      "give a number in [0, 1)")
    if self.criterion == "perceptron" and self.label_smoothing:
      raise UserError("--config.model.label_smoothing has no meaning for the perceptron "
                      "criterion; set it to 0")
    if self.class_weights and len(self.class_weights) != self.num_classes:
      raise UserError(f"--config.data.class_weights: {len(self.class_weights)} numbers for "
                      f"{self.num_classes} classes; give one for each")

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    return self.model.init({"params": rng}, batch["image"], train=False)

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of examples, not counting padding, and the sum of their weights."""
    examples = {"examples": jnp.sum(batch["mask"])}
    if not self.class_weights:
      return examples
    return examples | {"weight": jnp.sum(self._weights(batch) * batch["mask"])}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: loss, accuracy, top_5_accuracy (C > 5), confusion_matrix.

    The confusion matrix [C, C] (row: truth, column: guess) is a metric of evaluation for up to
    `MAX_CONFUSION_CLASSES` classes. Its counts are the sums of the rows, so that sum / count gives
    rates by truth.
    """
    del player  # one player: all parameters
    out, model_state = self.apply(params, model_state, batch, rng, train, *self.inputs(batch))
    logits = at_least_float32(_logits(out))
    label, mask = batch["label"], batch["mask"].astype(logits.dtype)

    # The loss of an evaluation is the same for all smoothings and weights, so that runs can be
    # compared.
    smoothing = self.label_smoothing if train else 0.0
    weighted = bool(self.class_weights) and train
    weight = lambda label: self._weight(label).astype(logits.dtype) if weighted else 1
    losses = weight(label) * self._criterion(logits, label, smoothing)
    if "mix_label" in batch:
      share, other = batch["mix_weight"].astype(logits.dtype), batch["mix_label"]
      losses = share * losses + (1 - share) * weight(other) * self._criterion(
          logits, other, smoothing)
    total = jnp.sum(losses * mask)
    count = jnp.sum(mask)
    # A batch of nothing but padding, or of classes without weight, has loss 0.
    if weighted:
      examples, weights = denominators["weight"], jnp.sum(self._weights(batch) * mask)
      examples = jnp.where(examples > 0, examples, 1)
    else:
      examples, weights = jnp.maximum(denominators["examples"], 1), count

    guess = jnp.argmax(logits, axis=-1)
    metrics = {
        "loss": (total, weights),
        "accuracy": (jnp.sum((guess == label) * mask), count),
    }
    if self.num_classes > 5:
      metrics["top_5_accuracy"] = jnp.sum((_rank(logits, label) < 5) * mask), count
    if not train and self.num_classes <= MAX_CONFUSION_CLASSES:
      truths = jax.nn.one_hot(label, self.num_classes, dtype=mask.dtype) * mask[:, None]
      matrix = truths.T @ jax.nn.one_hot(guess, self.num_classes, dtype=mask.dtype)
      rows = jnp.broadcast_to(jnp.sum(matrix, axis=1, keepdims=True), matrix.shape)
      metrics["confusion_matrix"] = matrix, rows
    return LossOutput(loss=total / examples, metrics=metrics, model_state=model_state)

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """{"probabilities": f32[B, C]}, the softmax of the logits.

    A perceptron's logits were not trained as log probabilities; only their order has a meaning.
    """
    del rng, context  # nothing is drawn
    logits = _logits(self.model.apply(variables, *self.inputs(batch), train=False))
    return {"probabilities": jax.nn.softmax(logits.astype(jnp.float32), axis=-1)}

  def inputs(self, batch: Batch) -> tuple[Array, ...]:
    """The model's arguments."""
    return batch["image"], batch["mask"]

  @property
  def goals(self) -> Mapping[str, str]:
    """See `Task.goals`."""
    goals = {"loss": MIN, "accuracy": MAX, "macro_f1": MAX}
    if self.num_classes > 5:
      goals["top_5_accuracy"] = MAX
    if self.criterion == "softmax":
      goals["calibration_error"] = MIN
    return goals | {f"worst_{group}_accuracy": MAX for group in self.groups}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums,
      assets: Mapping[str, Any],
  ) -> Findings:
    """Scores by class and by group, calibration, and pictures.

    Metrics: macro_f1; calibration_error (softmax only); worst_NAME_accuracy for each batch field
    "host/group/NAME", which holds the group of each row.
    Tables: classes (precision, recall, f1, support); group_NAME (accuracy, support), sorted by the
    groups' names.
    Figures: confusion_matrix, calibration, mistakes. The mistakes are up to `MAX_PICTURED` images,
    those with the most confident wrong guesses first. If there are none, the right guesses with
    the least confidence are drawn. Inputs that are not images have no such figure.
    """
    names = class_names(assets, self.num_classes)
    tally = _Tally(self.num_classes)
    # This comes first, as `sums` may be filled while the rows pass.
    shown = self.show_mistakes(tally.watch(rows), names)
    figures = dict(shown.figures)
    by_class = scores.by_class(*tally.counts)
    metrics = {"macro_f1": scores.macro_f1(*tally.counts)}
    columns = zip(names, by_class.precision, by_class.recall, by_class.f1, by_class.support)
    tables = {**shown.tables, "classes": [
        {"class": name, "precision": float(p), "recall": float(r), "f1": float(f),
         "support": int(n)} for name, p, r, f, n in columns]}
    if self.criterion == "softmax":  # a perceptron's probabilities mean nothing
      metrics["calibration_error"] = tally.calibration.error()
      figures["calibration"] = functools.partial(
          report.calibration,
          tally.calibration.count, tally.calibration.confidence, tally.calibration.right)
    worst, by_group = tally.groups.findings()
    metrics, tables = metrics | worst, tables | by_group
    if "confusion_matrix" in sums:
      figures["confusion_matrix"] = functools.partial(
          report.confusion_matrix, np.asarray(sums["confusion_matrix"][0]), names)
    return Findings(metrics, figures, tables)

  def show_mistakes(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], names: list[str],
  ) -> Findings:
    """The figure mistakes; it reads all rows, which are those of `evaluate`."""
    mistakes = _picture_mistakes(rows, names)
    return Findings(figures={} if mistakes is None else {"mistakes": mistakes})

  def _weight(self, label: Array) -> Array:
    """The weight of each label, f32[B]."""
    return jnp.asarray(self.class_weights, jnp.float32)[label]

  def _weights(self, batch: Batch) -> Array:
    """The weight of each example, f32[B]; of mixed labels the mean by their shares."""
    weights = self._weight(batch["label"])
    if "mix_label" in batch:
      share = batch["mix_weight"]
      weights = share * weights + (1 - share) * self._weight(batch["mix_label"])
    return weights

  def _criterion(self, logits: Array, label: Array, smoothing: float) -> Array:
    """The loss of each example, [B], for logits [B, C] and label i32[B]."""
    if self.criterion == "perceptron":
      # The index of the best logit is used, as the gradient of max would be split at a tie.
      guess = jnp.argmax(logits, axis=-1)
      return _pick(logits, guess) - _pick(logits, label)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -(1 - smoothing) * _pick(log_p, label) - smoothing * jnp.mean(log_p, axis=-1)


def decode(predictions: PyTree, assets: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
  """One row for each prediction, to print and to write.

  Args:
    predictions: the result of `Classification.predict`, {"probabilities": [B, C]}.
    assets: the run's assets; "classes" are the class names.

  Yields:
    {"label": name, "probability": p, "probabilities": {name: p, ...}}; the last has up to
    `MAX_LISTED` classes, the most probable first.
  """
  probabilities = np.asarray(predictions["probabilities"])
  names = class_names(assets, probabilities.shape[-1])
  for p in probabilities:
    order = np.argsort(-p, kind="stable")[:MAX_LISTED]
    yield {
        "label": names[order[0]],
        "probability": float(p[order[0]]),
        "probabilities": {names[i]: float(p[i]) for i in order},
    }


def _logits(out: Any) -> Array:
  """The logits [B, C] in a model's output, which may hold other values too."""
  return out["logits"] if isinstance(out, Mapping) else out


def _pick(values: Array, index: Array) -> Array:
  """values[b, index[b]], [B]."""
  return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]


def _rank(logits: Array, label: Array) -> Array:
  """How many classes come before the label by logit, i32[B]; at a tie the lower class does.

  They are counted: `jax.lax.top_k` sorts, and for that XLA gathers the rows of all devices on each.
  """
  own = _pick(logits, label)[:, None]
  behind = (logits < own) | ((logits == own) & (jnp.arange(logits.shape[-1]) >= label[:, None]))
  return jnp.sum(~behind, axis=-1)  # NaN logits give the place behind all classes


class _Tally:
  """Counts rows as they pass.

  Attributes:
    counts: f64[3, C], how often each class was guessed right, was the truth, and was guessed.
    calibration: the sums that the guesses' calibration follows from.
    groups: the guesses by the rows' groups.
  """

  def __init__(self, num_classes: int):
    self.counts = np.zeros((3, num_classes))
    self.calibration = scores.Calibration.of(np.zeros(0), np.zeros(0))
    self.groups = scores.Groups()

  def watch(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]],
  ) -> Iterator[tuple[PyTree, Mapping[str, Any]]]:
    """Counts the rows, and yields them unchanged."""
    for predictions, batch in rows:
      p, label = np.asarray(predictions["probabilities"]), np.asarray(batch["label"])
      guess = p.argmax(axis=-1)
      right = guess == label
      for total, classes in zip(self.counts, (label[right], label, guess)):
        total += np.bincount(classes, minlength=len(total))
      self.calibration += scores.Calibration.of(p.max(axis=-1), right)
      self.groups.add(batch, right)
      yield predictions, batch


def _picture_mistakes(rows: Iterable[tuple[PyTree, Mapping[str, Any]]], names: list[str]) -> Any:
  """A function that draws the wrong guesses, or the least sure right ones; None without images."""
  worst = Worst(MAX_PICTURED)
  seen = wrong = 0
  for predictions, batch in rows:
    images, labels = batch["image"], np.asarray(batch["label"])
    if len(images.shape) != 4:
      continue
    p = np.asarray(predictions["probabilities"])
    guesses = p.argmax(axis=-1)
    right = guesses == labels
    rest = p.copy()
    np.put_along_axis(rest, labels[:, None], -1, axis=-1)
    margins = np.take_along_axis(p, labels[:, None], axis=-1)[:, 0] - rest.max(axis=-1)
    seen += len(labels)
    wrong += int(np.sum(~right))

    def look(kept: np.ndarray) -> list[tuple[bool, np.ndarray, str]]:
      found = []
      for i, image in zip(kept, images[kept]):
        sure = f"sure: {p[i, labels[i]]:.0%}" if right[i] else f"guess: {names[guesses[i]]}"
        found.append((bool(right[i]), image, f"truth: {names[labels[i]]}\n{sure}"))
      return found

    worst.add(list(zip(right.tolist(), margins.tolist())), look)
  shown = worst.rows
  if not shown:
    return None
  if wrong:
    shown = [row for row in shown if not row[0]]
    part = f", the worst {len(shown)}" if wrong > len(shown) else ""
    caption = f"{wrong:,} of {seen:,} images wrong{part}"
  else:
    caption = f"All {seen:,} images right, the least sure"
  return functools.partial(
      report.image_grid, [row[1] for row in shown], [row[2] for row in shown], caption=caption)
