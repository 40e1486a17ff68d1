"""What the recipes that read text share: the user's own text, and texts to predict for."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ml_collections

from dljax.data.splits import find_files
from dljax.data.text import corpus, pretrained
from dljax.errors import UserError


def resolve(
    config: ml_collections.ConfigDict, given: Collection[str],
) -> Mapping[str, Any]:
  """What a text of the user's own decides, and prints what it holds; see `corpus.find`.

  If training starts from a folder of weights that holds a tokenizer, that is the tokenizer, unless
  another was chosen.
  """
  fields = [field.removeprefix("data.") for field in given if field.startswith("data.")]
  beside, source = {}, config.init.source
  if source and not {"tokenizer", "tokenizer_file"} & set(fields) and pretrained.holds_tokenizer(source):
    beside = {"tokenizer": "file", "tokenizer_file": source}
  data = ml_collections.ConfigDict(config.data)
  data.update(beside)
  found, lines = corpus.find(data, config.seed, fields)
  print(*lines, sep="\n", end="\n" * bool(lines))
  named = {f"data.{field}": value for field, value in (beside | found).items()}
  if found.get("validation") == "" and "monitor" not in given:
    named["monitor"] = ""
  return named


def check_length(config: ml_collections.ConfigDict, model: Any) -> None:
  """Raises `UserError` if rows of `config.data.length` tokens are more than a model can read."""
  longest = getattr(model, "max_length", None)  # a network without that reads texts of any length
  if longest is not None and config.data.length > longest:
    raise UserError(f"--config.data.length={config.data.length}: the model reads at most {longest} "
                    "tokens; make it smaller")


def read(
    paths: Sequence[str], check: Callable[[str, str], Any],
) -> tuple[list[str], list[str], list[str]]:
  """Reads files, and the .txt files in folders.

  Args:
    paths: the paths of files and folders.
    check: a function of (text, name) that raises `UserError` if the text cannot be used.

  Returns:
    The texts, their names, and one line for each file that cannot be used.
  """
  texts, names, skipped = [], [], []
  for path in find_files(paths, "a file of text, or a folder of .txt files", ".txt"):
    try:
      content = corpus.read_file(path, "--input")
      check(content, os.fspath(path))
      texts.append(content)
      names.append(os.fspath(path))
    except UserError as error:
      skipped.append(str(error).removeprefix("--input="))
  return texts, names, skipped
