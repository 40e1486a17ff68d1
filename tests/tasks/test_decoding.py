"""Decoding: which tokens may be drawn, what alone a continuation depends on, and where it ends."""

import functools
import math

import jax
import numpy as np
import pytest
import scipy.stats

from dljax.data import ragged
from dljax.errors import UserError
from dljax.models import gpt
from dljax.tasks import decoding
from dljax.tasks.decoding import Sampling
from dljax.tasks.language_modeling import LanguageModeling
from dljax.train import parallel
from dljax.train.evaluate import Generator, Predictor
from dljax.train.program import Program, RunOptions
from dljax.train.step import evaluation_key
from tests.fixtures import formula, generation
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


def test_min_p_leaves_tokens_that_are_probable_beside_the_best():
  logits = np.log(np.array([[0.4, 0.05, 0.3, 0.25], [0.05, 0.9, 0.03, 0.02]], np.float32))
  kept = lambda **kwargs: np.isfinite(_filter(Sampling(**{"temperature": 1, **kwargs}), logits)).tolist()
  assert kept(min_p=0.7) == [[True, False, True, False], [False, True, False, False]]
  assert kept(min_p=0.1) == [[True, True, True, True], [False, True, False, False]]
  assert kept(min_p=0.04) == [[True] * 4, [True, True, False, False]]
  # A temperature of 2 takes square roots.
  assert kept(min_p=0.2, temperature=2) == [[True] * 4, [True, True, False, False]]
  assert kept(min_p=1, top_k=3) == [[True, False, False, False], [False, True, False, False]]


@pytest.mark.parametrize("name", generation.STEPS)
def test_one_step_is_that_of_transformers(name):
  logits, history = generation.step()
  sampling = Sampling(**generation.STEPS[name])
  text = {"history": np.pad(history, ((0, 0), (0, 3))), "count": np.full(len(history), history.shape[1]),
          "seen": (history[:, :, None] == np.arange(logits.shape[1])).any(1)}
  found = np.asarray(jax.jit(lambda logits: sampling.filter(sampling.penalize(logits, text)))(logits))
  expected = _peer()[f"step_{name}"]
  assert np.isfinite(expected).any(1).all() and (name == "temperature" or np.isinf(expected).any())
  np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


DRAWS = 20_000


def _chi_square(sampling, expected, seed):
  """p of 20,000 drawn tokens if they follow `expected` f64[V]; tokens that would have below 5 are one bin."""
  logits = np.tile(_LOGITS, (DRAWS, 1))
  rows = {"id": np.arange(DRAWS, dtype=np.int32), "place": np.zeros(DRAWS, np.int32)}
  counts = np.bincount(_draw(sampling, logits, jax.random.key(seed), rows), minlength=len(_LOGITS))
  if counts[expected == 0].any():
    return 0.0
  few = expected * DRAWS < 5
  join = lambda x: np.array([x for x in (*x[~few], x[few].sum())])
  counts, mean = join(counts), join(expected * DRAWS)
  counts, mean = (counts, mean) if mean[-1] >= 5 else (counts[:-1], mean[:-1])
  return scipy.stats.chisquare(counts, mean * counts.sum() / mean.sum()).pvalue


_LOGITS = np.random.default_rng(5).normal(size=30).astype(np.float32) * 2


def _softmax_of(temperature, kept):
  """The probabilities of the `kept` most probable tokens at a temperature, in float64."""
  p = np.exp(_LOGITS.astype(np.float64) / temperature)
  p[np.argsort(-p)[kept:]] = 0
  return p / p.sum()


@pytest.mark.parametrize("seed", range(3))
def test_drawn_tokens_follow_the_filtered_softmax(seed):
  p = np.sort(_softmax_of(0.9, 30))[::-1]
  several = {"plain": ({}, 30), "top_k": ({"top_k": 12}, 12),
             "top_p": ({"top_p": 0.8}, int(np.sum(np.cumsum(p) - p < 0.8))),
             "min_p": ({"min_p": 0.03}, int(np.sum(p >= 0.03 * p[0])))}
  assert len({kept for _, kept in several.values()}) == 4
  for settings, kept in several.values():
    assert _chi_square(Sampling(temperature=0.9, **settings), _softmax_of(0.9, kept), seed) > 1e-3
    assert _chi_square(Sampling(temperature=0.99, **settings), _softmax_of(0.9, kept), seed) < 1e-3


def test_no_two_examples_or_places_share_a_draw():
  """64 draws of 4096 equally probable tokens rarely meet; example + place as a key would give 15."""
  example, place = np.divmod(np.arange(64), 8)
  draw = _draw(Sampling(temperature=1), np.zeros((64, 4096), np.float32), jax.random.key(0),
               {"id": example, "place": place})
  assert len(np.unique(draw)) > 60


@pytest.mark.parametrize("field, value",
                         [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.nan),
                          ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("seed", -1), ("min_p", -0.1),
                          ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.inf),
                          ("no_repeat_ngram", -1), ("no_repeat_ngram", 101), ("min_new_tokens", -1),
                          ("min_new_tokens", 401), ("stop_tokens", ("x",))])
def test_sampling_out_of_range_is_refused(field, value):
  shown = value[0] if isinstance(value, tuple) else value
  with pytest.raises(UserError, match=f"^--config.sampling.{field}={shown}: must be"):
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


def _engine(task, mode, mesh, kind):
  """A `Predictor` or `Generator` of the task, and a state of its network."""
  batch = tiny.batch(rows=toys.BATCH_SIZE, reset=np.zeros(toys.BATCH_SIZE, np.float32))
  experiment = toys.formula_experiment(task, toys.Scripted(lambda step: batch))
  program = Program(experiment, RunOptions(parallelism=mode, mesh=toys.MESHES[mesh]))
  sharding = parallel.put_shared(0, program.mesh).sharding
  state = program.init_state().replace(params=jax.device_put(tiny.params(), sharding))
  return kind(experiment, program, mode), state


@pytest.mark.parametrize("mode, mesh", tiny.MODES)
def test_the_engine_writes_the_same_at_once_and_bit_by_bit(mode, mesh):
  task = LanguageModeling(tiny.Tiny(), True, Sampling(max_new_tokens=19, temperature=1.0))
  predictor, state = _engine(task, mode, mesh, Predictor)
  expected = np.asarray(_predict(
      task, {"params": tiny.params()}, _prompts(ROWS), evaluation_key(np.asarray(state.rng)))["tokens"])
  np.testing.assert_array_equal(predictor(state, _prompts(ROWS))["tokens"], expected)
  generator, state = _engine(task, mode, mesh, Generator)
  parts = [part["tokens"] for part in generator(state, _prompts(ROWS))]
  assert [part.shape for part in parts] == [(3, 8), (3, 16), (3, 19)]
  for part in parts:
    np.testing.assert_array_equal(part, expected[:, :part.shape[1]])


# The end of a text


def test_a_text_ends_with_a_stop_token_and_the_loop_with_the_last_text():
  free = _continue(_prompts(ROWS), top_k=1)
  stops = free[:, 4]
  prompts = {**_prompts(ROWS), "stop": np.array([[stops[0]], [-1], [stops[2]]], np.int32)}
  found = _continue(prompts, top_k=1, stop_tokens=(int(stops[1]),))
  for row, other, stop in zip(found, free, stops):
    end = np.flatnonzero(np.isin(other, [stop, stops[1]]))[0]
    np.testing.assert_array_equal(row[:end + 1], other[:end + 1])
    assert (row[end + 1:] == decoding.NOTHING).all()
  sampling = Sampling(temperature=0, max_new_tokens=12, stop_tokens=tuple(map(int, stops)))
  text = jax.jit(lambda: decoding.advance(
      tiny.Tiny(), {"params": tiny.params()}, sampling, decoding.start(
          tiny.Tiny(), {"params": tiny.params()}, _prompts(ROWS), sampling), jax.random.key(0), 12)[1])()
  assert text["done"].all() and max(text["place"]) <= 5  # of 12 steps
  # A row of padding is none to wait for.
  padded = {**prompts, "mask": np.array([1, 0, 0], np.float32)}
  assert (_continue(padded, top_k=1)[1:] == decoding.NOTHING).all()


def test_nothing_ends_a_text_before_its_least_length():
  stop = int(_continue(_prompts(ROWS), top_k=1)[0, 2])
  prompts = {**_prompts(ROWS), "stop": np.full((3, 1), stop, np.int32)}
  short, long = _continue(prompts, top_k=1)[0], _continue(prompts, top_k=1, min_new_tokens=6)[0]
  assert (short >= 0).sum() <= 3 and (long >= 0).sum() >= 6 and stop not in long[:6]


def test_the_least_length_is_a_number_of_tokens():
  text = {"place": np.array([0, 2, 3]), "stop": np.array([[1, -1], [0, 1], [0, 1]])}
  found = Sampling(min_new_tokens=3).penalize(np.zeros((3, 3), np.float32), text)
  assert np.isfinite(found).tolist() == [[True, False, True], [False, False, True], [True] * 3]


def test_a_row_ends_where_every_token_is_banned():
  found = _continue(_prompts([ROWS[0], [1]]), no_repeat_ngram=1)
  for row, prompt in zip(found, (ROWS[0], [1])):
    left = tiny.VOCABULARY - len(prompt)
    assert sorted([*prompt, *row[:left]]) == list(range(tiny.VOCABULARY))
    assert (row[left:] == decoding.NOTHING).all()


def test_probabilities_are_the_models_own():
  found = _continue(_prompts(ROWS), scores=True, top_k=2, repetition_penalty=1.5, stop_tokens=(2,))
  apply = jax.jit(lambda tokens: tiny.Tiny().apply({"params": tiny.params()}, tokens)["logits"])
  for prompt, row, log_p in zip(ROWS, found["tokens"], found["log_p"]):
    count = (row >= 0).sum()
    tokens = np.zeros((1, 24), np.int32)
    tokens[0, :len(prompt) + count] = [*prompt, *row[:count]]
    places = np.arange(len(prompt), len(prompt) + count)
    expected = jax.nn.log_softmax(apply(tokens)[0])[places - 1, row[:count]]
    np.testing.assert_allclose(log_p[:count], expected, atol=1e-5)
    assert not log_p[count:].any()


def test_a_text_ends_before_its_first_stop_text():
  before = Sampling(stop_texts=("END", "\n\n")).before_stop
  assert before("an END and\n\n") == "an " and before("a\n\nEND") == "a" and before("EN") == "EN"
  assert before("END") == "" and before("") == ""
  # The first three characters are those of the least number of tokens.
  assert before("END", 3) == "END" and before("ENDEND", 3) == "END" and before("ENDX", 2) == ""
  assert Sampling().before_stop("END") == "END"


def test_what_may_become_a_stop_text_is_not_shown_yet():
  settled = Sampling(stop_texts=("END", "EEND!")).settled
  assert settled("an E") == "an " and settled("an EN") == "an " and settled("an EE") == "an "
  assert settled("an ENd") == "an ENd" and settled("EEEND") == "E" and settled("") == ""
  assert settled("half \N{REPLACEMENT CHARACTER}") == "half " and Sampling().settled("EN") == "EN"


# Prompts


def test_few_programs_serve_prompts_of_all_lengths():
  assert [decoding.bucket(n) for n in (0, 1, 2, 17, 18, 33, 34, 129)] == [1, 1, 17, 17, 33, 33, 65, 129]
  generator, state = _engine(TASK, "jit", "data:1", Generator)
  for length in (2, 3, 9, 17, 18, 30, 33):
    rows = _prompts([list(range(1, length + 1))])
    width = decoding.bucket(length) - length
    rows["prompt"] = np.pad(rows["prompt"], ((0, 0), (0, width))) % tiny.VOCABULARY
    next(generator(state, rows))
  assert generator._start.__wrapped__._cache_size() == 2
  assert generator._advance.__wrapped__._cache_size() == 1  # the state of this network does not grow with the prompt


def test_padding_of_a_prompt_changes_nothing():
  padded = _prompts(ROWS)
  padded["prompt"] = np.pad(padded["prompt"], ((0, 0), (0, 12)), constant_values=3)
  settings = {"repetition_penalty": 1.5, "no_repeat_ngram": 2}
  np.testing.assert_array_equal(_continue(padded, **settings), _continue(_prompts(ROWS), **settings))


@pytest.mark.parametrize("tokens, slide, words", [
    ([], False, "x.txt has no token; give at least"),
    ([1, 11, 2], False, "x.txt: token 11 at place 1 is not one of the model's, 0 to 10"),
    ([1, -1], True, "x.txt: token -1 at place 1"),
    (range(10), False, "x.txt has 10 tokens with the one that begins a text, 2 more than the model's context of 8; "
                       "shorten it, or let --config.sampling.slide=true read its last 8"),
])
def test_prompts_that_no_model_can_read_are_refused(tokens, slide, words):
  model = gpt.GPT(vocab_size=11, max_length=8, embed_dim=4, num_layers=1, num_heads=1)
  with pytest.raises(UserError) as error:
    decoding.check_prompt("x.txt", tokens, model, Sampling(slide=slide))
  assert words in str(error.value) and "\n" not in str(error.value)


def test_prompts_that_fit_are_read_and_an_empty_batch_is_refused():
  model = gpt.GPT(vocab_size=11, max_length=8, embed_dim=4, num_layers=1, num_heads=1)
  decoding.check_prompt("x", range(8), model, Sampling())
  decoding.check_prompt("x", range(10), model, Sampling(slide=True))
  decoding.check_prompt("x", [3] * 1000, tiny.Tiny(), Sampling())  # without a context
  decoding.check(_prompts(ROWS), "abc", model, Sampling())
  with pytest.raises(UserError, match="^b has 9 tokens"):
    decoding.check(_prompts([[1], [2] * 9]), "ab", model, Sampling())
  with pytest.raises(UserError, match="^there is no prompt"):
    decoding.check({"prompt": np.zeros((0, 1), np.int32), "length": np.zeros(0, np.int32)}, [], model, Sampling())


def test_settings_beyond_the_vocabulary_are_refused():
  Sampling(top_k=11, stop_tokens=(10,)).check_vocabulary(11)
  with pytest.raises(UserError, match="^--config.sampling.top_k=12: the model has 11 tokens; give at most as many"):
    Sampling(top_k=12).check_vocabulary(11)
  for token in 11, -1:
    with pytest.raises(UserError, match=f"^--config.sampling.stop_tokens={token}: the model's tokens are 0 to 10"):
      Sampling(stop_tokens=(token,)).check_vocabulary(11)


# Decoders with a cache of keys and values


FORMS = {
    "gpt2": {},
    "llama": {"norm": "rms", "positions": "rotary", "activation": "swiglu", "use_bias": False,
              "num_kv_heads": generation.GROUPS, "mlp_dim": generation.HIDDEN, "tied": False},
}


@functools.cache
def _peer():
  with np.load(formula.FOLDER / "generation.npz") as file:
    return dict(file)


@functools.cache
def _gpt(form, max_length=generation.CONTEXT, num_layers=1):
  """A network, and its variables, which are those of the fixture, as far as it has them."""
  model = gpt.GPT(vocab_size=generation.VOCABULARY, max_length=max_length, embed_dim=generation.WIDTH,
                  num_layers=num_layers, num_heads=generation.HEADS, **FORMS[form])
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
  fill = lambda path, x: generation.weight("/".join(part.key for part in path), x.shape)
  return model, {"params": jax.tree.map_with_path(fill, shapes)}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generate(model, variables, batch, sampling, seed=0):
  return decoding.generate(model, variables, batch, sampling, jax.random.key(seed))


SETTINGS = [name if name in ("greedy", "all") else pytest.param(name, marks=pytest.mark.slow)
            for name in generation.SETTINGS]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_decoding_is_that_of_transformers(form, name):
  peer, (settings, stops) = _peer(), generation.SETTINGS[name]
  assert peer[f"{form}_gap"] > 1e-4
  assert min(len(set(row)) for row in peer[f"{form}_greedy"]) >= 8
  model, variables = _gpt(form, num_layers=generation.LAYERS)
  stop = (int(peer[f"{form}_stop_token"]),) if stops else ()
  sampling = Sampling(temperature=0, max_new_tokens=generation.NEW, stop_tokens=stop, **settings)
  found = _generate(model, variables, _prompts(generation.prompts()), sampling)["tokens"]
  np.testing.assert_array_equal(found, peer[f"{form}_{name}"])


def _by_hand(model, variables, prompt, count):
  """Greedy decoding without a cache: tokens, and their logarithms of probabilities."""
  context = model.max_length
  apply = _uncached(model)
  text, begin, log_p = list(prompt), max(len(prompt) - context, 0), []
  for _ in range(count):
    if len(text) - begin > context:
      begin = len(text) - context // 2
    window = np.zeros((1, context), np.int32)
    window[0, :len(text) - begin] = text[begin:]
    logits = apply(variables, window)[0, len(text) - begin - 1]
    text.append(int(np.argmax(logits)))
    log_p.append(np.max(jax.nn.log_softmax(logits)))
  return text[len(prompt):], log_p


@functools.cache
def _uncached(model):
  return jax.jit(lambda variables, tokens: model.apply(variables, tokens)["logits"])


@pytest.mark.parametrize("form", FORMS)
def test_the_cache_changes_nothing_and_rows_are_as_alone(form):
  model, variables = _gpt(form)
  prompts, sampling = generation.prompts(), Sampling(temperature=1.0, max_new_tokens=12, scores=True)
  together = _generate(model, variables, _prompts(prompts), sampling)
  for i, prompt in enumerate(prompts):
    text = np.zeros((1, generation.CONTEXT), np.int32)
    text[0, :len(prompt) + 12] = [*prompt, *together["tokens"][i]]
    log_p = jax.nn.log_softmax(_uncached(model)(variables, text)[0])  # of all tokens after each
    places = np.arange(len(prompt), len(prompt) + 12)
    np.testing.assert_allclose(together["log_p"][i], log_p[places - 1, text[0, places]], atol=1e-5)
    alone = _prompts([prompt], ids=[i])
    alone["prompt"] = np.pad(alone["prompt"], ((0, 0), (0, max(generation.LENGTHS) - len(prompt))))
    alone = _generate(model, variables, alone, sampling)
    np.testing.assert_array_equal(alone["tokens"][0], together["tokens"][i])
    np.testing.assert_allclose(alone["log_p"][0], together["log_p"][i], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_text_beyond_the_context_goes_on_from_the_last_half(form):
  model, variables = _gpt(form, max_length=8)
  prompts = [np.array(row) for row in ([5], [60, 2, 33, 4], [9, 8, 7, 6, 5, 4, 3, 2], range(20, 31))]
  sampling = Sampling(temperature=0, max_new_tokens=22, scores=True)
  found = _generate(model, variables, _prompts(prompts), sampling)
  for i, prompt in enumerate(prompts):
    tokens, log_p = _by_hand(model, variables, prompt, 22)
    np.testing.assert_array_equal(found["tokens"][i], tokens)
    np.testing.assert_allclose(found["log_p"][i], log_p, atol=1e-5)


@pytest.mark.slow
def test_a_text_in_parts_is_the_text_at_once_also_where_the_context_slides():
  model, variables = _gpt("llama", max_length=8)
  prompts = _prompts([[5], [60, 2, 33, 4]])
  sampling = Sampling(temperature=1.0, max_new_tokens=22, scores=True, repetition_penalty=1.2, no_repeat_ngram=3)
  advance = jax.jit(lambda text: decoding.advance(model, variables, sampling, text, jax.random.key(0), 8))
  text, parts = jax.jit(lambda: decoding.start(model, variables, prompts, sampling))(), []
  for _ in range(3):
    part, text = advance(text)
    parts.append(part)
  whole = _generate(model, variables, prompts, sampling)
  found = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *parts)
  np.testing.assert_array_equal(found["tokens"][:, :22], whole["tokens"])
  np.testing.assert_allclose(found["log_p"][:, :22], whole["log_p"], atol=1e-6)
  assert (found["tokens"][:, 22:] == decoding.NOTHING).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_copies_neither_weights_nor_cache(form):
  """Compiled, the loop over tokens updates the cache in place: no copy of an array of its size is in its body."""
  model, variables = _gpt(form, num_layers=2)
  sampling = Sampling(temperature=0, max_new_tokens=8)
  prompts = _prompts([[5], [60, 2, 33, 4]])
  text = jax.eval_shape(lambda: decoding.start(model, variables, prompts, sampling))
  compiled_step = jax.jit(
      lambda variables, text: decoding.advance(model, variables, sampling, text, jax.random.key(0), 8),
      donate_argnums=1).lower(variables, text).compile()
  shape = ",".join(map(str, text["cache"]["block0"]["key"].shape))
  assert f"f32[{shape}]" in compiled_step.as_text()
  copies = [line for line in compiled_step.as_text().splitlines() if f"= f32[{shape}]" in line and " copy(" in line]
  assert not copies, copies
