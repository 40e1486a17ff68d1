"""Tiny forms of real families give on a mesh over several processes what they give on virtual devices of one.

  python -m tests.train.processes                          every family on every mesh, over two and four processes
  python -m tests.train.processes 2x1 "rnn tensor:2"       these cases, over two processes with one device each

trains each family, evaluates it and predicts with it, in float64, and prints the largest difference of any number (in
units of the largest of its array) to one process with as many virtual devices. test_processes.py has a part of it.
"""

import contextlib
import functools
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import tests.conftest  # sets the flags of XLA, before JAX reads them
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dljax import optim
from dljax.data import sources
from dljax.data.datasets import morse
from dljax.data.pipeline import opened
from dljax.models import deepspeech as deepspeech_models
from dljax.models import resnet
from dljax.models import retinanet as retinanet_models
from dljax.models import unet as unet_models
from dljax.models import vit as vit_models
from dljax.models.layers import BatchNorm
from dljax.train import parallel
from dljax.train.evaluate import Evaluator, Predictor
from dljax.train.experiment import Request
from dljax.train.program import Program, RunOptions
from dljax.train.state import state_sha256
from experiments import deepspeech, lenet, retinanet, rnn, unet, vit
from tests.command import xla_flags

STEPS = 2
FAMILIES = {  # name -> its file and preset
    "lenet": (lenet, "digits"), "rnn": (rnn, "pydoc"), "forecaster": (rnn, "temperatures"),
    "deepspeech": (deepspeech, "morse"), "retinanet": (retinanet, "digit_scenes"), "unet": (unet, "digit_scenes"),
    "vit": (vit, "digits")}
FORMS = {  # in place of the families' small forms
    (deepspeech_models, "deepspeech_small"): functools.partial(
        deepspeech_models.DeepSpeech, channels=2, kernels=((5, 5),), strides=((4, 4),), hidden_size=4, num_layers=1),
    (retinanet_models, "retinanet_small"): functools.partial(
        retinanet_models.RetinaNet, block=resnet.BasicBlock, stage_sizes=(1, 1), backbone_width=4, small_stem=True,
        first_stage=2, extra_levels=0, width=4, head_depth=0),
    (unet_models, "unet_small"): functools.partial(unet_models.UNet, padded=True, norm=BatchNorm),
    (vit_models, "vit_nano"): functools.partial(
        vit_models.ViT, patch_size=4, embed_dim=8, num_layers=1, num_heads=4),
}


class Squares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A white square on black in each image."""

  VERSION = tfds.core.Version("1.0.0")
  name = "squares"

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(16, 16, 1)),
        "segmentation": tfds.features.Image(shape=(16, 16, 1), encoding_format="png"),
        "objects": tfds.features.Sequence({
            "bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(num_classes=10)})}))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(count) for split, count in (("train", 9), ("validation", 6), ("test", 6))}

  def _generate_examples(self, count):
    for i in range(count):
      image = np.zeros((16, 16), np.uint8)
      image[i % 5:i % 5 + 8, 4:12] = 255
      box = tfds.features.BBox(i % 5 / 16, 4 / 16, (i % 5 + 8) / 16, 12 / 16)
      yield i, {"image": Image.fromarray(image), "segmentation": Image.fromarray((image > 0) * np.uint8(1 + i % 3)),
                "objects": [{"bbox": box, "label": i % 3}]}


def prepare(folder: Path) -> None:
  """Writes the sets and the text that the families read."""
  sources.build(Squares, folder / "tfds")
  sources.prepare_embedded("digits/stratified", folder / "tfds")
  splits = {name: (count, 10.0, 10.0) for name, count in (("train", 9), ("validation", 6), ("test_10db", 6))}
  with mock.patch.object(morse, "SPLITS", splits):
    sources.prepare_embedded("morse", folder / "tfds")
  words = np.random.default_rng(0).choice(["to", "be", "or", "not", "that", "is"], 900)
  (folder / "play.txt").write_text(" ".join(words))
  hours = np.arange("2024-01-01T00", "2024-01-04T00", dtype="datetime64[h]")
  rows = [f"{hour}:00,{np.sin(i):.3f},{np.cos(i * i):.3f}" for i, hour in enumerate(hours)]
  (folder / "series.csv").write_text("\n".join(["date,a,b", *rows]))


def _config(family: str, folder: Path) -> Any:
  module, preset = FAMILIES[family]
  config = module.get_config(preset)
  # Not Adam, which divides by gradients, of which those that are nearly 0 are rounding noise.
  config.optimizer = optim.default_config("momentum")
  config.optimizer.update({"learning_rate": 0.01, "warmup_fraction": 0.0})
  config.update({"batch_size": 8, "eval_batch_size": 8, "total_steps": 10, "shard_above": 0, "ema_decay": 0.9})
  config.model.dtype = "float64"
  if "dropout" in config.model:
    config.model.dropout = 0.3
  if family == "lenet":
    config.data.update({"pad_crop": 2, "mixup": 0.4, "test": "test[:13]"})
  if family == "vit":
    config.data.update({"image_shape": (8, 8, 1), "test": "test[:13]"})
  if family == "rnn":
    config.model.update({"embed_dim": 4, "hidden_size": 4, "num_layers": 1})
    config.data.update({"file": str(folder / "play.txt"), "tokenizer": "character", "length": 8})
    config.sampling.max_new_tokens = 3
  if family == "forecaster":
    config.model.update({"variant": "dlinear"})
    config.data.update({"name": str(folder / "series.csv"), "channels": ("a", "b"), "window": 6, "horizon": 3,
                        "train": 40, "validation": 12, "test": 12})
  if family == "deepspeech":
    config.data.update({"buckets": 1, "max_frames": 880, "num_mels": 8, "time_masks": 1, "frequency_masks": 1})
    config.model.beam = 1
  if family in ("retinanet", "unet"):
    config.data.update({"name": "squares", "image_shape": (16, 16, 1), "max_boxes": 2, "flip": True})
  if family == "unet":
    config.model.update({"width": 2, "num_pools": 1})
  return config, module.build


def _rows(family: str, experiment: Any, batch: Any) -> Any:
  """Rows to predict for: more than one batch, and no multiple of the devices."""
  if family == "rnn":
    return experiment.read(Request(texts=["to be", "or", "not"]), {}).batch
  return {k: np.concatenate([v, v])[:11] for k, v in batch.items() if not k.startswith("host/")}


def _named(name: str, tree: Any) -> dict[str, np.ndarray]:
  """Each array (number, text) of a tree by its place."""
  return {f"{name}{jax.tree_util.keystr(path)}": np.asarray(x)
          for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _initial(family: str, folder: Path, program: Program) -> Any:
  """The initial state in float64, computed by the first process that needs it, which is alone."""
  path = folder / f"{family}.npz"
  cast = lambda x: np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None)
  if not path.exists():
    state = jax.tree.map(cast, program.init_state())
    # A head of zeros gives classes that are not in a batch equal logits, whose order rounding decides.
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.01 * draw.normal(size=x.shape), state.params)
    np.savez(path, *jax.tree.leaves(state.replace(params=params)))
  with np.load(path) as stored:
    values = jax.tree.unflatten(jax.tree.structure(program.abstract_state), stored.values())
  return jax.tree.map(lambda x, like: jax.make_array_from_callback(x.shape, like.sharding, x.__getitem__),
                      values, program.abstract_state)


def outcome(family: str, mesh: str, folder: Path) -> dict[str, np.ndarray]:
  """What the family gives on a mesh: name -> array, the same on every process but for the digest."""
  config, build = _config(family, folder)
  experiment = build(config)
  data, task = experiment.data, experiment.task
  program = Program(experiment, RunOptions(mesh=parallel.parse_mesh(mesh)))
  state = _initial(family, folder, program)
  found = {}
  evaluator = Evaluator(task, "jit", program.mesh, data.context)
  with opened(data.train, *data.evals.values(), rows=evaluator.rows):
    for step in range(STEPS):
      batch = parallel.put_batch(data.train.batch(step), "jit", program.mesh)
      state, out = program.train_step(state, batch, parallel.put_shared(np.float32(1), program.mesh))
      found |= _named(f"step {step}", jax.tree.map(np.asarray, jax.block_until_ready(out)))
    findings = evaluator.full(
        state.variables, state.rng, data.evals["test"], "test", json.loads(json.dumps(data.assets())))
    found |= _named("test", dict(findings.metrics))
    # A picture shows rows of every process; all of them are drawn by a function of arrays.
    pictures = {name: (figure.args, figure.keywords) for name, figure in findings.figures.items()}
    found |= {name: x for name, x in _named("picture", pictures).items() if x.dtype != object}
    whole = build(config).data.evals["test"]
    whole.open(np.arange)
    rows = _rows(family, experiment, whole.batch(0))
    found |= _named("predicted", Predictor(experiment, program, "jit")(state, rows))
  found |= _named("state", parallel.state_to_host(state))
  found["digest"] = np.array(state_sha256(state, parallel.array_to_first_host) or "")
  return found


def outcomes(cases: Sequence[str], folder: Path) -> dict[str, dict[str, np.ndarray]]:
  """Case ("lenet data:2") -> `outcome`."""
  environment = {"TFDS_DATA_DIR": str(folder / "tfds")}
  with mock.patch.dict("os.environ", environment), jax.enable_x64(True), contextlib.ExitStack() as forms:
    for (module, name), form in FORMS.items():
      forms.enter_context(mock.patch.object(module, "VARIANTS", {**module.VARIANTS, name: form}))
    return {case: outcome(*case.split(), folder) for case in cases}


def _difference(one: np.ndarray, other: np.ndarray) -> float:
  """The largest difference, in units of the largest number; of what is not floating, 0 or infinite."""
  if one.dtype.kind != "f" or one.shape != other.shape or one.dtype != other.dtype:
    return 0.0 if np.array_equal(one, other) else math.inf
  if not np.array_equal(np.isnan(one), np.isnan(other)):
    return math.inf
  one, other = np.nan_to_num(one), np.nan_to_num(other)
  gap = np.max(np.abs(one - other), initial=0)
  return float(gap and gap / np.max(np.abs(one)))


def compare(
    count: int, cases: Sequence[str], folder: Path, devices: int = 1,
) -> dict[str, tuple[float, str]]:
  """Case -> the largest difference of any of `count` processes, which have `devices` each, to this one; and where."""
  expected = outcomes(cases, folder)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  variables = {**os.environ, "XLA_FLAGS": xla_flags(devices), "JAX_COORDINATOR_ADDRESS": address,
               "JAX_NUM_PROCESSES": str(count)}
  command = [sys.executable, "-m", "tests.train.processes", str(folder), *cases]
  processes = [
      subprocess.Popen(command, env={**variables, "JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE, text=True,
                       stdout=subprocess.DEVNULL) for i in range(count)]
  try:
    for process in processes:
      _, said = process.communicate(timeout=3000)
      assert process.returncode == 0, said
  finally:
    for process in processes:
      process.kill()
  found = {}
  for case, arrays in expected.items():
    worst = 0.0, ""
    for i in range(count):
      with np.load(folder / f"{case}-{i}.npz") as stored:
        other = dict(stored)
      assert (str(other.pop("digest")) != "") == (i == 0)  # the first process's, whose last bit may differ from this one's
      assert other.keys() == arrays.keys() - {"digest"}
      worst = max(worst, *((_difference(arrays[name], x), name) for name, x in other.items()))
    found[case] = worst
  return found


TWO = ("data:2", "fsdp:2", "tensor:2")
FOUR = ("data:4", "fsdp:4", "tensor:4", "data:2,fsdp:2", "data:2,tensor:2", "fsdp:2,tensor:2")
MESHES = {(2, 1): TWO, (4, 1): FOUR, (2, 2): FOUR}  # by processes and the devices of each


def main() -> None:
  if "JAX_PROCESS_ID" in os.environ:
    folder, *cases = sys.argv[1:]
    parallel.initialize()
    for case, arrays in outcomes(cases, Path(folder)).items():
      np.savez(Path(folder) / f"{case}-{jax.process_index()}.npz", **arrays)
    return
  work = [(key, [f"{family} {mesh}" for mesh in meshes]) for key, meshes in MESHES.items() for family in FAMILIES]
  if asked := sys.argv[1:]:
    work = [(tuple(map(int, asked[0].split("x"))), asked[1:])]
  with tempfile.TemporaryDirectory() as folder:
    prepare(Path(folder))
    for (count, devices), cases in work:
      for case, (gap, name) in compare(count, cases, Path(folder), devices).items():
        print(f"{count} processes with {devices}: {case}: {gap:.1e} {name if gap else ''}", flush=True)


if __name__ == "__main__":
  main()
