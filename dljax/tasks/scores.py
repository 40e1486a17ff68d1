"""Scores of a classifier over a whole set, in NumPy.

These are precision and recall by class, average precision, calibration, and accuracy by group.

Calibration. Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Q. Weinberger. "On Calibration of Modern
Neural Networks", 2017. https://arxiv.org/abs/1706.04599

Dimensions: `C` classes, `M` bins, `N` examples.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

BINS = 15  # as in Guo et al., section 4
GROUP = "host/group/"  # the prefix of batch fields that hold the group of each row


@dataclasses.dataclass(frozen=True)
class ClassScores:
  """Scores of each class, f64[C], and how often it is the truth.

  A score without a denominator is 0: the precision of a class that was never guessed, or the
  recall of one that never occurred.
  """

  precision: np.ndarray
  recall: np.ndarray
  f1: np.ndarray
  support: np.ndarray


def by_class(right: np.ndarray, support: np.ndarray, guessed: np.ndarray) -> ClassScores:
  """The scores that follow from a confusion matrix's diagonal, row sums and column sums.

  Args:
    right: [C], how many examples of each class were guessed right.
    support: [C], how often each class is the truth.
    guessed: [C], how often each class was guessed.
  """
  # F1 = 2 P R / (P + R) = 2 right / (support + guessed).
  return ClassScores(_ratio(right, guessed), _ratio(right, support),
                     _ratio(2 * right, support + guessed), support)


def macro_f1(right: np.ndarray, support: np.ndarray, guessed: np.ndarray) -> float:
  """The mean F1 of the classes that occur as truth or as guess, else NaN. See `by_class`."""
  occurs = support + guessed > 0
  f1 = by_class(right, support, guessed).f1
  return float(f1[occurs].mean()) if occurs.any() else float("nan")


def average_precision(score: np.ndarray, positive: np.ndarray) -> float:
  """The area under the precision-recall curve, as a sum of steps: the sum over the distinct scores,
  from the highest, of (R_n - R_{n-1}) P_n; NaN without a positive example.

  Args:
    score: f[N], the higher the more probable.
    positive: bool[N].
  """
  order = np.argsort(-score, kind="stable")
  score, hits = np.asarray(score)[order], np.cumsum(np.asarray(positive, np.float64)[order])
  if not hits.size or not hits[-1]:
    return float("nan")
  last = np.append(score[1:] != score[:-1], True)  # of the examples with one score
  hits, count = hits[last], np.flatnonzero(last) + 1
  return float(np.sum(np.diff(hits, prepend=0) * hits / count) / hits[-1])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  numerator = np.asarray(numerator, np.float64)
  return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Sums over `M` bins of confidence of equal width; they add up over batches.

  Bin m holds the examples with a confidence in (m / M, (m + 1) / M]; the first also has those
  with 0.

  Attributes:
    count: f64[M], the number of examples.
    confidence: f64[M], the sum of the guesses' probabilities.
    right: f64[M], the number of right guesses.
  """

  count: np.ndarray
  confidence: np.ndarray
  right: np.ndarray

  @classmethod
  def of(cls, confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> "Calibration":
    """The sums over some examples.

    Args:
      confidence: f[N], the probability of each guess, in [0, 1].
      right: bool[N], whether each guess is right.
      bins: the number of bins, M.
    """
    confidence = np.asarray(confidence, np.float64)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    values = np.ones_like(confidence), confidence, np.asarray(right, np.float64)
    return cls(*(np.bincount(index, value, minlength=bins) for value in values))

  def __add__(self, other: "Calibration") -> "Calibration":
    return Calibration(self.count + other.count, self.confidence + other.confidence,
                       self.right + other.right)

  def error(self) -> float:
    """The expected calibration error, equation 3.

    It is the mean over examples of |accuracy - confidence| of their bin; NaN without examples.
    """
    total = self.count.sum()
    return float(np.abs(self.right - self.confidence).sum() / total) if total else float("nan")


def by_group(groups: np.ndarray, right: np.ndarray) -> list[dict[str, str | float | int]]:
  """The accuracy of each group, sorted by group.

  Args:
    groups: [N], a number or a string for each example.
    right: bool[N], whether each guess is right.

  Returns:
    {"group", "accuracy", "support"} for each group.
  """
  names, index = np.unique(groups, return_inverse=True)
  support, hits = np.bincount(index), np.bincount(index, np.asarray(right, np.float64))
  return [{"group": name.item(), "accuracy": float(hit / count), "support": int(count)}
          for name, hit, count in zip(names, hits, support)]


class Groups:
  """Accuracy by the groups that rows are in, of rows that come batch by batch."""

  def __init__(self):
    self._parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

  def add(self, batch: Mapping[str, Any], right: np.ndarray) -> None:
    """Counts rows.

    Args:
      batch: the rows; each field "host/group/NAME" holds their groups of one kind.
      right: bool[B], whether each row's guess is right.
    """
    for field, groups in batch.items():
      if field.startswith(GROUP):
        self._parts.setdefault(field.removeprefix(GROUP), []).append((np.asarray(groups), right))

  def findings(self) -> tuple[dict[str, float], dict[str, list[dict[str, Any]]]]:
    """The metrics worst_NAME_accuracy, and the tables group_NAME; see `by_group`."""
    tables = {name: by_group(*map(np.concatenate, zip(*parts)))
              for name, parts in self._parts.items()}
    return ({f"worst_{name}_accuracy": min(row["accuracy"] for row in table)
             for name, table in tables.items()},
            {f"group_{name}": table for name, table in tables.items()})
