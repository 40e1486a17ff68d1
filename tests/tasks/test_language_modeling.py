"""Language modelling: exact sums over a text, however it is cut, and continuations that depend on nothing else."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax import report
from dljax.data import ragged
from dljax.data.text import corpus, streams, tokenize
from dljax.errors import UserError
from dljax.tasks.language_modeling import LanguageModeling, Sampling
from dljax.train import parallel
from dljax.train.evaluate import Evaluator, Predictor, generate
from dljax.train.step import evaluation_key
from dljax.train.program import Program, RunOptions
from tests.train import toys

VOCABULARY, WIDTH = 11, 6
MODES = [("jit", "data:1"), ("jit", "data:4"), ("pmap", "data:4")]


class Tiny(nn.Module):
  """A leaky sum of embeddings; padding leaves the state."""

  vocab_size: int = VOCABULARY
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, tokens, cache=None, length=None, train=False):
    x = nn.Embed(self.vocab_size, WIDTH, dtype=self.dtype, name="embed")(tokens)
    cache = self.init_cache(*tokens.shape) if cache is None else cache
    valid = jnp.arange(tokens.shape[1]) < (tokens.shape[1] if length is None else length[:, None])
    valid = jnp.broadcast_to(valid, tokens.shape)

    def read(state, now):
      x, valid = now
      state = jnp.where(valid[:, None], jnp.tanh(0.7 * state + x), state)
      return state, state

    cache, h = jax.lax.scan(read, cache, (x.swapaxes(0, 1), valid.T))
    return {"logits": nn.Dense(self.vocab_size, dtype=self.dtype, name="head")(3 * h.swapaxes(0, 1)), "cache": cache}

  def init_cache(self, batch, length):
    return jnp.zeros((batch, WIDTH), self.dtype)


TASK = LanguageModeling(Tiny(), stateful=True)


@functools.cache
def _params(vocab_size=VOCABULARY):
  variables = Tiny(vocab_size).init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))
  return jax.tree.map(lambda x: 2 * x, variables["params"])


def _batch(rows=4, length=6, seed=0, lengths=None, **fields):
  """Rows of random tokens, of `lengths` where they are padded."""
  text = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length + 1)).astype(np.int32)
  lengths = np.full(rows, length, np.int32) if lengths is None else np.array(lengths, np.int32)
  weight = np.arange(length) < lengths[:, None]
  return {"tokens": text[:, :-1], "targets": text[:, 1:], "target_weight": weight.astype(np.float32),
          "length": lengths, "mask": (lengths > 0).astype(np.float32),
          "id": np.arange(rows, dtype=np.int32), **fields}


def _nll(batch, carry=None):
  """[B, L], by hand."""
  out = Tiny().apply({"params": _params()}, batch["tokens"], carry)
  log_p = jax.nn.log_softmax(out["logits"], axis=-1)
  return np.asarray(-np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], axis=-1)[..., 0]), out["cache"]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _compiled_loss(task, params, state, batch, denominators, train):
  return task.loss(params, state, batch, jax.random.key(0), denominators=denominators, train=train)


def _loss(task, batch, state=None, train=False, denominators=None):
  state = {"carry": jnp.zeros((len(batch["tokens"]), WIDTH))} if state is None and task.stateful else state or {}
  denominators = task.denominators(batch) if denominators is None else denominators
  return _compiled_loss(task, _params(), state, batch, denominators, train)


# The loss


@pytest.mark.parametrize("train", [True, False])
def test_the_loss_is_the_mean_over_predicted_tokens(train):
  batch = _batch(lengths=[6, 3, 0, 0])
  batch["target_weight"][1, 0] = 0
  losses, _ = _nll(batch)
  expected = losses[0].sum() + losses[1, 1:3].sum()
  out = _loss(TASK, batch, train=train)
  assert float(TASK.denominators(batch)["tokens"]) == 8
  assert float(out.loss) == pytest.approx(expected / 8, rel=1e-5)
  found = TASK.summarize(out.metrics)
  assert found["loss"] == pytest.approx(expected / 8, rel=1e-5)
  assert found["perplexity"] == pytest.approx(math.exp(expected / 8), rel=1e-5)
  assert set(found) == {"loss", "perplexity", "accuracy"}


def test_bits_are_those_of_the_text():
  batch = _batch(characters=np.array([3, 0, 7, 1], np.float32), bytes=np.array([4, 0, 9, 1], np.float32))
  found = TASK.summarize(_loss(TASK, batch).metrics)
  nats = _nll(batch)[0].sum()
  assert found["bits_per_character"] == pytest.approx(nats / math.log(2) / 11, rel=1e-5)
  assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 14, rel=1e-5)


def test_accuracy_counts_the_most_probable_token():
  batch = _batch()
  guess = np.argmax(Tiny().apply({"params": _params()}, batch["tokens"])["logits"], axis=-1)
  found = TASK.summarize(_loss(TASK, batch).metrics)
  assert found["accuracy"] == pytest.approx(np.mean(guess == batch["targets"]))


def test_what_is_behind_the_end_of_a_row_changes_nothing():
  batch = _batch(lengths=[6, 2, 5, 0])
  other = {**batch, "tokens": batch["tokens"].copy(), "targets": batch["targets"].copy()}
  for tokens, targets, n in zip(other["tokens"], other["targets"], batch["length"]):
    tokens[n:], targets[n:] = 3, 4
  one, two = _loss(TASK, batch), _loss(TASK, other)
  assert float(one.loss) == float(two.loss)
  np.testing.assert_array_equal(one.model_state["carry"], two.model_state["carry"])


def test_padding_is_reported_where_documents_are_padded():
  batch = _batch(lengths=[6, 2, 5, 0])
  found = TASK.summarize(_loss(LanguageModeling(Tiny()), batch).metrics)
  assert found["padding"] == pytest.approx(11 / 24)


def test_windows_that_carry_their_state_are_one_long_window():
  long = _batch(length=12)
  whole = _loss(TASK, long)
  halves = [{k: v[:, part] if v.ndim == 2 else np.full(4, 6) if k == "length" else v for k, v in long.items()}
            for part in (slice(0, 6), slice(6, 12))]
  first, second = halves
  one = _loss(TASK, first)
  two = _loss(TASK, second, state=one.model_state)
  assert float(one.loss + two.loss) / 2 == pytest.approx(float(whole.loss), rel=1e-5)
  np.testing.assert_allclose(two.model_state["carry"], whole.model_state["carry"], atol=1e-6)
  assert float(_loss(TASK, second).loss) != pytest.approx(float(two.loss), rel=1e-3)


def test_the_gradient_ends_at_the_carry_and_shares_add_up():
  batch = _batch(rows=4)
  state = {"carry": jnp.ones((4, WIDTH))}
  denominators = TASK.denominators(batch)
  value = lambda params, rows: TASK.loss(
      params, {"carry": state["carry"][np.array(rows)]}, {k: v[np.array(rows)] for k, v in batch.items()},
      jax.random.key(0),
      denominators=denominators, train=True).loss
  grad = jax.jit(jax.grad(value), static_argnums=1)
  whole = grad(_params(), (0, 1, 2, 3))
  parts = [grad(_params(), rows) for rows in ((0,), (1, 2, 3))]
  jax.tree.map(lambda w, a, b: np.testing.assert_allclose(w, a + b, atol=1e-6), whole, *parts)


def test_the_loss_is_computed_in_float32_and_the_carry_keeps_its_type():
  task = LanguageModeling(Tiny(dtype=jnp.bfloat16), stateful=True)
  state = {"carry": jnp.zeros((4, WIDTH), jnp.float32)}
  out = task.loss(_params(), state, _batch(), jax.random.key(0), denominators={"tokens": jnp.ones(())}, train=True)
  assert out.loss.dtype == jnp.float32 and out.model_state["carry"].dtype == jnp.float32


def test_fresh_variables_have_a_carry_for_each_row_where_it_is_kept():
  variables = TASK.init(jax.random.key(0), _batch(rows=5))
  assert variables["carry"].shape == (5, WIDTH) and not variables["carry"].any()
  assert set(LanguageModeling(Tiny()).init(jax.random.key(0), _batch())) == {"params"}


def test_a_token_is_predicted_from_those_before_it():
  tokens = jax.nn.one_hot(_batch(rows=1)["tokens"][0], VOCABULARY)
  for place in range(6):
    gradient = jax.grad(lambda x: _soft(x)[place].sum())(tokens)
    reach = np.abs(gradient).sum(axis=-1) > 0
    assert reach[:place + 1].all() and not reach[place + 1:].any()


def _soft(tokens):
  """Tiny's logits [L, V] for tokens as denominators [L, V]."""
  params = _params()
  h, logits = jnp.zeros(WIDTH), []
  for x in tokens @ params["embed"]["embedding"]:
    h = jnp.tanh(0.7 * h + x)
    logits.append(3 * h @ params["head"]["kernel"] + params["head"]["bias"])
  return jnp.stack(logits)


# A whole split, by the engine


@pytest.fixture
def play(tmp_path):
  path = tmp_path / "play.txt"
  path.write_text("Speak the speech, I pray you, as I pronounced it to you, trippingly — on the tongue. é\n" * 40)
  return path


def _pipelines(play, **fields):
  config = corpus.default_config()
  config.update({"file": str(play), "length": 16, **fields})
  return lambda size: corpus.TextSet(config).pipelines(
      batch_size=16, eval_batch_size=size, seed=0, host=0, hosts=1)


@functools.cache
def _evaluator(mode, mesh, stateful):
  task = LanguageModeling(Tiny(tokenize.Bytes.size), stateful)
  return task, Evaluator(task, mode, parallel.make_mesh(toys.MESHES[mesh], mode))


def _evaluate(pipeline, mode="jit", mesh="data:1", stateful=True):
  task, evaluator = _evaluator(mode, mesh, stateful)
  pipeline.open()
  variables = {"params": _params(tokenize.Bytes.size)}
  if stateful:
    variables["carry"] = jnp.zeros((16, WIDTH))
  rng = jax.random.key_data(jax.random.key(0))
  return evaluator.sums(variables, rng, pipeline, "validation"), evaluator


@pytest.mark.parametrize("length", [5, 16, 1000])
def test_one_stream_is_exact_over_the_whole_text_whatever_the_window(play, length):
  found, _ = _evaluate(_pipelines(play, length=length)(1).evals["validation"])
  split = corpus.split_text(play.read_text())["validation"]
  tokens = np.array([[tokenize.Bytes.end, *split.encode()]])
  out = Tiny(tokenize.Bytes.size).apply({"params": _params(tokenize.Bytes.size)}, tokens[:, :-1])
  log_p = np.asarray(jax.nn.log_softmax(out["logits"], axis=-1), np.float64)
  nats = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).sum()
  assert found["loss"] == pytest.approx(nats / len(split.encode()), rel=1e-5)
  assert found["perplexity"] == pytest.approx(math.exp(nats / len(split.encode())), rel=1e-4)
  assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(split.encode()), rel=1e-5)
  assert found["bits_per_character"] == pytest.approx(nats / math.log(2) / len(split), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_picture_has_the_bits_of_the_text_in_reading_order(play, rows, monkeypatch):
  drawn = []
  monkeypatch.setattr(report, "surprise", lambda pieces, bits: drawn.append((pieces, bits)))
  pipeline = _pipelines(play, length=7)(rows).evals["validation"]
  task = LanguageModeling(Tiny(tokenize.Bytes.size), stateful=True, spell=list)
  evaluator = Evaluator(task, "jit", parallel.make_mesh(toys.MESHES["data:1"], "jit"))
  variables = {"params": _params(tokenize.Bytes.size), "carry": jnp.zeros((16, WIDTH))}
  pipeline.open()
  rng = jax.random.key_data(jax.random.key(0))
  evaluator.full(variables, rng, pipeline, "validation", {}).figures["surprise"]()
  (tokens, bits), = drawn
  text_bytes = corpus.split_text(play.read_text())["validation"].encode()
  first = -(-len(text_bytes) // rows)  # the stream that begins the text, whose state nothing comes before
  assert bytes(tokens[:first]) == text_bytes[:first] and len(tokens) <= len(text_bytes)
  inputs = np.array([[tokenize.Bytes.end, *text_bytes[:first]]])
  out = Tiny(tokenize.Bytes.size).apply({"params": _params(tokenize.Bytes.size)}, inputs[:, :-1])
  log_p = np.asarray(jax.nn.log_softmax(out["logits"], axis=-1))
  expected = -np.take_along_axis(log_p, inputs[:, 1:, None], axis=-1)[0, :, 0] / math.log(2)
  np.testing.assert_allclose(bits[:first], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode, mesh", MODES[1:])
def test_a_split_has_the_same_sums_under_every_mode(play, mode, mesh):
  pipeline = _pipelines(play)(8).evals["validation"]
  one, other = _evaluate(pipeline)[0], _evaluate(pipeline, mode, mesh)[0]
  assert one == pytest.approx(other, rel=1e-5)


class _Documents:
  """Many short documents, through the pipeline of documents."""

  def __init__(self, buckets, size):
    draw = np.random.default_rng(0)
    documents = [bytes(draw.integers(97, 123, draw.integers(1, 60)).tolist()).decode() for _ in range(50)]
    parts = [tokenize.Encoded(np.array([256], np.int32), *np.zeros((2, 1), np.int32)), *(
        part for d in documents for part in (tokenize.Bytes().encode(d), tokenize.Encoded(
            np.array([256], np.int32), *np.zeros((2, 1), np.int32))))][:-1]
    joined = tokenize.Encoded(*map(np.concatenate, zip(*parts)))
    begins = np.flatnonzero(joined.tokens == 256)
    self.pipeline = ragged.RaggedPipeline(
        lambda _: streams.Documents((joined, begins), 40, 256, counts=True),
        lambda documents, plan: documents.gather(plan, plan.rows), longest=40, buckets=buckets, batch_size=size,
        host=0, hosts=1)


def test_documents_have_the_same_sums_whatever_the_buckets_and_few_programs():
  found = {}
  for buckets, size in ((1, 4), (2, 8), (8, 4)):
    sums, evaluator = _evaluate(_Documents(buckets, size).pipeline, stateful=False)
    found[buckets] = sums
  padding = {buckets: sums.pop("padding") for buckets, sums in found.items()}
  assert found[1] == pytest.approx(found[2], rel=1e-5)
  assert found[1] == pytest.approx(found[8], rel=1e-5)
  assert padding[8] < padding[1]
  assert evaluator._steps[False]._cache_size() <= 1 + 2 + 8


# Sampling


def test_temperature_zero_takes_the_most_probable_token():
  logits = jax.random.normal(jax.random.key(0), (3, 9))
  draw = Sampling(temperature=0).draw(logits, jax.random.key(1), {"id": jnp.arange(3), "place": jnp.zeros(3, int)})
  np.testing.assert_array_equal(draw, np.argmax(logits, axis=-1))


def test_top_k_and_top_p_leave_the_most_probable_tokens():
  logits = jnp.log(jnp.array([[0.4, 0.05, 0.3, 0.25], [0.05, 0.9, 0.03, 0.02]]))
  kept = lambda **kwargs: np.isfinite(Sampling(temperature=1, **kwargs).filter(logits)).tolist()
  assert kept() == [[True] * 4] * 2
  assert kept(top_k=1) == [[True, False, False, False], [False, True, False, False]]
  assert kept(top_k=2) == [[True, False, True, False], [True, True, False, False]]
  assert kept(top_p=0.5) == [[True, False, True, False], [False, True, False, False]]
  assert kept(top_p=0.75) == [[True, False, True, True], [False, True, False, False]]
  assert kept(top_k=2, top_p=0.6) == [[True, False, True, False], [False, True, False, False]]
  assert kept(top_p=1e-9) == [[True, False, False, False], [False, True, False, False]]
  assert kept(top_k=99) == [[True] * 4] * 2


def test_drawn_tokens_follow_the_probabilities():
  logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
  rows = {"id": jnp.arange(4000), "place": jnp.zeros(4000, int)}
  draw = lambda t: np.bincount(Sampling(temperature=t).draw(
      jnp.tile(logits, (4000, 1)), jax.random.key(0), rows), minlength=3) / 4000
  np.testing.assert_allclose(draw(1.0), [0.5, 0.3, 0.2], atol=0.03)
  sharp = np.array([0.5, 0.3, 0.2])**2
  np.testing.assert_allclose(draw(0.5), sharp / sharp.sum(), atol=0.03)


def test_no_two_examples_or_places_share_a_draw():
  """Of 4096 tokens that are equally probable 64 draws rarely meet; by example + place there would be 15 of them."""
  example, place = map(jnp.asarray, np.divmod(np.arange(64), 8))
  draw = Sampling(temperature=1).draw(jnp.zeros((64, 4096)), jax.random.key(0), {"id": example, "place": place})
  assert len(np.unique(draw)) > 60


@pytest.mark.parametrize("field, value", [
    ("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0),
    ("top_p", 1.5), ("seed", -1)])
def test_sampling_out_of_range_is_refused(field, value):
  with pytest.raises(UserError, match=f"--config.sampling.{field}={value}: must be"):
    Sampling(**{field: value})


# Continuations


def _prompts(rows, ids=None):
  length = np.array([len(row) for row in rows], np.int32)
  return {"prompt": ragged.pad([np.array(row, np.int32) for row in rows], length.max()), "length": length,
          "id": np.arange(len(rows), dtype=np.int32) if ids is None else np.array(ids, np.int32),
          "mask": np.ones(len(rows), np.float32)}


ROWS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


def _write(prompts, seed=0, key=0, count=12, **sampling):
  task = LanguageModeling(Tiny(), True, Sampling(max_new_tokens=count, temperature=1.0, seed=seed, **sampling))
  return np.asarray(task.predict({"params": _params()}, prompts, jax.random.key(key))["tokens"])


def test_a_prompt_is_continued_by_the_models_own_tokens():
  found = _write(_prompts(ROWS), top_k=1)
  apply = jax.jit(lambda tokens: Tiny().apply({"params": _params()}, tokens)["logits"])
  for row, written in zip(ROWS, found):
    tokens = np.zeros((1, 24), np.int32)  # what follows a token has no say in what it predicts
    tokens[0, :len(row)] = row
    for place, token in enumerate(written, len(row)):
      assert token == int(np.argmax(apply(tokens)[0, place - 1]))
      tokens[0, place] = token


def test_what_follows_a_prompt_is_predicted_by_its_last_token():
  prompts = {**_prompts([ROWS[2]] * 3), "length": np.array([1, 3, 5], np.int32)}
  logits = jax.jit(TASK.start)({"params": _params()}, prompts)["logits"]
  whole = jax.jit(Tiny().apply)({"params": _params()}, jnp.array([ROWS[2]]))["logits"][0]
  np.testing.assert_allclose(logits, whole[np.array([0, 2, 4])], rtol=1e-5)


def test_a_continuation_depends_on_prompt_seed_and_id_alone():
  together = _write(_prompts(ROWS))
  assert together.shape == (3, 12) and together.dtype == np.int32
  for i, row in enumerate(ROWS):
    np.testing.assert_array_equal(_write(_prompts([row], ids=[i]))[0], together[i])
  assert not np.array_equal(_write(_prompts([ROWS[0]], ids=[5]))[0], together[0])
  assert not np.array_equal(_write(_prompts(ROWS), seed=1), together)
  assert not np.array_equal(_write(_prompts(ROWS), key=1), together)
  np.testing.assert_array_equal(_write(_prompts(ROWS), count=5), together[:, :5])


@pytest.mark.parametrize("mode, mesh", MODES)
def test_the_engine_writes_the_same_at_once_and_bit_by_bit(mode, mesh):
  task = LanguageModeling(Tiny(), True, Sampling(max_new_tokens=19, temperature=1.0))
  batch = _batch(rows=toys.BATCH_SIZE, reset=np.zeros(toys.BATCH_SIZE, np.float32))
  experiment = toys.formula_experiment(task, toys.Scripted(lambda step: batch))
  program = Program(experiment, RunOptions(parallelism=mode, mesh=toys.MESHES[mesh]))
  state = program.init_state().replace(params=jax.device_put(_params(), parallel.put_shared(0, program.mesh).sharding))
  expected = np.asarray(task.predict(
      {"params": _params()}, _prompts(ROWS), evaluation_key(np.asarray(state.rng)))["tokens"])
  at_once = Predictor(experiment, program, mode)(state, _prompts(ROWS))["tokens"]
  parts = list(generate(experiment, program, mode, state, _prompts(ROWS)))
  np.testing.assert_array_equal(at_once, expected)
  assert [part.shape for part in parts] == [(3, 8), (3, 8), (3, 3)]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)
