"""Optimizers against their published rules, schedules against closed forms, all in float64."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax import optim
from dljax.errors import UserError

STEPS = 12


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def _params():
  """Where a quadratic starts, by path: two kernels, an embedding, a bias, a norm's scale.

  Every shape costs a compilation of each operation.
  """
  rng = np.random.default_rng(0)
  shapes = {
      "tall/kernel": (5, 3), "wide/kernel": (2, 6), "wide/bias": (6,), "embed/embedding": (5, 3),
      "norm/scale": (6,)}
  return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def _gradient(params):
  """The gradient of 0.5 * sum(curvature * (p - 1) ** 2); the curvature spans 0.5 to 2."""
  return {name: np.linspace(0.5, 2.0, p.size).reshape(p.shape) * (p - 1.0) for name, p in params.items()}


def _nest(flat):
  tree = {}
  for name, value in flat.items():
    module, leaf = name.split("/")
    tree.setdefault(module, {})[leaf] = jnp.asarray(value)
  return tree


def _flatten(tree):
  return {f"{m}/{leaf}": np.asarray(x) for m, leaves in tree.items() for leaf, x in leaves.items()}


def _train(config, params, steps=STEPS, gradient=_gradient, input_dimensions=()):
  """(parameters after `steps` updates, optimizer state)."""
  tx, _ = optim.make_optimizer(config, steps, input_dimensions=input_dimensions)
  tree = _nest(params)
  state = tx.init(tree)
  for _ in range(steps):  # not compiled: single operations are cached over all tests, whole updates are not
    updates, state = tx.update(_nest(gradient(_flatten(tree))), state, tree)
    tree = jax.tree.map(jnp.add, tree, updates)
  return _flatten(tree), state


def _config(name, **fields):
  config = optim.default_config(name)
  config.update(schedule="constant", warmup_fraction=0.0, weight_decay=0.0, learning_rate=0.05)
  config.update(fields)
  return config


# The published rules, one array at a time. Each is called once per step with t = 1, 2, ..., the gradient
# and the parameter, keeps what it must remember in `s`, and returns what the parameter loses per unit of
# learning rate. `decay` is the decoupled weight decay of this array.


def _sgd(c, s, t, g, p, decay):
  return g + decay * p


def _momentum(c, s, t, g, p, decay):  # torch.optim.SGD, dampening=0
  s["b"] = c.momentum * s.get("b", 0.0) + g
  return s["b"] + decay * p


def _nesterov(c, s, t, g, p, decay):  # torch.optim.SGD, nesterov=True
  s["b"] = c.momentum * s.get("b", 0.0) + g
  return g + c.momentum * s["b"] + decay * p


def _adagrad(c, s, t, g, p, decay):  # Duchi et al., figure 1
  s["G"] = s.get("G", 0.0) + g**2
  return g / (c.eps + np.sqrt(s["G"])) + decay * p


def _rmsprop(c, s, t, g, p, decay):  # torch.optim.RMSprop
  s["v"] = c.b2 * s.get("v", 0.0) + (1 - c.b2) * g**2
  s["b"] = c.momentum * s.get("b", 0.0) + g / (np.sqrt(s["v"]) + c.eps)
  return s["b"] + decay * p


def _adam(c, s, t, g, p, decay):  # Kingma & Ba, Algorithm 1
  s["m"] = c.b1 * s.get("m", 0.0) + (1 - c.b1) * g
  s["v"] = c.b2 * s.get("v", 0.0) + (1 - c.b2) * g**2
  m_hat, v_hat = s["m"] / (1 - c.b1**t), s["v"] / (1 - c.b2**t)
  return m_hat / (np.sqrt(v_hat) + c.eps) + decay * p


def _lamb(c, s, t, g, p, decay):  # You et al., Algorithm 2
  u = _adam(c, s, t, g, p, decay)
  return np.linalg.norm(p) / np.linalg.norm(u) * u


def _lion(c, s, t, g, p, decay):  # Chen et al., Algorithm 2
  m = s.get("m", 0.0)
  s["m"] = c.b2 * m + (1 - c.b2) * g
  return np.sign(c.b1 * m + (1 - c.b1) * g) + decay * p


def _muon(c, s, t, g, p, decay):  # Jordan et al., on the singular values: the iteration is odd in X
  s["M"] = c.momentum * s.get("M", 0.0) + g
  u, sigma, vt = np.linalg.svd(c.momentum * s["M"] + g, full_matrices=False)
  sigma = sigma / (np.sqrt(np.sum(sigma**2)) + 1e-7)
  for _ in range(5):
    sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
  rows_in, columns_out = g.shape
  return (u * sigma) @ vt * np.sqrt(max(1, columns_out / rows_in)) + decay * p


RULES = {
    "sgd": _sgd, "momentum": _momentum, "nesterov": _nesterov, "adagrad": _adagrad, "rmsprop": _rmsprop,
    "adam": _adam, "adamw": _adam, "lamb": _lamb, "lion": _lion, "muon": _muon,
}


def _reference(config, params, decays, steps=STEPS, learning_rate=lambda t: 0.05):
  params, memory = dict(params), {name: {} for name in params}
  for t in range(1, steps + 1):
    grads = _gradient(params)
    for name, p in params.items():
      rule = RULES[config.name]
      if config.name == "muon" and not name.endswith("kernel"):
        rule = _adam
      decay = config.weight_decay if name in decays else 0.0
      params[name] = p - learning_rate(t) * rule(config, memory[name], t, grads[name], p, decay)
  return params


def _assert_close(actual, expected):
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, err_msg=name, rtol=1e-9, atol=1e-10)


DECAYED = {"tall/kernel", "wide/kernel", "embed/embedding"}


def test_every_optimizer_has_a_reference():
  assert set(RULES) == set(optim.OPTIMIZERS)


@pytest.mark.parametrize(
    "name,weight_decay", [(name, 0.0) for name in RULES] + [(name, 0.1) for name in RULES if name != "adam"])
def test_follows_the_published_rule(name, weight_decay):
  config = _config(name, weight_decay=weight_decay)
  if name not in ("adagrad", "lion"):  # an eps that would show if it stood in the wrong place
    config.eps = 0.03
  _assert_close(_train(config, _params())[0], _reference(config, _params(), DECAYED))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion", "muon"])
def test_the_learning_rate_of_each_step_is_the_schedule_s(name):
  config = _config(name, weight_decay=0.1, schedule="linear", warmup_fraction=0.25, end_factor=0.2)
  rate = lambda t: 0.05 * (t - 1) / 3 if t <= 3 else 0.05 * (1 - 0.8 * (t - 4) / 9)
  _assert_close(_train(config, _params())[0], _reference(config, _params(), DECAYED, learning_rate=rate))


def test_rmsprop_with_momentum():
  config = _config("rmsprop", momentum=0.9, eps=0.03, learning_rate=0.01)
  expected = _reference(config, _params(), DECAYED, learning_rate=lambda t: 0.01)
  _assert_close(_train(config, _params())[0], expected)
  config.momentum = 0.0
  assert not np.allclose(_train(config, _params())[0]["tall/kernel"], expected["tall/kernel"])


def test_lamb_leaves_a_zero_array_free_to_move():
  params = {"layer/bias": np.zeros(6)}
  moved = _train(_config("lamb", eps=1e-12), params, steps=1)[0]["layer/bias"]
  np.testing.assert_allclose(moved, np.full(6, 0.05), rtol=1e-6)  # adam's first step, ratio 1


def test_muon_reads_convolutions_and_head_projections_as_matrices():
  grad = np.random.default_rng(1).normal(size=(3, 2, 2, 5))
  direction = lambda name, shape: _train(
      _config("muon", learning_rate=1.0), {name: np.zeros(shape)}, 1, lambda _: {name: grad.reshape(shape)},
      (("query/kernel", 1), ("joint/*", 1)),
  )[0][name].reshape(-1)
  as_matrix = direction("dense/kernel", (12, 5))
  np.testing.assert_allclose(direction("conv/kernel", (3, 2, 2, 5)), as_matrix, rtol=1e-9)
  np.testing.assert_allclose(direction("out/kernel", (3, 4, 5)), as_matrix, rtol=1e-9)
  for name, shape in (("query/kernel", (3, 4, 5)), ("joint/kernel", (3, 2, 2, 5))):
    np.testing.assert_allclose(direction(name, shape), direction("query/kernel", (3, 20)), rtol=1e-9)


def test_input_dimensions_are_found_by_the_whole_path_of_a_players_kernel():
  params = {"qkv": {"kernel": jnp.zeros((3, 4, 5))}}
  grad = {"qkv": {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 5)))}}
  updates = {}
  for player in ("critic", "generator"):
    tx, _ = optim.make_optimizer(_config("muon"), 1, player, [("critic/qkv/kernel", 1)])
    updates[player] = np.asarray(tx.update(grad, tx.init(params), params)[0]["qkv"]["kernel"])
  for player, rows in (("critic", 3), ("generator", 12)):
    matrix = updates[player].reshape(rows, -1)
    direction = np.asarray(optim.newton_schulz(jnp.asarray(grad["qkv"]["kernel"].reshape(rows, -1))))
    cosine = np.sum(matrix * direction) / (np.linalg.norm(matrix) * np.linalg.norm(direction))
    assert float(cosine) == pytest.approx(-1.0, abs=1e-9)


def test_newton_schulz_nearly_orthogonalises():
  for shape in [(20, 8), (8, 20)]:
    x = np.random.default_rng(2).normal(size=shape)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    newton_schulz = jax.jit(optim.newton_schulz)
    inside = u.T @ np.asarray(newton_schulz(x)) @ vt.T
    assert np.all((np.diag(inside) > 0.68) & (np.diag(inside) < 1.14))
    np.testing.assert_allclose(inside - np.diag(np.diag(inside)), 0.0, atol=1e-10)
    np.testing.assert_array_equal(newton_schulz(np.zeros(shape)), 0)  # a kernel without a gradient stays


# Schedules.


def _closed_form(name, total, warmup, peak, end, boundaries, factor):
  """The learning rate of every step 0 .. total, written out."""
  rates = []
  decay = total - warmup
  for step in range(total + 1):
    k = max(step - warmup, 0)
    p = k / decay
    share = {
        "constant": 1.0,
        "linear": (1 - p) + end * p,
        "cosine": end + (1 - end) * 0.5 * (1 + math.cos(math.pi * p)),
        "step": factor ** sum(max(step, warmup) >= round(b * total) for b in boundaries),
        "exponential": end**p if end else None,
        "inverse_sqrt": math.sqrt(max(warmup, 1) / (max(warmup, 1) + k)),
        "one_cycle": (
            1 / 25 + (24 / 25) * 0.5 * (1 - math.cos(math.pi * p / 0.3)) if p < 0.3 else
            end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (p - 0.3) / 0.7))),
    }[name]
    rates.append(peak * share * (step / warmup if step < warmup else 1.0))
  return rates


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.1])
@pytest.mark.parametrize("total", [100, 7, 2, 1])
def test_schedule_is_its_closed_form(name, warmup_fraction, total):
  config = _config(
      "sgd", schedule=name, warmup_fraction=warmup_fraction, learning_rate=0.3, end_factor=0.01,
      decay_boundaries=(0.3, 0.5, 0.8), decay_factor=0.2)
  schedule = optim.make_optimizer(config, total)[1]
  expected = _closed_form(name, total, round(warmup_fraction * total), 0.3, 0.01, (0.3, 0.5, 0.8), 0.2)
  # One length for all, of which the steps after the last are cut.
  found = np.asarray(jax.vmap(schedule)(np.arange(101)))[:total + 1]
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name,end", [
    ("constant", 1.0), ("linear", 0.25), ("cosine", 0.25), ("step", 0.01), ("exponential", 0.25),
    ("inverse_sqrt", 0.5), ("one_cycle", 0.25)])
def test_schedule_ends_where_it_says_and_stays_there(name, end):
  config = _config("sgd", schedule=name, warmup_fraction=0.25, end_factor=0.25, learning_rate=2.0)
  schedule = optim.make_optimizer(config, 40)[1]
  assert float(schedule(0)) == 0.0
  assert float(schedule(10)) == pytest.approx(2.0 / 25 if name == "one_cycle" else 2.0)
  assert float(schedule(40)) == pytest.approx(2.0 * end)
  if name != "inverse_sqrt":
    assert float(schedule(400)) == pytest.approx(2.0 * end)


def test_a_single_step_is_never_all_warm_up():
  config = _config("sgd", warmup_fraction=0.9)
  assert float(optim.make_optimizer(config, 1)[1](0)) == pytest.approx(0.05)


def test_schedule_is_float32_outside_of_float64():
  with jax.enable_x64(False):
    for name in optim.SCHEDULES:
      config = _config("sgd", schedule=name, end_factor=0.1)
      rate = jax.eval_shape(optim.make_optimizer(config, 10)[1], jnp.int32(0))
      assert rate.shape == () and rate.dtype == jnp.float32


# Clipping, decay, freezing, learning rates by path.


def _names(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _norm(tree):
  return math.sqrt(sum(np.sum(x**2) for x in tree.values()))


def test_clipping_is_by_the_global_norm_of_the_gradient():
  start, grads = _params(), _gradient(_params())
  for clip in [0.5 * _norm(grads), 2.0 * _norm(grads)]:
    share = min(1.0, clip / _norm(grads))
    expected = {name: p - 0.05 * share * grads[name] for name, p in start.items()}
    _assert_close(_train(_config("sgd", clip_norm=clip), start, steps=1)[0], expected)


def test_clipping_does_not_see_frozen_gradients():
  grads = _gradient(_params())
  grads["embed/embedding"] = np.full((5, 3), 1e6)
  clip = _norm({name: g for name, g in grads.items() if name != "embed/embedding"})
  config = _config("sgd", clip_norm=1.001 * clip, freeze=("embed/*",))
  moved, _ = _train(config, _params(), 1, lambda _: grads)
  np.testing.assert_allclose(moved["norm/scale"], _params()["norm/scale"] - 0.05 * grads["norm/scale"])


def test_decay_spares_norms_biases_and_vectors():
  shapes = {"conv": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "norm": {"scale": (4,), "bias": (4,)},
            "embed": {"embedding": (7, 4)}, "heads": {"kernel": (4, 2, 2), "bias": (2, 2)},
            "affine": {"scale": (1, 4)}, "layer_scale": (4,), "temperature": ()}
  params = jax.tree.map(np.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
  mask = optim.decay_mask(params)
  decays = [name for name, yes in zip(_names(mask), jax.tree.leaves(mask), strict=True) if yes]
  assert sorted(decays) == ["conv/kernel", "embed/embedding", "heads/kernel"]


@pytest.mark.parametrize("decay", ["weight_decay", "l2"])
def test_a_model_names_more_that_does_not_decay(decay):
  """By the whole path, with the player where there are several."""
  params = {"positions": np.ones((1, 4, 2)), "kernel": np.ones((2, 2))}
  config = _config("sgd", learning_rate=1.0, schedule="constant", warmup_fraction=0.0, **{decay: 0.5})
  for player, pattern in ("", "positions"), ("critic", "critic/positions"):
    tx, _ = optim.make_optimizer(config, 2, player, no_decay=(pattern,))
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["positions"], 0)
    np.testing.assert_allclose(updates["kernel"], -0.5)


def test_l2_is_decay_through_the_gradient():
  start = _params()
  l2, _ = _train(_config("adam", l2=0.1), start)
  def gradient(params):
    return {name: g + 0.1 * params[name] * (name in DECAYED) for name, g in _gradient(params).items()}
  _assert_close(l2, _train(_config("adam"), start, gradient=gradient)[0])
  decoupled, _ = _train(_config("adamw", weight_decay=0.1), start)
  assert np.max(np.abs(l2["tall/kernel"] - decoupled["tall/kernel"])) > 1e-3
  np.testing.assert_allclose(l2["norm/scale"], decoupled["norm/scale"])
  # For plain gradient descent the two are the same, as Loshchilov & Hutter show.
  _assert_close(_train(_config("sgd", l2=0.1), start)[0], _train(_config("sgd", weight_decay=0.1), start)[0])


def test_l2_comes_after_clipping():
  start, grads = _params(), _gradient(_params())
  moved, _ = _train(_config("sgd", l2=0.1, clip_norm=1.0), start, steps=1)
  expected = {
      name: p - 0.05 * (grads[name] / _norm(grads) + 0.1 * p * (name in DECAYED))
      for name, p in start.items()}
  _assert_close(moved, expected)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_parameters_stay_bit_identical_and_hold_no_state(name):
  config = _config(name, freeze=("wide/*", "*/embedding"), weight_decay=0.0 if name == "adam" else 0.1)
  start = _params()
  after, state = _train(config, start)
  for path, value in start.items():
    frozen = path.startswith("wide") or path.endswith("embedding")
    assert np.array_equal(after[path], value) == frozen, path
  assert not [path for path in _names(state) if "wide" in path or "embed" in path]
  free = _config(name, weight_decay=config.weight_decay)
  kept = {path: value for path, value in start.items() if path in ("tall/kernel", "norm/scale")}
  expected, _ = _train(free, kept)
  _assert_close({path: after[path] for path in kept}, expected)


def test_a_gradient_that_is_not_finite_does_not_reach_frozen_parameters():
  grads = {name: np.full_like(g, np.nan) for name, g in _gradient(_params()).items()}
  after, _ = _train(_config("adamw", freeze=("tall/*",)), _params(), 1, lambda _: grads)
  assert np.array_equal(after["tall/kernel"], _params()["tall/kernel"])


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion", "muon"])
def test_learning_rates_by_path_and_the_first_match_wins(name):
  config, start = _config(name, weight_decay=0.1), _params()
  plain, _ = _train(config, start, steps=1)
  config.learning_rates = ("wide/bias=0.5", "wide/*=3", "*=2")
  scaled, _ = _train(config, start, steps=1)
  factors = {"tall/kernel": 2, "wide/kernel": 3, "wide/bias": 0.5, "embed/embedding": 2, "norm/scale": 2}
  _assert_close(scaled, {n: p + factors[n] * (plain[n] - p) for n, p in start.items()})


def test_patterns_are_globs_over_whole_paths():
  config = _config("sgd", freeze=("wide",))
  with pytest.raises(UserError, match="freeze: 'wide' matches no parameter; the nearest is 'wide/"):
    optim.check_patterns(config, _nest(_params()))
  deep = {"stage1": {"block": {"kernel": jnp.ones((2, 2))}}, "head": {"kernel": jnp.ones((2, 2))}}
  config.freeze = ("stage1/*",)
  optim.check_patterns(config, deep)
  tx, _ = optim.make_optimizer(config, 2)
  updates, _ = tx.update(deep, tx.init(deep), deep)
  assert not updates["stage1"]["block"]["kernel"].any() and updates["head"]["kernel"].all()


def test_check_patterns():
  params = _nest(_params())
  optim.check_patterns(_config("sgd", freeze=("wide/*",), learning_rates=("*/kernel=2",)), params)
  with pytest.raises(UserError, match="freeze: 'tail/kernel' matches no .* nearest is 'tall/kernel'"):
    optim.check_patterns(_config("sgd", freeze=("tail/kernel",)), params)
  with pytest.raises(UserError, match="learning_rates: 'norm/scales' .* the nearest is 'norm/scale'"):
    optim.check_patterns(_config("sgd", learning_rates=("norm/scales=2",)), params)
  with pytest.raises(UserError, match=r"freeze=\('\*',\): leaves nothing to train"):
    optim.check_patterns(_config("sgd", freeze=("*",)), params)
  optim.check_patterns(_config("sgd"), {})  # a model without parameters
  with pytest.raises(UserError, match="freeze: 'head' matches no parameter; the model has none; drop it"):
    optim.check_patterns(_config("sgd", freeze=("head",)), {})
  # Of several players each has patterns of its own, which begin with its name; shapes are enough.
  shapes = jax.eval_shape(lambda: params)
  optim.check_patterns(_config("sgd", freeze=("critic/wide/*",)), shapes, "critic")
  with pytest.raises(UserError, match="--config.optimizers.critic.freeze: 'wide/x' matches no .* 'critic/"):
    optim.check_patterns(_config("sgd", freeze=("wide/x",)), shapes, "critic")


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_is_arrays_only_of_any_tree_and_needs_no_values(name):
  config = _config(
      name, freeze=("1/*",), learning_rates=("0/*=2",), clip_norm=1.0, schedule="cosine", warmup_fraction=0.1)
  tx, _ = optim.make_optimizer(config, 10)
  params = [{"kernel": jnp.ones((3, 2))}, ({"kernel": jnp.ones((2, 2))}, jnp.ones(()))]
  shapes = jax.eval_shape(tx.init, params)
  state = tx.init(params)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
  assert len(set(_names(state))) == len(_names(state))
  _, after = jax.jit(tx.update)(params, state, params)
  for other in (state, after):  # a checkpoint or a scan needs the same structure, shapes and dtypes each step
    assert jax.tree.structure(other) == jax.tree.structure(shapes)
    described = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (other, shapes)]
    assert described[0] == described[1]


# Plateau and best.


def _follow(config, values, higher_is_better=True, tracker=optim.Tracker()):
  for i, value in enumerate(values, 1):
    tracker = optim.track(config, tracker, 10 * i, value, higher_is_better)
    yield tracker


def test_plateau_counts_exactly():
  config = _config("sgd", plateau_factor=0.5, plateau_patience=2)
  followed = list(_follow(config, [0.5, 0.5, 0.4, 0.6, 0.6, 0.5, 0.5, 0.5, 0.7]))
  assert [t.lr_scale for t in followed] == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
  assert [t.stale for t in followed] == [0, 1, 2, 0, 1, 2, 3, 4, 0]
  assert [t.best_step for t in followed] == [10, 10, 10, 40, 40, 40, 40, 40, 90]
  assert [t.best_value for t in followed] == [0.5] * 3 + [0.6] * 5 + [0.7]


def test_plateau_of_a_loss_with_a_smallest_improvement():
  config = _config("sgd", plateau_factor=0.1, plateau_patience=3, plateau_min_delta=0.1)
  followed = list(_follow(config, [1.0, 0.95, 0.92, 0.91, 0.85], higher_is_better=False))
  assert [t.stale for t in followed] == [0, 1, 2, 3, 0]  # slow gains add up against the reference
  assert [t.lr_scale for t in followed] == [1, 1, 1, 0.1, 0.1]
  assert [t.best_step for t in followed] == [10, 20, 30, 40, 50]  # the best checkpoint has no margin


def test_plateau_is_off_by_default():
  *_, last = _follow(_config("sgd"), [1.0] + [0.0] * 50)
  assert last.lr_scale == 1.0 and last.stale == 50


def test_values_that_are_not_finite_are_never_best():
  config = _config("sgd")
  first, second, third = _follow(config, [math.nan, 0.1, math.inf])
  assert (first.best_value, first.best_step, first.stale) == (None, -1, 1)
  assert (second.best_value, second.stale) == (0.1, 0)
  assert (third.best_value, third.stale) == (0.1, 1)


def test_tracker_survives_json_in_the_middle_of_a_plateau():
  config = _config("sgd", plateau_factor=0.3, plateau_patience=2)
  values = [0.1, 0.3, 0.2, 0.2, 0.1, 0.3, 0.4]
  *_, unbroken = _follow(config, values)
  tracker = optim.Tracker()
  for i, value in enumerate(values, 1):
    tracker = optim.Tracker(**json.loads(json.dumps(dataclasses.asdict(tracker))))
    tracker = optim.track(config, tracker, 10 * i, value, True)
  assert tracker == unbroken


# Bad input: one line that names the flag.


@pytest.mark.parametrize("fields,message", [
    ({"name": "adamm"}, "name: there is no 'adamm'; did you mean adam"),
    ({"schedule": "cosin"}, "schedule: there is no 'cosin'; did you mean cosine?"),
    ({"learning_rate": 0.0}, "learning_rate=0.0: must be above 0"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0: must be above 0"),
    ({"learning_rate": math.nan}, "learning_rate=nan: must be above 0"),
    ({"learning_rate": math.inf}, "learning_rate=inf: must be above 0"),
    ({"momentum": 1.0}, "momentum=1.0: must be at least 0 and below 1"),
    ({"name": "momentum"}, "momentum=0.0: momentum needs one above 0"),
    ({"b1": -0.1}, "b1=-0.1: must be at least 0 and below 1"),
    ({"b2": 0.0}, "b2=0.0: must be above 0 and below 1"),
    ({"eps": 0.0}, "eps=0.0: must be above 0"),
    ({"warmup_fraction": 1.0}, "warmup_fraction=1.0: must be at least 0 and below 1"),
    ({"end_factor": 1.5}, "end_factor=1.5: must be from 0 to 1"),
    ({"schedule": "exponential"}, "end_factor=0.0: the exponential schedule needs one above 0"),
    ({"decay_boundaries": (0.5, 0.2)}, "decay_boundaries=(0.5, 0.2): must be rising shares"),
    ({"decay_boundaries": (0.5, 30)}, "decay_boundaries=(0.5, 30): must be rising shares"),
    ({"decay_boundaries": ("half",), "schedule": "step"}, "decay_boundaries=('half',): must be"),
    ({"decay_boundaries": (0.1, 0.5), "schedule": "step", "warmup_fraction": 0.2},
     "decay_boundaries=(0.1, 0.5): must lie after the warm-up, which ends at 0.2"),
    ({"decay_boundaries": (0.2, 0.5), "schedule": "step", "warmup_fraction": 0.2},
     "decay_boundaries=(0.2, 0.5): must lie after the warm-up, which ends at 0.2"),
    ({"decay_factor": 0.0}, "decay_factor=0.0: must be above 0 and at most 1"),
    ({"clip_norm": -1.0}, "clip_norm=-1.0: must be at least 0; 0 is off"),
    ({"weight_decay": -1.0}, "weight_decay=-1.0: must be at least 0; 0 is off"),
    ({"name": "adam", "weight_decay": 0.1},
     "weight_decay=0.1: adam has no weight decay; use adamw, or l2"),
    ({"l2": -1.0}, "l2=-1.0: must be at least 0; 0 is off"),
    ({"l2": 0.1, "weight_decay": 0.1}, "l2=0.1: is the alternative to weight_decay"),
    ({"plateau_factor": 0.0}, "plateau_factor=0.0: must be above 0 and at most 1"),
    ({"plateau_patience": 0}, "plateau_patience=0: must be at least 1"),
    ({"plateau_min_delta": -1.0}, "plateau_min_delta=-1.0: must be at least 0"),
    ({"learning_rates": ("stem/*",)}, "learning_rates: 'stem/*' is not 'pattern=factor'"),
    ({"learning_rates": ("=2",)}, "learning_rates: '=2' is not 'pattern=factor'"),
    ({"learning_rates": ("stem=fast",)}, "learning_rates: 'stem=fast' is not"),
    ({"learning_rates": ("stem=0",)}, "learning_rates: 'stem=0' is not"),
    ({"learning_rates": ("stem=nan",)}, "learning_rates: 'stem=nan' is not"),
])
def test_bad_config_is_one_line_naming_the_flag(fields, message):
  config = _config("adamw")
  config.update(fields)
  with pytest.raises(UserError) as error:
    optim.make_optimizer(config, 10)
  assert str(error.value).startswith(f"--config.optimizer.{message}")
  assert "\n" not in str(error.value)


def test_bad_total_steps():
  with pytest.raises(UserError, match="--config.total_steps=0: must be at least 1"):
    optim.make_optimizer(_config("sgd"), 0)


def test_default_configs_are_valid_and_json():
  for name in optim.OPTIMIZERS:
    config = optim.default_config(name)
    assert json.loads(config.to_json())["name"] == name
    optim.make_optimizer(config, 10)
  with pytest.raises(UserError, match="--config.optimizer.name: there is no 'sdg'; did you mean sgd"):
    optim.default_config("sdg")
