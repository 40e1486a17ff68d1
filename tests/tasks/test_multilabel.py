"""Several labels for each image: closed forms, shares that add up, and scores as scikit-learn has them."""

import jax
import numpy as np
import pytest
import sklearn.metrics

from dljax.errors import UserError
from dljax.tasks import multilabel
from dljax.tasks.multilabel import MultiLabel
from tests.tasks import compiled
from tests.tasks.test_classification import Identity, Linear
from tests.train import toys

C = 5


def make_batch(size=16, seed=0, **more):
  draw = np.random.default_rng(seed)
  return {"image": draw.normal(size=(size, C)).astype(np.float32),
          "label": (draw.random((size, C)) < 0.4).astype(np.float32),
          "mask": np.ones(size, np.float32), "id": np.arange(size, dtype=np.int32), **more}


def cross_entropy(logits, label, weight=1.0):
  p = 1 / (1 + np.exp(-logits.astype(np.float64)))
  return -(weight * label * np.log(p) + (1 - label) * np.log(1 - p)).mean(axis=1)


def test_the_loss_is_the_mean_binary_cross_entropy():
  batch = make_batch(mask=np.array([1] * 13 + [0] * 3, np.float32))
  out = compiled.loss(MultiLabel(Identity(), C), batch)
  expected = cross_entropy(batch["image"], batch["label"])[:13].mean()
  assert out.loss == pytest.approx(expected, rel=1e-5)
  right = ((batch["image"] > 0) == batch["label"]).all(axis=1)[:13]
  assert out.metrics["accuracy"] == (right.sum(), 13)
  empty = compiled.loss(MultiLabel(Identity(), C), {**batch, "mask": np.zeros(16, np.float32)})
  assert empty.loss == 0


def test_weights_smoothing_and_mixed_labels_count_in_training_alone():
  weights = (1.0, 2.0, 0.5, 3.0, 0.0)
  task = MultiLabel(Identity(), C, label_smoothing=0.2, class_weights=weights)
  other = make_batch(seed=1)["label"]
  batch = make_batch(mix_label=other, mix_weight=np.full(16, 0.3, np.float32))
  smooth = 0.8 * (0.3 * batch["label"] + 0.7 * other) + 0.1  # the loss is linear in the labels
  trained = compiled.loss(task, batch, train=True).loss
  assert trained == pytest.approx(cross_entropy(batch["image"], smooth, np.array(weights)).mean(), rel=1e-5)
  plain = make_batch()
  assert compiled.loss(task, plain).loss == pytest.approx(
      cross_entropy(plain["image"], plain["label"]).mean(), rel=1e-5)


def test_shares_of_uneven_parts_add_up_to_the_whole():
  task = MultiLabel(Linear(C), C, class_weights=(1.0, 2.0, 3.0, 4.0, 5.0))
  batch = make_batch(12, mask=np.array([1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0], np.float32))
  params = compiled.variables(task, batch)["params"]
  denominators = compiled.denominators(task, batch)
  whole = compiled.loss_and_grad(task, params, batch, denominators)
  parts = [jax.tree.map(lambda x: x[i:i + 4], batch) for i in (0, 4, 8)]
  shares = [compiled.loss_and_grad(task, params, part, denominators) for part in parts]
  total = jax.tree.map(lambda *xs: sum(xs), *shares)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), total, whole)


def test_jit_and_pmap_on_four_devices_train_alike():
  def train(**how):
    task = MultiLabel(Linear(C, np.float64), C, class_weights=(1.0, 2.0, 3.0, 4.0, 5.0))
    pipeline = toys.Scripted(lambda step: make_batch(seed=step, mask=toys.uneven_mask(step)))
    return toys.train(toys.formula_experiment(task, pipeline), 2, dtype=np.float64, **how).state.params

  with jax.enable_x64(True):
    one = train(mesh="data:1")
    assert toys.difference(one, train(mesh="data:4")) < 1e-12
    assert toys.difference(one, train(parallelism="pmap", mesh="data:4")) < 1e-12


def findings(p, label, images=None, task=None):
  rows = [({"probabilities": p[i:i + 9]}, {"label": label[i:i + 9], "image": (p if images is None else images)[i:i + 9]})
          for i in range(0, len(p), 9)]
  return (task or MultiLabel(None, p.shape[1])).evaluate(rows, {}, {"classes": list("vwxyz")[:p.shape[1]]})


def test_scores_are_those_of_sklearn():
  draw = np.random.default_rng(0)
  p, label = draw.random((40, C)).astype(np.float32).round(1), (draw.random((40, C)) < 0.3).astype(np.float32)
  label[:, 4] = 0  # a class that no image has
  found = findings(p, label)
  assert found.metrics["mean_average_precision"] == pytest.approx(
      sklearn.metrics.average_precision_score(label[:, :4], p[:, :4], average="macro"), rel=1e-6)
  each = sklearn.metrics.precision_recall_fscore_support(label, p >= 0.5, zero_division=0)
  for i, row in enumerate(found.tables["classes"]):
    assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx([x[i] for x in each])
  assert found.metrics["macro_f1"] == pytest.approx(each[2].mean())
  assert [row["class"] for row in found.tables["classes"]] == list("vwxyz") and not found.figures
  assert np.isnan(found.tables["classes"][4]["average_precision"])


def test_the_worst_images_are_drawn_with_their_classes():
  p = np.full((30, 2), 0.9, np.float32)
  label = np.ones((30, 2), np.float32)
  label[17], label[3, 0] = 0, 0
  images = np.random.default_rng(0).random((30, 4, 4, 3)).astype(np.float32)
  draw = findings(p, label, images).figures["mistakes"]
  pictures, titles = draw.args
  assert len(pictures) == multilabel.MAX_PICTURED
  np.testing.assert_array_equal(pictures[0], images[17])
  assert list(titles[:2]) == ["truth: none\nguess: v, w", "truth: w\nguess: v, w"]
  assert draw.keywords["caption"] == "The largest losses among 30 images"
  draw()


def test_accuracy_by_group():
  label = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], np.float32)
  p = np.array([[.9, .1], [.9, .2], [.4, .1], [.3, .7]])  # the second lacks a class
  batch = {"label": label, "image": np.zeros((4, 2)), "host/group/camera": np.array(list("aabb"))}
  task = MultiLabel(None, 2, groups=("camera",))
  found = task.evaluate([({"probabilities": p}, batch)], {}, {"classes": ["x", "y"]})
  assert found.tables["group_camera"] == [{"group": "a", "accuracy": 0.5, "support": 2},
                                          {"group": "b", "accuracy": 1.0, "support": 2}]
  assert found.metrics["worst_camera_accuracy"] == 0.5 and "worst_camera_accuracy" in task.goals


def test_goals_name_every_metric():
  task = MultiLabel(Identity(), C)
  batch = make_batch()
  summed = task.summarize(compiled.loss(task, batch).metrics)
  found = findings(batch["label"], batch["label"])
  assert {*summed, *found.metrics} == set(task.goals)
  assert found.metrics == {"mean_average_precision": 1.0, "macro_f1": 1.0}


def test_predictions_are_probabilities_of_each_class():
  batch = make_batch()
  p = compiled.predict(MultiLabel(Identity(), C), {}, batch)
  np.testing.assert_allclose(p["probabilities"], 1 / (1 + np.exp(-batch["image"])), rtol=1e-5)
  rows = list(multilabel.decode({"probabilities": np.array([[0.2, 0.9, 0.6], [0.1, 0.2, 0.3]])},
                                {"classes": ["a", "b", "c"]}))
  assert rows == [{"labels": "b;c", "probabilities": {"b": 0.9, "c": 0.6, "a": 0.2}},
                  {"labels": "", "probabilities": {"c": 0.3, "b": 0.2, "a": 0.1}}]


def test_settings_out_of_range_are_refused():
  with pytest.raises(UserError, match="label_smoothing=1.0"):
    MultiLabel(Identity(), C, label_smoothing=1.0)
  with pytest.raises(UserError, match="2 numbers for 5 classes"):
    MultiLabel(Identity(), C, class_weights=(1.0, 2.0))
