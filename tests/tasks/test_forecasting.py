"""Forecasting: losses by closed forms, what must not count, units, and which windows are shown."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from dljax.errors import UserError
from dljax.models import baselines
from dljax.tasks import forecasting
from dljax.tasks.forecasting import Forecasting
from tests.tasks import compiled

W, H, C = 6, 4, 3
ASSETS = {"normaliser": {"channels": ["a", "b", "c"], "mean": [1.0, 2.0, 3.0], "std": [2.0, 0.5, 10.0], "step": 3600}}


class Fixed(nn.Module):
  """The last H rows of the window are the forecast; with quantiles, moved by these."""

  shifts: tuple[float, ...] = ()

  @nn.compact
  def __call__(self, window, covariates=None, *, train):
    forecast = window[:, -H:]
    return {"logits": forecast[..., None] + jnp.array(self.shifts) if self.shifts else forecast}


class Constant(nn.Module):
  """A number for each quantile, the same everywhere."""

  count: int

  @nn.compact
  def __call__(self, window, covariates=None, *, train):
    level = self.param("level", nn.initializers.zeros, (self.count,))
    return {"logits": jnp.broadcast_to(level, (len(window), H, window.shape[-1], self.count))}


def make_batch(size=5, seed=0, missing=0.2, channels=C, **more):
  draw = np.random.default_rng(seed)
  horizon = draw.normal(size=(size, H, channels))
  horizon[draw.random(horizon.shape) < missing] = np.nan
  return {"window": draw.normal(size=(size, W, channels)).astype(np.float32),
          "horizon": horizon.astype(np.float32), "mask": np.ones(size, np.float32),
          "id": np.arange(size, dtype=np.int32), **more}


def mask(*rows):
  return np.array(rows, np.float32)


def there(batch):
  """Truths and forecasts of `Fixed`, [N, C] of the rows that count, with NaN where a truth is missing."""
  real = batch["mask"] > 0
  return (np.asarray(batch[name], np.float64)[real][:, -H:].reshape(-1, batch["window"].shape[-1])
          for name in ("horizon", "window"))


def test_the_squared_error_counts_each_value_that_is_there_once():
  batch = make_batch(mask=mask(1, 1, 0, 1, 0))
  out = compiled.loss(Forecasting(Fixed()), batch)
  truth, found = there(batch)
  known = ~np.isnan(truth)
  summary = Forecasting(Fixed()).summarize(out.metrics)
  want = {"loss": sklearn.metrics.mean_squared_error(truth[known], found[known]),
          "mse": sklearn.metrics.mean_squared_error(truth[known], found[known]),
          "mae": sklearn.metrics.mean_absolute_error(truth[known], found[known])}
  assert summary == pytest.approx(want, rel=1e-6)
  assert float(out.loss) == pytest.approx(want["loss"], rel=1e-6)
  for c in range(C):
    of = known[:, c]
    assert float(out.metrics["mae"][0][c] / out.metrics["mae"][1][c]) == pytest.approx(
        np.abs(truth[of, c] - found[of, c]).mean(), rel=1e-6)


@pytest.mark.parametrize("quantiles", [(), (0.1, 0.5, 0.9)])
def test_shares_of_parts_add_up_and_padding_counts_nothing(quantiles):
  task = Forecasting(Fixed(tuple(q - 0.5 for q in quantiles)), quantiles)
  whole = make_batch(6, mask=mask(1, 1, 1, 1, 1, 0))
  parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 1), slice(1, 6))]
  denominators = compiled.denominators(task, whole)
  np.testing.assert_allclose(sum(compiled.denominators(task, part)["values"] for part in parts), denominators["values"])
  shares = [compiled.loss(task, part, denominators=denominators) for part in parts]
  out = compiled.loss(task, whole)
  assert float(sum(share.loss for share in shares)) == pytest.approx(float(out.loss), rel=1e-6)
  real = {key: value[:5] for key, value in whole.items()}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out, compiled.loss(task, real))
  nothing = compiled.loss(task, {**whole, "mask": np.zeros(6, np.float32)})
  assert float(nothing.loss) == 0 and all(np.isnan(v) for v in task.summarize(nothing.metrics).values())


def test_the_pinball_loss_is_that_of_scikit_learn():
  quantiles, shifts = (0.1, 0.5, 0.75), (-1.0, 0.2, 0.9)
  batch = make_batch()
  out = compiled.loss(Forecasting(Fixed(shifts), quantiles), batch)
  truth, found = there(batch)
  known = ~np.isnan(truth)
  want = np.mean([sklearn.metrics.mean_pinball_loss(truth[known], found[known] + shift, alpha=q)
                  for q, shift in zip(quantiles, shifts)])
  summary = Forecasting(Fixed(shifts), quantiles).summarize(out.metrics)
  assert summary["loss"] == pytest.approx(want, rel=1e-5) == pytest.approx(float(out.loss), rel=1e-5)
  error = truth[known] - found[known]
  assert summary["mse"] == pytest.approx(np.mean((error - 0.2)**2), rel=1e-5)  # of the median
  assert summary["coverage"] == pytest.approx(np.mean((-1 <= error) & (error <= 0.9)))


def test_a_truth_at_either_end_of_the_band_is_covered():
  batch = make_batch(missing=0.0)
  for shifts in ((0.0, 1.0, 2.0), (-2.0, -1.0, 0.0)):
    task = Forecasting(Fixed(shifts), (0.1, 0.5, 0.9))
    assert task.summarize(compiled.loss(task, {**batch, "horizon": batch["window"][:, -H:]}).metrics)["coverage"] == 1


def test_what_the_pinball_loss_is_least_for_are_the_quantiles():
  quantiles = (0.1, 0.5, 0.9)
  task, batch = Forecasting(Constant(3), quantiles), make_batch(400, channels=1)
  truth = np.asarray(batch["horizon"]).ravel()
  truth = np.sort(truth[~np.isnan(truth)])
  of = lambda level: compiled.loss_and_grad(task, {"level": level}, batch)
  loss = lambda level: of(level)[0]
  best = np.quantile(truth, quantiles).astype(np.float32)
  np.testing.assert_allclose(of(best)[1]["level"], 0, atol=1e-3)
  for other in (best - np.float32(0.1), best + np.float32(0.1)):
    assert loss(best) < loss(other)
  coverage = compiled.loss(task, batch, {"level": best}).metrics["coverage"]
  assert float(coverage[0][0] / coverage[1][0]) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("quantiles", [(), (0.1, 0.5, 0.9)])
def test_a_missing_value_has_no_gradient(quantiles):
  task = Forecasting(baselines.DLinear(horizon=H, kernel_size=3, num_quantiles=len(quantiles)), quantiles)
  batch = make_batch()
  params = compiled.variables(task, batch)["params"]
  of = lambda batch: compiled.loss_and_grad(task, params, batch)[1]
  grads = of(batch)
  assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads))
  row = {**batch, "horizon": batch["horizon"].copy()}
  row["horizon"][2] = np.nan
  rest = {key: np.delete(value, 2, axis=0) for key, value in batch.items()}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), of(row), of(rest))


def test_a_forecast_does_not_see_what_it_forecasts():
  task = Forecasting(baselines.DLinear(horizon=H, kernel_size=3))
  batch = make_batch()
  variables = compiled.variables(task, batch)
  one = compiled.predict(task, variables, batch)
  two = compiled.predict(task, variables, {**batch, "horizon": 1e3 + batch["horizon"]}, seed=1)
  np.testing.assert_array_equal(one["forecast"], two["forecast"])


def test_predictions_have_the_median_and_the_quantiles():
  task = Forecasting(Fixed((-1.0, 0.0, 2.0)), (0.1, 0.5, 0.9))
  batch = make_batch()
  found = compiled.predict(task, {}, batch)
  np.testing.assert_array_equal(found["forecast"], batch["window"][:, -H:])
  shifts = found["quantiles"] - found["forecast"][..., None]
  np.testing.assert_allclose(shifts, np.broadcast_to([-1, 0, 2], (5, H, C, 3)), atol=1e-6)
  assert set(found) == {"forecast", "quantiles"}
  assert set(compiled.predict(Forecasting(Fixed()), {}, make_batch())) == {"forecast"}


def evaluated(task, batches, assets):
  def rows(sums):
    for batch in batches:
      for name, pair in compiled.loss(task, batch).metrics.items():
        pair = tuple(np.asarray(x, np.float64) for x in pair)
        sums[name] = tuple(map(np.add, sums[name], pair)) if name in sums else pair
      real = batch["mask"] > 0
      yield jax.tree.map(lambda x: x[real], (compiled.predict(task, {}, batch), batch))

  sums = {}
  return task.evaluate(rows(sums), sums, assets)


def test_errors_in_units_by_channel_and_by_step():
  task = Forecasting(Fixed((-1.0, 0.0, 1.0)), (0.1, 0.5, 0.9))
  batches = [make_batch(seed=0), make_batch(seed=1, mask=mask(1, 1, 1, 0, 0))]
  found = evaluated(task, batches, ASSETS)
  truth, guess = (np.concatenate(x) for x in zip(*map(there, batches)))
  error = truth - guess
  in_units = error * ASSETS["normaliser"]["std"]
  assert found.metrics == pytest.approx(
      {"mse_in_units": np.nanmean(in_units**2), "mae_in_units": np.nanmean(np.abs(in_units))}, rel=1e-5)
  for c, row in enumerate(found.tables["channels"]):
    assert row.pop("channel") == "abc"[c]
    assert row == pytest.approx({
        "mse": np.nanmean(error[:, c]**2), "mae": np.nanmean(np.abs(error[:, c])),
        "mse_in_units": np.nanmean(in_units[:, c]**2), "mae_in_units": np.nanmean(np.abs(in_units[:, c])),
        "coverage": np.mean(np.abs(error[:, c][~np.isnan(error[:, c])]) <= 1)}, rel=1e-5)
  by_step = error.reshape(-1, H, C)
  assert [row["step"] for row in found.tables["steps"]] == [1, 2, 3, 4]
  for h, row in enumerate(found.tables["steps"]):
    assert (row["mse"], row["mae"]) == pytest.approx(
        (np.nanmean(by_step[:, h]**2), np.nanmean(np.abs(by_step[:, h]))), rel=1e-5)


@pytest.mark.parametrize("kept, stride", [(5, 8), (512, 1)])  # of 33 windows
def test_pictured_are_the_windows_of_least_median_and_largest_error(monkeypatch, kept, stride):
  monkeypatch.setattr(forecasting, "MAX_KEPT", kept)
  shown = {}
  monkeypatch.setattr(forecasting.report, "forecasts", lambda rows, channels, **how: shown.update(
      rows=rows, channels=channels, **how))
  batches = [make_batch(seed=seed) for seed in range(7)]
  batches[2]["horizon"][[1, 3]] = np.nan  # nothing to be right or wrong about
  assets = {"normaliser": {**ASSETS["normaliser"], "step": "1 hour"}}
  found = evaluated(Forecasting(Fixed()), batches, assets)
  assert set(found.figures) == {"forecasts"}
  found.figures["forecasts"]()
  assert shown["channels"] == ["a", "b", "c"] and shown["band"] == ""
  assert shown["step"] == "1 hour"
  truths, guesses = (np.concatenate([np.asarray(b[name], np.float64)[:, -H:] for b in batches])
                     for name in ("horizon", "window"))
  errors = np.array([np.mean((t - g)[~np.isnan(t)]**2) if not np.isnan(t).all() else np.nan
                     for t, g in zip(truths, guesses)])
  titles = list(shown["rows"])
  assert titles[0] == f"least error: normalised mse {np.nanmin(errors):.3g}"
  assert titles[2] == f"largest error: normalised mse {np.nanmax(errors):.3g}"
  counted = errors[~np.isnan(errors)]
  middle = min(counted[::stride], key=lambda error: abs(error - np.median(counted)))
  assert titles[1] == f"median error: normalised mse {middle:.3g}"
  worst = int(np.nanargmax(errors))
  fields = shown["rows"][titles[2]]
  mean, std = (np.array(ASSETS["normaliser"][key]) for key in ("mean", "std"))
  np.testing.assert_allclose(fields["truth"], truths[worst] * std + mean, rtol=1e-6)
  np.testing.assert_allclose(fields["forecast"], guesses[worst] * std + mean, rtol=1e-6)
  np.testing.assert_allclose(fields["window"][-H:], fields["forecast"])


def test_the_median_alone_has_no_band_in_pictures():
  task = Forecasting(Fixed((0.0,)), (0.5,))
  figure = evaluated(task, [make_batch()], ASSETS).figures["forecasts"]()
  assert [text.get_text() for text in figure.legends[0].texts] == ["window", "truth", "forecast"]


def test_rows_to_print_are_in_units_with_their_times():
  zeros = np.zeros((1, 2, 3))
  predictions = {"forecast": zeros, "quantiles": np.stack([zeros - 1, zeros, zeros + 1], axis=-1)}
  first, last = "1.1.2020 23:00", "2.1.2020 0:00"
  batch = {"host/time": np.array([[first, last]])}
  row, = forecasting.decode(batch, predictions, ASSETS)
  assert row == {"first": first, "last": last,
                 "forecast": {name: {first: mean, last: mean} for name, mean in zip("abc", (1, 2, 3))},
                 "low": {name: {first: low, last: low} for name, low in zip("abc", (-1, 1.5, -7))},
                 "high": {name: {first: high, last: high} for name, high in zip("abc", (3, 2.5, 13))}}
  del predictions["quantiles"]
  assert set(next(iter(forecasting.decode(batch, predictions, ASSETS)))) == {"first", "last", "forecast"}


@pytest.mark.parametrize("quantiles, message", [
    ((0.1, 0.9), "quantiles=0.1,0.9: the median, 0.5, is missing"),
    ((0.5, 0.1), "quantiles=0.5,0.1: give rising numbers between 0 and 1"),
    ((0.5, 0.5), "give rising numbers"),
    ((0.0, 0.5), "give rising numbers between 0 and 1"),
])
def test_quantiles_that_make_no_sense_are_refused(quantiles, message):
  with pytest.raises(UserError, match=message):
    Forecasting(Fixed(), quantiles)
