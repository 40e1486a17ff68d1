"""The names of decoders.

transformers: src/transformers/models/gpt2/modeling_gpt2.py, llama/modeling_llama.py and
qwen3/modeling_qwen3.py, as GPT2LMHeadModel, LlamaForCausalLM and Qwen3ForCausalLM write them. The
classes without a head leave out the prefix "transformer." or "model."; files of either kind are
read. GPT-2's layers are Conv1D, whose kernels are [in, out], and its files may hold the causal mask
as a buffer.

A config.json may state what changes nothing here: rates of dropout, which are a run's own settings;
`reorder_and_upcast_attn`, as scores are float32 always; and the range of initial values.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import core

from dljax.errors import UserError
from dljax.interop.table import (
    LINEAR, SAME, Array, Layout, Rule, Table, concatenate, layer, merged_heads)
from dljax.models import gpt

# What the classes of transformers are called, by model_type.
_CLASSES = {"gpt2": ("GPT2LMHeadModel", "GPT2Model"), "llama": ("LlamaForCausalLM", "LlamaModel"),
            "qwen3": ("Qwen3ForCausalLM", "Qwen3Model")}
# transformers' activations -> ours. GPT-2 has no gate, the others always have one.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_GATED = ("silu", "swish")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _kind(model: gpt.GPT) -> str:
  """The model_type that has a model's form.

  Raises:
    UserError: none has it; it names the attribute.
  """
  if model.positions == "learned":
    kind, wanted = "gpt2", {
        "norm": "layer", "use_bias": True, "mlp_bias": (None, True), "qk_norm": False,
        "window": None, "num_kv_heads": (None, model.num_heads),
        "head_dim": (None, model.embed_dim // model.num_heads),
        "activation": tuple(_ACTIVATIONS.values())}
  else:
    kind = "qwen3" if model.qk_norm else "llama"
    wanted = {"norm": "rms", "activation": "swiglu", "scale_by_layer": False}
    wanted |= ({"mlp_bias": (False,) if model.use_bias else (None, False)} if model.qk_norm
               else {"window": None})
  for field, values in wanted.items():
    value = getattr(model, field)
    values = values if isinstance(values, tuple) else (values,)
    if value not in values:
      raise UserError(f"transformers' {kind} is the nearest model, and there {field} is "
                      f"{' or '.join(dict.fromkeys(map(repr, values)))}; here it is {value!r}")
  return kind


def _transformers(model: gpt.GPT) -> Table:
  make = _gpt2 if _kind(model) == "gpt2" else _llama
  return make(model)


def _gpt2(model: gpt.GPT) -> Table:
  block, theirs = r"block(\d+)", r"transformer.h.\1"
  kernel, bias = _joint(model.num_heads)
  merged = Layout(lambda x: x.reshape(model.num_heads, -1, x.shape[1]),
                  lambda x: x.reshape(-1, x.shape[2]))
  rules = [
      ("params/embed/embedding", "transformer.wte.weight", SAME),
      ("params/positions", "transformer.wpe.weight", SAME),
      (f"params/{block}/qkv/kernel", f"{theirs}.attn.c_attn.weight", kernel),
      (f"params/{block}/qkv/bias", f"{theirs}.attn.c_attn.bias", bias),
      *layer(f"{block}/project", f"{theirs}.attn.c_proj", merged),
      *layer(f"{block}/mlp1", f"{theirs}.mlp.c_fc", SAME),
      *layer(f"{block}/mlp2", f"{theirs}.mlp.c_proj", SAME),
      *((rf"params/{block}/norm([12])/{ours}", rf"{theirs}.ln_\2.{name}", SAME)
        for ours, name in (("scale", "weight"), ("bias", "bias"))),
      ("params/norm/scale", "transformer.ln_f.weight", SAME),
      ("params/norm/bias", "transformer.ln_f.bias", SAME),
      ("params/head/kernel", "lm_head.weight", LINEAR),
  ]
  return _table(model, rules, older=[(r"((?:wte|wpe|h|ln_f)\..*)", r"transformer.\1")],
                tied="transformer.wte.weight", no_weight=r".*\.attn\.(masked_)?bias")


def _llama(model: gpt.GPT) -> Table:
  block, theirs = r"block(\d+)", r"model.layers.\1"
  kernel, bias = _grouped(model.num_kv_heads or model.num_heads, model.size_of_head)
  parts = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
  rules = [
      ("params/embed/embedding", "model.embed_tokens.weight", SAME),
      (f"params/{block}/qkv/kernel", tuple(f"{part}.weight" for part in parts), kernel),
      (f"params/{block}/qkv/bias", tuple(f"{part}.bias" for part in parts), bias),
      *layer(f"{block}/project", f"{theirs}.self_attn.o_proj", merged_heads(model.num_heads)),
      *layer(f"{block}/gate", f"{theirs}.mlp.gate_proj", LINEAR),
      *layer(f"{block}/mlp1", f"{theirs}.mlp.up_proj", LINEAR),
      *layer(f"{block}/mlp2", f"{theirs}.mlp.down_proj", LINEAR),
      (f"params/{block}/query_norm/scale", f"{theirs}.self_attn.q_norm.weight", SAME),
      (f"params/{block}/key_norm/scale", f"{theirs}.self_attn.k_norm.weight", SAME),
      (f"params/{block}/norm1/scale", f"{theirs}.input_layernorm.weight", SAME),
      (f"params/{block}/norm2/scale", f"{theirs}.post_attention_layernorm.weight", SAME),
      ("params/norm/scale", "model.norm.weight", SAME),
      ("params/head/kernel", "lm_head.weight", LINEAR),
  ]
  return _table(model, rules, older=[(r"((?:embed_tokens|layers|norm)\..*)", r"model.\1")],
                tied="model.embed_tokens.weight", no_weight=r".*\.rotary_emb\.inv_freq")


def _table(
    model: gpt.GPT, rules: list[Rule], older: list[tuple[str, str]], tied: str, no_weight: str,
) -> Table:
  return Table(rules, inputs=lambda tensors: (jax.ShapeDtypeStruct((1, 1), np.int32),),
               no_weight=no_weight, older=older,
               tied={"lm_head.weight": tied} if model.tied else {})


def _joint(heads: int) -> tuple[Layout, Layout]:
  """The layouts of kernel and bias of GPT-2's joint projection.

  The kernel is [D, 3 heads D'] there, the queries, then the keys, then the values, and
  [D, heads, 3, D'] with us. The bias has the same layouts without D.
  """
  return (
      Layout(lambda x: x.reshape(x.shape[0], 3, heads, -1).transpose(0, 2, 1, 3),
             lambda x: x.transpose(0, 2, 1, 3).reshape(x.shape[0], -1)),
      Layout(lambda x: x.reshape(3, heads, -1).transpose(1, 0, 2),
             lambda x: x.transpose(1, 0, 2).reshape(-1)))


def _grouped(groups: int, head_dim: int) -> tuple[Layout, Layout]:
  """The layouts of kernel and bias of queries, keys and values, which are three layers there.

  Their kernels are [heads D', D] and twice [groups D', D], and all three are
  [D, groups, heads / groups + 2, D'] with us: the queries of a group, its key, and its value. The
  biases have the same layouts without D.
  """

  def join_kernels(*kernels: Array) -> Array:
    return concatenate([x.reshape(groups, -1, head_dim, x.shape[1]).transpose(3, 0, 1, 2)
                        for x in kernels], 2)

  def split_kernel(kernel: Array) -> tuple[Array, ...]:
    parts = kernel[:, :, :-2], kernel[:, :, -2:-1], kernel[:, :, -1:]
    return tuple(x.transpose(1, 2, 3, 0).reshape(-1, kernel.shape[0]) for x in parts)

  def join_biases(*biases: Array) -> Array:
    return concatenate([x.reshape(groups, -1, head_dim) for x in biases], 1)

  def split_bias(bias: Array) -> tuple[Array, ...]:
    return tuple(x.reshape(-1) for x in (bias[:, :-2], bias[:, -2:-1], bias[:, -1:]))

  return Layout(join_kernels, split_kernel), Layout(join_biases, split_bias)


def _crop(model: gpt.GPT, table: np.ndarray, shape: tuple[int, ...], image: None, note: Any) -> np.ndarray:
  """Learned positions [N, D] for a shorter context: the first ones."""
  del model, image
  if table.ndim != 2 or len(table) <= shape[0]:
    return table
  note(f"of {len(table)} positions the first {shape[0]} are taken")
  return table[:shape[0]]


# --- config.json ----------------------------------------------------------------------------------

# Ours -> transformers' names of the field, of which the first is written, and its default; None for
# a size that ours may also leave open.
_SIZES = {
    "gpt2": {
        "vocab_size": (("vocab_size",), 50_257),
        "max_length": (("n_positions", "max_position_embeddings"), 1024),
        "embed_dim": (("n_embd", "hidden_size"), 768),
        "num_layers": (("n_layer", "num_hidden_layers"), 12),
        "num_heads": (("n_head", "num_attention_heads"), 12), "mlp_dim": (("n_inner",), None)},
    "llama": {
        "vocab_size": (("vocab_size",), 32_000),
        "max_length": (("max_position_embeddings",), 2048),
        "embed_dim": (("hidden_size",), 4096), "num_layers": (("num_hidden_layers",), 32),
        "num_heads": (("num_attention_heads",), 32),
        "num_kv_heads": (("num_key_value_heads",), None), "head_dim": (("head_dim",), None),
        "mlp_dim": (("intermediate_size",), 11_008)},
}
_SIZES["qwen3"] = {
    **_SIZES["llama"], "vocab_size": (("vocab_size",), 151_936),
    "max_length": (("max_position_embeddings",), 32_768), "head_dim": (("head_dim",), 128),
    "num_kv_heads": (("num_key_value_heads",), 32), "mlp_dim": (("intermediate_size",), 22_016)}
# What changes the network -> the only values for which ours is the same.
_ONLY = {
    "gpt2": {"scale_attn_weights": (True,), "add_cross_attention": (False,), "is_causal": (True,),
             "pruned_heads": ({}, None)},
    "llama": {"is_causal": (True,), "partial_rotary_factor": (1, None)},
}
_ONLY["qwen3"] = _ONLY["llama"]


def _transformers_model(config: Mapping[str, Any]) -> gpt.GPT | None:
  """The model of transformers' config.json, if its model_type is known here."""
  kind = config.get("model_type")
  if kind not in _CLASSES:
    return None
  names = config.get("architectures") or [_CLASSES[kind][0]]
  if len(names) != 1 or names[0] not in _CLASSES[kind]:
    raise UserError(f"config.json: the architectures {names} have no counterpart here; those of "
                    f"{kind} that have one are {', '.join(_CLASSES[kind])}")
  if config.get("quantization_config"):
    raise UserError("config.json: quantization_config says that the weights are quantised, which "
                    "cannot be read here; get the weights as floating-point numbers")
  for key, values in _ONLY[kind].items():
    if key in config and config[key] not in values:
      raise UserError(f"config.json: {key} is {config[key]!r}, which cannot be had here; only "
                      f"{values[0]!r}")
  settings = {ours: _size(config, *field) for ours, field in _SIZES[kind].items()}
  width, heads = settings["embed_dim"], settings["num_heads"]
  groups, head_dim = settings.get("num_kv_heads") or heads, settings.get("head_dim")
  if not head_dim and width % heads:
    raise UserError(f"config.json: {heads} heads do not divide a width of {width}")
  if heads % groups:
    raise UserError(f"config.json: {groups} heads of keys do not divide {heads} heads of queries")
  if kind != "gpt2" and (head_dim or width // heads) % 2:
    raise UserError(f"config.json: head_dim is {head_dim or width // heads}; rotary positions need "
                    "an even number")
  # A size that follows from the others is left open, as it is in our variants.
  for field, same in (("num_kv_heads", heads), ("head_dim", width / heads), ("mlp_dim", 4 * width)):
    if settings.get(field) == same:
      settings[field] = None
  if kind == "gpt2":
    return gpt.GPT(**settings, **_gpt2_settings(config))
  return gpt.GPT(**settings, **_llama_settings(config, settings["max_length"]))


def _size(config: Mapping[str, Any], names: tuple[str, ...], default: int | None) -> int | None:
  """The size that a config states under one of its names."""
  name = next((name for name in names if name in config), names[0])
  value = config.get(name, default)
  if value is None and (default is None or name == "num_key_value_heads"):
    return None
  if type(value) is not int or value < 1:
    raise UserError(f"config.json: {name} is {value!r}; it must be a whole number above 0")
  return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
  """The number above 0 that a config states."""
  value = config.get(name, default)
  if type(value) not in (int, float) or not value > 0:
    raise UserError(f"config.json: {name} is {value!r}; it must be a number above 0")
  return float(value)


def _flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
  value = config.get(name, default)
  if type(value) is not bool:
    raise UserError(f"config.json: {name} is {value!r}; it must be true or false")
  return value


def _gpt2_settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """The settings of GPT-2 besides its sizes."""
  activation = config.get("activation_function", "gelu_new")
  if activation not in _ACTIVATIONS:
    raise UserError(f"config.json: activation_function is {activation!r}, which is not known here; "
                    f"only {', '.join(_ACTIVATIONS)}")
  return {
      "activation": _ACTIVATIONS[activation],
      "epsilon": _number(config, "layer_norm_epsilon", 1e-5),
      "scale_by_layer": _flag(config, "scale_attn_by_inverse_layer_idx"),
      "tied": _flag(config, "tie_word_embeddings", True)}


def _llama_settings(config: Mapping[str, Any], max_length: int) -> dict[str, Any]:
  """The settings of llama and qwen3 besides their sizes."""
  if (activation := config.get("hidden_act", "silu")) not in _GATED:
    raise UserError(f"config.json: hidden_act is {activation!r}, which is not known here; only "
                    f"{', '.join(_GATED)}")
  qwen3 = config["model_type"] == "qwen3"
  biases = _flag(config, "attention_bias")
  mlp_biases = not qwen3 and _flag(config, "mlp_bias")
  theta, scaling = _rope(config, max_length)
  return {
      "norm": "rms", "positions": "rotary", "activation": "swiglu", "qk_norm": qwen3,
      "epsilon": _number(config, "rms_norm_eps", 1e-6), "rope_theta": theta,
      "rope_scaling": scaling, "tied": _flag(config, "tie_word_embeddings"), "use_bias": biases,
      "mlp_bias": None if mlp_biases == biases else mlp_biases,
      **(_windows(config) if qwen3 else {})}


def _rope(
    config: Mapping[str, Any], max_length: int,
) -> tuple[float, Mapping[str, float] | None]:
  """The base of rotary positions and how they are stretched, in either form of a config."""
  name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
  given = config.get(name) or {}
  if by_layer := [key for key, value in given.items() if isinstance(value, Mapping)]:
    raise UserError(f"config.json: {name} has settings by the kind of layer ({', '.join(by_layer)}), "
                    "which cannot be had here; only the same for all layers")
  kind = given.get("rope_type", given.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise UserError(f"config.json: the rope_type of {name} is {kind!r}, which is not known here; "
                    "only default and llama3")
  theta = _number({"rope_theta": config.get("rope_theta", 10_000.0)} | given, "rope_theta", 0.0)
  if given.get("partial_rotary_factor") not in (1, None):
    raise UserError(f"config.json: partial_rotary_factor is {given['partial_rotary_factor']!r}, "
                    "which cannot be had here; only 1")
  if kind == "default":
    return theta, None
  # Where the trained length is not stated, transformers takes the context.
  length = config.get(_LLAMA3[-1], given.get(_LLAMA3[-1], max_length))
  numbers = {key: _number(given, key, 0.0) for key in _LLAMA3[:-1]}
  return theta, core.freeze({**numbers, _LLAMA3[-1]: _size({_LLAMA3[-1]: length}, _LLAMA3[-1:], 0)})


def _windows(config: Mapping[str, Any]) -> dict[str, Any]:
  """Which of qwen3's layers see a window alone, and its length."""
  layers = config.get("num_hidden_layers", 32)
  window = _size(config, ("sliding_window",), 4096) if _flag(config, "use_sliding_window") else None
  kinds = config.get("layer_types")
  if kinds is None:
    full = layers if window is None else min(config.get("max_window_layers", 28), layers)
    kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
  known = ["full_attention", *(["sliding_attention"] if window else [])]
  if len(kinds) != layers or not set(kinds) <= set(known):
    raise UserError(f"config.json: layer_types is {kinds}; it must be {layers} of "
                    f"{' and '.join(known)}, where use_sliding_window is {window is not None}")
  full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
  if len(full) == layers:
    return {}
  return {"window": window, "full_layers": full}


def _config(model: gpt.GPT) -> dict[str, Any]:
  """The content of config.json for a model.

  The tokens that begin and end a text are the tokenizer's, and not known here.
  """
  kind = _kind(model)
  if kind == "llama" and model.embed_dim % model.num_heads:
    raise UserError("transformers' llama wants a width that its heads divide, and "
                    f"{model.num_heads} do not divide {model.embed_dim}")
  config = {"model_type": kind, "architectures": [_CLASSES[kind][0]],
            **{names[0]: getattr(model, ours) for ours, (names, _) in _SIZES[kind].items()},
            "tie_word_embeddings": model.tied,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}
  if kind == "gpt2":
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == model.activation)
    return {**config, "activation_function": activation, "layer_norm_epsilon": model.epsilon,
            "scale_attn_by_inverse_layer_idx": model.scale_by_layer,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)}
  config |= {
      "num_key_value_heads": model.num_kv_heads or model.num_heads,
      "head_dim": model.size_of_head, "intermediate_size": model.mlp_dim or 4 * model.embed_dim,
      "hidden_act": "silu", "rms_norm_eps": model.epsilon, "attention_bias": model.use_bias,
      "attention_dropout": model.dropout,
      # The older form, which all versions read.
      "rope_theta": model.rope_theta,
      "rope_scaling": model.rope_scaling and {"rope_type": "llama3", **model.rope_scaling}}
  if kind == "llama":
    return {**config, "mlp_bias": model.use_bias if model.mlp_bias is None else model.mlp_bias}
  kinds = ["full_attention" if model.window is None or i in model.full_layers
           else "sliding_attention" for i in range(model.num_layers)]
  return {**config, "use_sliding_window": model.window is not None,
          "sliding_window": model.window, "layer_types": kinds}


TABLES = {"transformers": {gpt.GPT: _transformers}}
CONFIGS = {"transformers": _transformers_model}
WRITERS = {"transformers": {gpt.GPT: _config}}
# Class -> our path -> what fits an array to another size of the context.
RESIZERS = {gpt.GPT: {"params/positions": _crop}}
