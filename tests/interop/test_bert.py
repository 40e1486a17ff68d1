"""Parity with transformers' BERT, and what its folders may hold."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from dljax import interop
from dljax.errors import UserError
from dljax.interop.folder import config_of, model_of
from dljax.models import bert
from dljax.train import pretrained
from dljax.train.state import TrainState, parameter_count
from tests.fixtures import formula

SOURCE = "transformers"
HEADS = {"bert_none": "none", "bert_mlm": "mlm", "bert_untied": "mlm", "bert_pretraining": "pretraining",
         "bert_sequence": "sequence", "bert_token": "token", "bert_span": "span"}
WORDS = "cls.predictions"


def _fixture(name):
  """The fixture, its config.json, and its tensors."""
  fixture = formula.load(name)
  config = json.loads(fixture.pop("config").tobytes())
  return fixture, config, formula.bert_tensors(fixture["shapes"], config["tie_word_embeddings"])


def _write(folder, config, tensors):
  (folder / "config.json").write_text(json.dumps(config), "utf-8")
  safetensors.numpy.save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()},
                              folder / "model.safetensors")
  return folder


def _assert_equal(ours, theirs, tolerance):
  """Asserts that two rows' real places agree within a part of the difference between the rows."""
  if theirs.ndim == 3:  # the third row has the fewest places
    real = np.arange(theirs.shape[1]) < formula.token_rows(1, 1)[1][:, None]
    difference = np.abs(theirs[0] - theirs[1])[real[1]].max()
  else:
    real, difference = np.ones(len(theirs), bool), np.abs(theirs[0] - theirs[1]).max()
  assert difference > 0.1 * np.abs(theirs[real]).max()
  error = np.abs(np.asarray(ours, np.float64) - theirs)[real].max() / difference
  assert error < tolerance, f"off by {error:.1e}"


def _compare(name, folder, dtype, tolerance):
  """Asserts transformers' outputs for a folder as it would write it; returns model, variables and tensors."""
  fixture, config, tensors = _fixture(name)
  model, variables = interop.from_folder(_write(folder, config, tensors), SOURCE)
  assert model.head == HEADS[name]
  inputs = formula.token_rows(40, config["type_vocab_size"])
  with jax.enable_x64(dtype is jnp.float64):
    ours = jax.jit(model.clone(dtype=dtype).apply)(
        jax.tree.map(lambda x: x.astype(dtype), variables), *inputs)
  outputs = fixture.keys() & {"logits", "hidden", "pooled", "next_sentence"}
  assert len(outputs) > 1
  for output in outputs:
    _assert_equal(ours[output], fixture[output], tolerance)
  return model, variables, tensors


@pytest.mark.parametrize("name", HEADS)
def test_bert_gives_transformers_outputs(name, tmp_path):
  """In float64; and the tensors come back bit for bit, those of two names under both."""
  model, variables, tensors = _compare(name, tmp_path, jnp.float64, 1e-9)
  back = interop.dump(model, variables, SOURCE)
  assert back.keys() == tensors.keys()
  assert all(np.array_equal(x.view(np.uint32), tensors[key].view(np.uint32)) for key, x in back.items())


@pytest.mark.parametrize("name", [
    name if name in ("bert_none", "bert_pretraining") else pytest.param(name, marks=pytest.mark.slow) for name in HEADS])
def test_bert_gives_transformers_outputs_in_float32(name, tmp_path):
  _compare(name, tmp_path, jnp.float32, 1e-4)


def _sizes():
  with np.load(formula.FOLDER / "bert_sizes.npz") as file:
    return json.loads(file["sizes"].tobytes())


@pytest.mark.parametrize("size", [
    size if "large" not in size and "base" not in size or size == "bert_base/pretraining"
    else pytest.param(size, marks=pytest.mark.slow) for size in _sizes()])
def test_a_published_size_has_transformers_names_shapes_and_count(size):
  theirs, (variant, head) = _sizes()[size], size.split("/")
  model = bert.VARIANTS[variant](head=head, num_classes=2)
  variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
  assert parameter_count(variables["params"]) == theirs["parameters"]
  specs = traverse_util.flatten_dict(variables, sep="/")
  table = interop.find_table(model, SOURCE)
  shapes = {}
  for entry in table.entries(specs):
    parts = jax.eval_shape(entry.to_source, *(specs[path] for path in entry.paths))
    shapes |= {name: part.shape for name, part in zip(entry.names, parts, strict=True)}
  assert table.tie(shapes) == {name: tuple(shape) for name, shape in theirs["shapes"].items()}


def _older(tensors):
  return {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
          for key, x in tensors.items()}


def _without_second_names(tensors):
  return {key: x for key, x in tensors.items() if not key.startswith(f"{WORDS}.decoder")}


def _with_buffers(tensors):
  return {**tensors, "bert.embeddings.position_ids": np.arange(12)[None]}


def _without_prefix(tensors):
  return {key.removeprefix("bert."): x for key, x in tensors.items()}


@pytest.mark.parametrize("change", [_older, _without_second_names, _with_buffers, _without_prefix])
def test_files_of_other_versions_hold_the_same(change):
  _, _, tensors = _fixture("bert_mlm")
  model = bert.BERT(40, 12, 2, 32, 2, 4, 48, head="mlm")
  expected = interop.load(model, tensors, SOURCE)
  jax.tree.map(np.testing.assert_array_equal, interop.load(model, change(tensors), SOURCE), expected)
  assert interop.recognise(model, change(tensors)) == SOURCE


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_halved_weights_come_back_bit_for_bit(dtype):
  _, _, tensors = _fixture("bert_pretraining")
  halved = {key: x.astype(dtype) for key, x in tensors.items()}
  model = bert.BERT(40, 7, 2, 32, 2, 1, 48, head="pretraining")
  back = interop.dump(model, interop.load(model, halved, SOURCE, keep_dtype=True), SOURCE)
  assert back.keys() == halved.keys()
  for key, x in back.items():
    assert x.dtype == dtype
    np.testing.assert_array_equal(x.view(np.uint16), halved[key].view(np.uint16))


def test_a_model_takes_what_it_has_of_a_file_with_more_heads():
  """Published files often hold both heads of pre-training, whatever their config.json says."""
  _, _, tensors = _fixture("bert_pretraining")
  sizes = (40, 7, 2, 32, 2, 1, 48)
  whole = interop.load(bert.BERT(*sizes, head="pretraining"), tensors, SOURCE)["params"]
  for head in ("none", "mlm"):
    params = interop.load(bert.BERT(*sizes, head=head), tensors, SOURCE)["params"]
    assert params.keys() < whole.keys()
    jax.tree.map(np.testing.assert_array_equal, params, {key: whole[key] for key in params})
  with pytest.raises(UserError, match="left over"):
    interop.load(bert.BERT(*sizes, head="mlm"), {**tensors, "bert.encoder.layer.2.output.dense.bias": np.ones(32)}, SOURCE)
  with pytest.raises(UserError, match="classifier.bias, classifier.weight are missing"):
    interop.load(bert.BERT(*sizes, head="sequence"), tensors, SOURCE)


@pytest.mark.parametrize("source", [SOURCE, interop.OURS])
def test_fine_tuning_starts_from_any_head(source):
  """The model takes the heads that it shares with the source; the others are left out on both sides."""
  sizes = (40, 7, 2, 32, 2, 1, 48)
  models = {head: bert.BERT(*sizes, head=head, num_classes=3) for head in ("mlm", "pretraining", "sequence")}
  specs = {head: traverse_util.flatten_dict(jax.eval_shape(
      model.init, jax.random.key(0), np.zeros((1, 1), np.int32)), sep="/") for head, model in models.items()}
  _, _, tensors = _fixture("bert_pretraining")
  whole = traverse_util.flatten_dict(interop.load(models["pretraining"], tensors, SOURCE), sep="/")
  for old, new, fresh in (("pretraining", "sequence", {"params/head/kernel", "params/head/bias"}),
                          ("mlm", "sequence", {"params/head/kernel", "params/head/bias", "params/pooler/kernel",
                                               "params/pooler/bias"}),
                          ("pretraining", "mlm", set())):
    flat = {path: whole[path] for path in specs[old]}
    if source != interop.OURS:
      flat = interop.dump(models[old], traverse_util.unflatten_dict(flat, sep="/"), source)
    loaded = traverse_util.flatten_dict(interop.load(
        models[new], flat, source, specs=specs[new], partial=True), sep="/")
    assert specs[new].keys() - loaded.keys() == fresh
    for path, array in loaded.items():
      np.testing.assert_array_equal(array, whole[path])
    if fresh:
      with pytest.raises(UserError, match="missing"):
        interop.load(models[new], flat, source, specs=specs[new])


@dataclasses.dataclass
class _Task:
  """What starting from weights asks of a task."""

  model: bert.BERT

  def init(self, rng, batch):
    return self.model.init(rng, **batch)


def test_a_run_says_which_heads_start_from_scratch(tmp_path):
  _, config, tensors = _fixture("bert_mlm")
  _write(tmp_path, config, tensors)
  task = _Task(bert.BERT(40, 12, 2, 32, 2, 4, 48, head="sequence", num_classes=3))
  batch = {"tokens": jax.ShapeDtypeStruct((1, 1), np.int32)}
  init = types.SimpleNamespace(source=str(tmp_path), format="", new_head=False)
  experiment = types.SimpleNamespace(config=types.SimpleNamespace(init=init), task=task,
                                     data=types.SimpleNamespace(batch_spec=batch))
  params = jax.eval_shape(task.init, jax.random.key(0), batch)["params"]
  state = TrainState(step=0, params=params, model_state={}, opt_state={}, rng=None, ema={}, failed_step=0)
  weights = pretrained.load(experiment, state)
  assert weights.summary.endswith(
      "29 of 33 arrays; head/bias, head/kernel, pooler/bias, pooler/kernel start from scratch for 3 classes")
  np.testing.assert_array_equal(weights.arrays["params/embed/embedding"],
                                tensors["bert.embeddings.word_embeddings.weight"])


def test_of_two_biases_the_one_that_transformers_reads_counts():
  """Tied, they are one tensor; untied, it reads the decoder's, and earlier versions wrote the other name."""
  _, config, tensors = _fixture("bert_mlm")
  tied, untied = (bert.BERT(40, 12, 2, 32, 2, 4, 48, head="mlm", tied=tied) for tied in (True, False))
  bias, other = tensors[f"{WORDS}.decoder.bias"], f"{WORDS}.bias"
  for tensors_ in ({**tensors, other: bias + 1}, {key: x for key, x in tensors.items() if key != other}):
    np.testing.assert_array_equal(interop.load(untied, tensors_, SOURCE)["params"]["decoder_bias"], bias)
  only = {key: x for key, x in tensors.items() if key != f"{WORDS}.decoder.bias"}
  np.testing.assert_array_equal(interop.load(untied, only, SOURCE)["params"]["decoder_bias"], bias)
  with pytest.raises(UserError, match=f"{WORDS}.bias and {WORDS}.decoder.bias differ"):
    interop.load(tied, {**tensors, other: bias + 1}, SOURCE)
  assert config["tie_word_embeddings"]


@pytest.mark.parametrize("change, expected", [
    ({}, {"num_classes": 3, "head_dropout": 0.3, "mlp_dim": 48, "epsilon": 1e-12}),
    ({"intermediate_size": 80}, {"mlp_dim": None}),
    ({"classifier_dropout": None, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0.2},
     {"head_dropout": None, "dropout": 0.0, "attention_dropout": 0.2}),
    ({"id2label": None}, {"num_classes": 2}), ({"id2label": None, "num_labels": 4}, {"num_classes": 4}),
    ({"architectures": None}, {"head": "none"}), ({"hidden_act": "gelu_fast"}, {"activation": "gelu_tanh"}),
    ({"position_embedding_type": "absolute", "pruned_heads": {}}, {"head": "sequence"}),
])
def test_a_config_says_the_settings(change, expected, tmp_path):
  _, config, _ = _fixture("bert_sequence")
  model = model_of(_write(tmp_path, {**config, **change}, {}), SOURCE)
  assert {key: getattr(model, key) for key in expected} == expected


@pytest.mark.parametrize("name", HEADS)
def test_a_config_is_written_as_transformers_writes_it(name, tmp_path):
  _, config, _ = _fixture(name)
  model = model_of(_write(tmp_path, config, {}), SOURCE)
  written = config_of(model, SOURCE)
  assert len(written) >= 15 and {key: config[key] for key in written} == written
  assert model_of(_write(tmp_path, written, {}), SOURCE) == model


@pytest.mark.parametrize("change, message", [
    ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'.*only 'absolute'"),
    ({"is_decoder": True}, "is_decoder is True.*only False"),
    ({"add_cross_attention": True}, "add_cross_attention is True.*only False"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads is .*only {}"),
    ({"hidden_act": "mish"}, "hidden_act is 'mish'.*only gelu, "),
    ({"architectures": ["BertLMHeadModel"]}, r"architectures \['BertLMHeadModel'\] have no counterpart.*BertForMaskedLM"),
    ({"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering has 3 labels; a span has two"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is .*only None"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'.*true or false"),
    ({"layer_norm_eps": 0}, "layer_norm_eps is 0; it must be a number above 0"),
    ({"hidden_size": "20"}, "hidden_size is '20'.*whole number above 0"),
    ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5.*from 0 to below 1"),
    ({"num_attention_heads": 3}, "3 heads do not divide a width of 20"),
    ({"model_type": "roberta"}, "no family here has this model of transformers.*roberta"),
])
def test_other_configs_are_refused(change, message, tmp_path):
  _, config, tensors = _fixture("bert_sequence")
  with pytest.raises(UserError, match=message) as error:
    interop.from_folder(_write(tmp_path, {**config, **change}, tensors), SOURCE)
  assert "\n" not in str(error.value)
