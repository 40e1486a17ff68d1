"""Examples of different lengths in batches of few shapes."""

import itertools

import numpy as np
import pytest

from dljax.data import ragged
from dljax.data.pipeline import PADDING, all_rows
from dljax.errors import UserError
from tests.data.hosts import share

LONGEST = 40


class Rows:
  """The simplest `RaggedExamples`: one array per example, all in memory."""

  def __init__(self, rows):
    self._rows = rows
    self.lengths = np.asarray([len(row) for row in rows])

  def __len__(self):
    return len(self._rows)

  def gather(self, plan, rows):
    examples = [self._rows[i] if i != PADDING else self._rows[0][:0] for i in plan.indices[rows]]
    return {"x": ragged.pad(examples, plan.padded), "length": np.array([len(example) for example in examples])}

  def close(self):
    pass


def make(n=50, batch_size=4, lengths=None, rows=all_rows, **kwargs):
  """A pipeline of n rows, row i filled with i + 1."""
  lengths = np.random.default_rng(0).integers(1, LONGEST + 1, n) if lengths is None else np.asarray(lengths)
  examples = Rows([np.full(length, i + 1, np.int32) for i, length in enumerate(lengths)])
  kwargs = {"longest": LONGEST, **kwargs}
  pipeline = ragged.RaggedPipeline(
      lambda _: examples,
      lambda examples, plan: {**examples.gather(plan, plan.rows), "host/id": plan.indices[plan.rows]},
      batch_size=batch_size, **kwargs)
  pipeline.open(rows)
  return pipeline, lengths


@pytest.mark.parametrize("train", [True, False])
def test_each_row_is_there_in_full_and_nothing_else(train):
  pipeline, lengths = make(train=train)
  for step in range(pipeline.num_batches):
    batch = pipeline.batch(step)
    assert batch["x"].shape[1] in pipeline.ends
    for row, length, mask, index in zip(batch["x"], batch["length"], batch["mask"], batch["host/id"]):
      expected = np.zeros(batch["x"].shape[1])
      if index != PADDING:
        expected[:lengths[index]] = index + 1
      np.testing.assert_array_equal(row, expected)
      assert (length, mask) == ((0, 0) if index == PADDING else (lengths[index], 1))


def test_training_sees_every_example_once_per_epoch_in_full_batches():
  pipeline, _ = make(n=48, batch_size=4, train=True)
  stream = np.concatenate([pipeline.batch(step)["host/id"] for step in range(36)])
  for epoch in stream.reshape(3, 48):
    assert sorted(epoch) == list(range(48))
  assert not np.array_equal(stream[:48], stream[48:96])
  assert pipeline.num_batches == 12


@pytest.mark.parametrize("buckets", [1, 3, 8])
def test_the_examples_of_a_window_do_not_depend_on_the_bucketing(buckets):
  ids = lambda pipeline: sorted(np.concatenate([pipeline.batch(s)["host/id"] for s in range(2 * pipeline.num_batches)]))
  assert ids(make(train=True, buckets=buckets)[0]) == ids(make(train=True, buckets=5)[0])


def test_evaluation_takes_each_example_once_and_no_batch_more_than_without_buckets():
  pipeline, _ = make(n=50, batch_size=4)
  ids = np.concatenate([pipeline.batch(step)["host/id"] for step in range(pipeline.num_batches)])
  assert pipeline.num_batches == 13
  assert sorted(ids) == [PADDING] * 2 + list(range(50))
  for step in (-1, 13):
    with pytest.raises(IndexError, match="a pass over 50 examples"):
      pipeline.batch(step)


@pytest.mark.parametrize("train", [True, False])
def test_a_batch_is_a_function_of_seed_and_step_and_hosts_share_it_out(train):
  whole, _ = make(train=train, seed=5)
  for rows in share(0, 2), share(1, 2):
    part, _ = make(train=train, seed=5, rows=rows)
    for step in (9, 2, 11):
      np.testing.assert_array_equal(part.batch(step)["x"], whole.batch(step)["x"][rows(4)])


def test_fitted_lengths_need_the_least_padding():
  lengths = np.random.default_rng(1).integers(1, 12, 30) ** 2 // 10
  cost = lambda ends: sum(min(end for end in ends if end >= length) for length in lengths)
  for buckets in (1, 2, 3):
    best = min(cost((*rest, 14)) for rest in itertools.combinations(range(1, 14), buckets - 1))
    ends = ragged.fitted(lengths, 14, buckets)
    assert len(ends) <= buckets and ends[-1] == 14
    assert cost(ends) == best


def test_lengths_are_multiples_where_asked_and_never_more_than_eight():
  lengths = np.random.default_rng(2).integers(0, 5000, 3000)
  for ends in (ragged.fitted(lengths, 5008, multiple=16), ragged.spaced(5008, multiple=16)):
    assert len(ends) == 8 and ends[-1] == 5008 and list(ends) == sorted(set(ends))
    assert not any(end % 16 for end in ends)
  assert ragged.spaced(3) == (1, 2, 3)
  assert ragged.fitted(np.array([4, 4]), 10) == (4, 10)


def test_buckets_save_padding():
  lengths = np.random.default_rng(3).geometric(0.1, 400).clip(1, LONGEST)
  fraction = {buckets: make(lengths=lengths, buckets=buckets, train=True)[0].padding() for buckets in (1, 8)}
  assert fraction[1] == pytest.approx(1 - lengths.mean() / LONGEST, abs=1e-9)
  assert fraction[8] < 0.15 < fraction[1]


def test_bad_lengths_and_buckets():
  with pytest.raises(UserError, match="--config.data.max_length=40: example 1 has length 41; allow as much"):
    make(lengths=[3, 41, 2])
  with pytest.raises(UserError, match="--config.data.buckets=9: must be from 1 to 8"):
    make(buckets=9)
  with pytest.raises(UserError, match="--config.data.max_length=0: must be at least 1"):
    make(longest=0)
