"""The cases of the row "models": the command lines of experiments whose networks are compared.

This file imports no model, because a worker first chooses between our operators and the native
ones.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Case:
  """One network, with a batch and an input size.

  Attributes:
    experiment: the module that builds it, with `get_config` and `build`.
    arguments: the arguments of its command line: the preset, and the changed fields.
    peer: the package that has the same network; the NETWORKS of the family's file in `peers` makes
      it, by the case's name.
    bound: the longest time of a train step or of inference, as a multiple of the peer's, or None
      if it is only reported.
    layouts: the layouts of the peer's memory, of which the faster counts.
  """

  experiment: str
  arguments: tuple[str, ...]
  peer: str
  bound: float | None
  layouts: tuple[str, ...] = ("contiguous", "channels_last")

  @property
  def family(self) -> str:
    """The name of the experiment's file."""
    return self.experiment.rpartition(".")[2]


_LANGUAGE_MODEL = ("--preset=tiny_shakespeare", "--config.batch_size=32",
                   "--config.data.length=64", "--config.data.tokenizer=bpe",
                   "--config.data.vocab_size=1000", "--config.model.embed_dim=256",
                   "--config.model.hidden_size=256", "--config.model.dropout=0")

CASES: Mapping[str,
               Case] = {"mlp": Case("experiments.mlp",
                                    ("--preset=mnist", "--config.batch_size=128",
                                     "--config.model.dropout=0"), peer="torch", bound=None,
                                    layouts=("contiguous",)),
                        "lenet": Case("experiments.lenet",
                                      ("--preset=mnist", "--config.batch_size=128"), peer="torch",
                                      bound=1.0),
                        "lenet_max": Case("experiments.lenet",
                                          ("--preset=mnist", "--config.batch_size=128",
                                           "--config.model.pool=max"), peer="torch", bound=1.0),
                        "alexnet": Case("experiments.alexnet",
                                        ("--preset=cifar10", "--config.batch_size=64",
                                         "--config.model.dropout=0"), peer="torch", bound=1.0),
                        "vgg11": Case("experiments.vgg",
                                      ("--preset=cifar10", "--config.batch_size=64",
                                       "--config.model.variant=vgg11", "--config.model.dropout=0"),
                                      peer="torch", bound=1.0),
                        "unet": Case("experiments.unet",
                                     ("--preset=digit_scenes", "--config.batch_size=16",
                                      "--config.model.dice_weight=0"), peer="torch", bound=1.0),
                        "resnet18": Case("experiments.resnet",
                                         ("--preset=cifar10", "--config.batch_size=64",
                                          "--config.model.variant=resnet18"), peer="torchvision",
                                         bound=1.0),
                        "resnet50": Case("experiments.resnet",
                                         ("--preset=imagenet2012", "--config.batch_size=32",
                                          "--config.data.image_shape=64,64,3",
                                          "--config.data.num_classes=10",
                                          "--config.model.zero_init_residual=false"),
                                         peer="torchvision", bound=1.0),
                        "retinanet": Case("experiments.retinanet",
                                          ("--preset=digit_scenes", "--config.batch_size=16"),
                                          peer="torchvision", bound=1.0),
                        "efficientnet_b0": Case("experiments.efficientnet",
                                                ("--preset=imagenet2012", "--config.batch_size=16",
                                                 "--config.data.image_shape=128,128,3",
                                                 "--config.data.num_classes=10",
                                                 "--config.model.dropout=0",
                                                 "--config.model.stochastic_depth=0",
                                                 "--config.model.label_smoothing=0"),
                                                peer="torchvision", bound=1.0),
                        "vit_ti16": Case("experiments.vit",
                                         ("--preset=imagenet2012", "--config.batch_size=16",
                                          "--config.data.num_classes=10", "--config.data.mixup=0",
                                          "--config.model.variant=vit_ti16",
                                          "--config.model.pool=token",
                                          "--config.model.positions=learned"), peer="timm",
                                         bound=1.0),
                        "lstm": Case("experiments.rnn", _LANGUAGE_MODEL, peer="torch", bound=1.2,
                                     layouts=("contiguous",)),
                        "gru": Case("experiments.rnn",
                                    (*_LANGUAGE_MODEL, "--config.model.cell=gru"), peer="torch",
                                    bound=1.2, layouts=("contiguous",)),
                        "deepspeech": Case("experiments.deepspeech", ("--preset=morse",),
                                           peer="torch", bound=1.2),
                        "gpt": Case("experiments.gpt",
                                    ("--preset=tiny_shakespeare", "--config.batch_size=16",
                                     "--config.data.length=128", "--config.model.use_bias=true",
                                     "--config.model.dropout=0"), peer="transformers", bound=1.2,
                                    layouts=("contiguous",)),
                        "bert_small": Case("experiments.bert",
                                           ("--preset=pydoc_mlm", "--config.batch_size=16",
                                            "--config.data.length=128",
                                            "--config.model.variant=bert_small",
                                            "--config.model.dropout=0",
                                            "--config.model.attention_dropout=0"),
                                           peer="transformers", bound=1.3,
                                           layouts=("contiguous",)),}
