"""Decoders: GPT-2, and the form of llama and qwen3."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dljax.errors import UserError
from dljax.interop import table
from dljax.models import gpt
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables

COUNTS = {
    "gpt2": 124_439_808, "gpt2_medium": 354_823_168, "gpt2_large": 774_030_080, "gpt2_xl": 1_557_611_200,
    "llama_smollm2_135m": 134_515_008, "qwen3_0_6b": 596_049_920, "gpt_nano": 828_672, "llama_nano": 722_176,
}
# Forms that between them use every attribute.
FORMS = {
    "gpt2": {},
    "llama": {"norm": "rms", "positions": "rotary", "activation": "swiglu", "use_bias": False, "num_kv_heads": 2},
    "qwen3": {"norm": "rms", "positions": "rotary", "activation": "swiglu", "use_bias": False, "num_kv_heads": 1,
              "head_dim": 6, "qk_norm": True, "tied": False, "epsilon": 1e-6},
    "window": {"positions": "rotary", "window": 3, "scale_by_layer": True, "activation": "gelu", "mlp_dim": 24},
}


def _tiny(**attributes):
  sizes = {"vocab_size": 11, "max_length": 16, "embed_dim": 16, "num_layers": 2, "num_heads": 4}
  return gpt.GPT(**{**sizes, **attributes})


def _tokens(rows=2, count=9, seed=0):
  return np.random.RandomState(seed).randint(0, 11, (rows, count)).astype(np.int32)


def _apply(model, variables, *inputs, **options):
  """`model.apply`, compiled as a whole, which takes less time than operation by operation."""
  fixed = {name: options.pop(name) for name in ("train", "mutable") if name in options}
  return jax.jit(functools.partial(model.apply, **fixed))(variables, *inputs, **options)


@functools.lru_cache(maxsize=None)
def _case(form):
  """(model, variables in float64, tokens, logits)."""
  model, tokens = _tiny(**FORMS[form], dtype=jnp.float64), _tokens()
  with jax.enable_x64(True):
    variables = random_variables(model, tokens, dtype=np.float64)
    return model, variables, tokens, _apply(model, variables, tokens)["logits"]


@pytest.mark.parametrize("name", gpt.VARIANTS)
def test_parameter_counts(name):
  model = gpt.VARIANTS[name]()
  params = jax.eval_shape(model.init, jax.random.key(0), _tokens(1, 2))["params"]
  assert parameter_count(params) == COUNTS[name]


@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_a_later_one(form):
  model, tokens = _tiny(**FORMS[form]), _tokens(1, 6)
  variables = random_variables(model, tokens)
  x = variables["params"]["embed"]["embedding"][tokens]

  def logits(x):
    """The logits at place 3, if the embeddings of the tokens were x: [1, 6, D]."""
    table = jnp.concatenate([x[0], variables["params"]["embed"]["embedding"][6:]])
    params = {**variables["params"], "embed": {"embedding": table}}
    if model.tied:  # the head is the embedding too, and must not count
      params["head"] = {"kernel": variables["params"]["embed"]["embedding"].T}
    places = np.arange(6, dtype=np.int32)[None]
    return jnp.sum(model.clone(tied=False).apply({"params": params}, places)["logits"][0, 3])

  slopes = np.abs(jax.jit(jax.grad(logits))(x))[0].max(axis=-1)
  first = 0 if model.window is None else 3 - 2 * (model.window - 1)  # two blocks look back twice
  assert np.all(slopes[max(0, first):4] > 0) and np.all(slopes[4:] == 0)


def test_a_window_hides_what_is_further_away():
  """With one block, a token sees `window` places."""
  model, tokens = _tiny(**{**FORMS["window"], "num_layers": 1}), _tokens(1, 8)
  variables = random_variables(model, tokens)
  changed = tokens.copy()
  changed[0, 2] = (changed[0, 2] + 1) % 11
  a, b = (_apply(model, variables, x)["logits"][0] for x in (tokens, changed))
  differs = np.abs(a - b).max(axis=-1) > 0
  assert differs.tolist() == [False, False, True, True, True, False, False, False]


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_changes_nothing_for_prompts_of_unequal_lengths(form):
  """Prefill in two parts, each padded, then token by token: as each row alone without a cache."""
  model, variables, tokens, wanted = _case(form)
  with jax.enable_x64(True):
    lengths, cache = np.array([[3, 1], [2, 3]]), model.init_cache(2, 12)
    seen, got = np.zeros(2, int), [[], []]
    for length in (*lengths, None, None):
      count = np.ones(2, int) if length is None else length
      part = np.zeros((2, count.max()), np.int32)
      for row in range(2):
        part[row, :count[row]] = tokens[row, seen[row]:seen[row] + count[row]]
      out = _apply(model, variables, part, cache=cache,
                   length=None if length is None else jnp.asarray(length))
      cache, seen = out["cache"], seen + count
      for row in range(2):
        got[row].append(out["logits"][row, :count[row]])
    for row in range(2):
      np.testing.assert_allclose(np.concatenate(got[row]), wanted[row, :seen[row]], rtol=1e-10, atol=1e-12)
    assert cache["used"].tolist() == [8, 8] and cache["next"].tolist() == seen.tolist() == [7, 6]


def test_a_scan_over_layers_changes_neither_logits_nor_gradients():
  model, variables, tokens, _ = _case("qwen3")
  with jax.enable_x64(True):
    def loss(variables, model):
      return jnp.mean(model.apply(variables, tokens, train=True)["logits"]**2)

    results = [jax.jit(jax.value_and_grad(functools.partial(loss, model=model.clone(layer_scan=scan, remat=remat))))(
        variables) for scan, remat in ((False, False), (True, True))]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), *results)


def test_under_a_scan_the_program_does_not_grow_with_depth():
  sizes = []
  for layers in (2, 5):
    model = _tiny(num_layers=layers, layer_scan=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), _tokens())
    text = str(jax.make_jaxpr(lambda v, model=model: model.apply(v, _tokens())["logits"])(variables))
    sizes.append(text.count("dot_general"))
  assert sizes[0] == sizes[1] > 0


def test_layers_drop_different_units_under_a_scan():
  """The blocks have the same weights, so that they differ by what they drop alone."""
  model, tokens = _tiny(layer_scan=True, dropout=0.5), _tokens()
  variables = random_variables(model, tokens)
  draw = jax.jit(lambda key: model.apply(variables, tokens, train=True, rngs={"dropout": key})["logits"])
  first, again, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3
  text = str(jax.make_jaxpr(lambda: draw(jax.random.key(0)))())
  assert "random_fold_in" in text


@pytest.mark.parametrize("form", ["gpt2", "window"])
def test_packed_documents_are_as_each_alone(form):
  model, variables, tokens, _ = _case(form)
  with jax.enable_x64(True):
    segment = np.array([[0, 0, 0, 0, 1, 1, 2, 2, 2]] * 2, np.int32)
    position = np.array([[0, 1, 2, 3, 0, 1, 0, 1, 2]] * 2, np.int32)
    packed = _apply(model, variables, tokens, segment=segment, position=position)["logits"]
    for begin, end in ((0, 4), (4, 6), (6, 9)):
      alone = _apply(model, variables, tokens[:, begin:end])["logits"]
      np.testing.assert_allclose(packed[:, begin:end], alone, rtol=1e-12, atol=1e-12)


def test_dropout_acts_in_training_only_and_on_attention_weights_too():
  model, tokens = _tiny(dropout=0.4), _tokens()
  variables = random_variables(model, tokens)
  np.testing.assert_array_equal(_apply(model, variables, tokens)["logits"], _apply(_tiny(), variables, tokens)["logits"])

  def draw(key):
    return model.apply(variables, tokens, train=True, rngs={"dropout": key})["logits"]

  first, other = map(jax.jit(draw), jax.random.split(jax.random.key(0)))
  assert np.abs(first - other).max() > 1e-3
  # One draw for the embeddings, and three for each block: weights, and the ends of both branches.
  assert str(jax.make_jaxpr(draw)(jax.random.key(0))).count("name=_bernoulli") == 1 + 3 * model.num_layers


def test_attention_is_an_intermediate_whose_rows_sum_to_one():
  model, tokens = _tiny(**FORMS["llama"]), _tokens()
  _, state = _apply(model, random_variables(model, tokens), tokens, mutable=["intermediates"])
  for i in range(2):
    weights = state["intermediates"][f"block{i}"]["attention"][0]
    assert weights.shape == (2, 4, 9, 9)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert np.all(np.triu(weights, 1) == 0)


def test_remat_only_recomputes():
  assert_remat_only_recomputes(functools.partial(_tiny, dropout=0.1), _tokens())


def test_an_adapter_starts_without_effect_and_then_learns():
  plain, model, tokens = _tiny(), _tiny(lora_rank=2), _tokens()
  params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
  base = jax.eval_shape(plain.init, jax.random.key(0), tokens)["params"]

  def without(tree):
    return {k: without(v) if isinstance(v, dict) else v for k, v in tree.items() if not k.startswith("lora_")}

  assert jax.tree.structure(without(params)) == jax.tree.structure(base)
  np.testing.assert_array_equal(_apply(model, {"params": params}, tokens)["logits"],
                                _apply(plain, {"params": without(params)}, tokens)["logits"])
  slope = jax.jit(jax.grad(lambda p: jnp.mean(model.apply({"params": p}, tokens)["logits"]**2)))(params)
  for name in ("qkv", "project", "mlp1", "mlp2"):
    layer = slope["block0"][name]
    assert np.all(layer["lora_down"] == 0) and np.abs(layer["lora_up"]).max() > 0


def test_merged_adapters_are_in_the_kernels():
  model, tokens = _tiny(lora_rank=2, lora_alpha=6.0, dtype=jnp.float64), _tokens()
  with jax.enable_x64(True):
    params = random_variables(model, tokens, dtype=np.float64)["params"]
    merged = table.merge_adapters(params, 6.0 / 2)
    assert not any(table.is_adapter("/".join(path)) for path in traverse_util.flatten_dict(merged))
    wanted = _apply(model, {"params": params}, tokens)["logits"]
    np.testing.assert_allclose(_apply(model.clone(lora_rank=0), {"params": merged}, tokens)["logits"], wanted, rtol=1e-10)


def test_more_tokens_than_the_context_are_refused():
  model = _tiny(max_length=8)
  variables = random_variables(model, _tokens(1, 8))
  with pytest.raises(UserError, match="9 tokens are more than the context of 8"):
    model.apply(variables, _tokens(1, 9))


def test_residual_branches_start_smaller():
  model = _tiny(embed_dim=64, num_layers=2)
  params = jax.jit(model.init)(jax.random.key(0), _tokens())["params"]["block1"]
  for name, wanted in (("qkv", 0.02), ("mlp1", 0.02), ("project", 0.01), ("mlp2", 0.01)):
    assert np.std(params[name]["kernel"]) == pytest.approx(wanted, rel=0.1)
