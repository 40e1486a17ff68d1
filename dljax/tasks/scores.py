"""Scores of a classifier over a whole set, in NumPy: precision and recall by class, calibration, accuracy by group.

Calibration. Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Q. Weinberger. "On Calibration of Modern Neural Networks",
2017. https://arxiv.org/abs/1706.04599

Dimensions: `C` classes, `M` bins, `N` examples.
"""

import dataclasses

import numpy as np

BINS = 15  # of Guo et al., section 4


@dataclasses.dataclass(frozen=True)
class ClassScores:
  """Scores of each class, f64[C], and how often it is the truth.

  What has no denominator (precision of a class that was never guessed, recall of one that never occurred) is 0.
  """

  precision: np.ndarray
  recall: np.ndarray
  f1: np.ndarray
  support: np.ndarray


def by_class(right: np.ndarray, support: np.ndarray, guessed: np.ndarray) -> ClassScores:
  """The scores that follow from counts: the diagonal, the row sums and the column sums of a confusion matrix.

  Args:
    right: [C], how many examples of each class were guessed right.
    support: [C], how often it is the truth.
    guessed: [C], how often it was guessed.
  """
  # F1 = 2 P R / (P + R) = 2 right / (support + guessed).
  return ClassScores(_ratio(right, guessed), _ratio(right, support), _ratio(2 * right, support + guessed), support)


def macro_f1(right: np.ndarray, support: np.ndarray, guessed: np.ndarray) -> float:
  """The mean of F1 over the classes that occur, as truth or as guess; NaN where none does. See `by_class`."""
  occurs = support + guessed > 0
  return float(by_class(right, support, guessed).f1[occurs].mean()) if occurs.any() else float("nan")


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  numerator = np.asarray(numerator, np.float64)
  return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Sums over `M` bins of confidence of equal width; they add up over batches.

  Bin m holds the examples of confidence in (m / M, (m + 1) / M], the first also those of 0.

  Attributes:
    count: f64[M], examples.
    confidence: f64[M], the sum of the probabilities of the guesses.
    right: f64[M], how many guesses were right.
  """

  count: np.ndarray
  confidence: np.ndarray
  right: np.ndarray

  @classmethod
  def of(cls, confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> "Calibration":
    """The sums of examples.

    Args:
      confidence: f[N], the probability of the guess, in [0, 1].
      right: bool[N].
      bins: M.
    """
    confidence = np.asarray(confidence, np.float64)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = lambda weights: np.bincount(index, weights, minlength=bins).astype(np.float64)
    return cls(count(None), count(confidence), count(np.asarray(right, np.float64)))

  def __add__(self, other: "Calibration") -> "Calibration":
    return Calibration(self.count + other.count, self.confidence + other.confidence, self.right + other.right)

  def error(self) -> float:
    """The expected calibration error, equation 3: the mean over examples of |accuracy - confidence| of their bin."""
    total = self.count.sum()
    return float(np.abs(self.right - self.confidence).sum() / total) if total else float("nan")


def by_group(groups: np.ndarray, right: np.ndarray) -> list[dict[str, str | float | int]]:
  """The accuracy of each group, in the order of the groups.

  Args:
    groups: [N] numbers or strings.
    right: bool[N].

  Returns:
    {"group", "accuracy", "support"} of each.
  """
  names, index = np.unique(groups, return_inverse=True)
  support, hits = np.bincount(index), np.bincount(index, np.asarray(right, np.float64))
  return [{"group": name.item(), "accuracy": float(hit / count), "support": int(count)}
          for name, hit, count in zip(names, hits, support)]
