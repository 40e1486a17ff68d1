"""Recurrent models: counts, what is dropped, carries, padding, and what becomes of gradients over long sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dljax import optim
from dljax.errors import UserError
from dljax.models import rnn
from dljax.ops.recurrence import CELLS
from dljax.train.state import parameter_count
from experiments import rnn as experiment
from tests.models.variables import random_variables

# The first three by hand: V E, two layers of G H (D + H + 2), and V (H + 1).
COUNTS = {
    "rnn_elman": 1000 * 256 + 2 * 256 * 514 + 257 * 1000,
    "rnn_gru": 1000 * 256 + 2 * 3 * 256 * 514 + 257 * 1000,
    "rnn_lstm": 1000 * 256 + 2 * 4 * 256 * 514 + 257 * 1000,
    "rnn_zaremba_small": 4_653_200,
    "rnn_zaremba_medium": 19_780_400,
    "rnn_zaremba_large": 66_034_000,
    "rnn_awd_lstm": 24_221_600,
}
TOKENS = np.random.RandomState(0).randint(0, 7, (3, 5)).astype(np.int32)


def _x(*shape):
  return np.random.RandomState(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
  model = rnn.VARIANTS[name](vocab_size=1000 if COUNTS[name] < 2e6 else 10_000)
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  assert parameter_count(shapes["params"]) == COUNTS[name]


def test_the_forecasters_count_depends_on_no_horizon():
  for horizon in (1, 24):
    model = rnn.VARIANTS["rnn_forecaster"](horizon=horizon)
    shapes = jax.eval_shape(model.init, jax.random.key(0), _x(2, 9, 1))
    assert parameter_count(shapes["params"]) == 4 * 64 * (1 + 64 + 2) + 4 * 64 * (64 + 64 + 2) + 65 == 50_497
  assert set(rnn.VARIANTS) == {*COUNTS, "rnn_forecaster"}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_shapes_and_names(cell, bidirectional):
  stack = rnn.Stack(cell, 4, 2, bidirectional, last_size=3)
  params = jax.eval_shape(stack.init, jax.random.key(0), _x(2, 5, 6))["params"]
  names = {"l0", "l1"} | ({"l0_reverse", "l1_reverse"} if bidirectional else set())
  assert set(params) == names
  gates, wide = CELLS[cell].gates, 8 if bidirectional else 4
  assert params["l1"]["weight_ih"].shape == (wide, 3 * gates) and params["l1"]["weight_hh"].shape == (3, 3 * gates)
  y, carry = jax.eval_shape(lambda p: stack.apply({"params": p}, _x(2, 5, 6)), params)
  assert y.shape == (2, 5, 6 if bidirectional else 3)
  assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, stack.initial_carry(2))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_padding_changes_nothing_in_a_bidirectional_stack(cell):
  stack = rnn.Stack(cell, 4, 2, bidirectional=True)
  x, length = _x(2, 5, 3), jnp.array([5, 2])
  variables = random_variables(stack, x)
  y, carry = jax.jit(stack.apply)(variables, x, length)
  assert not np.any(y[1, 2:]) and np.all(y[1, :2])
  alone, end = jax.jit(stack.apply)(variables, x[1:, :2])
  np.testing.assert_allclose(y[1:, :2], alone, rtol=1e-5, atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:], b, rtol=1e-5, atol=1e-6), carry, end)


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_in_two_parts_is_the_text_and_sees_no_future(tied):
  model = rnn.LanguageModel(7, 6, "lstm", 5, 2, tied=tied, variational=True)
  variables = random_variables(model, TOKENS)
  apply = jax.jit(model.apply)
  whole = apply(variables, TOKENS)
  first = apply(variables, TOKENS[:, :2], model.init_cache(3, 2))
  second = apply(variables, TOKENS[:, 2:], first["cache"])
  np.testing.assert_allclose(jnp.concatenate([first["logits"], second["logits"]], 1), whole["logits"], 1e-5, 1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), second["cache"], whole["cache"])
  other = TOKENS.copy()
  other[:, 3] = (other[:, 3] + 1) % 7
  difference = np.abs(apply(variables, other)["logits"] - whole["logits"]).max((0, 2))
  assert not np.any(difference[:3]) and np.all(difference[3:] > 1e-4)


def test_tied_embeddings_are_one_matrix_and_take_both_gradients():
  model = rnn.LanguageModel(7, 6, "gru", 5, 1, tied=True)
  variables = random_variables(model, TOKENS)
  assert set(variables["params"]) == {"embed", "rnn", "head_bias"}
  assert variables["params"]["rnn"]["l0"]["weight_hh"].shape == (6, 18)  # the last layer has the embedding's width
  loss = lambda v: jnp.sum(model.apply(v, TOKENS[:, :1] * 0)["logits"][..., 3])
  grad = jax.jit(jax.grad(loss))(variables)["params"]["embed"]["embedding"]
  assert np.any(grad[0]) and np.any(grad[3]) and not np.any(grad[5])  # as a word, as a class, not at all


def test_variational_dropout_drops_the_same_values_in_all_steps():
  x = np.ones((4, 6, 32), np.float32)
  for variational in (False, True):
    # A layer that hands its input on, so that the next one's input shows the mask.
    stack = rnn.Stack("relu", 32, 2, dropout=0.5, variational=variational)
    one = {"weight_ih": np.eye(32), "weight_hh": np.zeros((32, 32)), "bias_ih": np.zeros(32), "bias_hh": np.zeros(32)}
    run = jax.jit(lambda params, stack=stack: (
        stack.apply(params, x, train=True, rngs={"dropout": jax.random.key(0)})[0], stack.apply(params, x)[0]))
    y, plain = map(np.asarray, run({"params": {"l0": one, "l1": one}}))
    assert set(np.unique(y)) == {0.0, 2.0} and 0.4 < np.mean(y == 0) < 0.6
    assert np.all(y == y[:, :1]) == variational
    assert np.any(y[0] != y[1])  # rows have masks of their own
    np.testing.assert_array_equal(plain, x)


def test_weight_dropout_drops_recurrent_weights_for_the_whole_sequence():
  """Each state of this network keeps what it was given at first, unless its weight is dropped."""
  stack = rnn.Stack("relu", 64, weight_dropout=0.25)
  zeros = np.zeros(64, np.float32)
  params = {"weight_ih": np.eye(64), "weight_hh": 0.75 * np.eye(64), "bias_ih": zeros, "bias_hh": zeros}
  x = np.concatenate([np.ones((2, 1, 64)), np.zeros((2, 5, 64))], 1).astype(np.float32)
  run = jax.jit(
      lambda key: stack.apply({"params": {"l0": params}}, x, train=True, rngs={"dropout": jax.random.key(key)})[0])
  y = np.asarray(run(0))
  np.testing.assert_allclose(y[:, 1:], np.broadcast_to(np.round(y[:1, 1:2]), y[:, 1:].shape), atol=1e-5)
  assert 0.6 < np.mean(y[0, 1]) < 0.9 and np.all(y[:, 0] == 1)
  assert np.any(run(1) != y)


def test_a_dropped_word_is_gone_wherever_it_stands_in_the_row():
  """The logits of this network are the mean of a word's vector, which is all ones."""
  model = rnn.LanguageModel(50, 4, "relu", 4, 1, embed_dropout=0.5)
  tokens = np.tile(np.arange(50), (2, 2)).astype(np.int32)
  zeros = np.zeros(4, np.float32)
  layer = {"weight_ih": np.eye(4), "weight_hh": np.zeros((4, 4)), "bias_ih": zeros, "bias_hh": zeros}
  params = {"embed": {"embedding": np.ones((50, 4))}, "rnn": {"l0": layer},
            "head": {"kernel": np.full((4, 50), 0.25), "bias": np.zeros(50)}}
  run = jax.jit(lambda params: (
      model.apply({"params": params}, tokens, train=True, rngs={"dropout": jax.random.key(0)})["logits"][..., 0],
      model.apply({"params": params}, tokens)["logits"]))
  logits, plain = map(np.asarray, run(params))
  assert set(np.unique(logits)) == {0.0, 2.0} and 0.3 < np.mean(logits == 0) < 0.7
  np.testing.assert_array_equal(logits[:, :50], logits[:, 50:])
  assert np.any(logits[0] != logits[1])
  np.testing.assert_array_equal(plain, 1)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_remat_changes_no_gradient(layer_norm):
  x, results = _x(2, 4, 3), []
  for remat in (False, True):
    stack = rnn.Stack("lstm", 4, 2, layer_norm=layer_norm, remat=remat)
    variables = random_variables(stack, x)
    loss = lambda v, stack=stack: jnp.sum(stack.apply(v, x, jnp.array([4, 2]), train=True)[0]**2)
    grad = jax.jit(jax.grad(loss))
    assert ("remat" in str(jax.make_jaxpr(grad)(variables))) == remat
    results.append(grad(variables))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), *results)


def test_computes_in_bfloat16_with_float32_parameters_state_and_logits():
  model = rnn.LanguageModel(7, 6, "lstm", 5, 2, dtype=jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  out = jax.eval_shape(model.apply, variables, TOKENS)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((variables, out)))
  assert "bf16" in str(jax.make_jaxpr(model.apply)(variables, TOKENS))


def test_an_lstm_starts_with_its_forget_gate_open():
  stack = rnn.Stack("lstm", 64)
  bias = jax.jit(stack.init)(jax.random.key(0), _x(1, 2, 3))["params"]["l0"]["bias_ih"].reshape(4, 64)
  np.testing.assert_allclose(bias.mean(1), [0, 1, 0, 0], atol=0.05)
  assert np.abs(bias - bias.mean(1, keepdims=True)).max() < 0.2


def test_an_unknown_cell_is_one_line():
  with pytest.raises(UserError, match="cell.*'lstn'.*lstm"):
    rnn.Stack("lstn", 4).initial_carry(1)


def test_forecasts_follow_the_level_and_the_covariates():
  model = rnn.Forecaster(4, hidden_size=8, num_quantiles=3)
  window, covariates = _x(2, 6, 2), _x(2, 10, 3)
  variables = random_variables(model, window, covariates)
  apply = jax.jit(model.apply)
  y = apply(variables, window, covariates)["logits"]
  assert y.shape == (2, 4, 2, 3)
  np.testing.assert_allclose(apply(variables, window + 5, covariates)["logits"], y + 5, atol=1e-4)
  # What is known of step 2 of the horizon changes the forecast from there on.
  covariates[:, 8] += 1
  change = np.abs(apply(variables, window, covariates)["logits"] - y).max((0, 2, 3))
  assert not np.any(change[:2]) and np.all(change[2:] > 1e-4)
  plain = rnn.Forecaster(4, "gru", 8, relative="no")
  variables = random_variables(plain, window)
  apply = jax.jit(plain.apply)
  y = apply(variables, window)["logits"]
  assert y.shape == (2, 4, 2) and np.abs(apply(variables, window + 5)["logits"] - y - 5).max() > 1


def test_a_forecaster_begins_by_repeating_the_last_season():
  model, window = rnn.Forecaster(5, hidden_size=8, relative="season", season=3), _x(2, 6, 2)
  y, variables = jax.jit(model.init_with_output)(jax.random.key(0), window)
  np.testing.assert_array_equal(y["logits"], window[:, [3, 4, 5, 3, 4]])
  trained = jax.tree.map(lambda x: x + 0.1, variables)
  apply = jax.jit(model.apply)
  y = apply(trained, window)["logits"]
  np.testing.assert_allclose(apply(trained, window + 5)["logits"], y + 5, atol=1e-4)


@pytest.mark.parametrize("change, message", [
    ({"relative": "seasons"}, "--config.model.relative: there is no 'seasons'; did you mean season"),
    ({"relative": "season", "season": 500}, "--config.model.season=500: must be from 1 to the window's 168 rows"),
])
def test_a_forecaster_of_unknown_differences_is_refused(change, message):
  config = experiment.get_config("temperatures")
  config.model.update(change)
  with pytest.raises(UserError, match=message):
    experiment.build(config)


# Gradients over long sequences.


def _gradient_norms(cell, steps, gate=0.0, orthogonal=False):
  """The norm of the gradient of the last step's output with respect to each step's input, by distance; 1 at none.

  `gate` is added to the bias of the gate that keeps the state, `orthogonal` makes an Elman network's weights so.
  """
  stack, x = rnn.Stack(cell, 32), _x(4, steps, 8)
  layer = jax.jit(stack.init)(jax.random.key(0), x)["params"]["l0"]
  if orthogonal:
    layer = {**layer, "weight_hh": jax.nn.initializers.orthogonal()(jax.random.key(1), (32, 32))}
  if gate:
    kept = np.arange(CELLS[cell].gates) == 1  # f of i, f, g, o; z of r, z, n
    layer = {**layer, "bias_hh": layer["bias_hh"] + gate * np.repeat(kept, 32)}
  f = lambda x: jnp.sum(stack.apply({"params": {"l0": layer}}, x)[0][:, -1] * _x(4, 32))
  norms = np.linalg.norm(np.asarray(jax.jit(jax.grad(f))(x), np.float64), axis=(0, 2))[::-1]
  return norms / norms[0]


def test_the_gradient_vanishes_with_distance_unless_a_gate_keeps_the_state():
  elman, orthogonal = _gradient_norms("tanh", 101), _gradient_norms("tanh", 101, orthogonal=True)
  # Exponentially: by as much from 50 to 90 steps as from 10 to 50, which is by a factor of 10 million.
  falls = [np.log(elman[10 + i] / elman[50 + i]) for i in (0, 40)]
  assert min(falls) > np.log(1e6) and 0.7 < falls[1] / falls[0] < 1.4
  assert elman[100] < 1e-15 and orthogonal[100] < 1e-6  # no weights do without the tanh's slope
  # An LSTM's forget gate, open at the start by a bias of 1, keeps a million times more; wide open, all of it.
  assert _gradient_norms("lstm", 101)[100] > 1e6 * elman[100]
  assert _gradient_norms("lstm", 101, gate=5.0)[100] > 0.05
  assert _gradient_norms("gru", 101, gate=6.0)[100] > 0.3


def _norm(tree):
  return np.sqrt(sum(np.sum(np.asarray(x, np.float64)**2) for x in jax.tree.leaves(tree)))


def test_clipping_saves_the_exploding_case():
  """Weights a little too large make the gradient of a long sequence enormous: one step along it ends all learning."""
  stack, x = rnn.Stack("relu", 16), np.abs(_x(4, 60, 3))
  layer = jax.jit(stack.init)(jax.random.key(0), x)["params"]["l0"]
  start = {"l0": {**layer, "weight_hh": 1.2 * np.eye(16, dtype=np.float32)}}
  gradient = jax.jit(jax.value_and_grad(lambda p: jnp.mean((stack.apply({"params": p}, x)[0][:, -1] - 1)**2)))
  loss, grads = gradient(start)
  assert 1e9 < _norm(grads) < 1e18 and loss > 1e6
  ends = {}
  for clip in (0.0, 1.0):
    config = optim.default_config("sgd")
    config.update({"learning_rate": 0.1, "schedule": "linear", "warmup_fraction": 0.0, "clip_norm": clip})
    tx, _ = optim.make_optimizer(config, total_steps=300)

    def step(_, state, tx=tx):
      params, opt_state = state
      updates, opt_state = tx.update(gradient(params)[1], opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    ends[clip], _ = jax.jit(lambda state, step=step: jax.lax.fori_loop(0, 300, step, state))((start, tx.init(start)))
  assert gradient(ends[1.0])[0] < 0.9  # of what is always zero: 1
  loss, grads = gradient(ends[0.0])
  assert not loss < 1 and not 0 < _norm(grads) < np.inf  # no number, or every unit is dead


STEPS = 60  # of the problems below


def _adding(key):
  """Numbers, two of them marked, one in each half; their sum is wanted. To say 1 always costs 1/6 on average."""
  numbers, *places = jax.random.split(key, 3)
  values = jax.random.uniform(numbers, (32, STEPS))
  marks = sum(jax.nn.one_hot(jax.random.randint(k, (32,), i * STEPS // 2, (i + 1) * STEPS // 2), STEPS)
              for i, k in enumerate(places))
  return jnp.stack([values, marks], -1), jnp.sum(values * marks, 1)


def _copying(key):
  """One of four symbols, blanks, and then a sign to tell it again; to guess costs log 4."""
  symbol = jax.random.randint(key, (32,), 0, 4)
  blanks = jnp.full((32, STEPS - 1), 4)
  return jax.nn.one_hot(jnp.concatenate([symbol[:, None], blanks, jnp.full((32, 1), 5)], 1), 6), symbol


def _learn(cell, problem, steps, gate=0.0):
  """The mean loss of the last 100 of `steps` steps of a cell of width 32.

  An LSTM's gates start letting little in and forgetting little, by `gate`: Corentin Tallec, Yann Ollivier, "Can
  recurrent neural networks warp time?", 2018, section 3.
  """
  stack = rnn.Stack(cell, 32)
  outputs = 1 if problem is _adding else 4
  layer = jax.jit(stack.init)(jax.random.key(0), problem(jax.random.key(0))[0])["params"]["l0"]
  if gate:
    layer["bias_ih"] += gate * np.repeat([-1, 1, 0, 0], 32)
  params = {"l0": layer, "head": 0.1 * jax.random.normal(jax.random.key(1), (32, outputs)), "bias": jnp.zeros(outputs)}

  def loss(params, key):
    x, wanted = problem(key)
    y = stack.apply({"params": {"l0": params["l0"]}}, x)[0][:, -1] @ params["head"] + params["bias"]
    if problem is _adding:
      return jnp.mean((y[:, 0] - wanted)**2)
    return optax.softmax_cross_entropy_with_integer_labels(y, wanted).mean()

  config = optim.default_config("adam")
  config.update({"learning_rate": 0.01, "schedule": "constant", "warmup_fraction": 0.0, "clip_norm": 1.0})
  tx, _ = optim.make_optimizer(config, steps)

  def step(state, key):
    params, opt_state = state
    value, grads = jax.value_and_grad(loss)(params, key)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value

  run = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(2), steps))[1])
  return float(jnp.mean(run((params, tx.init(params)))[-100:]))


@pytest.mark.slow
def test_an_lstm_adds_and_remembers_over_60_steps_and_an_elman_network_does_not_add():
  """One symbol an Elman network may come to keep, by its start, so that only its sums are asked for."""
  assert _learn("lstm", _adding, 500, gate=3.0) < 0.1 / 6
  assert _learn("lstm", _copying, 220, gate=5.0) < 0.1
  assert _learn("tanh", _adding, 500) > 0.9 / 6
