"""Segmentation: the loss by closed forms, scores held against scikit-learn's, what must not count."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import sklearn.metrics

from dljax.errors import UserError
from dljax.ops.crop import crop
from dljax.tasks import segmentation
from dljax.tasks.segmentation import Segmentation
from tests.tasks import compiled

K = 4


class Fixed(nn.Module):
  """The image is the logits, of which the border of margin / 2 pixels is cut."""

  margin: int = 0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image, mask=None, *, train):
    return crop(image, [side - self.margin for side in image.shape[1:3]]).astype(self.dtype)


class Linear(nn.Module):
  """Each pixel's logits from its own channels."""

  margin: int = 0

  @nn.compact
  def __call__(self, image, mask=None, *, train):
    return nn.Dense(K, name="head")(image)


def make_batch(size=6, height=5, width=7, seed=0, **more):
  rng = np.random.default_rng(seed)
  return {
      "image": rng.normal(size=(size, height, width, K)).astype(np.float32),
      "segmentation": rng.integers(-1, K, (size, height, width)).astype(np.int32),  # a fifth has no class
      "mask": np.ones(size, np.float32),
      "id": np.arange(size, dtype=np.int32),
      **more,
  }


def one_hot(target):
  return np.eye(K, dtype=np.float32)[target] * (target >= 0)[..., None]


def inner(x, margin):
  """What is left of pictures without a border of margin / 2 pixels."""
  border = slice(margin // 2, -(margin // 2) or None)
  return x[:, border, border]


def merged(task, batches):
  """The summed metrics of several batches, as the evaluation adds them."""
  sums = [compiled.loss(task, batch).metrics for batch in batches]
  return jax.tree.map(lambda *xs: sum(np.asarray(x, np.float64) for x in xs), *sums)


def known(batch, margin=0):
  """Truth and guess of the pixels that count."""
  truth, guess = inner(batch["segmentation"], margin), inner(batch["image"], margin).argmax(-1)
  there = (truth >= 0) & (batch["mask"][:, None, None] > 0)
  return truth[there], guess[there]


@pytest.mark.parametrize("margin", [0, 4])
def test_cross_entropy_is_the_mean_over_the_pixels_that_have_a_class(margin):
  batch = make_batch(mask=np.array([1, 1, 0, 1, 1, 1], np.float32))
  task = Segmentation(Fixed(margin), K)
  logits, target = (inner(batch[name], margin) for name in ("image", "segmentation"))
  there = (target >= 0) & (batch["mask"][:, None, None] > 0)
  assert 0 < there.sum() < there.size
  expected = np.mean(jax.jit(optax.softmax_cross_entropy_with_integer_labels)(logits[there], target[there]))
  output = compiled.loss(task, batch)
  np.testing.assert_allclose(output.loss, expected, rtol=1e-6)
  assert compiled.denominators(task, batch) == {"pixels": there.sum(), "examples": 5}
  np.testing.assert_allclose(task.summarize(output.metrics)["loss"], expected, rtol=1e-6)


@pytest.mark.parametrize("ground", [True, False])
def test_dice_is_that_of_every_image_and_class(ground):
  batch = make_batch()
  p = scipy.special.softmax(batch["image"], axis=-1)
  target = batch["segmentation"]
  p[target < 0] = 0
  expected = []
  for i in range(len(p)):
    values = []
    for k in range(0 if ground else 1, K):
      truth = (target[i] == k).astype(np.float32)
      values.append((2 * (p[i, ..., k] * truth).sum() + 1) / (p[i, ..., k].sum() + truth.sum() + 1))
    expected.append(1 - np.mean(values))
  task = Segmentation(Fixed(), K, cross_entropy_weight=0, dice_weight=1, ground=ground)
  np.testing.assert_allclose(compiled.loss(task, batch).loss, np.mean(expected), rtol=1e-5)


def test_dice_of_a_perfect_answer_is_no_loss_also_where_a_class_is_nowhere():
  target = np.zeros((6, 5, 7), np.int32)
  target[0, 1:3] = 2
  batch = make_batch() | {"segmentation": target, "image": 100 * one_hot(target)}
  assert compiled.loss(Segmentation(Fixed(), K, cross_entropy_weight=0, dice_weight=1), batch).loss < 1e-6
  wrong = batch | {"image": 100 * one_hot((target + 1) % K)}
  assert compiled.loss(Segmentation(Fixed(), K, cross_entropy_weight=0, dice_weight=1), wrong).loss > 0.5


def test_the_loss_is_the_weighted_sum_of_its_parts():
  batch = make_batch()
  cross_entropy, dice = (
      compiled.loss(Segmentation(Fixed(), K, cross_entropy_weight=c, dice_weight=d), batch).loss for c, d in ((1, 0), (0, 1)))
  task = Segmentation(Fixed(), K, cross_entropy_weight=0.5, dice_weight=2.0)
  output = compiled.loss(task, batch)
  np.testing.assert_allclose(output.loss, 0.5 * cross_entropy + 2 * dice, rtol=1e-6)
  summary = task.summarize(output.metrics)
  np.testing.assert_allclose(summary["loss"], output.loss, rtol=1e-6)
  np.testing.assert_allclose([summary["cross_entropy_loss"], summary["dice_loss"]], [cross_entropy, dice], rtol=1e-6)
  assert set(summary) == {"loss", "cross_entropy_loss", "dice_loss", "pixel_accuracy", "mean_iou"}


def test_shares_of_uneven_parts_add_up_to_the_whole():
  task = Segmentation(Linear(), K, dice_weight=1.0)
  batch = make_batch(6, mask=np.array([1, 1, 1, 0, 1, 0], np.float32))
  params = compiled.variables(task, batch)["params"]
  denominators = compiled.denominators(task, batch)
  loss_and_grad = lambda part: compiled.loss_and_grad(task, params, part, denominators)[:2]
  whole = loss_and_grad(batch)
  parts = [jax.tree.map(lambda x: x[i:i + 2], batch) for i in (0, 2, 4)]  # 2, 1 and 1 examples
  total = jax.tree.map(lambda *xs: sum(xs), *map(loss_and_grad, parts))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), total, whole)


@pytest.mark.parametrize("margin, ground", [(0, True), (0, False), (2, True), (2, False)])
def test_scores_of_a_whole_set_are_scikit_learns(margin, ground):
  task = Segmentation(Fixed(margin), K, ground=ground)
  batches = [make_batch(4, seed=seed, mask=(np.arange(4) < 4 - seed).astype(np.float32)) for seed in range(3)]
  for i, batch in enumerate(batches):  # the guesses are better than chance, and better for some classes
    batch["image"] += 1.5 * one_hot(batch["segmentation"]) * np.arange(K, dtype=np.float32) / (i + 1)
  truth, guess = map(np.concatenate, zip(*(known(batch, margin) for batch in batches)))
  sums = merged(task, batches)
  summary = task.summarize(sums)
  classes = list(range(K))
  jaccard = sklearn.metrics.jaccard_score(truth, guess, labels=classes, average=None)
  assert jaccard.min() > 0.1 and np.ptp(jaccard) > 0.1
  assert summary["mean_iou"] == pytest.approx(jaccard[0 if ground else 1:].mean(), rel=1e-12)
  assert summary["pixel_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, guess), rel=1e-12)
  matrix = sklearn.metrics.confusion_matrix(truth, guess, labels=classes)
  np.testing.assert_array_equal(sums["confusion_matrix"][0], matrix)
  np.testing.assert_array_equal(sums["confusion_matrix"][1][:, 0], matrix.sum(axis=1))

  rows = [(compiled.predict(task, {"params": {}}, b), {**b, "image": b["image"][..., :3]}) for b in batches]
  findings = task.evaluate(iter(rows), sums, {"classes": ["ground", "a", "b", "c"]})
  table = findings.tables["classes"]
  assert [row["class"] for row in table] == ["ground", "a", "b", "c"]
  p, r, f, n = sklearn.metrics.precision_recall_fscore_support(truth, guess, labels=classes)
  for key, values in (("iou", jaccard), ("precision", p), ("recall", r), ("f1", f), ("support", n)):
    np.testing.assert_allclose([row[key] for row in table], values, rtol=1e-12, err_msg=key)
  assert set(findings.figures) == {"confusion_matrix", "segmentations"}


def test_the_mean_iou_of_a_set_is_not_the_mean_of_its_batches():
  task = Segmentation(Fixed(), K)
  batches = [make_batch(2, seed=seed) for seed in range(2)]
  batches[1]["segmentation"] = np.zeros_like(batches[1]["segmentation"])  # where three classes never are
  apart = np.mean([task.summarize(compiled.loss(task, batch).metrics)["mean_iou"] for batch in batches])
  assert abs(task.summarize(merged(task, batches))["mean_iou"] - apart) > 0.01


def test_a_class_that_never_occurs_does_not_count_in_the_mean():
  target = np.zeros((1, 4, 4), np.int32)
  target[0, 0] = 1
  guess = target.copy()
  guess[0, 1] = 1
  batch = make_batch(1, 4, 4) | {"segmentation": target, "image": one_hot(guess)}
  task = Segmentation(Fixed(), K)
  assert task.summarize(compiled.loss(task, batch).metrics)["mean_iou"] == pytest.approx((8 / 12 + 4 / 8) / 2)
  table = task.evaluate(iter([]), compiled.loss(task, batch).metrics, {}).tables["classes"]
  assert [row["iou"] for row in table] == [pytest.approx(8 / 12), 0.5, 0, 0]


@pytest.mark.parametrize("train", [True, False])
def test_padding_and_pixels_without_a_class_never_change_a_result(train):
  task = Segmentation(Fixed(), K, dice_weight=1.0)
  batch = make_batch(3)
  there = batch["segmentation"] >= 0
  rubbish = make_batch(2, seed=5)
  rubbish = {**rubbish, "image": 1e3 * rubbish["image"], "mask": np.zeros(2, np.float32)}
  padded = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, rubbish)
  noisy = {**padded, "image": padded["image"].copy()}
  noisy["image"][:3] += np.where(there, 0, 50)[..., None] * np.arange(K)
  outputs = [compiled.loss(task, b, train=train) for b in (batch, padded, noisy)]
  assert ("confusion_matrix" in outputs[0].metrics) != train
  for other in outputs[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), outputs[0], other)


def test_a_batch_of_nothing_has_loss_zero_and_no_mean():
  batch = make_batch() | {"segmentation": np.full((6, 5, 7), -1, np.int32)}
  task = Segmentation(Fixed(), K)
  output = compiled.loss(task, batch)
  assert output.loss == 0
  assert all(np.isnan(value) for value in task.summarize(output.metrics).values())


def metrics_of(task, batch):
  """The shapes and dtypes of a batch's metrics."""
  loss = lambda batch: task.loss(
      {}, {}, batch, jax.random.key(0), denominators=task.denominators(batch), train=False)
  return jax.eval_shape(loss, batch).metrics


def test_counts_are_whole_numbers_beyond_those_of_float32():
  batch = make_batch(2, 300, 300)
  metrics = metrics_of(Segmentation(Fixed(), K), batch)
  for name in ("iou", "pixel_accuracy", "confusion_matrix"):
    assert all(jnp.issubdtype(x.dtype, jnp.integer) for x in metrics[name])


def test_no_confusion_matrix_of_many_classes():
  count = segmentation.MAX_CONFUSION_CLASSES + 1
  batch = make_batch(1) | {"image": np.zeros((1, 5, 7, count), np.float32)}
  metrics = compiled.loss(Segmentation(Fixed(), count), batch).metrics
  assert "confusion_matrix" not in metrics and metrics["iou"][0].shape == (count,)
  found = Segmentation(Fixed(), count).evaluate(iter([]), metrics, {})
  assert not found.figures and set(found.tables["classes"][0]) == {"class", "iou"}


def test_bfloat16_logits_give_a_float32_loss():
  output = compiled.loss(Segmentation(Fixed(dtype=jnp.bfloat16), K, dice_weight=1.0), make_batch())
  assert output.loss.dtype == jnp.float32
  assert {output.metrics[name][0].dtype for name in ("cross_entropy_loss", "dice_loss")} == {jnp.dtype("float32")}


def test_predict_gives_the_most_probable_class_and_decode_its_share():
  batch = make_batch(4)
  predictions = compiled.predict(Segmentation(Fixed(margin=2), K), {"params": {}}, batch)
  classes = predictions["classes"]
  assert classes.dtype == np.uint8
  target = np.where(batch["mask"][:, None, None] > 0, batch["segmentation"], -1)[:, 1:-1, 1:-1]
  np.testing.assert_array_equal(predictions["wrong"], np.sum((target != classes) & (target >= 0), (1, 2)))
  del batch["segmentation"]  # a user's picture has no truth
  assert compiled.predict(Segmentation(Fixed(margin=2), K), {"params": {}}, batch).keys() == {"classes"}
  np.testing.assert_array_equal(classes, batch["image"].argmax(-1)[:, 1:-1, 1:-1])
  names = ["ground", "cat", "dog", "cow"]
  for row, image in zip(segmentation.decode(predictions, {"classes": names}), classes):
    shares = {name: np.mean(image == k) for k, name in enumerate(names) if (image == k).any()}
    assert row["shares"] == pytest.approx(shares)
    assert list(row["shares"].values()) == sorted(row["shares"].values(), reverse=True)
    assert row["found"].count("%") == len(shares) - ("ground" in shares) and "ground" not in row["found"]
  nothing, = segmentation.decode({"classes": np.zeros((1, 9, 9), np.uint8)}, {"classes": names})
  assert nothing == {"found": "none", "shares": {"ground": 1.0}}
  few = np.zeros((1, 40, 50), np.uint8)
  few[0, 0, :3] = 1, 1, 2  # 0.1 % is the least that is listed
  row, = segmentation.decode({"classes": few}, {"classes": names})
  assert row["shares"] == {"ground": 0.9985, "cat": 0.001} and row["found"] == "cat (0.1%)"


def test_the_images_with_the_most_wrong_pixels_are_drawn():
  count = segmentation.MAX_PICTURED + 3
  truth = np.zeros((count, 6, 6), np.int32)
  truth[:, 0] = -1  # what the network says there is not wrong
  found = np.ones_like(truth, dtype=np.uint8) * (np.arange(36).reshape(6, 6) >= 36 - np.arange(count)[:, None, None])
  images = np.tile(np.arange(count, dtype=np.float32)[:, None, None, None], (1, 6, 6, 1))
  images[:, 0, 0] = -1  # drawn from the least to the greatest, its number would not be seen
  task = Segmentation(Fixed(), 2)
  wrong = np.sum((found != truth) & (truth >= 0), (1, 2))
  rows = [({"classes": found[i:i + 4], "wrong": wrong[i:i + 4]},
           {"image": images[i:i + 4], "segmentation": truth[i:i + 4]}) for i in range(0, count, 4)]
  figure = task.evaluate(iter(rows), {"iou": (np.ones(2), np.ones(2))}, {}).figures["segmentations"]()
  drawn = [axes.images[0].get_array() for axes in figure.axes]
  assert len(drawn) == 3 * segmentation.MAX_PICTURED
  wrong = [int((np.ptp(tinted, axis=-1) > 0.1).sum()) for tinted in drawn[2 * segmentation.MAX_PICTURED:]]
  assert wrong == list(range(count - 1, count - 1 - segmentation.MAX_PICTURED, -1))


@pytest.mark.parametrize("settings, words", [
    ({"dice_weight": -1.0}, "--config.model.dice_weight=-1.0: give 0 or more"),
    ({"cross_entropy_weight": float("nan")}, "--config.model.cross_entropy_weight=nan"),
    ({"cross_entropy_weight": 0.0}, "are both 0"),
    ({"num_classes": 300}, "give 2 to 255"),
])
def test_bad_settings_are_named(settings, words):
  with pytest.raises(UserError, match=words):
    Segmentation(**{"model": Fixed(), "num_classes": K, **settings})
