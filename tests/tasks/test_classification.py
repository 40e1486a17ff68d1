"""Classification: the loss against closed forms, shares that add up, padding that never matters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics

from dljax.errors import UserError
from dljax.tasks import classification
from dljax.tasks.classification import Classification
from dljax.tasks.scores import Calibration
from tests.tasks import compiled

NUM_CLASSES = 7


class Linear(nn.Module):
  """logits = image @ kernel + bias."""
  num_classes: int = NUM_CLASSES
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image, mask=None, *, train):
    x = image.reshape(len(image), -1).astype(self.dtype)
    return nn.Dense(self.num_classes, dtype=self.dtype)(x)


class Identity(nn.Module):
  """The image is the logits."""

  @nn.compact
  def __call__(self, image, mask=None, *, train):
    return image


class Counting(nn.Module):
  """Keeps the number of examples seen, and drops out."""

  @nn.compact
  def __call__(self, image, mask=None, *, train):
    seen = self.variable("batch_stats", "seen", lambda: jnp.zeros(()))
    if train:
      seen.value += jnp.sum(mask)
    return nn.Dense(NUM_CLASSES)(nn.Dropout(0.5)(image, deterministic=not train))


def make_batch(size=12, num_classes=NUM_CLASSES, seed=0, **more):
  rng = np.random.default_rng(seed)
  return {
      "image": rng.normal(size=(size, num_classes)).astype(np.float32),
      "label": rng.integers(num_classes, size=size).astype(np.int32),
      "mask": np.ones(size, np.float32),
      "id": np.arange(size, dtype=np.int32),
      **more,
  }


def identity_loss(batch, train=True, **settings):
  return compiled.loss(Classification(Identity(), NUM_CLASSES, **settings), batch, train=train).loss


@pytest.mark.parametrize("criterion", classification.CRITERIA)
def test_shares_of_uneven_parts_add_up_to_the_whole(criterion):
  task = Classification(Linear(), NUM_CLASSES, criterion=criterion)
  batch = make_batch(mask=np.array([1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0], np.float32))
  params = compiled.variables(task, batch)["params"]
  denominators = compiled.denominators(task, batch)
  assert denominators["examples"] == 6
  whole = compiled.loss_and_grad(task, params, batch, denominators)
  parts = [jax.tree.map(lambda x: x[i:i + 4], batch) for i in (0, 4, 8)]  # 4, 1 and 1 examples
  shares = [compiled.loss_and_grad(task, params, part, denominators) for part in parts]
  total = jax.tree.map(lambda *xs: sum(xs), *shares)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), total, whole)

  sums = [compiled.loss(task, part, params, denominators=denominators).metrics for part in parts]
  added = jax.tree.map(lambda *xs: sum(xs), *sums)
  expected = compiled.loss(task, batch, params).metrics
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, expected)


def test_softmax_loss_is_optax_cross_entropy():
  batch = make_batch()
  expected = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(batch["image"], batch["label"])
  np.testing.assert_allclose(identity_loss(batch), np.mean(expected), rtol=1e-6)


def test_uniform_logits_cost_log_c_whatever_the_smoothing():
  batch = make_batch() | {"image": np.zeros((12, NUM_CLASSES), np.float32)}
  for smoothing in (0.0, 0.3):
    loss = identity_loss(batch, label_smoothing=smoothing)
    np.testing.assert_allclose(loss, np.log(NUM_CLASSES), rtol=1e-6)


def one_hot(label):
  return np.eye(NUM_CLASSES, dtype=np.float32)[label]


def cross_entropy(logits, targets):
  return np.mean(_cross_entropy(logits, targets.astype(np.float32)))


_cross_entropy = jax.jit(optax.softmax_cross_entropy)


def test_label_smoothing_is_cross_entropy_with_smoothed_targets():
  batch = make_batch()
  expected = cross_entropy(batch["image"], 0.9 * one_hot(batch["label"]) + 0.1 / NUM_CLASSES)
  np.testing.assert_allclose(identity_loss(batch, label_smoothing=0.1), expected, rtol=1e-6)


def test_the_loss_of_an_evaluation_has_no_smoothing():
  batch = make_batch()
  plain = identity_loss(batch, train=False)
  assert identity_loss(batch, train=False, label_smoothing=0.3) == plain
  assert identity_loss(batch, label_smoothing=0.3) != pytest.approx(plain, rel=1e-3)


def test_mixed_labels_are_cross_entropy_with_mixed_targets():
  batch = make_batch()
  weight = np.linspace(0, 1, 12, dtype=np.float32)
  other = (batch["label"] + 2) % NUM_CLASSES
  targets = weight[:, None] * one_hot(batch["label"]) + (1 - weight)[:, None] * one_hot(other)
  expected = cross_entropy(batch["image"], 0.8 * targets + 0.2 / NUM_CLASSES)
  mixed = batch | {"mix_label": other, "mix_weight": weight}
  np.testing.assert_allclose(identity_loss(mixed, label_smoothing=0.2), expected, rtol=1e-6)


def test_perceptron_gradient_is_rosenblatts_rule():
  task = Classification(Linear(), NUM_CLASSES, criterion="perceptron")
  batch = make_batch()
  params = {"Dense_0": {"kernel": np.eye(NUM_CLASSES, dtype=np.float32),
                        "bias": np.zeros(NUM_CLASSES, np.float32)}}
  batch["label"][:6] = np.argmax(batch["image"][:6], axis=-1)  # six right guesses
  _, grads, _ = compiled.loss_and_grad(task, params, batch)
  kernel, bias = np.zeros((NUM_CLASSES, NUM_CLASSES)), np.zeros(NUM_CLASSES)
  dense = params["Dense_0"]
  mistakes = 0
  for x, y in zip(batch["image"], batch["label"]):
    guess = np.argmax(x @ dense["kernel"] + dense["bias"])
    if guess != y:
      mistakes += 1
      kernel[:, guess] += x / 12
      bias[guess] += 1 / 12
      kernel[:, y] -= x / 12
      bias[y] -= 1 / 12
  assert 0 < mistakes <= 6
  np.testing.assert_allclose(grads["Dense_0"]["kernel"], kernel, atol=1e-6)
  np.testing.assert_allclose(grads["Dense_0"]["bias"], bias, atol=1e-6)


def test_perceptron_learns_from_zero_weights():
  """All logits tie there: a gradient that is split among them would not be the rule."""
  task = Classification(Linear(2), 2, criterion="perceptron")
  batch = make_batch(2, 2) | {"label": np.array([0, 1], np.int32)}
  params = jax.tree.map(np.zeros_like, compiled.variables(task, batch)["params"])
  _, grads, _ = compiled.loss_and_grad(task, params, batch)
  np.testing.assert_allclose(grads["Dense_0"]["bias"], [0.5, -0.5])  # only the second is wrong: guessed 0


def test_of_equal_logits_the_lower_class_comes_first():
  np.testing.assert_array_equal(jax.jit(classification._rank)(np.zeros((7, 7), np.float32), np.arange(7)), np.arange(7))


def metrics_of(task, batch):
  """The shapes of a batch's metrics."""
  loss = lambda batch: task.loss(
      {}, {}, batch, jax.random.key(0), denominators=task.denominators(batch), train=False).metrics
  return jax.eval_shape(loss, batch)


def test_top_5_accuracy_by_hand():
  batch = make_batch(4) | {
      "image": np.tile(np.arange(7, dtype=np.float32)[::-1], (4, 1)), "label": np.array([0, 4, 5, 6], np.int32)}
  task = Classification(Identity(), NUM_CLASSES)
  assert task.summarize(compiled.loss(task, batch).metrics)["top_5_accuracy"] == 0.5
  few = make_batch(num_classes=5)
  assert "top_5_accuracy" not in metrics_of(Classification(Identity(), 5), few)


@pytest.mark.parametrize("train", [True, False])
def test_padding_never_changes_a_result(train):
  task = Classification(Linear(), NUM_CLASSES, label_smoothing=0.1)
  batch = make_batch(5)
  params = compiled.variables(task, batch)["params"]
  rubbish = {"image": np.full((3, NUM_CLASSES), 1e3, np.float32), "label": np.array([0, -1, 6], np.int32),
             "mask": np.zeros(3, np.float32), "id": np.zeros(3, np.int32)}
  padded = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, rubbish)
  bare, full = (compiled.loss(task, b, params, train=train) for b in (batch, padded))
  assert ("confusion_matrix" in bare.metrics) != train
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), bare, full)
  grads = [compiled.loss_and_grad(task, params, b)[1] for b in (batch, padded)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *grads)


def test_a_batch_of_padding_has_loss_zero_and_no_mean():
  task = Classification(Linear(), NUM_CLASSES)
  batch = make_batch(mask=np.zeros(12, np.float32))
  output = compiled.loss(task, batch, compiled.variables(task, batch)["params"])
  assert output.loss == 0
  assert np.isnan(task.summarize(output.metrics)["accuracy"])


def test_metrics_agree_with_scikit_learn():
  task = Classification(Linear(), NUM_CLASSES)
  masks = [(np.arange(40) < n).astype(np.float32) for n in (40, 33, 12)]
  batches = [make_batch(40, seed=i, mask=mask) for i, mask in enumerate(masks)]
  params = compiled.variables(task, batches[0])["params"]
  sums = jax.tree.map(lambda *xs: sum(xs), *[compiled.loss(task, b, params).metrics for b in batches])
  kept = [b["mask"] > 0 for b in batches]
  label = np.concatenate([b["label"][k] for b, k in zip(batches, kept)])
  predictions = [compiled.predict(task, {"params": params}, b)["probabilities"] for b in batches]
  p = np.concatenate([p[k] for p, k in zip(predictions, kept)])
  summary = task.summarize(sums)
  assert set(summary) == {"loss", "accuracy", "top_5_accuracy"}
  assert all(type(value) is float for value in summary.values())
  classes = range(NUM_CLASSES)
  assert summary["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(label, p.argmax(-1)))
  assert summary["loss"] == pytest.approx(sklearn.metrics.log_loss(label, p, labels=list(classes)), rel=1e-5)
  assert summary["top_5_accuracy"] == pytest.approx(
      sklearn.metrics.top_k_accuracy_score(label, p, k=5, labels=list(classes)))
  matrix = sklearn.metrics.confusion_matrix(label, p.argmax(-1), labels=list(classes))
  np.testing.assert_array_equal(sums["confusion_matrix"][0], matrix)
  np.testing.assert_array_equal(sums["confusion_matrix"][1][:, 0], matrix.sum(axis=1))


def test_no_confusion_matrix_of_a_thousand_classes():
  task = Classification(Identity(), 1000)
  assert "confusion_matrix" not in metrics_of(task, make_batch(2, 1000))


def test_model_state_moves_in_training_only():
  task = Classification(Counting(), NUM_CLASSES)
  batch = make_batch(mask=(np.arange(12) < 5).astype(np.float32))
  state = dict(jax.jit(task.init)(jax.random.key(0), batch))
  params = state.pop("params")
  trained = compiled.loss(task, batch, params, state=state, train=True)
  assert trained.model_state["batch_stats"]["seen"] == 5
  evaluated = compiled.loss(task, batch, params, state=state)
  assert evaluated.model_state["batch_stats"]["seen"] == 0
  assert trained.loss != evaluated.loss  # dropout is on in training alone


def test_bfloat16_logits_give_a_float32_loss():
  task, batch = Classification(Linear(dtype=jnp.bfloat16), NUM_CLASSES), make_batch()
  output = compiled.loss(task, batch, compiled.variables(task, batch)["params"])
  assert {x.dtype for x in jax.tree.leaves((output.loss, output.metrics))} == {jnp.dtype("float32")}


def test_float64_stays_float64():
  with jax.enable_x64(True):
    batch = make_batch() | {"image": np.ones((12, NUM_CLASSES))}
    assert identity_loss(batch).dtype == jnp.float64


def test_predict_gives_probabilities_and_decode_names_them():
  task = Classification(Identity(), NUM_CLASSES)
  batch = make_batch(3)
  predictions = compiled.predict(task, {"params": {}}, batch)
  p = predictions["probabilities"]
  np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
  rows = list(classification.decode(predictions, {"classes": list("abcdefg")}))
  assert [row["label"] for row in rows] == ["abcdefg"[i] for i in p.argmax(-1)]
  for row, expected in zip(rows, p):
    assert len(row["probabilities"]) == 5
    assert list(row["probabilities"].values()) == sorted(map(float, expected), reverse=True)[:5]
    assert row["probability"] == row["probabilities"][row["label"]] == float(expected.max())


@pytest.mark.parametrize("wrong", [0, 3, 60])
def test_evaluate_draws_the_confusion_matrix_and_the_mistakes(wrong):
  task = Classification(Identity(), 2)
  labels = np.arange(100) % 2
  shown = np.where(np.arange(100) < wrong, 1 - labels, labels)
  sure = np.linspace(0.6, 0.9, 100)
  p = np.where(np.arange(2) == shown[:, None], sure[:, None], 1 - sure[:, None])
  images = np.random.default_rng(0).normal(size=(100, 4, 4, 1))
  sums = {}

  def rows():
    for i in range(0, 100, 40):
      yield {"probabilities": p[i:i + 40]}, {"image": images[i:i + 40], "label": labels[i:i + 40]}
    sums["confusion_matrix"] = np.array([[40, 10], [5, 45]]), np.full((2, 2), 50)  # whole after the last row

  found = task.evaluate(rows(), sums, {"classes": ["cat", "dog"]})
  figures = found.figures
  assert set(figures) == {"confusion_matrix", "calibration", "mistakes"}
  guess = p.argmax(axis=1)
  assert found.metrics["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, guess, average="macro"))
  assert found.metrics["calibration_error"] == pytest.approx(Calibration.of(p.max(axis=1), guess == labels).error())
  assert [row["class"] for row in found.tables["classes"]] == ["cat", "dog"]
  for c, row in enumerate(found.tables["classes"]):
    expected = sklearn.metrics.precision_recall_fscore_support(labels, guess, labels=[c], zero_division=0)
    assert [row[k] for k in ("precision", "recall", "f1", "support")] == [pytest.approx(x[0]) for x in expected]
  titles = [axes.get_title() for axes in figures["mistakes"]().axes if axes.images]
  expected = min(wrong or 100, classification.MAX_PICTURED)
  assert len(titles) == expected
  if wrong:  # the surest of the wrong guesses leads
    cat, dog = ("cat", "dog") if labels[wrong - 1] == 0 else ("dog", "cat")
    assert titles[0] == f"truth: {cat}\nguess: {dog}"
  else:
    assert titles[0] == "truth: cat\nsure: 60%"


def test_evaluate_by_group():
  task = Classification(Identity(), 2)
  p, labels = np.eye(2)[[0, 0, 1, 1, 0, 1]], np.array([0, 0, 1, 0, 1, 0])
  batch = {"image": np.zeros((6, 2)), "label": labels, "host/group/writer": np.array(list("abbaac")),
           "host/group/year": np.array([9, 9, 9, 10, 10, 10])}
  rows = [({"probabilities": p[s]}, {k: v[s] for k, v in batch.items()}) for s in (slice(4), slice(4, None))]
  found = task.evaluate(iter(rows), {}, {})
  assert (found.metrics["worst_writer_accuracy"], found.metrics["worst_year_accuracy"]) == (0, 0)
  assert found.tables["group_writer"] == [
      {"group": "a", "accuracy": pytest.approx(1 / 3), "support": 3}, {"group": "b", "accuracy": 1, "support": 2},
      {"group": "c", "accuracy": 0, "support": 1}]
  assert [(row["group"], row["accuracy"]) for row in found.tables["group_year"]] == [(9, 1), (10, 0)]


def test_a_perceptron_is_not_calibrated():
  row = {"probabilities": np.array([[0.3, 0.7]])}, {"image": np.zeros((1, 2)), "label": np.array([0])}
  found = Classification(Identity(), 2, criterion="perceptron").evaluate(iter([row]), {}, {})
  assert set(found.metrics) == {"macro_f1"} and not found.figures


def test_evaluate_without_images_draws_no_mistakes():
  task = Classification(Identity(), 2)
  row = {"probabilities": np.array([[0.3, 0.7]])}, {"image": np.zeros((1, 2)), "label": np.array([0])}
  rows = iter([row] * 3)
  assert set(task.evaluate(rows, {}, {}).figures) == {"calibration"}
  assert next(rows, None) is None  # all were read, so that the sums are whole


@pytest.mark.parametrize("settings, message", [
    ({"criterion": "softmx"}, "did you mean softmax"),
    ({"label_smoothing": 1.0}, r"give a number in \[0, 1\)"),
    ({"label_smoothing": -0.1}, r"give a number in \[0, 1\)"),
    ({"label_smoothing": 0.1, "criterion": "perceptron"}, "no meaning"),
])
def test_bad_settings_are_named(settings, message):
  with pytest.raises(UserError, match=message):
    Classification(Identity(), 2, **settings)


# Weights of the classes

WEIGHTS = (1.0, 2.0, 0.5, 0.0, 3.0, 1.5, 1.0)


def test_the_weighted_loss_is_a_weighted_mean_in_training_alone():
  batch = make_batch(mask=np.array([1] * 9 + [0] * 3, np.float32))
  task = Classification(Identity(), NUM_CLASSES, class_weights=WEIGHTS)
  each = np.asarray(optax.softmax_cross_entropy_with_integer_labels(batch["image"], batch["label"]), np.float64)
  weight = np.array(WEIGHTS)[batch["label"]] * batch["mask"]
  out = compiled.loss(task, batch, train=True)
  assert out.loss == pytest.approx((weight * each).sum() / weight.sum(), rel=1e-5)
  assert out.metrics["loss"][0] / out.metrics["loss"][1] == pytest.approx(out.loss, rel=1e-6)
  assert compiled.loss(task, batch).loss == pytest.approx(each[:9].mean(), rel=1e-5)
  alike = Classification(Identity(), NUM_CLASSES, class_weights=(2.0,) * NUM_CLASSES)
  assert compiled.loss(alike, batch, train=True).loss == pytest.approx(each[:9].mean(), rel=1e-5)
  nothing = {**batch, "label": np.full(12, 3, np.int32)}  # a class of weight 0
  assert compiled.loss(task, nothing, train=True).loss == 0


def test_mixed_labels_have_the_mean_of_their_weights():
  other = make_batch(seed=1)["label"]
  batch = make_batch(mix_label=other, mix_weight=np.full(12, 0.3, np.float32))
  loss = lambda label: np.asarray(optax.softmax_cross_entropy_with_integer_labels(batch["image"], label), np.float64)
  own, partner = (np.array(WEIGHTS)[label] for label in (batch["label"], other))
  expected = (0.3 * own * loss(batch["label"]) + 0.7 * partner * loss(other)).sum() / (0.3 * own + 0.7 * partner).sum()
  task = Classification(Identity(), NUM_CLASSES, class_weights=WEIGHTS)
  assert compiled.loss(task, batch, train=True).loss == pytest.approx(expected, rel=1e-5)


def test_weighted_shares_of_uneven_parts_add_up_to_the_whole():
  task = Classification(Linear(), NUM_CLASSES, class_weights=WEIGHTS)
  batch = make_batch(mask=np.array([1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0], np.float32))
  params = compiled.variables(task, batch)["params"]
  denominators = compiled.denominators(task, batch)
  assert denominators["weight"] == pytest.approx((np.array(WEIGHTS)[batch["label"]] * batch["mask"]).sum())
  whole = compiled.loss_and_grad(task, params, batch, denominators)
  parts = [jax.tree.map(lambda x: x[i:i + 4], batch) for i in (0, 4, 8)]
  shares = [compiled.loss_and_grad(task, params, part, denominators) for part in parts]
  total = jax.tree.map(lambda *xs: sum(xs), *shares)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), total, whole)


def test_there_is_a_weight_for_each_class():
  with pytest.raises(UserError, match="class_weights: 2 numbers for 7 classes"):
    Classification(Identity(), NUM_CLASSES, class_weights=(1.0, 2.0))
