"""The default name of a run's folder."""

import re

import pytest

from dljax import config as config_lib
from dljax.launch import names
from experiments import bert, lenet, rnn, vit


def _name(family, *overrides, preset=None, seed=0, epochs=None):
  default = next(iter(family.PRESETS))
  config = family.get_config(preset or default)
  config_lib.apply_overrides(config, [f"--config.{override}" for override in overrides])
  config.seed = seed
  return names.run_name(config, family.get_config(preset or default), default=default, epochs=epochs)


@pytest.mark.parametrize("family, overrides, others, name", [
    (lenet, [], {}, "lenet-digits"),
    (lenet, ["optimizer.learning_rate=0.4"], {"seed": 7}, "lenet-digits-learning_rate=0.4-seed=7"),
    (lenet, ["total_steps=8", "optimizer.learning_rate=1e-5"], {"preset": "mnist"},
     "lenet-mnist-learning_rate=1e-05-total_steps=8"),
    (lenet, [], {"epochs": 3.0}, "lenet-digits-epochs=3"),
    (lenet, [], {"epochs": 0.5, "seed": 1}, "lenet-digits-epochs=0.5-seed=1"),
    # What is done with the trained network does not tell runs apart.
    (lenet, ["eval.corruptions=all"], {}, "lenet-digits"),
    # Two fields end in "name".
    (lenet, ["optimizer.name=sgd"], {}, "lenet-digits-optimizer.name=sgd"),
    (lenet, ["data.name=fashion_mnist"], {}, "lenet-fashion_mnist"),
    (lenet, ["data.name=fashion_mnist"], {"preset": "mnist"}, "lenet-fashion_mnist-preset=mnist"),
    (rnn, ["data.file=book.txt"], {}, "rnn-book.txt"),
    (bert, ["data.table=reviews.csv"], {}, "bert-reviews.csv"),
    (rnn, ["data.file=b\xfccher.txt"], {"seed": 2}, "rnn-b\xfccher.txt-seed=2"),
    # The variant decides the patch size.
    (vit, ["model.variant=vit_b32"], {}, "vit-digits-variant=vit_b32"),
    (vit, ["model.variant=vit_b32", "model.patch_size=8"], {},
     "vit-digits-patch_size=8-variant=vit_b32"),
])
def test_the_name_says_what_differs_from_the_preset(family, overrides, others, name):
  assert _name(family, *overrides, **others) == name


@pytest.mark.parametrize("overrides, start", [
    (["data.file=texts/book.txt"], "rnn-book.txt"),
    (["data.file=/a [b]/c*.txt"], "rnn-c_.txt"),
    (["data.file=../.."], "rnn-.."),
    (["data.file=caf\udce9.txt"], "rnn-caf_.txt"),
    (["data.train=train[:90%]"], "rnn-pydoc-train=train_90"),
    (["monitor=validation/loss", "init.source=../old run/"], "rnn-pydoc-source=old_run"),
    (["data.file=" + 80 * "a"], "rnn-" + 40 * "a"),
    # Too long for a name.
    (["optimizer.learning_rate=0.45", "optimizer.schedule=constant", "optimizer.clip_norm=0.25"],
     "rnn-pydoc"),
])
def test_a_hash_stands_for_what_is_unfit_for_a_path(overrides, start):
  name = _name(rnn, *overrides)
  assert re.fullmatch(re.escape(start) + "-[0-9a-f]{8}", name) and len(name) <= 60
  assert name != _name(rnn, *overrides, seed=1)  # the name or the hash has the seed


def test_alike_values_have_different_names():
  alike = [_name(rnn, f"data.file={path}") for path in ("a.txt", "x/a.txt", "y/a.txt", "a.txt/x")]
  assert len(set(alike)) == 4
