"""Transfer learning: --config.init.source, what it takes, what it starts from scratch and what it refuses."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from dljax import config as config_lib
from dljax import interop
from dljax.errors import UserError
from dljax.launch import convert
from dljax.models import resnet as resnet_model
from dljax.models import retinanet as retinanet_model
from dljax.train import pretrained
from dljax.train.loop import fit
from dljax.train.state import FORMAT
from dljax.train.program import Program, RunOptions
from experiments import lenet, mlp, resnet, retinanet, vit
from tests.command import plain_pictures, refuse, run

pytestmark = pytest.mark.usefixtures("_digits")
STAGES = {"block": resnet_model.BasicBlock, "stage_sizes": (1, 1)}
MESH = {"data": 1, "fsdp": 1, "tensor": 1}
ONE = RunOptions(mesh=MESH, progress=False)
SHORT = ("--config.model.widths=16", "--config.total_steps=6", "--config.eval_every=3", "--config.checkpoint_every=3",
         "--config.optimizer.learning_rate=0.01")


@pytest.fixture(scope="module")
def data_dir(prepared):
  return prepared("digits")


@pytest.fixture
def _digits(data_dir, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))


@pytest.fixture(scope="module")
def run_dir(data_dir, tmp_path_factory):
  """A finished run of an MLP on digits, with an average of its parameters."""
  workdir = tmp_path_factory.mktemp("runs") / "source"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(data_dir))
    with plain_pictures():
      fit(_experiment(mlp, *SHORT, "--config.ema_decay=0.5"), workdir, ONE)
  return workdir


def _experiment(family, *overrides, preset="digits"):
  config = family.get_config(preset)
  config_lib.apply_overrides(config, overrides)
  return family.build(config)


def _start(experiment, options=ONE):
  """The state that a run starts with, the one without the weights, and what it says; as path -> array."""
  program = Program(experiment, options)
  weights = pretrained.load(experiment, program.abstract_state)
  fresh = program.init_state()
  state = weights.put(fresh)
  flat = lambda state: traverse_util.flatten_dict(
      jax.tree.map(np.asarray, {"params": state.params, **state.model_state}), sep="/")
  return state, flat(state), flat(fresh), weights.summary


def _random(model, shape):
  """Variables of the model, drawn without compiling anything."""
  specs = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros(shape, np.float32)))
  return jax.tree.map(lambda spec: np.random.default_rng(0).random(spec.shape, np.float32), specs)


def _same(one, other):
  assert one.keys() == other.keys()
  jax.tree.map(np.testing.assert_array_equal, dict(one), dict(other))


def test_a_run_starts_from_the_averaged_parameters_of_the_best_checkpoint(run_dir):
  best = json.loads((run_dir / "result.json").read_text())["checkpoint"]
  step, arrays = pretrained.read_run(run_dir)
  assert step == best
  source = _experiment(mlp, *SHORT, "--config.ema_decay=0.5")
  with pretrained.Checkpointer(run_dir / "checkpoints", read_only=True) as checkpointer:
    state = checkpointer.restore(Program(source, ONE).abstract_state, best).state
  _same(arrays, traverse_util.flatten_dict(jax.tree.map(np.asarray, state.variables), sep="/"))
  assert not np.array_equal(arrays["params/hidden1/kernel"], state.params["hidden1"]["kernel"])  # not averaged

  experiment = _experiment(mlp, *SHORT, f"--config.init.source={run_dir}", "--config.ema_decay=0.9")
  state, started, _, summary = _start(experiment)
  _same(started, arrays)
  _same(traverse_util.flatten_dict(state.ema["params"], sep="/"), traverse_util.flatten_dict(state.params, sep="/"))
  assert summary == f"starting from checkpoint {best} of {run_dir}: {len(arrays)} of {len(arrays)} arrays"


@pytest.mark.parametrize("options", [
    ONE, RunOptions(mesh={**MESH, "data": 2, "fsdp": 2}), RunOptions(parallelism="pmap"),
], ids=["one", "fsdp", "pmap"])
def test_the_head_starts_from_scratch_for_another_number_of_classes(run_dir, options):
  experiment = _experiment(mlp, *SHORT, f"--config.init.source={run_dir}", "--config.data.num_classes=3")
  state, started, fresh, summary = _start(experiment, options)
  _, arrays = pretrained.read_run(run_dir)
  head = {"params/head/kernel", "params/head/bias"}
  _same({p: a for p, a in started.items() if p in head}, {p: a for p, a in fresh.items() if p in head})
  _same({p: a for p, a in started.items() if p not in head}, {p: a for p, a in arrays.items() if p not in head})
  assert summary.endswith("2 of 4 arrays; head/bias, head/kernel start from scratch for 3 classes")
  abstract = Program(experiment, options).abstract_state
  assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim), state, abstract))


def test_a_head_for_as_many_classes_starts_from_scratch_when_asked(run_dir):
  experiment = _experiment(mlp, *SHORT, f"--config.init.source={run_dir}", "--config.init.new_head=true")
  _, started, fresh, summary = _start(experiment)
  np.testing.assert_array_equal(started["params/head/kernel"], fresh["params/head/kernel"])
  assert not np.array_equal(started["params/hidden1/kernel"], fresh["params/hidden1/kernel"])
  assert "2 of 4 arrays" in summary


def test_files_and_folders_are_recognised(run_dir, tmp_path):
  model = _experiment(mlp, *SHORT).task.model
  _, arrays = pretrained.read_run(run_dir)
  theirs = interop.dump(model, traverse_util.unflatten_dict(arrays, sep="/"), "torch")
  safetensors.numpy.save_file(theirs, tmp_path / "torch.safetensors")
  assert convert.main([str(run_dir), str(tmp_path / "ours")]) == 0
  assert convert.main(["--to=torch", str(run_dir), str(tmp_path / "again.safetensors")]) == 0
  _same(safetensors.numpy.load_file(tmp_path / "again.safetensors"), theirs)
  for place in (tmp_path / "torch.safetensors", tmp_path / "ours", tmp_path / "ours" / "weights.safetensors"):
    _same(_start(_experiment(mlp, *SHORT, f"--config.init.source={place}"))[1], arrays)
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs" / "config.json").write_text("{}")
  safetensors.numpy.save_file(theirs, tmp_path / "theirs" / "model.safetensors")
  _same(_start(_experiment(mlp, *SHORT, f"--config.init.source={tmp_path / 'theirs'}"))[1], arrays)
  named = f"--config.init.source={tmp_path / 'torch.safetensors'}", "--config.init.format=torch"
  _same(_start(_experiment(mlp, *SHORT, *named))[1], arrays)
  del theirs["head.weight"], theirs["head.bias"]
  safetensors.numpy.save_file(theirs, tmp_path / "headless.safetensors")
  summary = _start(_experiment(mlp, *SHORT, f"--config.init.source={tmp_path / 'headless.safetensors'}"))[-1]
  assert "start from scratch" in summary


def test_running_statistics_come_along(tmp_path):
  model = _experiment(resnet).task.model
  variables = _random(model, (1, 16, 16, 1))
  safetensors.numpy.save_file(interop.dump(model, variables, "torchvision"), tmp_path / "net.safetensors")
  _, started, _, _ = _start(_experiment(
      resnet, f"--config.init.source={tmp_path / 'net.safetensors'}", "--config.batch_size=8"))
  _same(started, traverse_util.flatten_dict(variables, sep="/"))


def test_what_does_not_fit_is_named(run_dir, tmp_path):
  def refusal(experiment):
    with pytest.raises(UserError) as error:
      pretrained.load(experiment, Program(experiment, ONE).abstract_state)
    assert "\n" not in str(error.value)
    return str(error.value)

  path = tmp_path / "net.safetensors"
  source = f"--config.init.source={path}"
  _, arrays = pretrained.read_run(run_dir)
  small = (*SHORT, source)
  assert "there is no such file" in refusal(_experiment(mlp, *small))
  for change, message in (
      ({"params/hidden1/bias": None}, "params/hidden1/bias is missing"),
      ({"params/hidden9/bias": np.zeros(3, np.float32)}, "params/hidden9/bias is left over"),
      ({"params/hidden1/bias": np.zeros(3, np.float32)}, "params/hidden1/bias has shape (3,)"),
  ):
    safetensors.numpy.save_file({k: v for k, v in {**arrays, **change}.items() if v is not None}, path)
    line = refusal(_experiment(mlp, *small))
    assert line.startswith(source) and message in line
  safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, path)
  assert "the names of dljax or torch; the first names are: a" in refusal(_experiment(mlp, *small))
  assert "did you mean torch" in refusal(_experiment(mlp, *small, "--config.init.format=torhc"))
  net = _experiment(lenet).task.model
  grey = _random(net, (1, 32, 32, 1))
  safetensors.numpy.save_file(interop.dump(net, grey, "torch"), path)
  coloured = ("--config.data.image_shape=32,32,3", "--config.data.mean=0,0,0", "--config.data.std=1,1,1")
  assert "they were trained on images of 1 channels, and these have 3" in refusal(_experiment(lenet, source, *coloured))
  assert "holds neither a run nor weights.safetensors" in refusal(
      _experiment(mlp, *SHORT, f"--config.init.source={tmp_path}"))
  shutil.copytree(run_dir, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
  assert "holds no intact checkpoint" in refusal(_experiment(mlp, *SHORT, f"--config.init.source={tmp_path / 'empty'}"))


def test_a_source_is_verified_as_a_run_that_continues(run_dir, tmp_path):
  copy = tmp_path / "run"
  shutil.copytree(run_dir, copy)
  noted = (copy / "config.json").read_text()
  run = json.loads(noted)["run"]
  for text, message in ((noted.replace('"seed": 0', '"seed": 1'), "was damaged or edited"),
                        (noted.replace(run, "0" * 32), "was damaged or edited"),
                        (json.dumps({**json.loads(noted), "run": "another", "sha256": ""}), "belongs to another run")):
    assert text != noted
    (copy / "config.json").write_text(text)
    for use in (lambda: pretrained.read_run(copy),
                lambda: _start(_experiment(mlp, *SHORT, f"--config.init.source={copy}")),
                lambda: convert.convert(interop.OURS, "torch", "", {}, str(copy), tmp_path / "out.safetensors")):
      with pytest.raises(UserError, match=message):
        use()
  (copy / "config.json").write_text(noted)
  (copy / "model.json").write_text((copy / "model.json").read_text().replace("16", "17"))
  with pytest.raises(UserError, match="model.json was damaged or edited"):
    convert.convert(interop.OURS, "torch", "", {}, str(copy), tmp_path / "out.safetensors")
  assert not (tmp_path / "out.safetensors").exists()


def test_positions_are_fitted_to_the_datas_images(tmp_path):
  net = _experiment(vit).task.model
  small = _random(net, (1, 8, 8, 1))
  safetensors.numpy.save_file(interop.dump(net, small, "timm"), tmp_path / "net.safetensors")
  experiment = _experiment(vit, f"--config.init.source={tmp_path / 'net.safetensors'}")
  side = experiment.data.batch_spec["image"].shape[1] // net.patch_size
  weights = pretrained.load(experiment, Program(experiment, ONE).abstract_state)
  assert weights.arrays["params/positions"].shape == (1, 1 + side * side, net.embed_dim)
  assert weights.summary.endswith(f"; the positions of 2x2 patches are interpolated to {side}x{side}")


# --- On the command line ----------------------------------------------------------------------------------


def test_fine_tuning_changes_only_what_is_not_frozen_and_resumes_without_the_source(run_dir, tmp_path):
  source, workdir = tmp_path / "source", tmp_path / "tuned"
  shutil.copytree(run_dir, source)
  flags = (f"--workdir={workdir}", "--mesh=data:1", *SHORT, f"--config.init.source={source}",
           "--config.optimizer.freeze=hidden1/kernel", "--config.optimizer.learning_rates=*/bias=0.1")
  with plain_pictures():
    outcome = run(mlp, *flags)
  assert outcome.status == 0 and outcome.err.startswith("starting from checkpoint"), outcome
  before, after = pretrained.read_run(source)[1], pretrained.read_run(workdir)[1]
  changed = {path for path, array in after.items() if not np.array_equal(array, before[path])}
  assert changed == {"params/hidden1/bias", "params/head/kernel", "params/head/bias"}
  shutil.rmtree(source)
  with plain_pictures():
    longer = run(mlp, *flags, "--config.total_steps=9")
  assert longer.status == 0 and "starting from" not in longer.err and "continuing from step 6" in longer.err, longer
  with plain_pictures():
    assert run(mlp, "--mode=eval", f"--workdir={workdir}").status == 0


def test_a_bad_source_is_one_line_and_touches_nothing(tmp_path):
  line = refuse(mlp, f"--workdir={tmp_path / 'run'}", *SHORT, "--config.init.source=nowhere")
  assert line == "--config.init.source=nowhere: nowhere: there is no such file"
  assert not list(tmp_path.iterdir())


def test_a_run_of_another_format_is_refused_by_its_number(run_dir, tmp_path):
  workdir = tmp_path / "old"
  shutil.copytree(run_dir, workdir)
  written = json.loads((workdir / "config.json").read_text())
  assert written.pop("format") == FORMAT == 2
  (workdir / "config.json").write_text(json.dumps(written))
  for flags in (["--mode=eval"], ["--mesh=data:1", *SHORT]):
    line = refuse(mlp, f"--workdir={workdir}", *flags)
    assert line.startswith(f"{workdir}/config.json: this run has format 1, and this version of dljax reads format 2;")


def _backbone_source(num_classes=5):
  """A classifier with the stages of the RetinaNet below, and its variables."""
  model = resnet_model.ResNet(num_classes=num_classes, **STAGES, width=4, small_stem=True)
  return model, _random(model, (1, 16, 16, 1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("source", ["torchvision", "ours"])
def test_a_detector_starts_from_a_classifiers_stages(tmp_path, monkeypatch, source, frozen):
  form = functools.partial(
      retinanet_model.RetinaNet, **STAGES, backbone_width=4, small_stem=True, first_stage=1, extra_levels=1, width=8,
      head_depth=1)
  monkeypatch.setattr(retinanet_model, "VARIANTS", {"retinanet_small": form})
  classifier, variables = _backbone_source()
  flat = traverse_util.flatten_dict(variables, sep="/")
  tensors = flat if source == "ours" else interop.dump(classifier, variables, "torchvision")
  safetensors.numpy.save_file(tensors, tmp_path / "net.safetensors")
  _, started, fresh, summary = _start(_experiment(
      retinanet, f"--config.init.source={tmp_path / 'net.safetensors'}", f"--config.model.frozen_norm={frozen}",
      "--config.data.image_shape=16,16,1", "--config.batch_size=2", preset="digit_scenes"))
  stages = {path.replace("/backbone/", "/", 1): array for path, array in started.items() if "/backbone/" in path}
  moved = lambda path: path.replace("params/", "batch_stats/") if frozen and "norm" in path else path
  _same(stages, {moved(path): array for path, array in flat.items() if "head" not in path})
  _same(*({path: array for path, array in arrays.items() if "/backbone/" not in path} for arrays in (started, fresh)))
  assert summary.endswith(f"{len(stages)} of {len(started)} arrays, the backbone; the rest starts from scratch")


def test_a_backbone_of_another_size_is_refused(tmp_path):
  _, variables = _backbone_source()
  safetensors.numpy.save_file(traverse_util.flatten_dict(variables, sep="/"), tmp_path / "net.safetensors")
  with pytest.raises(UserError, match="ResNet: .* missing"):
    _start(_experiment(retinanet, f"--config.init.source={tmp_path / 'net.safetensors'}", preset="digit_scenes"))
