"""The experiment that all classifiers of texts share, from a config and a model."""

import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import ml_collections

from dljax import optim
from dljax.config import Field, Group, base_config
from dljax.data import own
from dljax.data.splits import find_files
from dljax.data.text import corpus, labelled, pretrained
from dljax.errors import UserError
from dljax.recipes import common, texts
from dljax.tasks import classification
from dljax.tasks.text_classification import TextClassification
from dljax.train.experiment import Assets, Experiment, Inputs, Request

# The values of fields of `config.data` for the sets that presets use.
DATA = {
    "pydoc": {"name": f"pydoc_paragraphs/{platform.python_version()}", "num_classes": 8,
              "tokenizer": "wordpiece", "vocab_size": 2000, "length": 64},
    "wordnet": {"name": "wordnet", "num_classes": 26, "tokenizer": "wordpiece",
                "vocab_size": 8000, "length": 64},
    # GLUE's test sets have no labels.
    "cola": {"name": "glue/cola", "text_features": ("sentence",), "test": ""},
    "sst2": {"name": "glue/sst2", "text_features": ("sentence",), "test": ""},
    "mrpc": {"name": "glue/mrpc", "text_features": ("sentence1", "sentence2"), "test": ""},
    "qqp": {"name": "glue/qqp", "text_features": ("question1", "question2"), "test": ""},
    "mnli": {"name": "glue/mnli", "text_features": ("premise", "hypothesis"), "num_classes": 3,
             "validation": "validation_matched", "test": "validation_mismatched"},
    "qnli": {"name": "glue/qnli", "text_features": ("question", "sentence"), "test": ""},
    "rte": {"name": "glue/rte", "text_features": ("sentence1", "sentence2"), "test": ""},
}


def config(
    family: str, preset: str, data: str, variant: str, optimizer: str,
) -> ml_collections.ConfigDict:
  """The shared fields of a text classifier's config, for the preset to change.

  Args:
    family: the name of the experiment's file.
    preset: one of its presets.
    data: a key of `DATA`.
    variant: a key of the family's VARIANTS.
    optimizer: a name that `optim.default_config` knows.
  """
  data_config = labelled.default_config()
  data_config.update(DATA[data])
  return base_config(
      family, preset, task="text_classification", monitor="validation/accuracy",
      optimizer=optim.default_config(optimizer), data=data_config, model=Group({
          **common.model_fields(variant),
          "label_smoothing": Field(0.0, "The share of the target that is spread evenly over all "
                                   "classes in training.")}))


def resolve(
    config: ml_collections.ConfigDict, given: Collection[str],
) -> Mapping[str, Any]:
  """What a table of the user's own decides, and prints what it holds; see `labelled.look_up`.

  The tokenizer is that of the weights that training starts from, see `texts.tokenizer_beside`.
  """
  fields = [field.removeprefix("data.") for field in given if field.startswith("data.")]
  beside = texts.tokenizer_beside(config, given)
  data = ml_collections.ConfigDict(config.data)
  data.update(beside)
  found, lines = labelled.look_up(data, config.seed, fields)
  print(*lines, sep="\n", end="\n" * bool(lines))
  found = beside | found
  folder = found.get("tokenizer_file", "")
  if folder and "vocab_size" not in fields and pretrained.is_folder(folder):
    found["vocab_size"] = pretrained.rows_of(folder)
  named = {f"data.{field}": value for field, value in found.items()}
  if found.get("validation") == "" and "monitor" not in given:
    named["monitor"] = ""
  return named


def build(config: ml_collections.ConfigDict, model: nn.Module) -> Experiment:
  """The experiment that trains `model` on the texts of `config.data`. Opens no data.

  Args:
    config: a config with the fields that `config()` gives.
    model: the network, see `TextClassification`, with `config.data.num_classes` logits.

  Raises:
    UserError: a value is out of range, or a row is longer than what the model can read.
  """
  texts.check_length(config, model)
  text_set = labelled.LabelledTexts(config.data)
  data = text_set.pipelines(
      batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed)
  task = TextClassification(
      model=model, num_classes=config.data.num_classes,
      label_smoothing=config.model.label_smoothing,
      spell=lambda tokens: text_set.tokenizer().decode(tokens))

  def read(request: Request, assets: Assets) -> Inputs:
    del assets  # the experiment has restored them
    common.check_request(request, config.family, ["paths", "texts"])
    if request.paths:
      found, names, skipped = _read(request.paths, config.data)
    else:
      found = [_parts(text, "--prompt", config.data) for text in request.texts]
      names, skipped = list(request.texts), []
    if not found:
      return Inputs({}, [], skipped)
    flags = names if request.paths else ["--prompt"] * len(found)
    batch = labelled.encode_inputs(found, flags, text_set.tokenizer(), config.data.length)
    return Inputs(batch, names, skipped)

  def show(inputs: Inputs, predictions: Any, assets: Assets) -> Iterator[Mapping[str, Any]]:
    del inputs
    return classification.decode(predictions, assets)

  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None, read=read, show=show,
      texts=True)


def _parts(text: str, where: str, config: Any) -> list[str]:
  """The text, or the two texts that a tab separates, as the model reads one or two."""
  count = len(config.text_features)
  parts = text.split("\t") if count == 2 else [text]
  if len(parts) != count:
    raise UserError(f"{where}: the model reads two texts ({' and '.join(config.text_features)}); "
                    "give them with one tab between them")
  if not all(part.strip() for part in parts):
    raise UserError(f"{where}: there is no text; give one")
  return parts


def _read(
    paths: Sequence[str], config: Any,
) -> tuple[list[Sequence[str]], list[str], list[str]]:
  """Reads tables, each row of which is a text or two, and files of a text each.

  Args:
    paths: the paths of files; of folders all files in them are taken.
    config: `config.data`.

  Returns:
    The texts of each row, the rows' names, and one line for each file that cannot be used.
  """
  found, names, skipped = [], [], []
  for path in find_files(paths, "a table or a file of text"):
    try:
      if path.suffix.lower() in labelled.TABLES:
        table = own.read_table(path, "--input")
        columns = [table.column(name, "--config.data.text_features")
                   for name in config.text_features]
        found += zip(*columns)
        names += [table.where(i) for i in range(len(table.rows))]
      else:
        found.append(_parts(corpus.read_file(path, "--input"), own.show(path), config))
        names.append(own.show(path))
    except UserError as error:
      skipped.append(str(error).removeprefix("--input="))
  return found, names, skipped
