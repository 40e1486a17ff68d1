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
      "image": jnp.asarray(rng.normal(size=(size, num_classes)), jnp.float32),
      "label": jnp.asarray(rng.integers(num_classes, size=size), jnp.int32),
      "mask": jnp.ones(size),
      "id": jnp.arange(size),
      **more,
  }


def run(task, batch, *, params=None, train=False, denominators=None, model_state=None):
  key = jax.random.key(0)
  if params is None:
    params = task.init(key, batch).get("params", {})
  denominators = task.denominators(batch) if denominators is None else denominators
  return task.loss(params, model_state or {}, batch, key, denominators=denominators, train=train, player="all")


def loss_and_grad(task, params, batch, denominators):
  return jax.value_and_grad(
      lambda p: run(task, batch, params=p, train=True, denominators=denominators).loss)(params)


def identity_loss(batch, **settings):
  return run(Classification(Identity(), NUM_CLASSES, **settings), batch, params={}).loss


@pytest.mark.parametrize("criterion", classification.CRITERIA)
def test_shares_of_uneven_parts_add_up_to_the_whole(criterion):
  task = Classification(Linear(), NUM_CLASSES, criterion=criterion)
  batch = make_batch(mask=jnp.array([1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0.]))
  params = task.init(jax.random.key(1), batch)["params"]
  denominators = task.denominators(batch)
  assert denominators["examples"] == 6
  whole = loss_and_grad(task, params, batch, denominators)
  parts = [jax.tree.map(lambda x: x[i:i + 4], batch) for i in (0, 4, 8)]  # 4, 1 and 1 examples
  shares = [loss_and_grad(task, params, part, denominators) for part in parts]
  total = jax.tree.map(lambda *xs: sum(xs), *shares)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), total, whole)

  sums = [run(task, part, params=params, denominators=denominators).metrics for part in parts]
  added = jax.tree.map(lambda *xs: sum(xs), *sums)
  expected = run(task, batch, params=params).metrics
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, expected)


def test_softmax_loss_is_optax_cross_entropy():
  batch = make_batch()
  expected = optax.softmax_cross_entropy_with_integer_labels(batch["image"], batch["label"]).mean()
  np.testing.assert_allclose(identity_loss(batch), expected, rtol=1e-6)


def test_uniform_logits_cost_log_c_whatever_the_smoothing():
  batch = make_batch() | {"image": jnp.zeros((12, NUM_CLASSES))}
  for smoothing in (0.0, 0.3):
    loss = identity_loss(batch, label_smoothing=smoothing)
    np.testing.assert_allclose(loss, np.log(NUM_CLASSES), rtol=1e-6)


def test_label_smoothing_is_cross_entropy_with_smoothed_targets():
  batch = make_batch()
  targets = 0.9 * jax.nn.one_hot(batch["label"], NUM_CLASSES) + 0.1 / NUM_CLASSES
  expected = optax.softmax_cross_entropy(batch["image"], targets).mean()
  np.testing.assert_allclose(identity_loss(batch, label_smoothing=0.1), expected, rtol=1e-6)


def test_mixed_labels_are_cross_entropy_with_mixed_targets():
  batch = make_batch()
  weight = jnp.linspace(0, 1, 12)
  other = (batch["label"] + 2) % NUM_CLASSES
  hot = lambda label: jax.nn.one_hot(label, NUM_CLASSES)
  targets = weight[:, None] * hot(batch["label"]) + (1 - weight)[:, None] * hot(other)
  targets = 0.8 * targets + 0.2 / NUM_CLASSES
  expected = optax.softmax_cross_entropy(batch["image"], targets).mean()
  mixed = batch | {"mix_label": other, "mix_weight": weight}
  np.testing.assert_allclose(identity_loss(mixed, label_smoothing=0.2), expected, rtol=1e-6)


def test_perceptron_gradient_is_rosenblatts_rule():
  task = Classification(Linear(), NUM_CLASSES, criterion="perceptron")
  batch = make_batch()
  params = {"Dense_0": {"kernel": jnp.eye(NUM_CLASSES), "bias": jnp.zeros(NUM_CLASSES)}}
  batch["label"] = batch["label"].at[:6].set(jnp.argmax(batch["image"][:6], axis=-1))  # six right guesses
  _, grads = loss_and_grad(task, params, batch, task.denominators(batch))
  kernel, bias = np.zeros((NUM_CLASSES, NUM_CLASSES)), np.zeros(NUM_CLASSES)
  dense = params["Dense_0"]
  mistakes = 0
  for x, y in zip(np.asarray(batch["image"]), np.asarray(batch["label"])):
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
  batch = make_batch(2, 2) | {"label": jnp.array([0, 1])}
  params = jax.tree.map(jnp.zeros_like, task.init(jax.random.key(0), batch)["params"])
  _, grads = loss_and_grad(task, params, batch, task.denominators(batch))
  np.testing.assert_allclose(grads["Dense_0"]["bias"], [0.5, -0.5])  # only the second is wrong: guessed 0


def test_of_equal_logits_the_lower_class_comes_first():
  np.testing.assert_array_equal(classification._rank(jnp.zeros((7, 7)), jnp.arange(7)), np.arange(7))


def test_top_5_accuracy_by_hand():
  batch = make_batch(4) | {
      "image": jnp.tile(jnp.arange(7.)[::-1], (4, 1)), "label": jnp.array([0, 4, 5, 6])}
  task = Classification(Identity(), NUM_CLASSES)
  assert task.summarize(run(task, batch, params={}).metrics)["top_5_accuracy"] == 0.5
  few = make_batch(num_classes=5)
  assert "top_5_accuracy" not in run(Classification(Identity(), 5), few, params={}).metrics


@pytest.mark.parametrize("train", [True, False])
def test_padding_never_changes_a_result(train):
  task = Classification(Linear(), NUM_CLASSES, label_smoothing=0.1)
  batch = make_batch(5)
  params = task.init(jax.random.key(1), batch)["params"]
  rubbish = {"image": 1e3 * jnp.ones((3, NUM_CLASSES)), "label": jnp.array([0, -1, 6]), "mask": jnp.zeros(3),
             "id": jnp.zeros(3, jnp.int32)}
  padded = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, rubbish)
  bare, full = (run(task, b, params=params, train=train) for b in (batch, padded))
  assert ("confusion_matrix" in bare.metrics) != train
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), bare, full)
  grads = [loss_and_grad(task, params, b, task.denominators(b))[1] for b in (batch, padded)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *grads)


def test_a_batch_of_padding_has_loss_zero_and_no_mean():
  task = Classification(Linear(), NUM_CLASSES)
  batch = make_batch(3, mask=jnp.zeros(3))
  output = run(task, batch)
  assert output.loss == 0
  assert np.isnan(task.summarize(output.metrics)["accuracy"])


def test_metrics_agree_with_scikit_learn():
  task = Classification(Linear(), NUM_CLASSES)
  masks = [jnp.asarray(np.arange(40) < n, jnp.float32) for n in (40, 33, 12)]
  batches = [make_batch(40, seed=i, mask=mask) for i, mask in enumerate(masks)]
  params = task.init(jax.random.key(1), batches[0])["params"]
  sums = jax.tree.map(lambda *xs: sum(xs), *[run(task, b, params=params).metrics for b in batches])
  kept = [np.asarray(b["mask"]) > 0 for b in batches]
  label = np.concatenate([np.asarray(b["label"])[k] for b, k in zip(batches, kept)])
  predictions = [np.asarray(task.predict({"params": params}, b, None)["probabilities"]) for b in batches]
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
  assert "confusion_matrix" not in run(task, make_batch(2, 1000), params={}).metrics


def test_model_state_moves_in_training_only():
  task = Classification(Counting(), NUM_CLASSES)
  batch = make_batch(mask=jnp.asarray(np.arange(12) < 5, jnp.float32))
  variables = dict(task.init(jax.random.key(0), batch))
  params = variables.pop("params")
  trained = run(task, batch, params=params, model_state=variables, train=True)
  assert trained.model_state["batch_stats"]["seen"] == 5
  evaluated = run(task, batch, params=params, model_state=variables)
  assert evaluated.model_state["batch_stats"]["seen"] == 0
  assert trained.loss != evaluated.loss  # dropout is on in training alone


def test_bfloat16_logits_give_a_float32_loss():
  output = run(Classification(Linear(dtype=jnp.bfloat16), NUM_CLASSES), make_batch())
  assert {x.dtype for x in jax.tree.leaves((output.loss, output.metrics))} == {jnp.dtype("float32")}


def test_float64_stays_float64():
  with jax.enable_x64(True):
    batch = make_batch() | {"image": jnp.ones((12, NUM_CLASSES), jnp.float64)}
    assert identity_loss(batch).dtype == jnp.float64


def test_predict_gives_probabilities_and_decode_names_them():
  task = Classification(Identity(), NUM_CLASSES)
  batch = make_batch(3)
  predictions = jax.jit(task.predict)({"params": {}}, batch, jax.random.key(0))
  p = np.asarray(predictions["probabilities"])
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
