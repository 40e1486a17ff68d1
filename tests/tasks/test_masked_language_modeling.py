"""Masked language modelling: exact means over the hidden tokens, and guesses in their order."""

import math

import jax
import numpy as np
import pytest
import scipy.special

from dljax.tasks.masked_language_modeling import GUESSES, MaskedLanguageModeling
from tests.tasks import compiled, tiny

TASK = MaskedLanguageModeling(tiny.TinyEncoder())


def _batch():
  """Three rows of 6, 4 and 0 tokens with 2, 1 and 0 to be predicted."""
  draw = np.random.default_rng(0)
  tokens = draw.integers(0, tiny.VOCABULARY, (3, 6)).astype(np.int32)
  length = np.array([6, 4, 0], np.int32)
  return {"tokens": np.where(np.arange(6) < length[:, None], tokens, 0).astype(np.int32), "length": length,
          "places": np.array([[1, 4, 0], [2, 0, 0], [0, 0, 0]], np.int32),
          "targets": np.array([[3, 7, 0], [5, 0, 0], [0, 0, 0]], np.int32),
          "target_weight": np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32),
          "id": np.arange(3, dtype=np.int32), "mask": (length > 0).astype(np.float32)}


VARIABLES = compiled.variables(TASK, _batch())


def _logits(batch):
  apply = jax.jit(lambda variables, tokens, length: TASK.model.apply(variables, tokens, length=length)["logits"])
  return np.asarray(apply(VARIABLES, batch["tokens"], batch["length"]), np.float64)


def _losses(batch):
  """-log p of the tokens to be predicted, by hand."""
  log_p = scipy.special.log_softmax(_logits(batch), axis=-1)
  return [-log_p[row, batch["places"][row, i], batch["targets"][row, i]]
          for row, i in zip(*np.nonzero(batch["target_weight"]))]


def test_the_loss_is_the_mean_over_hidden_tokens():
  batch = _batch()
  expected = np.mean(_losses(batch))
  assert compiled.denominators(TASK, batch)["tokens"] == 3
  for train in (True, False):
    out = compiled.loss(TASK, batch, VARIABLES["params"], train=train)
    found = TASK.summarize(out.metrics)
    assert float(out.loss) == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert found["padding"] == pytest.approx(8 / 18)
    assert set(found) == set(TASK.goals)


def test_accuracy_counts_the_most_probable_token():
  batch = _batch()
  best = np.argmax(_logits(batch), axis=-1)
  batch["targets"][0, 0] = best[0, 1]
  batch["targets"][0, 1] = (best[0, 4] + 1) % tiny.VOCABULARY
  batch["targets"][1, 0] = (best[1, 2] + 1) % tiny.VOCABULARY
  found = TASK.summarize(compiled.loss(TASK, batch, VARIABLES["params"]).metrics)
  assert found["accuracy"] == pytest.approx(1 / 3)


def test_padding_changes_nothing():
  batch = _batch()
  other = {field: value.copy() for field, value in batch.items()}
  other["tokens"][1, 4:], other["targets"][0, 2], other["places"][1, 1:] = 9, 4, 3
  one, two = (compiled.loss(TASK, b, VARIABLES["params"]) for b in (batch, other))
  assert float(one.loss) == float(two.loss)


def test_shares_of_devices_add_up():
  batch = _batch()
  denominators = compiled.denominators(TASK, batch)
  _, whole, _ = compiled.loss_and_grad(TASK, VARIABLES["params"], batch)
  parts = [compiled.loss_and_grad(TASK, VARIABLES["params"], {k: v[i:i + 1] for k, v in batch.items()}, denominators)[1]
           for i in range(3)]
  jax.tree.map(lambda w, *p: np.testing.assert_allclose(w, sum(p), atol=1e-6), whole, *parts)


def test_packed_documents_do_not_see_each_other():
  batch = {**_batch(), "segment": np.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0], [0] * 6], np.int32),
           "position": np.array([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 0], [0] * 6], np.int32)}
  found = compiled.loss(TASK, batch, VARIABLES["params"])
  total = 0
  for row, part, place, target in ((0, slice(0, 3), 1, 3), (0, slice(3, 6), 1, 7), (1, slice(2, 4), 0, 5)):
    alone = {"tokens": batch["tokens"][row:row + 1, part], "places": np.array([[place]], np.int32),
             "targets": np.array([[target]], np.int32), "target_weight": np.ones((1, 1), np.float32),
             "id": np.zeros(1, np.int32)}
    alone["length"] = np.array([alone["tokens"].shape[1]], np.int32)
    total += float(compiled.loss(TASK, alone, VARIABLES["params"]).loss)
  assert float(found.loss) == pytest.approx(total / 3, rel=1e-5)


def test_guesses_are_the_most_probable_tokens_in_order():
  batch = {field: value for field, value in _batch().items() if not field.startswith("target")}
  found = compiled.predict(TASK, VARIABLES, batch)
  probabilities = scipy.special.softmax(_logits(batch), axis=-1)
  for row, place in ((0, 0), (0, 1), (1, 0)):
    p = probabilities[row, batch["places"][row, place]]
    order = np.argsort(-p)[:GUESSES]
    np.testing.assert_array_equal(found["tokens"][row, place], order)
    np.testing.assert_allclose(found["probabilities"][row, place], p[order], rtol=1e-5)
  assert compiled.predict(TASK, VARIABLES, _batch()) == {}
