"""Language modelling: exact sums over a text, however it is cut."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dljax import report
from dljax.data import ragged
from dljax.data.text import corpus, streams, tokenize
from dljax.models import gpt
from dljax.tasks.language_modeling import LanguageModeling
from dljax.train import parallel
from dljax.train.evaluate import Evaluator
from tests.tasks import compiled, tiny
from tests.train import toys

TASK = LanguageModeling(tiny.Tiny(), stateful=True)


_compiled_apply = jax.jit(tiny.Tiny.apply, static_argnums=0)


def _apply(model, tokens):
  return _compiled_apply(model, {"params": tiny.params(model.vocab_size)}, tokens)["logits"]


def _nll(batch, model=tiny.Tiny()):
  """[B, L], by hand."""
  log_p = scipy.special.log_softmax(np.asarray(_apply(model, batch["tokens"]), np.float64), axis=-1)
  return -np.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]


def _loss(task, batch, state=None, train=False):
  if state is None and task.stateful:
    state = {"carry": np.zeros((len(batch["tokens"]), tiny.WIDTH), np.float32)}
  return compiled.loss(task, batch, tiny.params(), state=state, train=train)


# The loss


@pytest.mark.parametrize("train", [True, False])
def test_the_loss_is_the_mean_over_predicted_tokens(train):
  batch = tiny.batch(lengths=[6, 3, 0, 0])
  batch["target_weight"][1, 0] = 0
  losses = _nll(batch)
  expected = losses[0].sum() + losses[1, 1:3].sum()
  out = _loss(TASK, batch, train=train)
  assert compiled.denominators(TASK, batch)["tokens"] == 8
  assert float(out.loss) == pytest.approx(expected / 8, rel=1e-5)
  found = TASK.summarize(out.metrics)
  assert found["loss"] == pytest.approx(expected / 8, rel=1e-5)
  assert found["perplexity"] == pytest.approx(math.exp(expected / 8), rel=1e-5)
  assert set(found) == {"loss", "perplexity", "accuracy"}


def test_bits_are_those_of_the_text():
  batch = tiny.batch(characters=np.array([3, 0, 7, 1], np.float32), bytes=np.array([4, 0, 9, 1], np.float32))
  found = TASK.summarize(_loss(TASK, batch).metrics)
  nats = _nll(batch).sum()
  assert found["bits_per_character"] == pytest.approx(nats / math.log(2) / 11, rel=1e-5)
  assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 14, rel=1e-5)


def test_accuracy_counts_the_most_probable_token():
  batch = tiny.batch()
  guess = np.argmax(_apply(tiny.Tiny(), batch["tokens"]), axis=-1)
  found = TASK.summarize(_loss(TASK, batch).metrics)
  assert found["accuracy"] == pytest.approx(np.mean(guess == batch["targets"]))


def test_what_is_behind_the_end_of_a_row_changes_nothing():
  batch = tiny.batch(lengths=[6, 2, 5, 0])
  other = {**batch, "tokens": batch["tokens"].copy(), "targets": batch["targets"].copy()}
  for tokens, targets, n in zip(other["tokens"], other["targets"], batch["length"]):
    tokens[n:], targets[n:] = 3, 4
  one, two = _loss(TASK, batch), _loss(TASK, other)
  assert float(one.loss) == float(two.loss)
  np.testing.assert_array_equal(one.model_state["carry"], two.model_state["carry"])


def test_padding_is_reported_where_documents_are_padded():
  batch = tiny.batch(lengths=[6, 2, 5, 0])
  found = TASK.summarize(_loss(LanguageModeling(tiny.Tiny(), padded=True), batch).metrics)
  assert found["padding"] == pytest.approx(11 / 24)


def test_windows_that_carry_their_state_are_one_long_window():
  long = tiny.batch(length=12)
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
  batch = tiny.batch(rows=4)
  denominators = compiled.denominators(TASK, batch)
  value = lambda params, rows: TASK.loss(
      params, {"carry": np.ones((4, tiny.WIDTH), np.float32)[rows]}, {k: v[rows] for k, v in batch.items()},
      jax.random.key(0), denominators=denominators, train=True).loss
  rows = [0, 1, 2, 3], [0], [1, 2, 3]
  whole, *parts = jax.jit(lambda params: [jax.grad(value)(params, np.array(some)) for some in rows])(tiny.params())
  jax.tree.map(lambda w, a, b: np.testing.assert_allclose(w, np.add(a, b), atol=1e-6), whole, *parts)


def test_the_loss_is_computed_in_float32_and_the_carry_keeps_its_type():
  task = LanguageModeling(tiny.Tiny(dtype=jnp.bfloat16), stateful=True)
  state = {"carry": np.zeros((4, tiny.WIDTH), np.float32)}
  loss = functools.partial(task.loss, denominators={"tokens": np.float32(1)}, train=True)
  out = jax.eval_shape(loss, tiny.params(), state, tiny.batch(), jax.random.key(0))
  assert out.loss.dtype == jnp.float32 and out.model_state["carry"].dtype == jnp.float32


def test_fresh_variables_have_a_carry_for_each_row_where_it_is_kept():
  variables = jax.jit(TASK.init)(jax.random.key(0), tiny.batch(rows=5))
  assert variables["carry"].shape == (5, tiny.WIDTH) and not np.any(variables["carry"])
  assert set(jax.eval_shape(LanguageModeling(tiny.Tiny()).init, jax.random.key(0), tiny.batch())) == {"params"}


def test_a_token_is_predicted_from_those_before_it():
  batch = tiny.batch()
  for place in range(6):
    weight = np.zeros_like(batch["target_weight"])
    weight[:, place] = 1
    changed = []
    for other in (None, *range(6)):
      tokens = batch["tokens"].copy()
      tokens[:, [] if other is None else other] += 1
      tokens %= tiny.VOCABULARY
      changed.append(float(_loss(TASK, {**batch, "tokens": tokens, "target_weight": weight}).loss))
    reach = np.array(changed[1:]) != changed[0]
    assert reach[:place + 1].all() and not reach[place + 1:].any()


# Packed documents


def _packed():
  """A batch of two rows with documents of 4, 3 and 1, and of 5 and 2 tokens, and padding in the second."""
  batch = tiny.batch(rows=2, length=8)
  segment = np.array([[1, 1, 1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 1, 2, 2, 0]], np.int32)
  position = np.array([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 1, 0]], np.int32)
  return {**batch, "segment": segment, "position": position, "target_weight": (segment > 0).astype(np.float32),
          "length": np.array([8, 7], np.int32)}


_SMALL = {"vocab_size": tiny.VOCABULARY, "max_length": 8, "embed_dim": 12, "num_layers": 1, "num_heads": 2}
_FORMS = {"gpt2": gpt.GPT(**_SMALL), "llama": gpt.VARIANTS["llama_nano"](**_SMALL, num_kv_heads=1, mlp_dim=16)}


@pytest.mark.parametrize("form", _FORMS)
def test_packed_documents_have_the_loss_of_the_documents_one_by_one(form):
  task, batch = LanguageModeling(_FORMS[form], padded=True), _packed()
  params = jax.tree.map(lambda x: 3 * x, compiled.variables(task, batch)["params"])
  loss = lambda batch: compiled.loss(task, batch, params)
  found = loss(batch)
  total = 0
  for row in range(2):
    for number in range(1, batch["segment"][row].max() + 1):
      place = batch["segment"][row] == number
      count = place.sum()
      alone = {field: np.zeros((2, 8), batch[field].dtype) for field in ("tokens", "targets", "target_weight")}
      for field, values in alone.items():
        values[0, :count] = batch[field][row][place]
      alone |= {"length": np.array([count, 0], np.int32), "id": np.arange(2, dtype=np.int32)}
      total += float(loss(alone).loss) * place.sum()
  assert float(found.loss) == pytest.approx(total / 15, rel=1e-5)
  assert task.summarize(found.metrics)["padding"] == pytest.approx(1 / 16)
  leaking = {**batch, "segment": np.ones_like(batch["segment"])}
  assert abs(float(loss(leaking).loss) - total / 15) > 1e-3  # what a document sees of others matters here


@pytest.mark.parametrize("form", _FORMS)
def test_no_gradient_passes_from_one_document_to_another(form):
  task, batch = LanguageModeling(_FORMS[form].clone(tied=False)), _packed()
  params = compiled.variables(task, batch)["params"]
  for row in range(2):
    # Token n stands at place n alone, so the gradient of its embedding is that of the place.
    alone = {**{field: value[row:row + 1] for field, value in batch.items()}, "tokens": np.arange(8)[None]}
    segment = batch["segment"][row]
    for place in range(8):
      weight = np.float32(np.arange(8) == place)[None]
      _, grad, _ = compiled.loss_and_grad(task, params, {**alone, "target_weight": weight})
      reached = np.any(grad["embed"]["embedding"][:8] != 0, axis=1)
      np.testing.assert_array_equal(reached, (segment == segment[place]) & (np.arange(8) <= place))


# A whole split, by the engine


@pytest.fixture
def play(tmp_path):
  path = tmp_path / "play.txt"
  path.write_text("Speak the speech, I pray you, as I pronounced it to you, trippingly — on the tongue. é\n" * 40)
  return path


def _pipelines(play, carried=True, **fields):
  config = corpus.default_config()
  config.update({"file": str(play), "length": 16, **fields})
  return lambda size: corpus.TextSet(config, carried).pipelines(
      batch_size=16, eval_batch_size=size, seed=0)


@functools.cache
def _evaluator(mode, mesh, stateful, padded):
  task = LanguageModeling(tiny.Tiny(tokenize.Bytes.size), stateful, padded=padded)
  return task, Evaluator(task, mode, parallel.make_mesh(toys.MESHES[mesh], mode))


def _evaluate(pipeline, mode="jit", mesh="data:1", stateful=True, padded=False):
  task, evaluator = _evaluator(mode, mesh, stateful, padded)
  pipeline.open()
  variables = {"params": tiny.params(tokenize.Bytes.size)}
  if stateful:
    variables["carry"] = np.zeros((16, tiny.WIDTH), np.float32)
  rng = jax.random.key_data(jax.random.key(0))
  return evaluator.sums(variables, rng, pipeline, "validation"), evaluator


@pytest.mark.parametrize("length", [5, 16, 1000])
def test_one_stream_is_exact_over_the_whole_text_whatever_the_window(play, length):
  found, _ = _evaluate(_pipelines(play, length=length)(1).evals["validation"])
  split = corpus.split_text(play.read_text())["validation"]
  tokens = np.array([[tokenize.Bytes.end, *split.encode()]])
  nats = _nll({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, tiny.Tiny(tokenize.Bytes.size)).sum()
  assert found["loss"] == pytest.approx(nats / len(split.encode()), rel=1e-5)
  assert found["perplexity"] == pytest.approx(math.exp(nats / len(split.encode())), rel=1e-4)
  assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(split.encode()), rel=1e-5)
  assert found["bits_per_character"] == pytest.approx(nats / math.log(2) / len(split), rel=1e-5)


@pytest.mark.parametrize("stride", [16, 5])
def test_windows_that_overlap_count_each_token_once_from_what_is_before_it(play, stride):
  text = [tokenize.Bytes.end, *corpus.split_text(play.read_text())["validation"].encode()]
  nats = 0
  for begin in range(0, len(text) - 1 - 16 + stride, stride):
    window = np.array([text[begin:begin + 17]])
    losses = _nll({"tokens": window[:, :-1], "targets": window[:, 1:]}, tiny.Tiny(tokenize.Bytes.size))
    nats += losses[0, 16 - stride if begin else 0:].sum()
  found, _ = _evaluate(_pipelines(play, carried=False, eval_stride=stride)(4).evals["validation"], stateful=False)
  assert found["loss"] == pytest.approx(nats / (len(text) - 1), rel=1e-5)
  assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(text) - 1), rel=1e-5)
  assert "padding" not in found


@pytest.mark.parametrize("rows", [1, 3])
def test_the_picture_has_the_bits_of_the_text_in_reading_order(play, rows, monkeypatch):
  drawn = []
  monkeypatch.setattr(report, "surprise", lambda pieces, bits: drawn.append((pieces, bits)))
  pipeline = _pipelines(play, length=7)(rows).evals["validation"]
  task = LanguageModeling(tiny.Tiny(tokenize.Bytes.size), stateful=True, spell=list)
  evaluator = Evaluator(task, "jit", parallel.make_mesh(toys.MESHES["data:1"], "jit"))
  variables = {"params": tiny.params(tokenize.Bytes.size), "carry": np.zeros((16, tiny.WIDTH), np.float32)}
  pipeline.open()
  rng = jax.random.key_data(jax.random.key(0))
  evaluator.full(variables, rng, pipeline, "validation", {}).figures["surprise"]()
  (tokens, bits), = drawn
  text_bytes = corpus.split_text(play.read_text())["validation"].encode()
  first = -(-len(text_bytes) // rows)  # the stream that begins the text, whose state nothing comes before
  assert bytes(tokens[:first]) == text_bytes[:first] and len(tokens) <= len(text_bytes)
  inputs = np.array([[tokenize.Bytes.end, *text_bytes[:first]]])
  nats, = _nll({"tokens": inputs[:, :-1], "targets": inputs[:, 1:]}, tiny.Tiny(tokenize.Bytes.size))
  np.testing.assert_allclose(bits[:first], nats / math.log(2), rtol=1e-4, atol=1e-4)


def test_the_picture_shows_the_tokens_of_overlapping_windows_once(play, monkeypatch):
  drawn = []
  monkeypatch.setattr(report, "surprise", lambda pieces, bits: drawn.append((pieces, bits)))
  pipeline = _pipelines(play, carried=False, eval_stride=5)(3).evals["validation"]
  pipeline.open()
  batches = [pipeline.batch(step) for step in range(pipeline.num_batches)]
  rows = [({"nats": batch["targets"] * math.log(2)}, batch) for batch in batches[::-1]]
  LanguageModeling(tiny.Tiny(), spell=list).evaluate(rows, {}, {}).figures["surprise"]()
  (tokens, bits), = drawn
  assert bytes(tokens) == corpus.split_text(play.read_text())["validation"].encode()
  np.testing.assert_allclose(bits, tokens)


@pytest.mark.parametrize("mode, mesh", tiny.MODES[1:])
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
        lambda documents, plan: documents.gather(plan, plan.rows), longest=40, buckets=buckets, batch_size=size)


def test_documents_have_the_same_sums_whatever_the_buckets_and_few_programs():
  found = {}
  for buckets, size in ((1, 4), (2, 8), (8, 4)):
    sums, evaluator = _evaluate(_Documents(buckets, size).pipeline, stateful=False, padded=True)
    found[buckets] = sums
  padding = {buckets: sums.pop("padding") for buckets, sums in found.items()}
  assert found[1] == pytest.approx(found[2], rel=1e-5)
  assert found[1] == pytest.approx(found[8], rel=1e-5)
  assert padding[8] < padding[1]
  assert evaluator._steps[False].__wrapped__._cache_size() <= 1 + 2 + 8
