"""Parity with transformers' decoders, and what its folders may hold."""

import json
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from dljax import interop
from dljax.errors import UserError
from dljax.interop import folder, variants
from dljax.interop.families.gpt import CONFIGS
from dljax.launch import convert as command
from dljax.models import gpt
from dljax.train.state import parameter_count
from tests.fixtures import formula

SOURCE = "transformers"
CASES = ("gpt2_plain", "gpt2_scaled", "gpt2_relu", "gpt2_gelu", "llama_plain", "llama_stretched", "llama_mlp_bias",
         "qwen3_plain", "qwen3_window", "qwen3_mixed")
# One of each kind, for the quick suite; the last is its one in float32, and through the command line.
SOME = ("gpt2_scaled", "llama_stretched", "qwen3_mixed")


def _slow(names, quick):
  return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _fixture(name):
  """The fixture, its config.json, and its tensors."""
  fixture = formula.load(name)
  config = json.loads(fixture.pop("config").tobytes())
  return fixture, config, formula.decoder_tensors(fixture["shapes"], config["tie_word_embeddings"])


def _write(path, config, tensors):
  """A folder as transformers writes it, with the weights in two files."""
  path.mkdir(exist_ok=True)
  (path / "config.json").write_text(json.dumps(config), "utf-8")
  names, places = sorted(tensors), {}
  for i, part in enumerate((names[:5], names[5:]), 1):
    file = f"model-0000{i}-of-00002.safetensors"
    safetensors.numpy.save_file({name: np.ascontiguousarray(tensors[name]) for name in part}, path / file)
    places |= dict.fromkeys(part, file)
  (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
  return path


def _model(config):
  return CONFIGS[SOURCE](config)


def _assert_same_bits(ours, theirs):
  assert ours.keys() == theirs.keys()
  for name, tensor in theirs.items():
    assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
    assert ours[name].tobytes() == np.ascontiguousarray(tensor).tobytes(), name


def _hidden(model, variables, tokens, length):
  """[layers, B, L, D]: what each block gives, and after the last of them the norm."""
  layers = [f"block{i}" for i in range(model.num_layers - 1)] + ["norm"]
  _, state = model.apply(variables, tokens, length=length, mutable=["intermediates"],
                         capture_intermediates=lambda module, _: module.name in layers)
  found = [state["intermediates"][layer]["__call__"][0] for layer in layers]
  return jnp.stack([x[0] if isinstance(x, tuple) else x for x in found])


def _assert_equal(ours, theirs, real, tolerance):
  """Asserts that two rows' real places agree within a part of the difference between the rows."""
  difference = np.abs(theirs[0] - theirs[1])[real[1]].max()
  assert difference > 0.1 * np.abs(theirs[real]).max()
  error = np.abs(np.asarray(ours, np.float64) - theirs)[real].max() / difference
  assert error < tolerance, f"off by {error:.1e}"


def _compare(name, path, dtype, tolerance):
  fixture, config, tensors = _fixture(name)
  model, variables = interop.from_folder(_write(path, config, tensors), SOURCE)
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(variables))
  tokens, length, _ = formula.token_rows(config["vocab_size"], 1)
  wide = model.clone(dtype=dtype)
  with jax.enable_x64(dtype is jnp.float64):
    # The two are compared by both forms of attention: only the second holds its weights.
    logits, hidden = jax.jit(lambda v: (
        wide.apply(v, tokens, length=length)["logits"], _hidden(wide, v, tokens, length)))(
            jax.tree.map(lambda x: x.astype(dtype), variables))
  real = np.arange(tokens.shape[1]) < length[:, None]
  _assert_equal(logits, fixture["logits"], real, tolerance)
  assert len(hidden) == len(fixture["hidden"]) - 1 == model.num_layers
  for ours, theirs in zip(hidden, fixture["hidden"][1:]):
    _assert_equal(ours, theirs, real, tolerance)
  return model, variables, tensors


@pytest.mark.parametrize("name", _slow(CASES, SOME))
def test_decoders_give_transformers_logits_and_hidden_states(name, tmp_path):
  """In float64; and the tensors come back bit for bit."""
  model, variables, tensors = _compare(name, tmp_path, jnp.float64, 1e-9)
  _assert_same_bits(interop.dump(model, variables, SOURCE), tensors)


@pytest.mark.parametrize("name", _slow(CASES, SOME[-1:]))
def test_decoders_give_transformers_logits_in_float32(name, tmp_path):
  _compare(name, tmp_path, jnp.float32, 1e-4)


# --- Sizes ------------------------------------------------------------------------------------------------


def _sizes():
  with np.load(formula.FOLDER / "gpt_sizes.npz") as file:
    return json.loads(file["sizes"].tobytes())


COUNTS = {"gpt2": 124_439_808, "gpt2_medium": 354_823_168, "gpt2_large": 774_030_080, "gpt2_xl": 1_557_611_200,
          "llama_smollm2_135m": 134_515_008, "qwen3_0_6b": 596_049_920}


@pytest.mark.parametrize("name", _slow(COUNTS, ["gpt2"]))
def test_a_published_size_has_transformers_names_shapes_and_count(name):
  theirs = _sizes()[name]
  model = gpt.VARIANTS[name]()
  assert _model(theirs["config"]) == model
  variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
  assert parameter_count(variables["params"]) == theirs["parameters"] == COUNTS[name]
  specs = traverse_util.flatten_dict(variables, sep="/")
  table, shapes = interop.find_table(model, SOURCE), {}
  for entry in table.entries(specs):
    parts = jax.eval_shape(entry.to_source, *(specs[path] for path in entry.paths))
    shapes |= {name: part.shape for name, part in zip(entry.names, parts, strict=True)}
  assert table.tie(shapes) == {name: tuple(shape) for name, shape in theirs["shapes"].items()}


# --- Files ------------------------------------------------------------------------------------------------


def _without_prefix(tensors):
  return {re.sub(r"^(transformer|model)\.", "", key): x for key, x in tensors.items()}


def _with_buffers(tensors):
  if "transformer.wte.weight" in tensors:
    masks = {"transformer.h.1.attn.bias": np.ones((1, 1, 9, 9), np.uint8),
             "transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32)}
  else:
    masks = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
  return {**tensors, **masks}


def _bare_with_buffers(tensors):
  return _without_prefix(_with_buffers(tensors))


def _tied_once(tensors):
  return {key: x for key, x in tensors.items() if key != "lm_head.weight"}


@pytest.mark.parametrize("name", ["gpt2_plain", "llama_stretched"])
@pytest.mark.parametrize("change", [_without_prefix, _with_buffers, _bare_with_buffers, _tied_once])
def test_files_of_other_classes_and_versions_hold_the_same(name, change):
  _, config, tensors = _fixture(name)
  model = _model(config)
  expected = interop.load(model, tensors, SOURCE)
  jax.tree.map(np.testing.assert_array_equal, interop.load(model, change(tensors), SOURCE), expected)
  assert interop.recognise(model, change(tensors)) == SOURCE


def test_a_head_of_its_own_is_asked_for_and_one_too_many_is_refused():
  _, config, tensors = _fixture("gpt2_scaled")
  with pytest.raises(UserError, match="lm_head.weight is missing"):
    interop.load(_model(config), _tied_once(tensors), SOURCE)
  with pytest.raises(UserError, match=r"lm_head.weight and transformer.wte.weight differ.*does not tie them"):
    interop.load(_model({**config, "tie_word_embeddings": True}), tensors, SOURCE)


def _bfloat16(tensors):
  return {name: np.asarray(jnp.asarray(tensor, jnp.bfloat16)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", _slow(SOME, SOME[-1:]))
def test_a_folder_goes_through_ours_and_back_bit_for_bit_in_its_dtype(name, tmp_path, capsys):
  """By the command line; bfloat16 with us too, which a model loads as float32."""
  _, config, tensors = _fixture(name)
  theirs = _write(tmp_path / "theirs", config, _tied_once(_bfloat16(tensors)) if config["tie_word_embeddings"]
                  else _bfloat16(tensors))
  assert command.main(["--source=transformers", str(theirs), str(tmp_path / "ours")]) == 0
  assert command.main(["--to=transformers", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
  assert command.main(["--to=transformers", str(tmp_path / "ours"), str(tmp_path / "back.safetensors")]) == 0
  assert capsys.readouterr().out.count("written to") == 3
  _assert_same_bits(interop.read(tmp_path / "back"), interop.read(theirs))
  _assert_same_bits(interop.read(tmp_path / "back.safetensors"), _bfloat16(tensors))
  assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
  for path, source in ((tmp_path / "ours", interop.OURS), (tmp_path / "back", SOURCE)):
    model, variables = interop.from_folder(path, source)
    assert model == _model(config)
    jax.tree.map(np.testing.assert_array_equal, variables, interop.load(model, _bfloat16(tensors), SOURCE))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


def test_a_model_that_transformers_lacks_is_not_written(tmp_path, capsys):
  model = gpt.VARIANTS["gpt_nano"](vocab_size=11, embed_dim=8, num_layers=1, num_heads=2)
  variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(
      model.init, jax.random.key(0), np.zeros((1, 1), np.int32)))
  folder.write_folder(tmp_path / "ours", interop.dump(model, variables, interop.OURS), variants.describe(model))
  assert command.main(["--to=transformers", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "transformers' gpt2 is the nearest model, and there use_bias is True; here it is False" in error
  assert not (tmp_path / "theirs").exists()


def test_positions_are_cropped_to_a_shorter_context():
  _, config, tensors = _fixture("gpt2_plain")
  model, notes = _model(config).clone(max_length=5), []
  variables = interop.load(model, tensors, SOURCE, note=notes.append)
  np.testing.assert_array_equal(variables["params"]["positions"], tensors["transformer.wpe.weight"][:5])
  assert notes == ["of 12 positions the first 5 are taken"]
  tokens = formula.token_rows(40, 1)[0][:, :5]
  whole = interop.load(_model(config), tensors, SOURCE)
  run = jax.jit(lambda model, variables: model.apply(variables, tokens)["logits"], static_argnums=0)
  np.testing.assert_array_equal(run(model, variables), run(_model(config), whole))
  with pytest.raises(UserError, match=r"wpe.weight has shape \(12, 32\).*has \(13, 32\)"):
    interop.load(model.clone(max_length=13), tensors, SOURCE)


# --- config.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CASES, *COUNTS])
def test_a_config_that_we_write_describes_the_same_model(name):
  config = _sizes()[name]["config"] if name in COUNTS else _fixture(name)[1]
  model = _model(config)
  written = json.loads(json.dumps(folder.config_of(model, SOURCE)))
  assert _model(written) == model
  # What they write too is the same, but for dropout, ids of tokens, and both forms of rotary positions.
  ours = {"resid_pdrop", "embd_pdrop", "attn_pdrop", "bos_token_id", "eos_token_id", "pad_token_id", "architectures",
          "n_inner", "max_window_layers", "sliding_window"}
  assert {key: value for key, value in written.items() if key in config and key not in ours} == {
      key: value for key, value in config.items() if key in written and key not in ours}


LLAMA, GPT2, QWEN3 = {"model_type": "llama"}, {"model_type": "gpt2"}, {"model_type": "qwen3"}
STRETCH = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("config, expected", [
    (GPT2, {"vocab_size": 50_257, "max_length": 1024, "embed_dim": 768, "num_heads": 12, "mlp_dim": None, "tied": True,
            "activation": "gelu_tanh", "epsilon": 1e-5, "scale_by_layer": False, "dropout": 0.0}),
    ({**GPT2, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 9},
     {"embed_dim": 48, "num_layers": 3, "num_heads": 2, "max_length": 9}),
    ({**GPT2, "n_inner": 3072, "attn_pdrop": 0.5, "reorder_and_upcast_attn": True, "n_ctx": 3, "unheard_of": [1]},
     {"mlp_dim": None, "dropout": 0.0, "max_length": 1024}),
    (LLAMA, {"vocab_size": 32_000, "num_kv_heads": None, "head_dim": None, "rope_theta": 1e4, "rope_scaling": None,
             "tied": False, "use_bias": False, "mlp_bias": None, "epsilon": 1e-6, "mlp_dim": 11_008, "qk_norm": False}),
    ({**LLAMA, "attention_bias": True, "mlp_bias": True}, {"use_bias": True, "mlp_bias": None}),
    ({**LLAMA, "mlp_bias": True}, {"use_bias": False, "mlp_bias": True}),
    ({**LLAMA, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
    ({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **STRETCH}},
     {"rope_theta": 5e5, "rope_scaling": STRETCH}),
    ({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **STRETCH}},
     {"rope_theta": 5e5, "rope_scaling": STRETCH}),
    ({**LLAMA, "rope_scaling": {"rope_type": "llama3", **{key: x for key, x in STRETCH.items() if "max" not in key}}},
     {"rope_scaling": STRETCH | {"original_max_position_embeddings": 2048}}),
    ({**LLAMA, "sliding_window": 7}, {"window": None}),
    (QWEN3, {"head_dim": None, "qk_norm": True, "window": None, "full_layers": ()}),
    ({**QWEN3, "hidden_size": 1024, "sliding_window": 7}, {"head_dim": 128, "window": None}),
    ({**QWEN3, "num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 3},
     {"window": 4096, "full_layers": (0, 1, 2)}),
    ({**QWEN3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 40},
     {"window": None, "full_layers": ()}),
])
def test_a_config_says_the_settings(config, expected):
  model = _model(config)
  found = {key: getattr(model, key) for key in expected}
  assert {key: dict(x) if isinstance(x, flax.core.FrozenDict) else x for key, x in found.items()} == expected
  hash(model)  # as programs that are compiled for a model ask


@pytest.mark.parametrize("config, message", [
    ({**GPT2, "activation_function": "mish"}, "activation_function is 'mish'.*only gelu_new, "),
    ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights is False.*only True"),
    ({**GPT2, "add_cross_attention": True}, "add_cross_attention is True.*only False"),
    ({**GPT2, "n_head": 5}, "5 heads do not divide a width of 768"),
    ({**GPT2, "n_layer": "3"}, "n_layer is '3'.*whole number above 0"),
    ({**GPT2, "layer_norm_epsilon": 0}, "layer_norm_epsilon is 0.*above 0"),
    ({**GPT2, "tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'.*true or false"),
    ({**GPT2, "architectures": ["GPT2DoubleHeadsModel"]}, r"\['GPT2DoubleHeadsModel'\] have no counterpart.*GPT2LMHeadModel"),
    ({**LLAMA, "hidden_act": "gelu"}, "hidden_act is 'gelu'.*only silu"),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, "the rope_type of rope_scaling is 'linear'.*llama3"),
    ({**LLAMA, "rope_parameters": {"rope_type": "yarn"}}, "the rope_type of rope_parameters is 'yarn'"),
    ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by the kind of layer.*full_attention"),
    ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5.*only 1"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5.*only 1"),
    ({**LLAMA, "rope_scaling": {"rope_type": "llama3", **STRETCH, "factor": None}}, "factor is None.*above 0"),
    ({**LLAMA, "num_key_value_heads": 5}, "5 heads of keys do not divide 32"),
    ({**LLAMA, "head_dim": 5}, "head_dim is 5; rotary positions need an even number"),
    ({**LLAMA, "is_causal": False}, "is_causal is False"),
    ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config.*quantised"),
    ({**QWEN3, "layer_types": ["full_attention"]}, "layer_types is .*must be 32 of full_attention"),
    ({**QWEN3, "layer_types": ["sliding_attention"] * 32}, "use_sliding_window is False"),
    ({**QWEN3, "use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
    ({"model_type": "mistral"}, "no family here has this model of transformers.*mistral"),
])
def test_other_configs_are_refused_by_name(config, message, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=message) as error:
    folder.model_of(tmp_path, SOURCE)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings, message", [
    ({"use_bias": False}, "gpt2 is the nearest model, and there use_bias is True; here it is False"),
    ({"norm": "rms"}, "there norm is 'layer'; here it is 'rms'"), ({"head_dim": 3}, "there head_dim is None or 192"),
    ({"num_kv_heads": 2}, "num_kv_heads is None or 4"), ({"window": 7}, "there window is None; here it is 7"),
    ({"activation": "swiglu"}, "there activation is 'gelu_tanh' or 'gelu' or 'relu'; here it is 'swiglu'"),
    ({"positions": "rotary"}, "llama is the nearest model, and there norm is 'rms'"),
    ({"positions": "rotary", "norm": "rms", "qk_norm": True, "activation": "swiglu"}, "qwen3.*mlp_bias is False; here it is None"),
])
def test_models_that_transformers_lacks_are_refused_by_the_attribute(settings, message):
  with pytest.raises(UserError, match=message):
    interop.find_table(gpt.GPT(40, 8, 768, 2, 4, **settings), SOURCE)


# --- generation_config.json -------------------------------------------------------------------------------


@pytest.mark.parametrize("generation, config, expected", [
    (None, {}, {"temperature": 0.0, "stop_tokens": ()}),
    (None, {"eos_token_id": 3}, {"temperature": 0.0, "stop_tokens": (3,)}),
    ({"eos_token_id": [4, 5], "temperature": 0.6}, {"eos_token_id": 3}, {"temperature": 0.0, "stop_tokens": (4, 5)}),
    ({"eos_token_id": None, "do_sample": True}, {"eos_token_id": 3},
     {"temperature": 1.0, "top_k": 50, "stop_tokens": (3,)}),
    ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.1,
      "no_repeat_ngram_size": 3, "max_new_tokens": 9, "num_beams": 1, "suppress_tokens": None}, {},
     {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.1, "no_repeat_ngram": 3,
      "max_new_tokens": 9, "stop_tokens": ()}),
])
def test_a_folder_says_how_its_authors_generate(generation, config, expected, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(config))
  if generation is not None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
  assert interop.generation(tmp_path) == expected


@pytest.mark.parametrize("text, message", [
    ('{"num_beams": 4}', "generated with num_beams=4, which is not known here"),
    ('{"do_sample": true, "top_k": 1.5}', "top_k is 1.5; it must be a whole number"),
    ('{"eos_token_id": "a"}', "eos_token_id is 'a'"), ("[1]", "is no JSON object"), ("{", "is no JSON object"),
])
def test_other_ways_to_generate_are_refused_by_name(text, message, tmp_path):
  (tmp_path / "generation_config.json").write_text(text)
  with pytest.raises(UserError, match=message) as error:
    interop.generation(tmp_path)
  assert "\n" not in str(error.value)
