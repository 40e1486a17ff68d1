"""Scores: equal to scikit-learn's and to plain loops."""

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dljax.tasks import scores


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6).flatmap(lambda c: st.tuples(
    st.just(c), st.lists(st.tuples(st.integers(0, c - 1), st.integers(0, c - 1)), min_size=1, max_size=40))))
def test_scores_by_class_are_scikit_learns(drawn):
  classes, pairs = drawn
  truth, guess = np.array(pairs).T
  confusion = sklearn.metrics.confusion_matrix(truth, guess, labels=range(classes))
  precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
      truth, guess, labels=range(classes), zero_division=0)
  counts = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
  found = scores.by_class(*counts)
  np.testing.assert_allclose(found.precision, precision)
  np.testing.assert_allclose(found.recall, recall)
  np.testing.assert_allclose(found.f1, f1, atol=1e-15)
  np.testing.assert_array_equal(found.support, support)
  assert scores.macro_f1(*counts) == pytest.approx(sklearn.metrics.f1_score(truth, guess, average="macro"))


def test_nothing_counted_has_no_score():
  assert math.isnan(scores.macro_f1(*np.zeros((3, 3))))
  assert math.isnan(scores.Calibration.of(np.zeros(0), np.zeros(0, bool)).error())


def _plain_error(confidence, right, bins):
  total = 0.0
  for m in range(bins):
    inside = [i for i, p in enumerate(confidence) if (m / bins < p <= (m + 1) / bins) or (m == 0 and p == 0)]
    if inside:
      gap = np.mean([right[i] for i in inside]) - np.mean([confidence[i] for i in inside])
      total += len(inside) / len(confidence) * abs(gap)
  return total


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(
    hnp.arrays(np.float64, n, elements=st.integers(0, 1000).map(lambda k: k / 1009)), hnp.arrays(bool, n))),
       st.sampled_from([10, 15]))
def test_calibration_error_is_that_of_a_plain_loop(drawn, bins):
  confidence, right = drawn
  found = scores.Calibration.of(confidence, right, bins)
  assert found.error() == pytest.approx(_plain_error(confidence, right, bins), abs=1e-12)
  half = len(right) // 2
  parts = [scores.Calibration.of(confidence[s], right[s], bins) for s in (slice(half), slice(half, None))]
  np.testing.assert_allclose((parts[0] + parts[1]).confidence, found.confidence)
  np.testing.assert_array_equal((parts[0] + parts[1]).count, found.count)


def test_calibration_error_by_hand():
  """Four guesses of 0.9, of which two are right, and one of 1 that is: (4 x 0.4 + 1 x 0) / 5."""
  found = scores.Calibration.of(np.array([0.9, 0.9, 0.9, 0.9, 1.0]), np.array([1, 1, 0, 0, 1]))
  assert found.error() == pytest.approx(0.32)
  assert scores.Calibration.of(np.full(10, 0.5), np.arange(10) < 5).error() == pytest.approx(0)


def test_a_confidence_on_an_edge_lies_in_the_bin_below():
  found = scores.Calibration.of(np.array([0, 0.25, 0.5, 0.75, 1, 0.26]), np.ones(6), bins=4)
  np.testing.assert_array_equal(found.count, [2, 2, 1, 1])
  np.testing.assert_allclose(found.confidence, [0.25, 0.76, 0.75, 1])


def test_accuracy_by_group():
  right = np.array([1, 0, 1, 1, 0, 0], bool)
  assert scores.by_group(np.array(["b", "b", "a", "b", "c", "c"]), right) == [
      {"group": "a", "accuracy": 1.0, "support": 1}, {"group": "b", "accuracy": pytest.approx(2 / 3), "support": 3},
      {"group": "c", "accuracy": 0.0, "support": 2}]
  assert [row["group"] for row in scores.by_group(np.array([10, 9, 10, 9, 9, 9]), right)] == [9, 10]


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_is_that_of_sklearn(levels):
  draw = np.random.default_rng(levels)
  for size in (1, 7, 200):
    score = draw.integers(levels, size=size) / levels  # many ties
    positive = draw.random(size) < 0.3
    positive[0] = True
    expected = sklearn.metrics.average_precision_score(positive, score)
    assert scores.average_precision(score, positive) == pytest.approx(expected, rel=1e-12)


def test_average_precision_without_a_positive_example_is_none():
  assert np.isnan(scores.average_precision(np.zeros(3), np.zeros(3, bool)))
  assert np.isnan(scores.average_precision(np.zeros(0), np.zeros(0, bool)))
