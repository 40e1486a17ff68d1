"""Texts with a class each: the config that classifiers of texts share, and its pipelines.

A batch holds

  tokens      i32[b, L], a text, or two, in their frame (see `frames.py`), padded
  token_type  i32[b, L], 1 for the tokens of the second text and the token after it, otherwise 0
  length      i32[b], the number of tokens in a row that are no padding
  label       i32[b], the class
  mask, id    see `data/pipeline.py`

Texts longer than `config.data.length` lose their ends: of two texts the longer one is cut until
both fit (Devlin et al. 2019's code, "truncate_seq_pair"). Batches have few lengths; see
`data/ragged.py`.

The set is a TFDS set, or a table of the user's own with a text (or two) and a class in each row.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from dljax.config import Field, Group, one_of
from dljax.data import own, ragged, sources, splits
from dljax.data.pipeline import HostBatch, Pipeline
from dljax.data.splits import natural
from dljax.data.text import corpus, frames, tokenize
from dljax.errors import UserError, unknown

FLAG = "--config.data.table"
SPLIT_COLUMN = "split"  # the column of a table that names the rows' splits, if it has one
TABLES = (".csv", ".tsv")
_KEY = 16  # hexadecimal digits of a SHA-256 that tell examples apart
_READ_AT_ONCE = 1024


def default_config() -> Group:
  """The fields of `config.data`."""
  texts = corpus.default_config()
  shared = {name: Field(texts[name], texts.sentences[name]) for name in (
      "tokenizer", "tokenizer_file", "vocab_size", "byte_fallback", "buckets")}
  return Group({
      "name": Field("pydoc_paragraphs", splits.NAME),
      "table": Field("", "A table of your own in place of a set, .csv or .tsv, with the columns' "
                     "names in the first line; see dljax/data/README.md."),
      "shares": Field(own.SHARES, "The shares of train, validation and test, where the table has no "
                      f"column {SPLIT_COLUMN}."),
      "fitted_to": Field("", "The table that was looked at when the run started."),
      **splits.fields("train", "validation", "test"),
      "text_features": Field(("text",), "The feature of the set, or the column of your table, that "
                             "holds the text; or two, such as premise,hypothesis."),
      "label_feature": Field("label", "The feature or the column with the class."),
      "num_classes": Field(2, "The number of classes; of your own table it is found."),
      **shared,
      "length": Field(128, "The greatest number of tokens in a row; longer texts lose their ends."),
  })


def validate(config: Any) -> None:
  """Checks the fields of `config.data`; raises `UserError`."""
  need = functools.partial(splits.need, config)
  corpus.check_tokenizer(config)
  need("train", bool(config.train) or bool(config.table), "name the split to train on")
  need("num_classes", config.num_classes >= 2, "give at least 2")
  need("text_features", 1 <= len(config.text_features) <= 2 and all(config.text_features),
       "name one feature, or two")
  need("label_feature", config.label_feature not in config.text_features,
       "it is also a text; name another")
  least = 2 * len(config.text_features) + 1
  need("length", config.length >= least, f"give at least {least} tokens")
  own.check_shares(config.shares)
  if not config.table:
    sources.parse_name(config.name)
    return
  for split in own.SPLITS:
    need(split, config[split] in ("", split),
         f"a table of your own has only the split {split}; write {split}, or nothing")


def look_up(
    config: Any, seed: int, given: Collection[str],
) -> tuple[dict[str, Any], list[str]]:
  """What a table of the user's own decides; see `configs.Resolve`.

  Args:
    config: `config.data`.
    seed: the run's seed.
    given: the names of its fields that the user has set.

  Returns:
    Field of `config.data` -> value, for fields that are not given; and lines that say what the
    table holds.

  Raises:
    UserError: a value is out of range; or the table is missing or cannot be used.
  """
  if not config.table:
    validate(config)
    return {}, []
  config = ml_collections.ConfigDict(config.to_dict())
  config.num_classes = max(config.num_classes, 2)
  validate(config)
  if not Path(config.table).expanduser().exists() and "num_classes" in given:
    return {}, []
  examples = read_table(config)
  there = {example.split for example in examples}
  found: dict[str, Any] = {"fitted_to": config.table}
  for split, share in zip(own.SPLITS, config.shares):
    if split not in given and split != "train":
      # Where the table names only training and test rows, validation is drawn from the former.
      named = split in there or share > 0 and ("" in there or split == "validation")
      found[split] = split if named else ""
  config.update(found)
  classes = tuple(sorted({example.label for example in examples}, key=natural))
  dataset, _ = open_table(config, seed, classes)
  if "num_classes" not in given:
    found["num_classes"] = len(classes)
  parts = ", ".join(f"{split} {len(dataset.splits[split]):,}" for split in own.SPLITS
                    if config[split])
  return found, [f"{own.show(config.table)}: {len(examples):,} rows, {len(classes)} classes "
                 f"({own.some(classes)}); {parts}"]


@dataclasses.dataclass(frozen=True)
class Example:
  """A row of a table.

  Attributes:
    texts: the text, or two.
    label: the name of the class.
    split: the split that the table names; "" if it names none.
    where: the table and the line, for messages.
  """

  texts: tuple[str, ...]
  label: str
  split: str
  where: str

  @property
  def key(self) -> str:
    """A text that is the same for rows of equal texts."""
    return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:_KEY]


def read_table(config: Any, labels: bool = True) -> list[Example]:
  """The rows of the table of `config.data`.

  Args:
    config: `config.data`.
    labels: whether each row must have a class; otherwise the column is not read.

  Raises:
    UserError: the table cannot be read, lacks a column, or has a cell that holds nothing.
  """
  table = own.read_table(config.table, FLAG)
  texts = [table.column(name, "--config.data.text_features") for name in config.text_features]
  none = [""] * len(table.rows)
  classes = table.column(config.label_feature, "--config.data.label_feature") if labels else none
  named = table.column(SPLIT_COLUMN, FLAG) if SPLIT_COLUMN in table.columns else none
  found = []
  for i, (label, name, *row) in enumerate(zip(classes, named, *texts)):
    for column, cell in zip((*config.text_features, config.label_feature), (*row, label)):
      if not cell and (labels or column != config.label_feature):
        raise UserError(f"{table.where(i)}: the column {column} holds nothing; fill it in, or take "
                        "the line out")
    if name and own.split_name(name) is None:
      raise UserError(f"{table.where(i)}: {name!r} is no split; write train, validation or test")
    found.append(Example(tuple(row), label, own.split_name(name) or "", table.where(i)))
  return found


def open_table(
    config: Any, seed: int, classes: Sequence[str] = (), trained: Mapping[str, Any] | None = None,
) -> tuple[own.Dataset, dict[str, Any]]:
  """The user's own table as a data set.

  Args:
    config: `config.data`.
    seed: the run's seed, which draws the splits that the table does not name.
    classes: the names of the classes; by default those in the table.
    trained: the record of a run, {} if it has none, to evaluate it on another table: the rows named
      test, or all, are in the split test, but none that the run was trained on.

  Returns:
    The set; and the record to keep with a run: the fingerprint, and each line's key and split.

  Raises:
    UserError: see `read_table`; a class is none of those given, or has too few rows.
  """
  examples = read_table(config)
  found = tuple(sorted({example.label for example in examples}, key=natural))
  classes = tuple(classes) or found
  if clash := own.clash(found):
    raise UserError(f"{FLAG}={config.table}: the classes {clash[0]!r} and {clash[1]!r} differ only "
                    f"by {clash[2]}; give them one name")
  for example in examples:
    if example.label not in classes:
      raise UserError(f"{example.where}: {example.label!r} is none of the {len(classes)} classes "
                      f"({own.some(classes, 5)}); rename it, or take the line out")
  if len(classes) < 2:
    raise UserError(f"{FLAG}={config.table}: there is only one class, {found[0]}; add rows of "
                    "another")
  drawn = (_drawn(config, examples, seed) if trained is None
           else _all_to_test(config, examples, trained))
  chosen: dict[str, list[Example]] = {split: [] for split in own.SPLITS}
  for example, split in zip(examples, drawn):
    if split:
      chosen[split].append(example)
  text = json.dumps([(e.texts, e.label, e.split) for e in examples])
  fingerprint = f"{len(examples)} rows, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
  record = {"fingerprint": fingerprint, "files": {
      example.where.rpartition(", ")[2]: [example.key, split]
      for example, split in zip(examples, drawn)}}
  features = {**{name: own.Text() for name in config.text_features},
              config.label_feature: own.ClassLabel(classes)}
  number = {name: i for i, name in enumerate(classes)}

  def read(example: Example) -> Mapping[str, Any]:
    texts = {name: [text.encode()] for name, text in zip(config.text_features, example.texts)}
    return {**texts, config.label_feature: [number[example.label]]}

  return own.Dataset(config.table, features, fingerprint, chosen, read,
                     lambda example: example.where), record


def _drawn(config: Any, examples: Sequence[Example], seed: int) -> list[str]:
  """The split of each row: as the table says, else drawn by the seed, of each class its share."""
  shares = list(config.shares)
  for i, name in enumerate(own.SPLITS):
    if not config[name]:  # its rows are for training
      shares[0], shares[i] = shares[0] + shares[i], 0
  given = [example.split for example in examples]
  free = list(range(len(given)))
  if any(given):
    free = [i for i in free if given[i] == "train"]
    if not free:
      raise UserError(f"{FLAG}={config.table}: names no row for the split train; add some")
    if "validation" in given or not shares[1]:
      free = []
    shares = [shares[0] / (shares[0] + shares[1]), shares[1] / (shares[0] + shares[1]), 0]
  drawn = own.split([examples[i].key for i in free], shares, seed,
                    [examples[i].label for i in free],
                    lambda label: f"different rows of {label!r} in {config.table}")
  for i, name in zip(free, drawn):
    given[i] = name
  trained = {example.label for example, split in zip(examples, given) if split == "train"}
  for example, split in zip(examples, given):
    if example.label not in trained:
      raise UserError(f"{example.where}: the class {example.label!r} is in {split}, but no "
                      "training row has it; add some, or take the class out")
  return given


def _all_to_test(
    config: Any, examples: Sequence[Example], trained: Mapping[str, Any],
) -> list[str]:
  """The split test for the rows that it names, or else for all, but not for what was trained on."""
  named = any(example.split == "test" for example in examples)
  rest = [example for example in examples if example.split == "test" or not named]
  known = own.left_out([example.where for example in rest], [example.key for example in rest],
                       trained, f"{FLAG}={config.table}", "rows")
  kept = {example.where for example in rest} - known
  if not kept:
    raise UserError(f"{FLAG}={config.table} holds nothing but what the run was trained on; name "
                    "another")
  return ["test" if example.where in kept else "" for example in examples]


class LabelledTexts(own.FolderSet):
  """What the pipelines of one config share: the set, its classes and the tokenizer.

  Args:
    config: see `default_config`.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any):
    validate(config)
    # A table is to `FolderSet` what a folder is.
    config = ml_collections.ConfigDict(config.to_dict() | {"folder": config.table,
                                                           "skip_corrupt": 0})
    super().__init__(config, FLAG)
    self.tokenizer = corpus.RunTokenizer(self.config, self._training_texts, framed=True)

  def open_folder(
      self, trained: Mapping[str, Any] | None,
  ) -> tuple[own.Dataset, dict[str, Any]]:
    """See `FolderSet.open_folder`."""
    return open_table(self.config, self.seed, (self.run or {}).get("classes", ()), trained)

  def check(self, dataset: Any) -> None:
    """See `DataSet.check`."""
    config, kinds = self.config, {name: type(feature).__name__
                                  for name, feature in dataset.features.items()}
    for fields, kind in ((config.text_features, "Text"), ((config.label_feature,), "ClassLabel")):
      known = [name for name, of in kinds.items() if of == kind]
      flag = "--config.data." + ("text_features" if kind == "Text" else "label_feature")
      if not known:
        raise UserError(f"--config.data.name: {dataset.name} has no {kind} among its features "
                        f"{', '.join(kinds)}; choose another set")
      for name in fields:
        if name not in known:
          raise unknown(flag, name, known)
    classes = dataset.features[config.label_feature].num_classes
    if classes != config.num_classes:
      raise UserError(f"--config.data.num_classes={config.num_classes}: {dataset.name} has "
                      f"{classes} classes; give that number")
    if not self.foreign:
      super().check(dataset)

  def pipeline(self, split: str, **options: Any) -> Pipeline:
    """See `DataSet.pipeline`."""
    config = self.config
    return ragged.RaggedPipeline(
        lambda _: self._open(split), lambda texts, plan: texts.gather(plan, plan.rows),
        longest=config.length, flag="--config.data.length", buckets=config.buckets, **options)

  def shapes(self) -> splits.Shapes:
    """See `DataSet.shapes`."""
    row = (self.config.length,)
    return {"tokens": (row, np.int32), "token_type": (row, np.int32), "length": ((), np.int32),
            "label": ((), np.int32)}

  def assets(self) -> dict[str, Any]:
    """The names of the classes, the tokenizer, and the rows of the user's own table."""
    feature = self.dataset.features[self.config.label_feature]
    names = [feature.int2str(i) for i in range(feature.num_classes)]
    return super().assets() | {"classes": names, corpus.ASSET: self.tokenizer().to_json()}

  def restore(self, assets: Mapping[str, Any]) -> None:
    """See `FolderSet.restore`."""
    super().restore(assets)
    self.tokenizer.restore(assets)

  def _records(self, split: str) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """The texts of a split's examples; and their classes, i32[n].

    Raises:
      UserError: a text is not UTF-8, or an example has no class.
    """
    config, dataset = self.config, self.dataset
    self.check_foreign(split)
    records = dataset.records(config[split])
    texts, labels = [], []
    for start in range(0, len(records), _READ_AT_ONCE):
      for record in records[range(start, min(start + _READ_AT_ONCE, len(records)))]:
        where = lambda: (f"--config.data.{split}={config[split]!r}: "
                         f"{dataset.example(config[split], len(texts))}")
        try:
          texts.append(tuple(record[name][0].decode() for name in config.text_features))
        except (IndexError, AttributeError, UnicodeDecodeError) as error:
          raise UserError(f"{where()}: {', '.join(config.text_features)} holds no text in UTF-8 "
                          f"({error}); prepare the set again") from error
        label = record[config.label_feature][0] if len(record[config.label_feature]) else -1
        if not 0 <= label < config.num_classes:
          raise UserError(f"{where()}: has the label {label}, outside of 0 to "
                          f"{config.num_classes - 1}; choose a split with labels")
        labels.append(label)
    return texts, np.array(labels, np.int32)

  def _training_texts(self) -> list[str]:
    return [text for texts in self._records("train")[0] for text in texts]

  def _open(self, split: str) -> "_Texts":
    texts, labels = self._records(split)
    tokenizer = self.tokenizer()
    rows = [encode(row, tokenizer, self.config.length, f"--config.data.{split}, example {i}")
            for i, row in enumerate(texts)]
    return _Texts(rows, labels)


class _Texts:
  """The `ragged.RaggedExamples` of a split, in memory.

  Args:
    rows: the tokens and the token types of each.
    labels: i32[n].
  """

  def __init__(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], labels: np.ndarray):
    self._rows, self._labels = rows, labels
    self.lengths = np.array([len(tokens) for tokens, _ in rows], np.int64)

  def __len__(self) -> int:
    return len(self._rows)

  def gather(self, plan: ragged.RaggedPlan, rows: np.ndarray) -> HostBatch:
    none = np.zeros(0, np.int32)
    chosen = [self._rows[i] if i >= 0 else (none, none) for i in plan.indices[rows]]
    tokens, types = zip(*chosen) if chosen else ((), ())
    return {"tokens": ragged.pad(tokens, plan.padded), "token_type": ragged.pad(types, plan.padded),
            "length": np.array([len(row) for row in tokens], np.int32),
            "label": self._labels[np.maximum(plan.indices[rows], 0)]}

  def close(self) -> None:
    pass


def encode(
    texts: Sequence[str], tokenizer: tokenize.Tokenizer, length: int, where: str,
) -> tuple[np.ndarray, np.ndarray]:
  """A text, or two, in their frame.

  Args:
    texts: the text, or two.
    tokenizer: the run's tokenizer.
    length: the greatest number of tokens.
    where: the name of the texts, for messages.

  Returns:
    The tokens i32[n], and the token types i32[n].

  Raises:
    UserError: a text cannot be encoded.
  """
  if "class" in frames.roles(tokenizer) and hasattr(tokenizer, "frame"):
    framed = tokenizer.frame(*texts, longest=length, where=where)
    return framed.tokens, framed.token_type
  before, after = frames.frame(tokenizer)
  parts = [tokenizer.encode(text, where).tokens for text in texts]
  room = length - 1 - len(parts)
  if len(parts) == 2 and len(parts[0]) + len(parts[1]) > room:
    short = min(len(parts[0]), len(parts[1]), room // 2)
    sizes = (short, room - short) if len(parts[0]) <= len(parts[1]) else (room - short, short)
  else:
    sizes = (room,) * len(parts)
  rows = [np.append(part[:size], after) for part, size in zip(parts, sizes)]
  tokens = np.concatenate([[before], *rows]).astype(np.int32)
  types = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
  return tokens, np.concatenate([[0], types]).astype(np.int32)


def encode_inputs(
    texts: Sequence[Sequence[str]], names: Sequence[str], tokenizer: tokenize.Tokenizer,
    length: int,
) -> HostBatch:
  """Encodes texts to be classified as an evaluation reads them.

  Args:
    texts: of each row the text, or two.
    names: the rows' names, for messages.
    tokenizer: the run's tokenizer.
    length: the greatest number of tokens in a row.

  Returns:
    A batch of tokens, token_type and length, padded; id i32[n] and mask f32[n].
  """
  rows = [encode(row, tokenizer, length, name) for row, name in zip(texts, names)]
  sizes = np.array([len(tokens) for tokens, _ in rows], np.int32)
  longest = int(sizes.max())
  return {"tokens": ragged.pad([tokens for tokens, _ in rows], longest),
          "token_type": ragged.pad([types for _, types in rows], longest), "length": sizes,
          "id": np.arange(len(rows), dtype=np.int32), "mask": np.ones(len(rows), np.float32)}
