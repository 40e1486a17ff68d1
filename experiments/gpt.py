r"""Decoders: GPT-2, and the form of llama and qwen3.

  python -m experiments.gpt
  python -m experiments.gpt --mode=predict --prompt="The with statement"

The first gives 1.55 bits per byte on the validation topics and 2.08 on the test topics with Python
3.13.0, in 2 minutes on two CPU cores with AVX-512 (the LSTM of experiments/rnn.py: 2.61 and 2.85).
--config.model.variant chooses another network, such as gpt2.

Shakespeare must be prepared first:
  python -m dljax.data.prepare tiny_shakespeare
  python -m experiments.gpt --preset=tiny_shakespeare_cpu
  python -m experiments.gpt --preset=tiny_shakespeare

The first of these has the tokens (1.5 million) and the parameters (795,776) of nanoGPT's recipe for
a CPU, 4 layers of width 128 and windows of 64, but today's form of a decoder and Muon in place of
AdamW. Of the held-out tenth, which is TFDS' validation and test together, its last weights give 1.59
nats per character over windows that do not overlap, and 1.55 over windows that step by half
(--mode=eval --config.data.eval_stride=32), after 2 minutes on the same cores. nanoGPT reports 1.88.
The second is nanoGPT's recipe for a GPU, with 10.7 million parameters, for which it reports 1.4697;
it has not been run here.

GPT-2 from scratch on OpenWebText (nanoGPT reports a loss of 2.85) is for a pod, and has been
compiled for one and not run; the text is held in memory, 4 bytes for each of its 9 billion tokens:
  python -m experiments.gpt --preset=openwebtext --dry_run --topology=v5e:4x4

Weights of SmolLM2, in a folder as transformers has it, are adapted to a text of your own by matrices
of low rank (LoRA). The folder's tokenizer is taken:
  python -m experiments.gpt --preset=smollm_135m --config.init.source=SmolLM2-135M/ \
      --config.data.file=book.txt
"""

from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from dljax import errors, launch
from dljax.config import ModelConfig, one_of
from dljax.errors import UserError
from dljax.models import gpt
from dljax.recipes import common, language_modeling
from dljax.train.experiment import Experiment

PRESETS: Mapping[str, str] = {
    "pydoc": "A small llama on the bytes of Python's own documentation, which ships inside Python; offline, minutes.",
    "tiny_shakespeare_cpu": "A network of the size of nanoGPT's recipe for a CPU, on the characters of Shakespeare; minutes.",
    "tiny_shakespeare": "nanoGPT's 10.7 million parameters on the same text; hours on two cores, minutes on a GPU.",
    "openwebtext": "GPT-2 of 124 million parameters from scratch, on the texts that Reddit linked to; for a pod.",
    "smollm_135m": "SmolLM2's weights, adapted to a text of your own by matrices of low rank.",
}


def _config(
    preset: str, data: str, variant: str, optimizer: str = "adamw",
) -> ml_collections.ConfigDict:
  """The fields that all presets share."""
  config = language_modeling.config("gpt", preset, data=data, variant=variant, optimizer=optimizer)
  config.model.update({
      "max_length": 0, **_settings(gpt.VARIANTS[variant]()), "dropout": 0.0, "layer_scan": False,
      "lora_rank": 0, "lora_alpha": 16.0})
  config.optimizer.clip_norm = 1.0
  return config


def _small(preset: str, data: str) -> ml_collections.ConfigDict:
  """The fields of small networks that are trained from scratch, in today's form.

  Muon and the norm of queries and keys are those of Jordan et al. 2024,
  https://github.com/KellerJordan/modded-nanogpt.
  """
  config = _config(preset, data, "llama_nano", "muon")
  config.model.update({"num_kv_heads": 0, "qk_norm": True})
  config.optimizer.update({"b2": 0.99, "weight_decay": 0.01, "warmup_fraction": 0.05})
  return config


def _pydoc() -> ml_collections.ConfigDict:
  config = _small("pydoc", "pydoc")
  config.data.length = 128
  config.optimizer.weight_decay = 0.1
  config.update({
      "total_steps": 800, "batch_size": 16, "eval_batch_size": 32, "log_every": 20,
      "eval_every": 200, "checkpoint_every": 200})
  return config


def _tiny_shakespeare_cpu() -> ml_collections.ConfigDict:
  """The size of nanoGPT's command for a CPU: 4 layers of width 128, and 1.5 million tokens.

  nanoGPT takes 2000 batches of 12 windows of 64; batches of 16 divide over devices.
  """
  config = _small("tiny_shakespeare_cpu", "tiny_shakespeare")
  # Its held-out tenth, by which nothing is chosen: the last weights count.
  config.data.update({"length": 64, "validation": "", "test": "validation+test"})
  config.model.mlp_dim = 341  # as many parameters as four times the width, without a gate
  config.update({
      "total_steps": 1500, "batch_size": 16, "eval_batch_size": 64, "log_every": 50,
      "eval_every": 1500, "checkpoint_every": 500, "monitor": ""})
  return config


def _tiny_shakespeare() -> ml_collections.ConfigDict:
  """nanoGPT's config for a GPU: GPT-2's form, 6 layers of width 384, 5000 batches of 64 x 256."""
  config = _config("tiny_shakespeare", "tiny_shakespeare", "gpt_nano")
  config.data.length = 256
  config.model.update({"embed_dim": 384, "num_layers": 6, "num_heads": 6, "dropout": 0.2})
  config.optimizer.update({
      "learning_rate": 1e-3, "b2": 0.99, "weight_decay": 0.1, "end_factor": 0.1,
      "warmup_fraction": 0.02})
  config.update({
      "total_steps": 5000, "batch_size": 64, "eval_batch_size": 64, "log_every": 10,
      "eval_every": 250, "checkpoint_every": 250})
  return config


def _openwebtext() -> ml_collections.ConfigDict:
  """nanoGPT's config for GPT-2: 600,000 batches of 491,520 tokens."""
  config = _config("openwebtext", "openwebtext", "gpt2")
  config.data.length = 1024
  config.model.update({"dtype": "bfloat16", "use_bias": False, "layer_scan": True, "remat": True})
  config.optimizer.update({
      "learning_rate": 6e-4, "b2": 0.95, "weight_decay": 0.1, "end_factor": 0.1,
      "warmup_fraction": 1 / 300})
  config.update({
      "total_steps": 600_000, "batch_size": 480, "eval_batch_size": 64, "log_every": 10,
      "eval_every": 1000, "checkpoint_every": 1000})
  return config


def _smollm_135m() -> ml_collections.ConfigDict:
  config = _config("smollm_135m", "pydoc", "llama_smollm2_135m")
  config.data.update({"length": 512, "vocab_size": 49152})
  config.model.update({"max_length": 8192, "lora_rank": 8, "dtype": "bfloat16"})
  config.optimizer.update({"learning_rate": 2e-4, "weight_decay": 0.0})
  config.update({
      "total_steps": 500, "batch_size": 16, "eval_batch_size": 16, "log_every": 10,
      "eval_every": 100, "checkpoint_every": 100})
  return config


_CONFIGS = {
    "pydoc": _pydoc, "tiny_shakespeare_cpu": _tiny_shakespeare_cpu,
    "tiny_shakespeare": _tiny_shakespeare, "openwebtext": _openwebtext,
    "smollm_135m": _smollm_135m}
_FIELDS = {
    "variant": one_of("The network", gpt.VARIANTS),
    "max_length": "The context, in tokens; 0 takes data.length.",
    "embed_dim": "The width of a token's vector.",
    "num_layers": "The number of blocks.",
    "num_heads": "The number of attention heads.",
    "num_kv_heads": "The number of heads of keys and values; 0 takes num_heads.",
    "head_dim": "The width of a head; 0 takes embed_dim / num_heads.",
    "mlp_dim": "The width of the perceptrons' hidden layer; 0 takes four times embed_dim.",
    "norm": one_of("The norm", gpt.NORMS),
    "epsilon": "The number that the norm adds to the variance or the mean square.",
    "positions": one_of("The kind of positions", gpt.POSITIONS),
    "rope_theta": "The base of the rotary frequencies.",
    "activation": one_of("The perceptrons' activation", gpt.ACTIVATIONS),
    "use_bias": "Whether products and layer norms have biases.",
    "qk_norm": "Whether the queries and keys of each head are normalised.",
    "tied": "Whether the head's kernel is the embedding.",
    "window": "The number of tokens that a token sees, itself included; 0 is all.",
    "scale_by_layer": "Whether attention scores are divided by the number of the layer.",
    "dropout": "The probability of dropping a value, or an attention weight, in training.",
    "layer_scan": "Whether one block is compiled for all layers, in a scan over their weights.",
    "lora_rank": "The rank of adapters, beside which all weights are frozen; 0 trains all weights.",
    "lora_alpha": "The adapters' factor is lora_alpha / lora_rank.",
}
# What a variant decides.
_DECIDED = ("embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "norm",
            "epsilon", "positions", "rope_theta", "activation", "use_bias", "qk_norm", "tied",
            "window", "scale_by_layer")
_OPTIONAL = ("num_kv_heads", "head_dim", "mlp_dim", "window")  # 0 in place of None
_FROZEN = ("embed/*", "*/kernel", "*/scale")  # beside adapters


def _settings(model: gpt.GPT) -> dict[str, Any]:
  """What a variant decides, as fields of `config.model`."""
  return {field: getattr(model, field) or 0 if field in _OPTIONAL else getattr(model, field)
          for field in _DECIDED}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = _CONFIGS[preset]()
  config.model.describe(_FIELDS)
  config.model = ModelConfig(config.model, {
      name: _settings(variant()) for name, variant in gpt.VARIANTS.items()})
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  model = config.model
  errors.choose("--config.model.variant", model.variant, gpt.VARIANTS)
  for field, known in (("norm", gpt.NORMS), ("positions", gpt.POSITIONS),
                       ("activation", gpt.ACTIVATIONS)):
    errors.choose(f"--config.model.{field}", model[field], dict.fromkeys(known))
  for field in ("embed_dim", "num_layers", "num_heads"):
    if model[field] < 1:
      raise UserError(f"--config.model.{field}={model[field]}: must be at least 1")
  for field in ("max_length", "lora_rank", *_OPTIONAL):
    if model[field] < 0:
      raise UserError(f"--config.model.{field}={model[field]}: must be at least 0")
  for field in ("epsilon", "rope_theta", "lora_alpha"):
    if model[field] <= 0:
      raise UserError(f"--config.model.{field}={model[field]}: must be above 0")
  common.check_model(model)
  if not model.head_dim and model.embed_dim % model.num_heads:
    raise UserError(f"--config.model.num_heads={model.num_heads}: must divide embed_dim, "
                    f"{model.embed_dim}, or give head_dim")
  if model.num_kv_heads and model.num_heads % model.num_kv_heads:
    raise UserError(f"--config.model.num_kv_heads={model.num_kv_heads}: must divide num_heads, "
                    f"{model.num_heads}")
  if model.positions == "rotary" and (model.head_dim or model.embed_dim // model.num_heads) % 2:
    raise UserError("--config.model.positions=rotary turns pairs of a head's values; choose "
                    "head_dim, or embed_dim and num_heads, so that a head's width is even")
  if model.max_length and config.data.length > model.max_length:
    raise UserError(f"--config.data.length={config.data.length}: is above the context, "
                    f"--config.model.max_length={model.max_length}; make it smaller")
  settings = {field: model[field] for field in _DECIDED}
  settings |= {field: settings[field] or None for field in _OPTIONAL}
  network = gpt.GPT(
      vocab_size=config.data.vocab_size, max_length=model.max_length or config.data.length,
      **settings, dropout=model.dropout, lora_rank=model.lora_rank, lora_alpha=model.lora_alpha,
      dtype=common.dtype(config), remat=model.remat, layer_scan=model.layer_scan)
  return language_modeling.build(config, network, stateful=False)


def _resolve(config: ml_collections.ConfigDict, given: Collection[str]) -> Mapping[str, Any]:
  """What the user's own data decide; and with adapters, that all else is frozen."""
  found = dict(language_modeling.resolve(config, given))
  if config.model.lora_rank and "optimizer.freeze" not in given:
    found["optimizer.freeze"] = (
        *_FROZEN, *("positions",) * (config.model.positions == "learned"),
        *("*/bias",) * config.model.use_bias)
  return found


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS, _resolve)
