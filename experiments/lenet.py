"""LeNet-5 on handwritten digits.

  python -m experiments.lenet

Test accuracy, all on two shared CPU cores:

  digits           99.28 %, the mean of five seeds (--seed=0 to 4), on a stratified fifth, 360 images; 14 s for one
                   on an otherwise idle machine, start and compilation included
  digits/by_writer 97.22 %, the mean of five seeds, on the last 360 images of the file, which other people wrote:
                   --config.data.name=digits/by_writer
  mnist            99.38 %, one seed (published: 99.05 %, LeCun et al. 1998, without distortions; 99.2 % with);
                   1.1 minutes
"""

from collections.abc import Mapping

import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from dljax import errors, launch
from dljax.recipes import common, image_classification
from dljax.models import lenet
from dljax.train.experiment import Experiment

PRESETS: Mapping[str, str] = {
    "digits": "The 8x8 digits that ship inside scikit-learn; offline, under a minute.",
    "mnist": "MNIST, as in LeCun et al. 1998.",
    "fashion_mnist": "Fashion-MNIST.",
}
ACTIVATIONS = {"tanh": jnp.tanh, "relu": nn.relu}


def get_config(preset: str) -> ml_collections.ConfigDict:
  """The config of a preset of `PRESETS`."""
  config = image_classification.config("lenet", preset, data=preset, variant="lenet5", optimizer="adam")
  config.model.update({"activation": "tanh", "pool": "avg"})
  config.optimizer.update({"learning_rate": 2e-3, "warmup_fraction": 0.05})
  if preset == "digits":
    config.data.update({"image_shape": (32, 32, 1), "resize": "bilinear", "pad_crop": 3})
    # The loss, as 144 validation images give an accuracy of few values.
    config.update({"total_steps": 1200, "batch_size": 128, "log_every": 25, "eval_every": 200, "checkpoint_every": 600,
                   "monitor": "validation/loss"})
  else:
    config.update({"total_steps": 8000, "batch_size": 128, "log_every": 50, "eval_every": 420, "checkpoint_every": 2100})
    config.data.update({"pad_crop": 2})
  return config


def build(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment that `config` describes."""
  variant = errors.choose("--config.model.variant", config.model.variant, lenet.VARIANTS)
  errors.choose("--config.model.pool", config.model.pool, lenet.POOLS)
  model = variant(
      num_classes=config.data.num_classes,
      activation=errors.choose("--config.model.activation", config.model.activation, ACTIVATIONS),
      pool=config.model.pool, dtype=common.dtype(config), remat=config.model.remat)
  return image_classification.build(config, model)


if __name__ == "__main__":
  launch.main(get_config, build, PRESETS)
