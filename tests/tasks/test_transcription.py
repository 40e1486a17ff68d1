"""Transcription: the loss in shares, decoding against every text there is, and error rates."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dljax.errors import UserError
from dljax.ops import ctc as ctc_op
from dljax.tasks import transcription
from tests.fixtures import formula
from tests.tasks import compiled

ALPHABET = " ab"


class Linear(nn.Module):
  """Every second frame as it is, through one layer."""

  @nn.compact
  def __call__(self, features, length, *, train):
    del train
    return {"logits": nn.Dense(1 + len(ALPHABET), name="head")(features[:, ::2]), "length": self.output_length(length)}

  def output_length(self, length):
    return -(-length // 2)


def _batch():
  """Five recordings: two whose text fits, one whose text is one frame too long, one empty text, one row of padding."""
  return {
      "features": formula.noise("features", (5, 12, 4)), "length": np.array([12, 9, 6, 8, 0], np.int32),
      "tokens": np.array([[1, 2, 2, 3], [2, 3, 0, 0], [2, 2, 2, 0], [0] * 4, [0] * 4], np.int32),
      "token_length": np.array([4, 2, 3, 0, 0], np.int32), "mask": np.array([1, 1, 1, 1, 0], np.float32),
      "id": np.array([0, 1, 2, 3, 0], np.int32)}


def _task_and_variables(**kwargs):
  task = transcription.Transcription(Linear(), ALPHABET, **kwargs)
  return task, compiled.variables(task, _batch())


def _loss(task, variables, batch, denominators=None):
  out = compiled.loss(task, batch, variables["params"], denominators=denominators, train=True)
  return out.loss, out.metrics


_ctc_loss = jax.jit(ctc_op.ctc_loss)


# --- The loss ---------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_recordings_whose_text_fits():
  task, variables = _task_and_variables()
  batch = _batch()
  assert compiled.denominators(task, batch) == {"utterances": 3}
  loss, metrics = _loss(task, variables, batch)
  logits = jax.jit(functools.partial(Linear().apply, train=False))(
      variables, batch["features"], batch["length"])["logits"]
  each = np.asarray(_ctc_loss(logits, -(-batch["length"] // 2), batch["tokens"], batch["token_length"]))
  assert np.isposinf(each[2]) and np.isfinite(each[[0, 1, 3]]).all()
  np.testing.assert_allclose(loss, np.mean(each[[0, 1, 3]]), rtol=1e-6)
  np.testing.assert_allclose(metrics["loss"], [np.sum(each[[0, 1, 3]]), 3], rtol=1e-6)
  np.testing.assert_array_equal(metrics["too_short"], [1, 4])
  summary = task.summarize(metrics)
  assert summary["too_short"] == 0.25 and summary["loss"] == pytest.approx(float(loss))


def test_recordings_that_are_left_out_have_no_gradient():
  task, variables = _task_and_variables()
  batch = _batch()
  loss = lambda x: task.loss(
      variables["params"], {}, {**batch, "features": x}, jax.random.key(0),
      denominators=task.denominators(batch), train=True).loss
  grad = np.asarray(jax.jit(jax.grad(loss))(batch["features"]))
  assert np.isfinite(grad).all() and not grad[[2, 4]].any()
  assert all(grad[i, :batch["length"][i]:2].any() for i in (0, 1, 3))


def test_shares_of_shards_add_up():
  task, variables = _task_and_variables()
  batch = _batch()
  shards = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 3), slice(3, 5))]
  denominators = {"utterances": sum(compiled.denominators(task, shard)["utterances"] for shard in shards)}
  parts = [_loss(task, variables, shard, denominators) for shard in shards]
  whole, metrics = _loss(task, variables, batch)
  np.testing.assert_allclose(sum(loss for loss, _ in parts), whole, rtol=1e-6)
  for name, pair in metrics.items():
    np.testing.assert_allclose(np.sum([part[name] for _, part in parts], axis=0), pair, rtol=1e-6)


def test_a_batch_of_padding_has_loss_0():
  task, variables = _task_and_variables()
  batch = {name: np.zeros_like(value) for name, value in _batch().items()}
  loss, metrics = _loss(task, variables, batch)
  assert loss == 0 and np.isnan(task.summarize(metrics)["loss"])


# --- Decoding ---------------------------------------------------------------------------------------------


def test_greedy_merges_repeats_before_it_drops_blanks():
  for frames, text in (("_aab_b", "abb"), ("____", ""), ("aaaa", "a"), ("a_a a", "aa a"), ("", "")):
    log_probs = np.log(np.eye(4)[["_ ab".index(c) for c in frames]].reshape(-1, 4) + 1e-3)
    assert transcription.spell(transcription.greedy(log_probs), ALPHABET) == text


def _all_texts(log_probs):
  """Text -> log probability, by going through every alignment."""
  found = {}
  for alignment in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
    text = tuple(label for label, _ in itertools.groupby(alignment) if label)
    found[text] = np.logaddexp(found.get(text, -np.inf), log_probs[np.arange(len(log_probs)), alignment].sum())
  return found


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_every_text_with_its_probability(seed):
  log_probs = scipy.special.log_softmax(2 * formula.noise(f"beam{seed}", (5, 3)).astype(np.float64), axis=-1)
  expected = _all_texts(log_probs)
  found = dict(transcription.prefix_beam_search(log_probs, 200))
  assert found.keys() == expected.keys()
  np.testing.assert_allclose([found[text] for text in expected], list(expected.values()), rtol=1e-6)
  scores = [score for _, score in transcription.prefix_beam_search(log_probs, 200)]
  assert scores == sorted(scores, reverse=True)


def test_beam_search_agrees_with_the_loss_and_beats_greedy():
  """Where many alignments of one text together outweigh the best one of another (Graves et al. 2006, section 3.2)."""
  log_probs = np.log(np.array([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0]]) + 1e-9)
  assert transcription.greedy(log_probs) == []
  (text, score), *_ = transcription.prefix_beam_search(log_probs, 2)
  assert text == (1,) and score == pytest.approx(np.log(1 - 0.36), abs=1e-6)
  loss = _ctc_loss(log_probs[None].astype(np.float32), np.array([2]), np.array([[1]]), np.array([1]))
  np.testing.assert_allclose(score, -loss[0], rtol=1e-5)


def test_a_narrow_beam_gives_no_more_than_the_whole_probability():
  log_probs = scipy.special.log_softmax(formula.noise("narrow", (6, 4)).astype(np.float64), axis=-1)
  expected = _all_texts(log_probs)
  best = max(expected.values())
  for beam in (1, 3, 10):
    found = transcription.prefix_beam_search(log_probs, beam)
    assert len(found) == beam
    assert all(score <= expected[text] + 1e-9 for text, score in found)
  assert transcription.prefix_beam_search(log_probs, 60)[0][1] == pytest.approx(best)
  assert transcription.prefix_beam_search(log_probs[:0], 3) == [((), 0.0)]


def test_a_beam_out_of_range_is_refused():
  with pytest.raises(UserError, match="--config.model.beam=0"):
    transcription.Transcription(Linear(), ALPHABET, beam=0)


# --- Evaluation -------------------------------------------------------------------------------------------


def _predictions(texts, frames=14):
  """Sure predictions of texts, a blank after each character."""
  log_probs = np.full((len(texts), frames, 4), -20.0, np.float32)
  for i, text in enumerate(texts):
    spelt = "_".join(text).ljust(frames, "_")
    log_probs[i, np.arange(frames), ["_ ab".index(c) for c in spelt]] = 0
  return {"log_probs": log_probs, "length": np.full(len(texts), frames, np.int32)}


@pytest.mark.parametrize("beam", [1, 4])
def test_error_rates_are_of_the_whole_set(beam):
  task = transcription.Transcription(Linear(), ALPHABET, beam=beam)
  pairs = [("ab ba", "ab ba"), ("ab ab", "ab aa"), ("a b", "ab"), ("", "a"), ("b", "")]
  rows = []
  for block in (pairs[:2], pairs[2:]):
    tokens = np.zeros((len(block), 6), np.int32)
    for i, (truth, _) in enumerate(block):
      tokens[i, :len(truth)] = [1 + ALPHABET.index(c) for c in truth]
    rows.append((_predictions([found for _, found in block]), {
        "tokens": tokens, "token_length": np.array([len(truth) for truth, _ in block]), "mask": np.ones(len(block)),
        "features": formula.noise("pictured", (len(block), 28, 3)), "length": np.full(len(block), 28)}))
  findings = task.evaluate(iter(rows), {}, {})
  assert findings.metrics["character_error_rate"] == pytest.approx((0 + 1 + 1 + 1 + 1) / (5 + 5 + 3 + 0 + 1))
  assert findings.metrics["word_error_rate"] == pytest.approx((0 + 1 + 2 + 1 + 1) / (2 + 2 + 2 + 0 + 1))
  table = findings.tables["transcripts"]
  assert len(table) == 5 and {"truth": "ab ba", "found": "ab ba", "character_error_rate": 0.0} == table[-1]
  titles = [axes.get_title(loc="left") for axes in findings.figures["alignments"]().axes[::2]]
  assert len(titles) == transcription.MAX_PICTURED and "said: ab ba\nread: ab ba" not in titles
  findings.figures["alignments"]().draw_without_rendering()


def test_without_rows_there_are_no_rates():
  assert all(np.isnan(v) for v in transcription.Transcription(Linear(), ALPHABET).evaluate(iter(()), {}, {}).metrics.values())


def test_predictions_and_decode():
  task, variables = _task_and_variables()
  predictions = compiled.predict(task, variables, {k: _batch()[k] for k in ("features", "length", "mask")})
  assert predictions["log_probs"].shape == (5, 6, 4) and predictions["log_probs"].dtype == jnp.float32
  np.testing.assert_array_equal(predictions["length"], [6, 5, 3, 4, 0])
  rows = list(transcription.decode(_predictions(["ab a", "b"]), {"alphabet": list(ALPHABET)}, beam=3))
  assert rows == [{"text": "ab a"}, {"text": "b"}]
  assert list(transcription.transcribe(predictions, ALPHABET, 4))[4] == ""
