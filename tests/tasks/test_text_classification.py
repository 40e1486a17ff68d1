"""Classification of texts: the loss of images' classification, by the model's reading of tokens."""

import jax
import numpy as np
import pytest
import scipy.special

from dljax.tasks.text_classification import TextClassification
from tests.tasks import compiled, tiny

TASK = TextClassification(tiny.TinyEncoder(head="sequence"), num_classes=3, spell=lambda tokens: " ".join(map(str, tokens)))


def _batch():
  draw = np.random.default_rng(0)
  length = np.array([6, 4, 2, 0], np.int32)
  real = np.arange(6) < length[:, None]
  return {"tokens": np.where(real, draw.integers(1, tiny.VOCABULARY, (4, 6)), 0).astype(np.int32), "length": length,
          "token_type": np.where(real & (np.arange(6) > 2), 1, 0).astype(np.int32),
          "label": np.array([2, 0, 1, 0], np.int32), "mask": (length > 0).astype(np.float32),
          "id": np.arange(4, dtype=np.int32)}


VARIABLES = compiled.variables(TASK, _batch())


def _probabilities(batch):
  apply = jax.jit(lambda v, *inputs: TASK.model.apply(v, *inputs)["logits"])
  return scipy.special.softmax(np.float64(apply(VARIABLES, batch["tokens"], batch["length"], batch["token_type"])), -1)


def test_the_loss_is_the_mean_over_texts():
  batch = _batch()
  p = _probabilities(batch)[:3]
  out = compiled.loss(TASK, batch, VARIABLES["params"], train=True)
  assert float(out.loss) == pytest.approx(-np.mean(np.log(p[np.arange(3), batch["label"][:3]])), rel=1e-5)
  assert TASK.summarize(out.metrics)["accuracy"] == pytest.approx(np.mean(p.argmax(-1) == batch["label"][:3]))


def test_padding_and_types_reach_the_model():
  batch = _batch()
  loss = lambda **fields: float(compiled.loss(TASK, {**batch, **fields}, VARIABLES["params"]).loss)
  behind = batch["tokens"].copy()
  behind[1, 4:] = 5
  assert loss(tokens=behind) == loss() != loss(tokens=behind, length=np.array([6, 6, 2, 0], np.int32))
  assert loss(token_type=np.zeros_like(batch["token_type"])) != loss()


def test_the_surest_mistakes_are_listed_first():
  batch = _batch()
  p = compiled.predict(TASK, VARIABLES, batch)["probabilities"][:3]
  np.testing.assert_allclose(p, _probabilities(batch)[:3], rtol=1e-4)
  host = {**{field: value[:3] for field, value in batch.items()}, "label": (p.argmax(-1) + 1) % 3}
  found = TASK.evaluate([({"probabilities": p}, host)], {}, {"classes": ["a", "b", "c"]})
  rows = found.tables["mistakes"]
  order = np.argsort(-p.max(-1))
  assert [row["probability"] for row in rows] == pytest.approx(p.max(-1)[order])
  for row, i in zip(rows, order):
    assert row["text"] == " ".join(map(str, batch["tokens"][i, :batch["length"][i]]))
    assert row["guess"] == "abc"[p[i].argmax()] and row["truth"] == "abc"[(p[i].argmax() + 1) % 3]
  right = TASK.evaluate([({"probabilities": p}, {**host, "label": p.argmax(-1)})], {}, {})
  assert "mistakes" not in right.tables and right.metrics["macro_f1"] > 0
