"""Multilayer perceptrons, and Rosenblatt's perceptron of 1958.

  python -m experiments.mlp

Test accuracy, one seed each, on two shared CPU cores:

  mnist  99.06 % (published: 98.4 % for two layers, 800 hidden units and cross-entropy, Simard et
         al. 2003); 0.9 minutes
  xor    100 %; the perceptron (--config.model.variant=perceptron) 50 %
"""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from dljax import errors, launch, optim
from dljax.recipes import common, image_classification
from dljax.config import Group, ModelConfig, base_config, one_of
from dljax.data import inputs
from dljax.data.image import xor
from dljax.errors import UserError
from dljax.models import mlp
from dljax.tasks import classification
from dljax.train.experiment import Assets, Experiment, Inputs, Request

PRESETS: Mapping[str, str] = {
    "digits": "64-512-512-10 on the 8x8 digits that ship inside scikit-learn; offline, seconds.",
    "mnist": "784-512-512-10 on MNIST.",
    "fashion_mnist": "784-512-512-10 on Fashion-MNIST.",
    "xor": "2-8-2 on XOR, which the perceptron (--config.model.variant=perceptron) cannot learn.",
}
ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh, "logistic": nn.sigmoid}


# `config.model` of the small networks; `config.model.variant` decides the widths.
_MODEL = {"activation": "relu", "widths": (512, 512), "dropout": 0.0, "criterion": "softmax"}


def _digits() -> ml_collections.ConfigDict:
  config = image_classification.config(
      "mlp", "digits", data="digits", variant="mlp", optimizer="adamw")
  config.model.update(_MODEL)
  config.optimizer.learning_rate = 1e-3
  config.update({
      "total_steps": 1000, "log_every": 25, "eval_every": 200, "checkpoint_every": 500})
  return config


def _mnist(preset: str = "mnist") -> ml_collections.ConfigDict:
  config = image_classification.config(
      "mlp", preset, data=preset, variant="mlp", optimizer="adamw")
  config.model.update({**_MODEL, "dropout": 0.2})
  config.optimizer.update({"learning_rate": 1e-3, "weight_decay": 0.05})
  config.data.pad_crop = 1
  config.update({
      "total_steps": 16_880, "log_every": 100, "eval_every": 844, "checkpoint_every": 4220})
  return config


def _fashion_mnist() -> ml_collections.ConfigDict:
  return _mnist("fashion_mnist")


def _xor() -> ml_collections.ConfigDict:
  config = base_config(
      "mlp", "xor", task="xor", total_steps=400, batch_size=32, eval_batch_size=112,
      eval_every=100, monitor="validation/accuracy", optimizer=optim.default_config("adam"),
      data=xor.default_config(), model=Group({
          **common.model_fields("mlp"), "label_smoothing": 0.0, **_MODEL, "widths": (8,)}))
  config.optimizer.learning_rate = 1e-2
  return config


_CONFIGS = {"digits": _digits, "mnist": _mnist, "fashion_mnist": _fashion_mnist, "xor": _xor}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = _CONFIGS[preset]()
  config.model.describe({
      "variant": one_of("The network", mlp.VARIANTS),
      "activation": one_of("The activation after each hidden layer", ACTIVATIONS),
      "widths": "The width of each hidden layer.",
      "dropout": "The probability of dropping a hidden unit in training.",
      "criterion": one_of("The loss", classification.CRITERIA),
      "label_smoothing": "The share of the target that all classes get alike."})
  config.model = ModelConfig(config.model, {
      name: {"widths": variant(num_classes=1).widths} for name, variant in mlp.VARIANTS.items()})
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  num_classes = 2 if config.task == "xor" else config.data.num_classes
  variant = errors.choose("--config.model.variant", config.model.variant, mlp.VARIANTS)
  common.check_model(config.model)
  if any(width < 1 for width in config.model.widths):
    raise UserError(f"--config.model.widths={config.model.widths}: each must be at least 1")
  model = variant(
      num_classes=num_classes, dropout=config.model.dropout, dtype=common.dtype(config),
      activation=errors.choose("--config.model.activation", config.model.activation, ACTIVATIONS),
      widths=tuple(config.model.widths), remat=config.model.remat)
  if config.task != "xor":
    return image_classification.build(config, model, config.model.criterion)
  data = xor.pipelines(config.data, batch_size=config.batch_size,
                       eval_batch_size=config.eval_batch_size, seed=config.seed)
  task = classification.Classification(model=model, num_classes=2,
                                       label_smoothing=config.model.label_smoothing,
                                       criterion=config.model.criterion)
  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None,
      read=_read_points,
      show=lambda inputs, predictions, assets: classification.decode(predictions, assets))


def _read_points(request: Request, assets: Assets) -> Inputs:
  """Points from .npy files or arrays of shape [n, 2] or [2]."""
  del assets
  common.check_request(request, "mlp", ["paths"])
  points, names, skipped = [], [], []
  for name, source in inputs.each(request.paths, lambda path: [path]):
    try:
      found = np.load(source) if isinstance(source, Path) else source
      found = np.atleast_2d(found).astype(np.float32)
      if found.ndim != 2 or found.shape[1] != 2:
        raise ValueError(f"has shape {found.shape}, not [n, 2]")
    except FileNotFoundError:
      raise UserError(f"--input: there is no {name}") from None
    except (OSError, EOFError, TypeError, ValueError) as error:
      skipped.append(f"{name}: {error}")
      continue
    points.append(found)
    names += [f"{name}[{i}]" for i in range(len(found))]
  image = np.concatenate(points) if points else np.zeros((0, 2), np.float32)
  ids = np.arange(len(image), dtype=np.int32)
  batch = {"image": image, "mask": np.ones(len(image), np.float32), "id": ids}
  return Inputs(batch, names, skipped)


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS, image_classification.resolve)
