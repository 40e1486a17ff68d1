"""Numbers for each image: closed forms, shares that add up, and everything in the units of the table."""

import jax
import numpy as np
import pytest
import sklearn.metrics

from dljax.tasks import regression
from dljax.tasks.regression import Regression
from tests.tasks import compiled
from tests.tasks.test_classification import Identity, Linear
from tests.train import toys

MEAN, STD = (100.0, -3.0), (20.0, 0.5)


def make_batch(size=16, seed=0, **more):
  draw = np.random.default_rng(seed)
  return {"image": draw.normal(size=(size, 2)).astype(np.float32),
          "label": draw.normal(size=(size, 2)).astype(np.float32),
          "mask": np.ones(size, np.float32), "id": np.arange(size, dtype=np.int32), **more}


def test_loss_and_metrics_by_hand_in_both_units():
  task = Regression(Identity(), MEAN, STD)
  batch = make_batch(mask=np.array([1] * 13 + [0] * 3, np.float32))
  out = compiled.loss(task, batch)
  truth, guess = (batch[key][:13].astype(np.float64) for key in ("label", "image"))
  assert out.loss == pytest.approx(((guess - truth)**2).mean(), rel=1e-5)
  found = task.summarize(out.metrics)
  truth, guess = truth * STD + MEAN, guess * STD + MEAN
  for name, score in (("mse", "mean_squared_error"), ("mae", "mean_absolute_error"), ("r2", "r2_score")):
    assert found[name] == pytest.approx(getattr(sklearn.metrics, score)(truth, guess), rel=1e-4)
  assert found.keys() == task.goals.keys()


def test_shares_of_uneven_parts_add_up_to_the_whole():
  task = Regression(Linear(2), MEAN, STD)
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
    task = Regression(Linear(2, np.float64), MEAN, STD)
    pipeline = toys.Scripted(lambda step: make_batch(seed=step, mask=toys.uneven_mask(step)))
    return toys.train(toys.formula_experiment(task, pipeline), 2, dtype=np.float64, **how).state.params

  with jax.enable_x64(True):
    one = train(mesh="data:1")
    assert toys.difference(one, train(mesh="data:4")) < 1e-12
    assert toys.difference(one, train(parallelism="pmap", mesh="data:4")) < 1e-12


def test_a_number_that_does_not_vary_has_no_share_of_its_variance():
  task = Regression(Identity(), MEAN, STD)
  batch = make_batch()
  batch["label"][:, 0] = 0.3
  found = task.evaluate([], compiled.loss(task, batch).metrics, {"classes": ["age", "size"]})
  age, size = found.tables["numbers"]
  assert np.isnan(age["r2"]) and np.isfinite(size["r2"]) and age["number"] == "age"
  nothing = task.summarize(compiled.loss(task, {**batch, "mask": np.zeros(16, np.float32)}).metrics)
  assert all(np.isnan(value) for value in nothing.values())


def test_predictions_are_in_the_units_of_the_table():
  task, batch = Regression(Identity(), MEAN, STD), make_batch()
  predicted = compiled.predict(task, {}, batch)
  np.testing.assert_allclose(predicted["numbers"], batch["image"] * STD + MEAN, rtol=1e-5)
  rows = list(regression.decode({"numbers": np.array([[1.5, 2.0]])}, {"classes": ["age", "input"]}))
  assert rows == [{"age": 1.5, "number input": 2.0}]


def test_guesses_are_drawn_against_the_truth():
  task, batch = Regression(Identity(), MEAN, STD), make_batch()
  guesses = np.zeros((16, 2))
  found = task.evaluate([({"numbers": guesses[:9]}, {"label": batch["label"][:9]}),
                         ({"numbers": guesses[9:]}, {"label": batch["label"][9:]})],
                        compiled.loss(task, batch).metrics, {"classes": ["age", "$size_x$"]})
  truths, drawn, names = found.figures["numbers"].args
  np.testing.assert_allclose(truths, batch["label"] * STD + MEAN, rtol=1e-6)
  np.testing.assert_array_equal(drawn, guesses)
  assert [axes.get_title() for axes in found.figures["numbers"]().axes] == ["age", r"\$size_x\$"]
