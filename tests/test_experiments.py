"""Every experiment as it is shipped: presets build without data; families train, evaluate and predict.

What is asked of every family is what DESIGN.md promises; image classifiers are asked for more.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
import shutil
import struct
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from dljax import config as config_lib
from dljax import optim
from dljax.data import sources
from dljax.data.datasets import EMBEDDED, digit_scenes
from dljax.interop import variants
from dljax.models import alexnet, efficientnet, lenet, mlp, resnet, vgg, vit
from dljax.tasks.base import MAX
from dljax.tasks.classification import Classification
from dljax.train import workdir as workdir_lib
from dljax.train.checkpoint import Checkpointer
from dljax.train.experiment import Experiment
from dljax.train.loop import fit
from dljax.train.program import Program, RunOptions
from dljax.train.state import TrainState, parameter_count, state_sha256
from tests import smallest
from tests.command import plain_pictures, run
from tests.families import EXPERIMENTS, ROOT, SHOWN

SHARED = ROOT.parent / "shared" / "data" / "tfds"
PRESETS = [(family, preset) for family, module in EXPERIMENTS.items() for preset in module.PRESETS]
# How the default preset is shortened, by recipe; model and data stay as shipped. One device compiles fastest.
SHORTENED = {"total_steps": 60, "log_every": 5, "eval_every": 30}
FEW_STEPS = {"total_steps": 6, "log_every": 1, "eval_every": 3}
FEW_IMAGES = FEW_STEPS | {
    "batch_size": 4, "eval_batch_size": 8, "data.validation": "validation[:20]", "data.test": "test[:20]"}
RECIPES = {
    "image_classification": SHORTENED | {"batch_size": 32},
    "language_modeling": {
        "total_steps": 20, "log_every": 2, "eval_every": 10, "data.length": 16, "eval_batch_size": 64,
        "data.validation": "validation[:1]", "data.test": "test[:1]"},
    "object_detection": FEW_IMAGES,
    "semantic_segmentation": FEW_IMAGES,
    "speech": FEW_STEPS | {
        "batch_size": 4, "eval_batch_size": 8, "data.train": "train[:64]", "data.validation": "validation[:20]",
        "data.test": "test_10db[:20]", "data.buckets": 1, "model.beam": 2},
    "text_classification": {
        "total_steps": 40, "log_every": 4, "eval_every": 20, "batch_size": 16, "eval_batch_size": 64,
        "data.length": 32, "data.buckets": 1},
}
# Known of some, beyond what is asked of all: to what share the loss falls, and how many parameters there are.
FALLS_TO = {"mlp": 0.3, "vit": 0.75}  # a transformer learns more slowly than the rest
STEPS = {name: {"total_steps": 30, "eval_every": 15} for name in ("mlp", "lenet")}  # these learn faster
SIZES = ("ap_small", "ap_medium", "ap_large")
PARAMETERS = {"mlp": 301_066, "lenet": 61_706, "resnet": 269_434, "alexnet": 552_890, "vgg": 679_594,
              "efficientnet": 178_962, "vit": 675_562, "retinanet": 1_562_116, "unet": 482_619,
              "deepspeech": 469_750}
ON_ALL_DEVICES = "mlp"
SMALL = ("mlp", "lenet", "resnet")  # the smoke runs of the others are slow
# So few scenes are enough; tests/data/datasets prepares them all.
FEW_SCENES = {"train": 64, "validation": 20, "test": 20}


@functools.cache
def _abstract_state(family: str, preset: str) -> TrainState:
  """The state of a preset, traced once for all that is asked of it."""
  experiment = EXPERIMENTS[family].build(EXPERIMENTS[family].get_config(preset))
  return Program(experiment, RunOptions(mesh={"data": 1, "fsdp": 1, "tensor": 1})).abstract_state


def _recipe(family: str) -> str:
  """The name of the recipe that the experiment is built by."""
  modules = [value for value in vars(EXPERIMENTS[family]).values() if isinstance(value, types.ModuleType)]
  names = [module.__name__.rpartition(".")[2] for module in modules if module.__name__.startswith("dljax.recipes.")]
  return next((name for name in names if name in RECIPES), names[-1])


def _is_deep(family: str) -> bool:
  """Whether the default preset normalises over the batch, as deep networks do."""
  return "batch_stats" in _abstract_state(family, next(iter(EXPERIMENTS[family].PRESETS))).model_state


def _draws(family: str) -> bool:
  """Whether the smoke run draws its pictures: those of image classifiers have one recipe, and so two draw them."""
  return family in ("mlp", "lenet") or _recipe(family) != "image_classification"


def _shortened(family: str) -> dict[str, Any]:
  """The fields of the config by which the default preset takes seconds.

  Deep networks, which normalise over the batch or look for things in pictures, take a few steps only.
  """
  fields = RECIPES.get(_recipe(family), SHORTENED) | STEPS.get(family, {})
  if _recipe(family) == "image_classification" and family not in STEPS:
    fields = fields | {"eval_batch_size": 64}  # of 512, most would be padding
    if EXPERIMENTS[family].get_config(next(iter(EXPERIMENTS[family].PRESETS))).data.name == "digits":
      fields = fields | {"data.validation": "validation[:64]"}  # one batch; the test has all images
  if _is_deep(family):
    fields = fields | FEW_STEPS | ({"batch_size": 16} if fields.get("batch_size", 0) > 16 else {})
  return fields


def _classifies(experiment: Experiment) -> bool:
  """Whether it classifies images."""
  return isinstance(experiment.task, Classification) and "image" in experiment.data.batch_spec


def _falls_to(experiment: Experiment) -> float:
  """The share of its first value that the loss falls to; where players play against each other, it need not."""
  if len(experiment.task.players) > 1:
    return math.inf
  if experiment.config.total_steps <= FEW_STEPS["total_steps"]:  # they show no more than that numbers are finite
    return math.inf
  return FALLS_TO.get(experiment.config.family, 0.6 if _classifies(experiment) else 1.0)


@contextlib.contextmanager
def _quicker(family: str) -> Iterator[None]:
  """Deep networks have XLA's convolutions, and pictures are empty where others of their kind are looked at.

  VGG's wide convolutions take XLA longer to compute than ours to compile.
  """
  with contextlib.ExitStack() as stack:
    if _is_deep(family) and family != "vgg":
      stack.enter_context(smallest.native_convolutions())
    if not _draws(family):
      stack.enter_context(plain_pictures())
    yield


@pytest.fixture(scope="module", autouse=True)
def data_dir(prepared, tmp_path_factory) -> Iterator[Path]:
  """A TFDS directory that holds the digits, for all runs of this file."""
  root = tmp_path_factory.mktemp("tfds")
  _prepare("digits", root, prepared)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(root))
    yield root


def _prepare(name: str, root: Path, prepared: Callable[..., Path]) -> None:
  """Puts an embedded set into the directory `root`: a few scenes of digits, and the whole of any other set."""
  folder = root / name.partition("/")[0]
  if folder.exists():
    return
  if name == "digit_scenes":
    with mock.patch.object(digit_scenes, "SCENES", FEW_SCENES):
      sources.prepare_embedded(name, root)
  else:
    folder.symlink_to(prepared(name) / folder.name)


@pytest.mark.slow
def test_the_main_job_reaches_its_accuracy(tmp_path):
  outcome = run(EXPERIMENTS["lenet"], f"--workdir={tmp_path / 'run'}", "--mesh=data:1")
  assert outcome.status == 0, outcome
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["metrics"]["test"]["accuracy"] >= 0.98  # of 360 images, with one seed


# --- Presets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, preset", PRESETS)
def test_a_config_is_plain_typed_and_json(family, preset):
  config = EXPERIMENTS[family].get_config(preset)
  assert (config.family, config.preset) == (family, preset)
  assert set(config_lib.base_config(family, preset)) <= set(config)
  groups = {name for name, value in config.items() if isinstance(value, ml_collections.ConfigDict)}
  assert groups >= {"optimizer", "model", "data"} and all(config[group] for group in groups)
  config_lib.validate(config)
  for name, value in config_lib.flatten(config).items():
    items = value if isinstance(value, tuple) else (value,)
    assert all(type(item) in (bool, int, float, str) for item in items), name
    assert len({type(item) for item in items}) <= 1, f"{name} mixes types"
  stored = ml_collections.ConfigDict(workdir_lib._with_tuples(json.loads(json.dumps(config.to_dict()))))
  assert stored.to_dict() == config.to_dict(), "the workdir's config.json gives another config"
  again = EXPERIMENTS[family].get_config(preset)
  again.optimizer.learning_rate = 0.123
  assert EXPERIMENTS[family].get_config(preset).to_dict() == config.to_dict(), "configs share something"


@pytest.mark.parametrize("family, preset", PRESETS)
def test_every_field_has_a_sentence(family, preset):
  config = EXPERIMENTS[family].get_config(preset)
  by_flags = {"family", "preset", "task", "seed"}  # --help explains the flags
  for name in config_lib.flatten(config).keys() - by_flags:
    sentence = config_lib.sentence(config, name)
    own = name.startswith("model.") and family not in SHOWN  # a fork may say less of its network
    assert own or sentence[:1].isupper() and sentence.endswith("."), name
  choices = {"optimizer.schedule": optim.SCHEDULES, "optimizer.name": optim.OPTIMIZERS,
             "model.dtype": ("float32", "bfloat16")}
  if family in SHOWN:
    choices["model.variant"] = [config.model.variant]
  for name, values in choices.items():
    assert all(value in config_lib.sentence(config, name) for value in values)


@pytest.mark.parametrize("family, preset", PRESETS)
def test_a_preset_builds_without_data(family, preset, monkeypatch, tmp_path):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setattr(sources, "open_dataset", lambda name: pytest.fail(f"opened {name}"))
  config = EXPERIMENTS[family].get_config(preset)
  experiment = EXPERIMENTS[family].build(config)
  assert experiment.config is config
  assert "mask" in experiment.data.batch_spec
  assert all(spec.shape[0] == config.batch_size for spec in experiment.data.batch_spec.values())
  assert experiment.data.evals and set(experiment.data.evals) <= {"validation", "test"}
  assert experiment.monitor is None or experiment.monitor.partition("/")[0] in set(experiment.data.evals) - {"test"}
  if _classifies(experiment):
    assert {"image", "label"} <= set(experiment.data.batch_spec)
    assert list(experiment.data.evals) == ["validation", "test"] and experiment.monitor
  state = _abstract_state(family, preset)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family, preset, variants, count", [
    ("mlp", "mnist", mlp.VARIANTS, 669_706), ("lenet", "mnist", lenet.VARIANTS, 61_706),
    ("alexnet", "imagenet2012", alexnet.VARIANTS, 61_100_840), ("vgg", "imagenet2012", vgg.VARIANTS, 138_357_544),
    ("resnet", "imagenet2012", resnet.VARIANTS, 25_557_032),
    ("efficientnet", "imagenet2012", efficientnet.VARIANTS, 5_288_548),
    # timm's 22,050,664 without the class token and the learned positions of it and 196 patches
    ("vit", "imagenet2012", vit.VARIANTS, 22_050_664 - 384 - 197 * 384),
])
def test_presets_have_the_published_sizes(family, preset, variants, count):
  config = EXPERIMENTS[family].get_config(preset)
  assert config.model.variant in variants
  assert parameter_count(_abstract_state(family, preset).params) == count


# --- Smoke training ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trained:
  """A shortened run of a family's default preset.

  Attributes:
    family, preset: what ran.
    experiment: as it was built, after what shortened it.
    workdir: where.
  """

  family: str
  preset: str
  experiment: Experiment
  workdir: Path

  @property
  def splits(self) -> list[str]:
    """What was evaluated on the way."""
    return [split for split in self.experiment.data.evals if split != "test"]

  def result(self) -> Mapping[str, Any]:
    return json.loads((self.workdir / "result.json").read_text())


@pytest.fixture(scope="module", params=[
    pytest.param(family, marks=[] if family in SMALL else [pytest.mark.slow]) for family in EXPERIMENTS])
def trained(request, prepared, data_dir, tmp_path_factory) -> Trained:
  family, workdir = request.param, tmp_path_factory.mktemp(request.param) / "run"
  module = EXPERIMENTS[family]
  if (name := module.get_config(next(iter(module.PRESETS))).data.get("name")) in EMBEDDED:
    _prepare(name, data_dir, prepared)
  arguments = [f"--config.{name}={value}" for name, value in _shortened(family).items()]
  arguments += [] if family == ON_ALL_DEVICES else ["--mesh=data:1"]
  with _quicker(family):
    outcome = run(module, f"--workdir={workdir}", *arguments, "--config.checkpoint_every=1000")
  assert outcome.status == 0, outcome
  experiment = module.build(workdir_lib.Workdir(workdir).read_config())
  for words in (*experiment.data.evals, str(workdir / "result.json"), str(workdir / "figures")):
    assert words in outcome.out
  return Trained(family, next(iter(module.PRESETS)), experiment, workdir)


def _rows(workdir: Path, split: str) -> list[Mapping[str, float]]:
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [row for row in rows if row["split"] == split]


def test_the_loss_falls(trained):
  losses = [row["loss"] for row in _rows(trained.workdir, "train")]
  assert all(map(math.isfinite, losses))
  assert min(losses[-3:]) < _falls_to(trained.experiment) * losses[0], losses


def test_config_json_says_what_ran(trained):
  stored = json.loads((trained.workdir / "config.json").read_text())
  assert (stored["config"]["family"], stored["config"]["preset"]) == (trained.family, trained.preset)
  assert f"--workdir={trained.workdir}" in stored["command"]
  assert stored["versions"]["jax"] == jax.__version__
  assert {"python", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(stored["versions"])
  if (ROOT / ".git").exists() and shutil.which("git"):
    assert re.fullmatch(r"[0-9a-f]{40}\+?", stored["git_commit"])


def test_model_json_says_which_model_the_run_holds(trained):
  model = trained.experiment.task.model
  again = variants.build(**json.loads((trained.workdir / "model.json").read_text()))
  assert again.clone(dtype=model.dtype, remat=model.remat) == model


def test_metrics_are_logged_once_with_every_number(trained):
  config = trained.experiment.config
  train = _rows(trained.workdir, "train")
  evaluated = {split: _rows(trained.workdir, split) for split in trained.splits}
  for rows, every in ((train, config.log_every), *((rows, config.eval_every) for rows in evaluated.values())):
    assert [row["step"] for row in rows] == list(range(every, config.total_steps + 1, every))
    assert len({frozenset(row) - {"examples_per_second"} for row in rows}) == 1, "rows differ in what they tell"
  assert set(train[0]) >= {"step", "split", "loss", "learning_rate", "gradient_norm", "parameter_norm"}
  assert "examples_per_second" in train[-1]
  if trained.experiment.monitor:
    split, _, name = trained.experiment.monitor.partition("/")
    assert name in evaluated[split][0]
  if _classifies(trained.experiment):
    plain = {"step", "split", "loss", "accuracy", "top_5_accuracy"}
    assert set(train[0]) - {"examples_per_second"} == plain | {"learning_rate", "gradient_norm", "parameter_norm"}
    assert set(evaluated["validation"][0]) == plain


def test_tensorboard_has_the_same_numbers(trained):
  found = {}
  for path in trained.workdir.glob("events.out.tfevents.*"):
    for event in _events(path):
      found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
  for split in ("train", *trained.splits):
    for row in _rows(trained.workdir, split):
      for name in set(row) - {"step", "split"}:
        assert found[row["step"], f"{split}/{name}"] == pytest.approx(row[name], rel=1e-6)


def _events(path: Path) -> Iterator:
  """The events of a TensorBoard file: length u64, checksum u32, event, checksum u32."""
  from tensorboardX.proto import event_pb2

  data, place = path.read_bytes(), 0
  while place < len(data):
    size, = struct.unpack_from("<Q", data, place)
    yield event_pb2.Event.FromString(data[place + 12:place + 12 + size])
    place += 16 + size


def test_result_json_is_complete_and_true(trained):
  result, experiment = trained.result(), trained.experiment
  assert set(result) == {
      "run", "sha256",
      "family", "preset", "data", "steps", "total_steps", "metrics", "checkpoint", "params", "seconds",
      "examples_per_second", "seed", "devices", "state_sha256"}
  assert (result["family"], result["preset"], result["seed"]) == (trained.family, trained.preset, 0)
  assert result["data"] == experiment.config.data.name
  assert result["steps"] == result["total_steps"] == experiment.config.total_steps
  assert result["params"] == PARAMETERS.get(trained.family, result["params"]) > 0
  assert 0 < result["examples_per_second"] and 0 < result["seconds"]
  assert set(result["metrics"]) == set(experiment.data.evals)
  assert all(math.isfinite(value) for values in result["metrics"].values() for value in values.values())
  if experiment.monitor:
    split, _, name = experiment.monitor.partition("/")
    sign = 1 if experiment.task.goals[name] == MAX else -1
    best = max(_rows(trained.workdir, split), key=lambda row: (sign * row[name], -row["step"]))
    assert result["checkpoint"] == best["step"]
    assert result["metrics"][split][name] == pytest.approx(best[name], rel=1e-5)
  else:
    assert result["checkpoint"] == result["steps"]
  if _classifies(experiment):
    for values in result["metrics"].values():
      assert set(values) == {"accuracy", "loss", "top_5_accuracy", "macro_f1", "calibration_error"}
      assert 0 <= values["accuracy"] <= values["top_5_accuracy"] <= 1

  state = fit(experiment, trained.workdir)
  assert int(state.step) == result["steps"]
  assert state_sha256(jax.tree.map(np.asarray, state)) == result["state_sha256"]


def test_goals_are_those_of_every_metric_of_an_evaluation(trained):
  goals = set(trained.experiment.task.goals)
  for split in trained.splits:
    found = set(trained.result()["metrics"][split])
    assert found <= goals
    assert goals - found <= set(SIZES), "these are reported only if a split has such objects"


def test_checkpoints_pictures_and_data_are_there(trained):
  workdir, result = trained.workdir, trained.result()
  with Checkpointer(workdir / "checkpoints", assets=workdir / "data", read_only=True) as checkpointer:
    steps = checkpointer.steps()
    manifest = json.loads((workdir / "checkpoints" / str(steps[-1]) / "manifest.json").read_text())
  assert {result["steps"], result["checkpoint"]} <= set(steps)
  assert set(manifest["assets"]) == {path.name for path in (workdir / "data").iterdir()}
  figures = {path.name for path in (workdir / "figures").iterdir() if path.is_file()}
  assert "learning_curves.png" in figures
  assert (workdir / "figures" / "preview").is_dir() == bool(trained.experiment.preview)
  for name in figures:
    with Image.open(workdir / "figures" / name) as picture:
      picture.load()
      assert picture.format == "PNG"
      if _draws(trained.family):
        assert min(picture.size) > 200
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 3, "an empty picture"
  if _classifies(trained.experiment):
    assert set(manifest["assets"]) == {"classes.json", "brightness.json"}
    classes = json.loads((workdir / "data" / "classes.json").read_text())
    assert len(classes) == trained.experiment.task.num_classes
    assert figures == {"learning_curves.png", "confusion_matrix.png", "mistakes.png", "calibration.png"}


def test_nothing_else_lies_in_the_workdir(trained):
  workdir = trained.workdir
  names = {path.name for path in workdir.iterdir() if not path.name.startswith("events.out.tfevents.")}
  assert names == {"config.json", "model.json", "metrics.jsonl", "result.json", "checkpoints",
                   "data", "figures", "tables", ".lock"}
  assert not list(workdir.rglob("*.tmp"))
  lock = workdir_lib.Workdir(workdir)
  lock.acquire()
  lock.release()


def test_predictions_for_the_test_images_are_as_good_as_the_evaluation(trained, tmp_path):
  from sklearn.datasets import load_digits

  from dljax.data.datasets.digits import split_indices

  if not (_classifies(trained.experiment) and trained.preset == "digits"):
    pytest.skip(f"{trained.family} {trained.preset} does not classify digits")
  digits = load_digits()
  test = split_indices(digits.target, "stratified")["test"]
  for i in test:
    Image.fromarray(np.round(digits.images[i] * 255 / 16).astype(np.uint8)).save(tmp_path / f"{i}.png")
  output = tmp_path / "out.jsonl"
  files = (f"--input={tmp_path}", f"--output={output}")
  with _quicker(trained.family):
    outcome = run(EXPERIMENTS[trained.family], f"--workdir={trained.workdir}", "--mode=predict", *files)
  assert outcome.status == 0, outcome
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert [int(Path(row["input"]).stem) for row in rows] == sorted(test)
  right = sum(row["label"] == str(digits.target[i]) for row, i in zip(rows, sorted(test), strict=True))
  assert right / len(test) == trained.result()["metrics"]["test"]["accuracy"]


# --- XOR --------------------------------------------------------------------------------------------------


def _xor_accuracy(workdir: Path, *arguments: str) -> float:
  with plain_pictures():
    outcome = run(EXPERIMENTS["mlp"], "--preset=xor", f"--workdir={workdir}", "--mesh=data:1", *arguments)
  assert outcome.status == 0, outcome
  return json.loads((workdir / "result.json").read_text())["metrics"]["test"]["accuracy"]


def test_two_layers_learn_xor(tmp_path):
  assert _xor_accuracy(tmp_path / "run") >= 0.99


@pytest.mark.parametrize("criterion", ["softmax", "perceptron"])
def test_a_perceptron_does_not_learn_xor(tmp_path, criterion):
  # A line can part off one of the four corners: three of four right is the best there is.
  accuracy = _xor_accuracy(
      tmp_path / "run", "--config.model.variant=perceptron", f"--config.model.criterion={criterion}")
  assert 0.2 <= accuracy <= 0.8


def test_the_criterion_counts_for_images_too():
  config = EXPERIMENTS["mlp"].get_config("digits")
  config.model.criterion = "perceptron"
  assert EXPERIMENTS["mlp"].build(config).task.criterion == "perceptron"


# --- The other presets, on stand-ins of their sets -------------------------------------------------------

SETS = {
    "mnist": ((28, 28, 1), 10, "test"), "fashion_mnist": ((28, 28, 1), 10, "test"),
    "cifar10": ((32, 32, 3), 10, "test"), "imagenet2012": ((None, None, 3), 1000, "validation"),
}
QUICK = (("mlp", "mnist"), ("lenet", "fashion_mnist"))
# Steps and the batch size in which a preset's loss falls to four fifths.
LEARNS_IN = {
    "mlp": (30, 128), "lenet": (30, 128), "rnn": (30, 128), "alexnet": (100, 32), "vgg": (100, 32), "vit": (150, 32)}
# What a stand-in shows is the preset's pipeline, schedule and task: small images and the smallest network have them.
# Networks of the published sizes take up to a minute to compile; interop's tests of parity compute with them.
SMALLER = {"imagenet2012": ["--config.data.image_shape=64,64,3"]}


def _stand_in(name: str, root: Path) -> None:
  """Prepares a set with the name and features of a real one, and noise for pictures."""
  import tensorflow_datasets as tfds

  (height, width, channels), classes, test = SETS[name]
  set_name = name

  class StandIn(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = set_name
    VERSION = tfds.core.Version("9.9.9")

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
          "image": tfds.features.Image(shape=(height, width, channels)),
          "label": tfds.features.ClassLabel(num_classes=classes)}))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(100), test: self._generate_examples(6)}

    def _generate_examples(self, count):
      draw = np.random.default_rng(count)
      for i in range(count):
        shape = height or int(draw.integers(40, 80)), width or int(draw.integers(40, 80)), channels
        image = draw.integers(0, 256, shape, np.uint8)
        image = Image.fromarray(image if channels == 3 else image[..., 0])
        yield i, {"image": image, "label": int(draw.integers(classes))}

  sources.build(StandIn, root)


@pytest.mark.parametrize("family, preset", PRESETS)
def test_the_batches_of_every_preset_divide_over_16_devices(family, preset):
  config = EXPERIMENTS[family].get_config(preset)
  assert config.batch_size % 16 == config.eval_batch_size % 16 == 0


@pytest.mark.parametrize("family, preset", [
    pytest.param(family, preset, marks=[] if (family, preset) in QUICK else [pytest.mark.slow])
    for family, preset in PRESETS if preset in SETS])
def test_a_preset_trains_on_a_set_of_its_name(family, preset, tmp_path, monkeypatch):
  if (SHARED / preset).is_dir() and (family, preset) not in QUICK:
    pytest.skip("the real set is there, and another test trains on it")
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  _stand_in(preset, tmp_path / "tfds")
  with plain_pictures(), smallest.native_convolutions():
    outcome = run(
        EXPERIMENTS[family], f"--preset={preset}", f"--workdir={tmp_path / 'run'}", "--mesh=data:1",
        "--config.total_steps=2", "--config.batch_size=4", "--config.eval_batch_size=4", "--config.log_every=1",
        "--config.eval_every=2", *smallest.arguments(family, monkeypatch), *SMALLER.get(preset, []))
  assert outcome.status == 0, outcome
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["preset"] == preset
  assert all(math.isfinite(value) for values in result["metrics"].values() for value in values.values())
  assert [row["step"] for row in _rows(tmp_path / "run", "train")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("family, preset", [(f, p) for f, p in PRESETS if p in ("mnist", "fashion_mnist")])
def test_a_preset_learns_from_its_real_set(family, preset, tmp_path, monkeypatch):
  """By the smallest network, of which the set, the schedule and the task ask no more, and from a part of the images."""
  if not (SHARED / preset).is_dir():
    pytest.skip(f"{preset} is not prepared in {SHARED}")
  steps, batch_size = LEARNS_IN.get(family, (60, 32))
  with plain_pictures(), smallest.native_convolutions():
    outcome = run(
        EXPERIMENTS[family], f"--preset={preset}", f"--data_dir={SHARED}", f"--workdir={tmp_path / 'run'}",
        *([] if family == ON_ALL_DEVICES else ["--mesh=data:1"]), f"--config.total_steps={steps}",
        f"--config.batch_size={batch_size}", "--config.eval_batch_size=64", "--config.log_every=5",
        f"--config.eval_every={steps}", "--config.data.train=train[:2000]", "--config.data.test=test[:64]",
        "--config.data.validation=train[-64:]", *smallest.arguments(family, monkeypatch))
  assert outcome.status == 0, outcome
  losses = [row["loss"] for row in _rows(tmp_path / "run", "train")]
  experiment = EXPERIMENTS[family].build(EXPERIMENTS[family].get_config(preset))
  end = sum(losses[-3:]) / 3  # each is of one batch
  assert end < (0.8 if _classifies(experiment) else _falls_to(experiment)) * losses[0], losses
