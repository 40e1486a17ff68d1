"""Which examples make up which batch."""

import jax
import numpy as np
import pytest

from dljax.data.pipeline import PADDING, IndexedPipeline, InMemory, Streaming, all_rows, rng
from dljax.errors import UserError
from tests.data.hosts import share


def make(n=10, batch_size=4, streamed=False, rows=all_rows, **kwargs):
  """A pipeline over the numbers 0..n-1."""
  def load(indices, plan, rows):
    return [{"x": np.float32(index), "where": np.array([plan.step, row])}
            for index, row in zip(indices, rows)]

  def open_examples(pipeline):
    if streamed:
      return Streaming(n, load, pipeline.plan, lambda plan: plan.rows, threads=2)
    return InMemory({"x": np.arange(n, dtype=np.float32)}, lambda example, plan, row: {
        **example, "where": np.array([plan.step, row])})

  def finish(examples, plan):
    return {**examples.gather(plan, plan.rows), "host/id": plan.indices[plan.rows]}

  pipeline = IndexedPipeline(open_examples, finish, batch_size=batch_size, **kwargs)
  pipeline.open(rows)
  return pipeline


def test_every_example_once_per_epoch_whatever_the_batch_size():
  train = make(n=10, batch_size=4, seed=3, train=True)
  stream = np.concatenate([train.batch(step)["x"] for step in range(10)])
  epochs = stream.reshape(4, 10)  # 40 elements of the stream: 4 epochs of 10
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in epochs}) == 4  # shuffled anew
  assert train.num_batches == 2 and train.num_examples == 10


def test_batch_is_a_function_of_seed_and_step():
  one, other = make(seed=1, train=True), make(seed=1, train=True)
  later = {step: other.batch(step)["x"].tolist() for step in (7, 2, 0, 7)}
  assert later == {step: one.batch(step)["x"].tolist() for step in (0, 2, 7)}
  assert make(seed=2, train=True).batch(0)["x"].tolist() != later[0]


def test_every_name_seed_and_step_has_draws_of_its_own():
  draws = {rng(seed, step, name).random() for seed in (0, 1) for step in (0, 1) for name in ("flip", "pad_crop")}
  assert len(draws) == 8


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_out_the_global_batch(train, hosts):
  whole = make(train=train)
  for rows in (share(host, hosts) for host in range(hosts)):
    part = make(train=train, rows=rows)
    assert part.num_batches == whole.num_batches
    for step in range(3):
      np.testing.assert_array_equal(part.batch(step)["host/id"], whole.batch(step)["host/id"][rows(4)])


def test_id_is_the_global_row_in_training_and_the_example_in_evaluation():
  """So that what the engine draws for a row depends on neither hosts nor, in evaluation, the batch size."""
  for hosts in (1, 2):
    for host in range(hosts):
      train = make(train=True, rows=share(host, hosts))
      for step in (0, 5):
        batch = train.batch(step)
        assert batch["id"].dtype == np.int32 and batch["id"].tolist() == list(range(host, 4, hosts))
        assert batch["mask"].tolist() == [1] * (4 // hosts)
  for size in (2, 4, 16):
    evaluation = make(batch_size=size)
    batches = [evaluation.batch(step) for step in range(evaluation.num_batches)]
    ids, mask = (np.concatenate([batch[field] for batch in batches]) for field in ("id", "mask"))
    assert ids[:10].tolist() == list(range(10)) and not ids[10:].any()
    assert mask.tolist() == [1] * 10 + [0] * (len(ids) - 10)


def test_evaluation_is_one_pass_in_order_with_a_padded_end():
  evaluation = make(n=10, batch_size=4)
  assert evaluation.num_batches == 3
  ids = np.concatenate([evaluation.batch(step)["host/id"] for step in range(3)])
  assert ids.tolist() == [*range(10), PADDING, PADDING]
  with pytest.raises(IndexError):
    evaluation.batch(3)


@pytest.mark.parametrize("train", [True, False])
def test_streaming_gives_the_same_batches_in_any_order_of_steps(train):
  memory, disk = make(train=train), make(train=train, streamed=True)
  for step in (0, 1, 2, 1, 0, 2):
    one, other = memory.batch(step), disk.batch(step)
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])
  disk.close()
  with pytest.raises(RuntimeError, match="open"):
    disk.batch(0)


def test_a_failed_read_is_an_error_and_the_next_try_starts_afresh(monkeypatch):
  disk = make(train=True, streamed=True, batch_size=10)
  expected = disk.batch(1)["x"]
  working = disk._examples._load
  monkeypatch.setattr(disk._examples, "_load", lambda *args: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    disk.batch(5)
  monkeypatch.setattr(disk._examples, "_load", working)
  np.testing.assert_array_equal(disk.batch(1)["x"], expected)


def test_open_reads_once():
  calls = []
  pipeline = IndexedPipeline(lambda p: calls.append(1) or InMemory({"x": np.zeros(3)}), None, batch_size=2)
  pipeline.open()
  pipeline.open()
  assert calls == [1] and pipeline.num_examples == 3


def test_sizes_that_cannot_be():
  with pytest.raises(UserError, match="batch_size=4.*3 training examples"):
    make(n=3, batch_size=4, train=True)


def test_whose_rows_are_whose_is_asked_where_several_processes_take_part(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(RuntimeError, match="batch_rows"):
    make()
  assert make(rows=share(1, 2)).batch(0)["host/id"].tolist() == [1, 3]
