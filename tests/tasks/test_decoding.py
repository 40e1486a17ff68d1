"""Decoding: which tokens may be drawn, and what alone a continuation depends on."""

import math

import jax
import numpy as np
import pytest

from dljax.data import ragged
from dljax.errors import UserError
from dljax.tasks.decoding import Sampling
from dljax.tasks.language_modeling import LanguageModeling
from dljax.train import parallel
from dljax.train.evaluate import Generator, Predictor
from dljax.train.program import Program, RunOptions
from dljax.train.step import evaluation_key
from tests.tasks import compiled, tiny
from tests.train import toys

TASK = LanguageModeling(tiny.Tiny(), stateful=True)


# Sampling


_filter = jax.jit(Sampling.filter, static_argnums=0)
_draw = jax.jit(Sampling.draw, static_argnums=0)


def test_temperature_zero_takes_the_most_probable_token():
  logits = np.random.default_rng(0).normal(size=(3, 9))
  draw = Sampling(temperature=0).draw(logits, jax.random.key(1), {"id": np.arange(3), "place": np.zeros(3, int)})
  np.testing.assert_array_equal(draw, np.argmax(logits, axis=-1))


def test_top_k_and_top_p_leave_the_most_probable_tokens():
  logits = np.log(np.array([[0.4, 0.05, 0.3, 0.25], [0.05, 0.9, 0.03, 0.02]], np.float32))
  kept = lambda **kwargs: np.isfinite(_filter(Sampling(temperature=1, **kwargs), logits)).tolist()
  assert kept() == [[True] * 4] * 2
  assert kept(top_k=1) == [[True, False, False, False], [False, True, False, False]]
  assert kept(top_k=2) == [[True, False, True, False], [True, True, False, False]]
  assert kept(top_p=0.5) == [[True, False, True, False], [False, True, False, False]]
  assert kept(top_p=0.75) == [[True, False, True, True], [False, True, False, False]]
  assert kept(top_k=2, top_p=0.6) == [[True, False, True, False], [False, True, False, False]]
  assert kept(top_p=1e-9) == [[True, False, False, False], [False, True, False, False]]
  assert kept(top_k=99) == [[True] * 4] * 2


def test_drawn_tokens_follow_the_probabilities():
  logits = np.tile(np.log(np.array([0.5, 0.3, 0.2], np.float32)), (4000, 1))
  rows = {"id": np.arange(4000), "place": np.zeros(4000, int)}
  draw = lambda t: np.bincount(_draw(Sampling(temperature=t), logits, jax.random.key(0), rows), minlength=3) / 4000
  np.testing.assert_allclose(draw(1.0), [0.5, 0.3, 0.2], atol=0.03)
  sharp = np.array([0.5, 0.3, 0.2])**2
  np.testing.assert_allclose(draw(0.5), sharp / sharp.sum(), atol=0.03)


def test_no_two_examples_or_places_share_a_draw():
  """64 draws of 4096 equally probable tokens rarely meet; example + place as a key would give 15."""
  example, place = np.divmod(np.arange(64), 8)
  draw = _draw(Sampling(temperature=1), np.zeros((64, 4096), np.float32), jax.random.key(0),
               {"id": example, "place": place})
  assert len(np.unique(draw)) > 60


@pytest.mark.parametrize("field, value",
                         [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.nan),
                          ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("seed", -1)])
def test_sampling_out_of_range_is_refused(field, value):
  with pytest.raises(UserError, match=f"--config.sampling.{field}={value}: must be"):
    Sampling(**{field: value})


# Continuations


def _prompts(rows, ids=None):
  length = np.array([len(row) for row in rows], np.int32)
  return {"prompt": ragged.pad([np.array(row, np.int32) for row in rows], length.max()),
          "length": length, "id": np.arange(len(rows), dtype=np.int32) if ids is None
          else np.array(ids, np.int32), "mask": np.ones(len(rows), np.float32)}


ROWS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


def _continue(prompts, seed=0, key=0, count=12, **sampling):
  task = LanguageModeling(tiny.Tiny(), True,
                          Sampling(max_new_tokens=count, temperature=1.0, seed=seed, **sampling))
  found = compiled.predict(task, {"params": tiny.params()}, prompts, key)
  return found if "log_p" in found else found["tokens"]


def test_a_prompt_is_continued_by_the_models_own_tokens():
  found = _continue(_prompts(ROWS), top_k=1)
  apply = jax.jit(lambda tokens: tiny.Tiny().apply({"params": tiny.params()}, tokens)["logits"])
  for row, written in zip(ROWS, found):
    tokens = np.zeros((1, 24), np.int32)  # what follows a token has no say in what it predicts
    tokens[0, :len(row)] = row
    for place, token in enumerate(written, len(row)):
      assert token == int(np.argmax(apply(tokens)[0, place - 1]))
      tokens[0, place] = token


def test_what_follows_a_prompt_is_predicted_by_its_last_token():
  prompts = {**_prompts([ROWS[2]] * 3), "length": np.array([1, 3, 5], np.int32)}
  found = _continue(prompts, count=1, scores=True, top_k=1)
  whole = jax.jit(tiny.Tiny().apply)({"params": tiny.params()}, np.array([ROWS[2]]))["logits"]
  expected = jax.nn.log_softmax(np.asarray(whole)[0, [0, 2, 4]]).max(-1)
  np.testing.assert_allclose(found["log_p"][:, 0], expected, rtol=1e-5)


def test_a_continuation_depends_on_prompt_seed_and_id_alone():
  together = _continue(_prompts(ROWS))
  assert together.shape == (3, 12) and together.dtype == np.int32
  for i, row in enumerate(ROWS):
    np.testing.assert_array_equal(_continue(_prompts([row], ids=[i]))[0], together[i])
  assert not np.array_equal(_continue(_prompts([ROWS[0]], ids=[5]))[0], together[0])
  assert not np.array_equal(_continue(_prompts(ROWS), seed=1), together)
  assert not np.array_equal(_continue(_prompts(ROWS), key=1), together)
  np.testing.assert_array_equal(_continue(_prompts(ROWS), count=5), together[:, :5])


_predict = jax.jit(LanguageModeling.predict, static_argnums=0)


@pytest.mark.parametrize("mode, mesh", tiny.MODES)
def test_the_engine_writes_the_same_at_once_and_bit_by_bit(mode, mesh):
  task = LanguageModeling(tiny.Tiny(), True, Sampling(max_new_tokens=19, temperature=1.0))
  batch = tiny.batch(rows=toys.BATCH_SIZE, reset=np.zeros(toys.BATCH_SIZE, np.float32))
  experiment = toys.formula_experiment(task, toys.Scripted(lambda step: batch))
  program = Program(experiment, RunOptions(parallelism=mode, mesh=toys.MESHES[mesh]))
  sharding = parallel.put_shared(0, program.mesh).sharding
  state = program.init_state().replace(params=jax.device_put(tiny.params(), sharding))
  expected = np.asarray(_predict(
      task, {"params": tiny.params()}, _prompts(ROWS), evaluation_key(np.asarray(state.rng)))["tokens"])
  at_once = Predictor(experiment, program, mode)(state, _prompts(ROWS))["tokens"]
  np.testing.assert_array_equal(at_once, expected)
  parts = [part["tokens"] for part in Generator(experiment, program, mode)(state, _prompts(ROWS))]
  assert [part.shape for part in parts] == [(3, 8), (3, 16), (3, 19)]
  for part in parts:
    np.testing.assert_array_equal(part, expected[:, :part.shape[1]])
