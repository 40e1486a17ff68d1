"""What the recipes that read text share: the user's own text, and texts to predict for."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from dljax.data.splits import find_files
from dljax.data.text import corpus, pretrained, tokenize
from dljax.errors import UserError


def resolve(
    config: ml_collections.ConfigDict, given: Collection[str],
) -> Mapping[str, Any]:
  """What a text of the user's own decides, and prints what it holds; see `corpus.find`.

  The tokenizer is that of the weights that training starts from, see `tokenizer_beside`.
  """
  fields = [field.removeprefix("data.") for field in given if field.startswith("data.")]
  beside = tokenizer_beside(config, given)
  data = ml_collections.ConfigDict(config.data)
  data.update(beside)
  found, lines = corpus.find(data, config.seed, fields)
  print(*lines, sep="\n", end="\n" * bool(lines))
  named = {f"data.{field}": value for field, value in (beside | found).items()}
  if found.get("validation") == "" and "monitor" not in given:
    named["monitor"] = ""
  return named


def tokenizer_beside(config: Any, given: Collection[str]) -> dict[str, Any]:
  """The tokenizer of the weights that training starts from, as fields of `config.data`.

  It is the one in a folder of weights, or that of a run with sub-words, whose embedding has a row
  for each of them. {} if there is none, or if the user chose another.

  Args:
    config: the whole config.
    given: the names of its fields that the user has set.
  """
  source = config.init.source
  if not source or {"data.tokenizer", "data.tokenizer_file"} & set(given):
    return {}
  if pretrained.holds_tokenizer(source):
    return {"tokenizer": "file", "tokenizer_file": source}
  stored = Path(source) / "data" / f"{corpus.ASSET}.json"
  if pretrained.is_folder(source) and stored.expanduser().is_file():
    file = str(stored.expanduser())
    if isinstance(tokenize.load(file), tokenize.Subwords):
      return {"tokenizer": "file", "tokenizer_file": file}
  return {}


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
