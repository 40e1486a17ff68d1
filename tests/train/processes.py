"""Tiny forms of real families, and what each gives on a mesh over any number of processes.

  python -m tests.train.processes FOLDER "lenet data:2" "rnn fsdp:2,tensor:2" ...

trains each family on its mesh, evaluates it and predicts with it, in float64, and writes FOLDER/OUTPUT/CASE.npz for
each. Start one process a device with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (test_processes.py
does), or one process with virtual devices. FOLDER holds what `prepare` writes.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

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
from dljax.models import vit as vit_models
from dljax.train import parallel
from dljax.train.evaluate import Evaluator, Predictor
from dljax.train.experiment import Request
from dljax.train.program import Program, RunOptions
from experiments import deepspeech, lenet, retinanet, rnn, vit

STEPS = 2
FORMS = {  # in place of the families' small forms
    (deepspeech_models, "deepspeech_small"): functools.partial(
        deepspeech_models.DeepSpeech, channels=2, kernels=((5, 5),), strides=((4, 4),), hidden_size=4, num_layers=1),
    (retinanet_models, "retinanet_small"): functools.partial(
        retinanet_models.RetinaNet, block=resnet.BasicBlock, stage_sizes=(1, 1), backbone_width=4, small_stem=True,
        first_stage=2, extra_levels=0, width=4, head_depth=0),
    (vit_models, "vit_nano"): functools.partial(vit_models.ViT, embed_dim=8, num_layers=1, num_heads=2),
}


class Squares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A white square on black in each image."""

  VERSION = tfds.core.Version("1.0.0")
  name = "squares"

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(16, 16, 1)),
        "objects": tfds.features.Sequence({
            "bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(num_classes=10)})}))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(count) for split, count in (("train", 9), ("validation", 6), ("test", 6))}

  def _generate_examples(self, count):
    for i in range(count):
      image = np.zeros((16, 16), np.uint8)
      image[i % 5:i % 5 + 8, 4:12] = 255
      box = tfds.features.BBox(i % 5 / 16, 4 / 16, (i % 5 + 8) / 16, 12 / 16)
      yield i, {"image": Image.fromarray(image), "objects": [{"bbox": box, "label": i % 3}]}


def prepare(folder: Path) -> None:
  """Writes the sets and the text that the families read; digits are prepared by another."""
  sources.build(Squares, folder / "tfds")
  splits = {name: (count, 10.0, 10.0) for name, count in (("train", 9), ("validation", 6), ("test_10db", 6))}
  with mock.patch.object(morse, "SPLITS", splits):
    sources.prepare_embedded("morse", folder / "tfds")
  words = np.random.default_rng(0).choice(["to", "be", "or", "not", "that", "is"], 900)
  (folder / "play.txt").write_text(" ".join(words))


def _config(family: str, folder: Path) -> Any:
  module = {"lenet": lenet, "rnn": rnn, "deepspeech": deepspeech, "retinanet": retinanet, "vit": vit}[family]
  config = module.get_config(next(iter(module.PRESETS)))
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
  if family == "deepspeech":
    config.data.update({"buckets": 1, "max_frames": 880, "num_mels": 8, "time_masks": 1, "frequency_masks": 1})
    config.model.beam = 1
  if family == "retinanet":
    config.data.update({"name": "squares", "image_shape": (16, 16, 1), "max_boxes": 2, "flip": True})
  return config, module.build


def _inputs(family: str, experiment: Any, pipeline: Any) -> Any:
  """Rows to predict for; more than one batch, and not a multiple of the devices."""
  if family == "rnn":
    return experiment.read(Request(texts=["to be", "or", "not"]), {}).batch
  batch = {k: v for k, v in pipeline.items() if not k.startswith("host/")}
  return {k: np.concatenate([v, v])[:11] for k, v in batch.items()}


def outcome(family: str, mesh: str, folder: Path) -> dict[str, np.ndarray]:
  """What the family gives on a mesh: name -> array, the same on every process."""
  config, build = _config(family, folder)
  experiment = build(config)
  data, task = experiment.data, experiment.task
  program = Program(experiment, RunOptions(mesh=parallel.parse_mesh(mesh)))
  shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
  cast = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
  state = jax.jit(lambda s: jax.tree.map(cast, s), out_shardings=shardings)(program.init_state())
  found = {}
  evaluator = Evaluator(task, "jit", program.mesh, data.context)
  with opened(data.train, *data.evals.values(), rows=evaluator.rows):
    for step in range(STEPS):
      batch = parallel.put_batch(data.train.batch(step), "jit", program.mesh)
      state, out = program.train_step(state, batch, parallel.put_shared(np.float32(1), program.mesh))
      out = jax.tree.map(np.asarray, jax.block_until_ready(out))
      found |= {f"step {step} {jax.tree_util.keystr(path)}": x
                for path, x in jax.tree_util.tree_flatten_with_path(out)[0]}
    assets = json.loads(json.dumps(data.assets()))
    findings = evaluator.full(state.variables, state.rng, data.evals["test"], "test", assets)
    found |= {f"test {name}": np.asarray(value) for name, value in findings.metrics.items()}
    for name in findings.figures:  # as pixels: a picture shows rows of every process
      figure = findings.figures[name]()
      figure.canvas.draw()
      found[f"figure {name}"] = np.asarray(figure.canvas.buffer_rgba())
    whole = build(config).data.evals["test"]
    whole.open(np.arange)
    inputs = _inputs(family, experiment, whole.batch(0))
    predicted = Predictor(experiment, program, "jit")(state, inputs)
    found |= {f"predicted {jax.tree_util.keystr(path)}": x
              for path, x in jax.tree_util.tree_flatten_with_path(predicted)[0]}
  whole_state = parallel.state_to_host(state, program.mesh)
  found |= {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(whole_state)[0]}
  return found


def outcomes(cases: list[str], folder: Path) -> dict[str, dict[str, np.ndarray]]:
  """Case ("lenet data:2") -> `outcome`."""
  environment = {"TFDS_DATA_DIR": str(folder / "tfds")}
  with mock.patch.dict("os.environ", environment), jax.enable_x64(True):
    for (module, name), form in FORMS.items():
      module.VARIANTS = {**module.VARIANTS, name: form}
    return {case: outcome(*case.split(), folder) for case in cases}


def main() -> None:
  folder, output, *cases = sys.argv[1:]
  parallel.initialize()
  for case, found in outcomes(cases, Path(folder)).items():
    # Every process writes what it has, as all need the same.
    np.savez(Path(output) / f"{case}-{jax.process_index()}.npz", **found)


if __name__ == "__main__":
  main()
