"""BERT: counts, padding, packed texts, heads, and what is dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from dljax import optim
from dljax.errors import UserError
from dljax.models import bert
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables

# By size: bare; with the words' head; with both of pre-training.
COUNTS = {
    "bert_tiny": (4_385_920, 4_416_698, 4_433_468), "bert_small": (28_763_648, 28_795_194, 29_058_876),
    "bert_base": (109_482_240, 109_514_298, 110_106_428),
    "bert_large": (335_141_888, 335_174_458, 336_226_108),
}
LENGTH = np.array([6, 3], np.int32)
TOKENS = np.random.RandomState(0).randint(0, 11, (2, 6)).astype(np.int32)
TYPES = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]], np.int32)
# Three texts in one row, and then padding.
SEGMENT = np.array([[1, 1, 2, 2, 2, 3, 0]], np.int32)
POSITION = np.array([[0, 1, 0, 1, 2, 0, 0]], np.int32)


def _tiny(**kwargs):
  sizes = {"vocab_size": 11, "max_length": 8, "embed_dim": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 12}
  return bert.BERT(**{**sizes, **kwargs})


def _count(model):
  return parameter_count(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"])


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
  heads = ("none", "mlm", "pretraining")
  assert tuple(_count(bert.VARIANTS[name](head=head)) for head in heads) == COUNTS[name]


@pytest.mark.parametrize("head, count", [("sequence", 109_483_778), ("token", 108_893_186), ("span", 108_893_186)])
def test_parameter_counts_of_fine_tuned_heads(head, count):
  assert _count(bert.VARIANTS["bert_base"](head=head, num_classes=2)) == count


def test_nothing_is_left_untested_of_the_variants():
  assert set(bert.VARIANTS) == {*COUNTS, "bert_nano"}
  assert _count(bert.VARIANTS["bert_nano"](vocab_size=1000)) == 1000 * 96 + 128 * 96 + 2 * 96 + 2 * 96 + 3 * (
      12 * 96**2 + 13 * 96) + 97 * 96


def _run(model, variables, **inputs):
  return jax.jit(functools.partial(model.apply, variables))(**inputs)


@pytest.mark.parametrize("head", ["pretraining", "token"])
def test_padding_changes_nothing(head):
  """Neither the outputs of real tokens nor their gradients, whatever the padding holds."""
  model = _tiny(head=head, num_classes=3)
  variables = random_variables(model, TOKENS)
  other = TOKENS.copy()
  other[1, 3:] = (TOKENS[1, 3:] + 1) % 11
  real = np.arange(6) < LENGTH[:, None]

  @jax.jit
  def run(params, tokens, types, length, real):
    def loss(params):
      outputs = model.apply({"params": params}, tokens, length, types)
      # What has a row for each token counts where that is real.
      outputs = {name: y * real[..., None] if y.shape[:2] == real.shape else y for name, y in outputs.items()}
      return sum(jnp.sum(jnp.sin(y)) for y in outputs.values()), outputs
    return jax.value_and_grad(loss, has_aux=True)(params)

  def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), a, b)

  padded = run(variables["params"], TOKENS, TYPES, LENGTH, real)
  same(padded, run(variables["params"], other, TYPES, LENGTH, real))
  (_, outputs), _ = padded
  alone = _run(model, variables, tokens=TOKENS[1:, :3], token_type=TYPES[1:, :3])
  same({name: y[1:, :3] if y.shape[:2] == (2, 6) else y[1:] for name, y in outputs.items()}, alone)
  attended = _run(model, variables, tokens=TOKENS, token_type=TYPES)["hidden"]
  assert np.abs(attended[1, :3] - outputs["hidden"][1, :3]).max() > 1e-3  # it would, without its length


def test_packed_texts_see_nothing_of_each_other():
  """A place's word has no influence on the logits of another text: the gradient is zero, and not small."""
  model = _tiny(head="mlm", vocab_size=7)
  tokens = np.arange(7)[None]  # each place has a word of its own, whose vector is thus the place's
  params = random_variables(model, tokens)["params"]

  @jax.jit
  def influence(text):
    def total(vectors):
      changed = {**params, "embed": {"embedding": vectors}}
      hidden = model.apply({"params": changed}, tokens, segment=SEGMENT, position=POSITION)["hidden"]
      return jnp.sum(jnp.sin(hidden) * (SEGMENT == text)[..., None])
    return jnp.abs(jax.grad(total)(params["embed"]["embedding"])).max(-1)

  for text in (1, 2, 3):
    reached = np.asarray(influence(text))
    assert (reached[SEGMENT[0] == text] > 1e-4).all() and (reached[SEGMENT[0] != text] == 0).all()


def test_packed_texts_have_the_logits_and_gradients_of_the_texts_one_by_one():
  model = _tiny(head="mlm")
  tokens = np.random.RandomState(1).randint(0, 11, (1, 7)).astype(np.int32)
  params = random_variables(model, tokens)["params"]

  def loss(params, tokens, counts, **rest):
    logits = model.apply({"params": params}, tokens, **rest)["logits"]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), ((tokens + 3) % 11)[..., None], -1)[..., 0]
    return jnp.sum(losses * counts), logits

  grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (packed, logits), slopes = grad(params, tokens, SEGMENT > 0, segment=SEGMENT, position=POSITION)
  rows = [np.where(SEGMENT[0] == text)[0] for text in (1, 2, 3)]
  length = np.array([len(row) for row in rows], np.int32)
  unpacked = np.stack([np.resize(tokens[0, row], 3) for row in rows])
  (alone, theirs), their_slopes = grad(params, unpacked, np.arange(3) < length[:, None], length=length)
  np.testing.assert_allclose(packed, alone, rtol=1e-5)
  for i, row in enumerate(rows):
    np.testing.assert_allclose(logits[0, row], theirs[i, :len(row)], rtol=2e-5, atol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), slopes, their_slopes)


def test_words_at_some_places_are_those_of_all_places():
  model = _tiny(head="mlm", num_layers=1)
  variables = random_variables(model, TOKENS)
  places = np.array([[5, 0, 0], [2, 1, 3]], np.int32)
  everywhere = _run(model, variables, tokens=TOKENS)["logits"]
  some = _run(model, variables, tokens=TOKENS, places=places)["logits"]
  assert some.shape == (2, 3, 11)
  np.testing.assert_allclose(some, np.take_along_axis(np.asarray(everywhere), places[..., None], 1), rtol=1e-5)


def test_words_types_and_positions_are_added_and_then_normalised():
  model = _tiny(num_layers=0)
  variables = random_variables(model, TOKENS)
  p = variables["params"]
  x = p["embed"]["embedding"][TOKENS] + p["types"]["embedding"][TYPES] + p["positions"]["embedding"][:6]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
  hidden = model.apply(variables, TOKENS, token_type=TYPES)["hidden"]
  np.testing.assert_allclose(hidden, x * p["embed_norm"]["scale"] + p["embed_norm"]["bias"], rtol=1e-4, atol=1e-4)


def test_the_words_head_is_the_embedding_unless_it_is_not_tied():
  """Zeros in the embedding of a word that no text has make its logit the bias."""
  for tied in (True, False):
    model = _tiny(head="mlm", tied=tied, num_layers=0)
    variables = random_variables(model, TOKENS)
    tokens = np.full((1, 2), 3, np.int32)
    variables["params"]["embed"]["embedding"][5] = 0
    logits = _run(model, variables, tokens=tokens)["logits"][..., 5]
    assert (np.abs(logits - variables["params"]["decoder_bias"][5]).max() < 1e-6) == tied
    assert ("decoder" in variables["params"]) != tied


def test_attention_is_an_intermediate_whose_rows_sum_to_one():
  model = _tiny()
  variables = random_variables(model, TOKENS)
  outputs, state = jax.jit(functools.partial(model.apply, variables, mutable=["intermediates"]))(TOKENS, LENGTH)
  for i in range(2):
    weights = state["intermediates"][f"block{i}"]["attention"][0]
    assert weights.shape == (2, 2, 6, 6) and weights[0].std() > 1e-3
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights[1, :, :, 3:] == 0).all() and (weights[1, :, :, :3] > 0).all()
  plain = _run(model, variables, tokens=TOKENS, length=LENGTH)
  np.testing.assert_allclose(outputs["hidden"], plain["hidden"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{"dropout": 0.5}, {"attention_dropout": 0.5}, {"head_dropout": 0.5}])
def test_units_are_dropped_in_training_only(kwargs):
  off = {"dropout": 0.0, "attention_dropout": 0.0}
  model, plain = (_tiny(head="sequence", num_classes=3, **{**off, **given}) for given in (kwargs, {}))
  variables = random_variables(model, TOKENS)
  run = jax.jit(lambda key: [m.apply(variables, TOKENS, train=train, rngs={"dropout": key})["logits"]
                             for m, train in ((model, True), (model, False), (plain, True))])
  dropped, evaluated, trained = zip(*(map(np.asarray, run(jax.random.key(i))) for i in range(4)))
  assert len({y.tobytes() for y in dropped}) > 1
  np.testing.assert_allclose(evaluated, trained, rtol=1e-4)


def test_the_heads_dropout_is_that_of_the_encoder_unless_it_is_stated():
  def rates(**kwargs):
    found = []

    def note(call, args, kwargs, context):
      if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
        found.append(context.module.rate)
      return call(*args, **kwargs)

    with nn.intercept_methods(note):
      jax.eval_shape(_tiny(num_layers=1, dropout=0.2, **kwargs).init, jax.random.key(0), TOKENS)
    return found

  assert rates() == rates(head="span") == [0.2] * 3  # after the embeddings, the attention and the perceptron
  for head in ("sequence", "token"):
    assert rates(head=head) == [0.2] * 4
    assert rates(head=head, head_dropout=0.0) == [0.2] * 3 + [0.0]


def test_remat_only_recomputes():
  assert_remat_only_recomputes(functools.partial(_tiny, head="sequence"), TOKENS, LENGTH)


def test_vectors_and_biases_do_not_decay():
  variables = jax.eval_shape(_tiny(head="mlm", tied=False).init, jax.random.key(0), TOKENS)
  mask = traverse_util.flatten_dict(optim.decay_mask(variables["params"]), sep="/")
  assert {path for path, decays in mask.items() if decays} == {
      path for path in mask if path.endswith(("kernel", "embedding"))}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head", bert.HEADS)
def test_computes_in_dtype_with_float32_parameters_and_logits(dtype, head):
  outputs, variables = jax.eval_shape(_tiny(dtype=dtype, head=head).init_with_output, jax.random.key(0), TOKENS)
  kinds = {name: y.dtype for name, y in outputs.items()}
  wide = {name: kinds.pop(name) for name in ("logits", "next_sentence") if name in kinds}
  assert set(kinds.values()) == {jnp.dtype(dtype)} and set(wide.values()) <= {jnp.dtype(np.float32)}
  assert ("logits" in wide) == (head != "none")
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_it_starts_from_small_numbers():
  """Truncated at two standard deviations of 0.02; the joint projection too."""
  params = jax.jit(_tiny(embed_dim=32, num_layers=1).init)(jax.random.key(0), TOKENS)["params"]
  for path, x in traverse_util.flatten_dict(params, sep="/").items():
    if path.endswith(("kernel", "embedding")):
      assert 0.016 < x.std() < 0.0195 and np.abs(x).max() <= 0.04, path
    else:
      assert (x == path.endswith("scale")).all()


@pytest.mark.parametrize("settings, inputs, message", [
    ({}, {"tokens": np.zeros((1, 9), np.int32)}, "9 tokens are more than this model's 8 positions: shorten"),
    ({"head": "words"}, {}, "BERT's head.*words"), ({"activation": "mish"}, {}, "BERT's activation.*mish"),
    ({"num_heads": 3}, {}, "3 heads do not divide a width of 8"),
    ({"head": "sequence"}, {"segment": np.zeros((2, 6), np.int32)}, "'sequence' reads the first token.*do not pack"),
    ({"head": "token"}, {"places": np.zeros((2, 1), np.int32)}, "places are for the heads of words.*not for 'token'"),
])
def test_what_cannot_be_is_refused(settings, inputs, message):
  with pytest.raises(UserError, match=message):
    jax.eval_shape(functools.partial(_tiny(**settings).init, jax.random.key(0)), **{"tokens": TOKENS, **inputs})
