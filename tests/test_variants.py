"""Every variant of every family, chosen on the command line alone: which network it gives, and of which size."""

import contextlib
import dataclasses
import importlib

import jax
import ml_collections
import pytest

from dljax.config import apply_overrides
from dljax.errors import UserError
from dljax.models import baselines, rnn
from dljax.train.state import parameter_count
from tests.families import EXPERIMENTS, FAMILIES

IMAGENET = ("imagenet2012", [])
PENN = ("lm1b", ["data.vocab_size=10000"])
WORDS = ("lm1b", ["data.vocab_size=1000"])
PAIRS = ["data.mask_classes=2", "data.mask_values=1,2", "data.mask_names=a,b",
         "data.mean=0", "data.std=1"]
COCO = ("coco", ["data.num_classes=91"])
GPT2 = ("openwebtext", ["model.max_length=1024"])
VIT = ("imagenet2012", ["model.pool=token", "model.positions=learned"])
# Variant -> the preset that suits it, fields of the data or of the head, and the published number of parameters.
CASES = {
    "mlp": {"mlp": ("mnist", [], 669_706), "perceptron": ("mnist", [], 7_850)},
    "lenet": {"lenet5": ("mnist", [], 61_706)},
    "alexnet": {"alexnet": (*IMAGENET, 61_100_840), "alexnet_2012": (*IMAGENET, 60_965_224)},
    "vgg": {
        "vgg11": (*IMAGENET, 132_863_336), "vgg13": (*IMAGENET, 133_047_848),
        "vgg16": (*IMAGENET, 138_357_544), "vgg19": (*IMAGENET, 143_667_240),
        "vgg11_bn": (*IMAGENET, 132_868_840), "vgg13_bn": (*IMAGENET, 133_053_736),
        "vgg16_bn": (*IMAGENET, 138_365_992), "vgg19_bn": (*IMAGENET, 143_678_248)},
    "resnet": {
        "resnet18": (*IMAGENET, 11_689_512), "resnet34": (*IMAGENET, 21_797_672),
        "resnet50": (*IMAGENET, 25_557_032), "resnet101": (*IMAGENET, 44_549_160),
        "resnet152": (*IMAGENET, 60_192_808), "resnet20": ("cifar10", [], 269_722),
        "resnet32": ("cifar10", [], 464_154), "resnet56": ("cifar10", [], 853_018)},
    "efficientnet": {
        "efficientnet_b0": (*IMAGENET, 5_288_548), "efficientnet_b1": (*IMAGENET, 7_794_184),
        "efficientnet_b2": (*IMAGENET, 9_109_994), "efficientnet_b3": (*IMAGENET, 12_233_232),
        "efficientnet_b4": (*IMAGENET, 19_341_616), "efficientnet_b5": (*IMAGENET, 30_389_784),
        "efficientnet_b6": (*IMAGENET, 43_040_704), "efficientnet_b7": (*IMAGENET, 66_347_960),
        "efficientnet_nano": ("digits", [], 178_962)},
    "vit": {
        "vit_ti16": (*VIT, 5_717_416), "vit_s16": (*VIT, 22_050_664), "vit_b16": (*VIT, 86_567_656),
        "vit_b32": (*VIT, 88_224_232), "vit_l16": (*VIT, 304_326_632), "vit_nano": ("digits", [], 675_562)},
    "retinanet": {
        "retinanet_resnet50_fpn": (*COCO, 34_068_119), "retinanet_resnet50_fpn_v2": (*COCO, 38_198_935),
        "retinanet_resnet101_fpn": (*COCO, 53_060_247), "retinanet_small": ("digit_scenes", [], 1_562_116)},
    "unet": {
        # 572 pixels are the paper's; without padding no preset's own size fits four poolings.
        "unet_2015": ("oxford_iiit_pet", [*PAIRS, "data.image_shape=572,572,1"], 31_030_658),
        "unet_padded": ("oxford_iiit_pet", [*PAIRS, "data.image_shape=128,128,1"], 31_036_546),
        "unet_small": ("oxford_iiit_pet", [*PAIRS, "data.image_shape=128,128,1"], 482_466)},
    "rnn": {
        "rnn_elman": (*WORDS, 776_168), "rnn_gru": (*WORDS, 1_302_504), "rnn_lstm": (*WORDS, 1_565_672),
        "rnn_zaremba_small": (*PENN, 4_653_200), "rnn_zaremba_medium": (*PENN, 19_780_400),
        "rnn_zaremba_large": (*PENN, 66_034_000), "rnn_awd_lstm": (*PENN, 24_221_600),
        "rnn_forecaster": ("temperatures", ["data.channels=Basel", "data.covariates="], 50_497),
        "seasonal_naive": ("temperatures", [], 0), "dlinear": ("etth1", [], 64_704)},
    "gpt": {
        "gpt2": (*GPT2, 124_439_808), "gpt2_medium": (*GPT2, 354_823_168), "gpt2_large": (*GPT2, 774_030_080),
        "gpt2_xl": (*GPT2, 1_557_611_200),
        "llama_smollm2_135m": ("smollm_135m", ["model.lora_rank=0"], 134_515_008),
        "qwen3_0_6b": ("smollm_135m", ["model.lora_rank=0", "data.vocab_size=151936", "model.max_length=40960"],
                       596_049_920),
        "gpt_nano": ("pydoc", ["data.length=64"], 828_672), "llama_nano": ("pydoc", ["data.length=64"], 722_176)},
    # As a classifier, with the pooler; transformers counts these of BertForSequenceClassification.
    "bert": {
        "bert_tiny": ("glue_sst2", [], 4_386_178), "bert_small": ("glue_sst2", [], 28_764_674),
        "bert_base": ("glue_sst2", [], 109_483_778), "bert_large": ("glue_sst2", [], 335_143_938),
        "bert_nano": ("pydoc_mlm", [], 551_696)},
    "deepspeech": {
        "deepspeech2": ("librispeech", [], 53_337_533), "deepspeech_small": ("morse", [], 469_750)},
}


# Tracing these takes up to three seconds a variant.
SLOW = ("vgg", "resnet", "efficientnet", "retinanet", "unet")
# Those that have to be the networks whose parameters tests/models counts, with as many classes.
COUNTED = {
    "resnet": {"resnet34": 1000, "resnet101": 1000, "resnet152": 1000, "resnet32": 10, "resnet56": 10},
    "efficientnet": {f"efficientnet_b{i}": 1000 for i in range(1, 8)},
    "retinanet": {"retinanet_resnet50_fpn": 91, "retinanet_resnet101_fpn": 91}}
# Settings without parameters, which a preset may give a network.
NO_PARAMETERS = ("dtype", "remat", "strides", "stem_stride", "dropout", "stochastic_depth", "zero_init_residual")


def _variants(family):
  own = dict(getattr(EXPERIMENTS[family], family).VARIANTS)
  return own | dict(baselines.VARIANTS) if family == "rnn" else own


def _build(family, preset, *arguments):
  config = EXPERIMENTS[family].get_config(preset)
  apply_overrides(config, [f"--config.{argument}" for argument in arguments])
  return EXPERIMENTS[family].build(config)


def _build_suiting(family, variant):
  """By the preset of CASES, or for a family that is not there by the first that suits the variant."""
  if family in CASES:
    default = next(iter(EXPERIMENTS[family].PRESETS)), [], None
    preset, fields, _ = CASES[family].get(variant, default)
    return _build(family, preset, *fields, f"model.variant={variant}")
  for preset in EXPERIMENTS[family].PRESETS:
    with contextlib.suppress(UserError):
      return _build(family, preset, f"model.variant={variant}")
  pytest.fail(f"no preset of {family} suits {variant}")


@pytest.mark.parametrize("family, variant", [(f, v) for f in FAMILIES for v in _variants(f)])
def test_a_variant_is_reached_by_its_name_alone(family, variant):
  model = _build_suiting(family, variant).task.model
  entry = _variants(family)[variant]
  assert isinstance(model, getattr(entry, "func", entry))
  for field, value in getattr(entry, "keywords", {}).items():
    assert getattr(model, field) == value, field


@pytest.mark.parametrize("family, variant", [(f, v) for f, variants in COUNTED.items() for v in variants])
def test_a_deep_variant_is_the_network_that_is_counted(family, variant):
  preset, fields, count = CASES[family][variant]
  model = _build(family, preset, *fields, f"model.variant={variant}").task.model
  counted = _variants(family)[variant](num_classes=COUNTED[family][variant])
  fields = {field.name for field in dataclasses.fields(model)}
  given = {name: getattr(model, name) for name in NO_PARAMETERS if name in fields}
  assert counted.clone(**given) == model
  assert count == _published(family)[variant]


def _published(family):
  """The numbers that tests/models finds."""
  tests = importlib.import_module(f"tests.models.test_{family}")
  return {**tests.IMAGENET, **tests.CIFAR} if family == "resnet" else tests.COUNTS


@pytest.mark.parametrize("family, variant", [
    pytest.param(f, v, marks=[pytest.mark.slow] if f in SLOW else [])
    for f, variants in CASES.items() for v in variants if v not in COUNTED.get(f, ())])
def test_a_variant_has_its_published_size(family, variant):
  preset, fields, count = CASES[family][variant]
  experiment = _build(family, preset, *fields, f"model.variant={variant}")
  batch = {name: jax.ShapeDtypeStruct((2, *spec.shape[1:]), spec.dtype)
           for name, spec in experiment.data.batch_spec.items()}
  shapes = jax.eval_shape(experiment.task.init, jax.random.key(0), batch)
  assert parameter_count(shapes.get("params", {})) == count


def test_other_flags_win_over_the_variant_wherever_they_stand():
  flags = ["model.variant=rnn_awd_lstm", "model.dropout=0.2", "model.embed_dim=8"]
  first, last = _build("rnn", "pydoc", *flags), _build("rnn", "pydoc", *reversed(flags))
  assert first.task.model == last.task.model == rnn.VARIANTS["rnn_awd_lstm"](
      vocab_size=257, dropout=0.2, embed_dim=8)


def test_the_last_of_several_variants_counts():
  model = _build("unet", "digit_scenes", "model.variant=unet_padded", "model.variant=unet_small").task.model
  assert (model.width, model.num_pools) == (16, 3)


def test_a_notebook_chooses_a_variant_by_assignment():
  config = EXPERIMENTS["vit"].get_config("imagenet2012").copy_and_resolve_references()
  config.model.variant = "vit_b32"
  assert EXPERIMENTS["vit"].build(config).task.model.patch_size == 32


def test_strides_for_small_images_stay_where_the_number_of_stages_does():
  assert _build("efficientnet", "cifar10", "model.variant=efficientnet_b1").task.model.strides == (1, 1, 2, 2, 1, 2, 1)
  assert _build("efficientnet", "digits", "model.variant=efficientnet_b1").task.model.strides == (1, 2, 2, 2, 1, 2, 1)
  assert _build("efficientnet", "cifar10", "model.variant=efficientnet_nano").task.model.strides == (1, 2, 2, 1)


def test_a_stored_run_takes_the_fields_of_another_variant_too():
  preset = EXPERIMENTS["rnn"].get_config("pydoc")
  stored = ml_collections.ConfigDict(preset.to_dict())
  apply_overrides(stored, ["--config.model.variant=rnn_gru"], preset)
  assert (stored.model.cell, stored.model.embed_dim) == ("gru", 256)
  assert preset.model.variant == "rnn_lstm" and preset.model.embed_dim == 64


@pytest.mark.parametrize("preset, flag, words", [
    ("pydoc", "model.variant=rnn_lstn", "--config.model.variant: there is no 'rnn_lstn'; did you mean rnn_lstm"),
    ("pydoc", "model.variant=rnn_forecaster", "--config.model.variant: there is no 'rnn_forecaster'"),
    ("etth1", "model.variant=rnn_lstm", "--config.model.variant: there is no 'rnn_lstm'"),
    ("etth1", "model.variant=dlinaer", "did you mean dlinear"),
    ("pydoc", "task=forecasting", "--config.task cannot be set; use --preset"),
    ("pydoc", "seed=7", "--config.seed cannot be set; use --seed=7"),
])
def test_what_does_not_suit_the_task_is_refused(preset, flag, words):
  with pytest.raises(UserError) as error:
    _build("rnn", preset, flag)
  assert words in str(error.value)


@pytest.mark.parametrize("flags, line", [
    (["model.variant=gpt3"], "--config.model.variant: there is no 'gpt3'; did you mean gpt2"),
    (["model.norm=rmsnorm"], "--config.model.norm: there is no 'rmsnorm'; did you mean rms"),
    (["model.num_heads=3"], "--config.model.num_heads=3: must divide embed_dim, 128, or give head_dim"),
    (["model.num_kv_heads=3"], "--config.model.num_kv_heads=3: must divide num_heads, 4"),
    (["model.head_dim=5"], "a head's width is even"),
    (["model.window=-1"], "--config.model.window=-1: must be at least 0"),
    (["model.epsilon=0"], "--config.model.epsilon=0.0: must be above 0"),
    (["model.dropout=1"], "--config.model.dropout=1.0: must be at least 0 and below 1"),
    (["model.max_length=64"], "--config.data.length=128: is above the context, --config.model.max_length=64"),
])
def test_a_decoder_that_cannot_be_is_refused(flags, line):
  with pytest.raises(UserError) as error:
    _build("gpt", "pydoc", *flags)
  assert line in str(error.value)


def test_the_task_alone_decides_what_is_built():
  """Language models and forecasters both have a variant, and `config.task` parts them."""
  for preset in EXPERIMENTS["rnn"].PRESETS:
    config = EXPERIMENTS["rnn"].get_config(preset)
    task = EXPERIMENTS["rnn"].build(config).task
    assert config.model.variant and type(task).__module__.endswith(config.task)
