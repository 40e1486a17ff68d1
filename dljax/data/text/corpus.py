"""Text for language models: the config that they share, and its pipelines.

A batch holds

  tokens           i32[b, L]
  targets          i32[b, L], the token after each token
  target_weight    f32[b, L], 0 where no token is to be predicted
  length           i32[b], the number of tokens in a row that are no padding
  reset            f32[b], 1 where a row does not continue the row of the batch before; not of
                   windows that are read on their own
  mask, id         see `data/pipeline.py`; in evaluation, the id of a stream's window is the place
                   of its first token in the split
  characters       f32[b], in evaluation: the number of characters that the targets stand for
  bytes            f32[b], in evaluation: the number of bytes that the targets stand for
  segment          i32[b, L], of packed documents: from 1 on, the document in its row that a token
                   belongs to; 0 at padding
  position         i32[b, L], of packed documents: the place of a token in its document
  "host/position"  i64[b], in evaluation: the place of the row's first token in the split; of packed
                   documents i64[b, L], the place of each token

The documents of a split are read as one text, in streams or windows, or each on its own; see
`data/text/streams.py`.
"""

import functools
import json
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dljax.config import Field, Group, one_of
from dljax.data import own, ragged, sources, splits
from dljax.data.pipeline import HostBatch, IndexedPipeline, Pipeline
from dljax.data.text import packing, pretrained, streams, tokenize
from dljax.errors import UserError, unknown

ASSET = "tokenizer"
_SPLITS = own.SPLITS
SHARES = (0.9, 0.05, 0.05)  # of the user's own text
MANY = 10  # documents of a folder from which on whole documents are for one split
SUFFIX = ".txt"
_KEY = 16  # hexadecimal digits of a SHA-256 that tell documents apart
MAX_BYTES = 2**31 - 1  # of the user's own text; the place of a token is an int32
_LEAST_VOCABULARY = 300  # for a sub-word tokenizer: 256 bytes and some words


def default_config() -> Group:
  """The fields of `config.data`."""
  return Group({
      "name": Field("pydoc", splits.NAME),
      "file": Field("", "A UTF-8 text of your own in place of a set: the first 90 % are for "
                    "training, half of the rest for validation, and half for the test."),
      "folder": Field("", "Or a folder of .txt files, each a document; see dljax/data/README.md."),
      "field": Field("text", "The feature of the set that holds the text."),
      **splits.fields("train", "validation", "test"),
      "tokenizer": Field("byte", one_of("How text becomes tokens", tokenize.TOKENIZERS)),
      "tokenizer_file": Field("", 'The file of the tokenizer "file": a SentencePiece .model or a '
                              "tokenizer.json; or a folder that holds a tokenizer beside a model's "
                              "weights."),
      "vocab_size": Field(257, "The number of tokens of the model; a tokenizer may have fewer."),
      "byte_fallback": Field(False, "Whether characters that are not in the training text become "
                             "bytes; otherwise they are refused."),
      "documents": Field(False, "Whether each document is read on its own; otherwise all are read "
                         "as one text."),
      "length": Field(64, "The number of tokens in a window, and in the longest piece that a "
                      "document is cut into."),
      "packed": Field(False, "Whether documents that are read on their own share rows of length "
                      "tokens; otherwise each has a row."),
      "eval_stride": Field(0, "The number of tokens from one window of an evaluation to the next, "
                           "which predicts as many; 0 is length. A smaller number shows each token "
                           "more of the text before it, and takes longer."),
      "buckets": Field(ragged.MAX_BUCKETS, "The number of lengths that batches of documents are "
                       "padded to."),
  })


def validate(config: Any) -> None:
  """Checks the fields of `config.data`; raises `UserError`."""
  need = functools.partial(splits.need, config)
  check_tokenizer(config)
  need("length", config.length >= 1, "give at least 1 token")
  if stride := config.get("eval_stride"):
    need("eval_stride", 0 < stride <= config.length,
         f"give a number from 1 to --config.data.length={config.length}, or 0")
    need("eval_stride", not config.documents,
         "documents are not read in windows that overlap; set it to 0, or drop "
         "--config.data.documents")
  need("packed", not config.packed or config.documents,
       "goes with --config.data.documents=true; add it, or drop this")
  mine = own_text(config)
  # An evaluation may read all as the split test.
  need("train", bool(config.train) or bool(mine and not config.validation and config.test),
       "name the split to train on")
  need("folder", not (config.file and config.folder),
       "goes without --config.data.file; drop one of them, as by --config.data.folder=")
  if not mine:
    sources.parse_name(config.name)
    return
  for split in _SPLITS:
    need(split, config[split] in ("", split),
         f"a text of your own has only the split {split}; write {split}, or nothing")


def check_tokenizer(config: Any) -> None:
  """Checks the fields of `config.data` that choose the tokenizer; raises `UserError`."""
  need = functools.partial(splits.need, config)
  if config.tokenizer not in tokenize.TOKENIZERS:
    raise unknown("--config.data.tokenizer", config.tokenizer, tokenize.TOKENIZERS)
  need("vocab_size", config.vocab_size >= 2, "give at least 2")
  if config.tokenizer == "byte":
    need("vocab_size", config.vocab_size >= tokenize.Bytes.size,
         f"bytes need {tokenize.Bytes.size}")
  if config.tokenizer in ("bpe", "wordpiece", "unigram"):
    need("vocab_size", config.vocab_size >= _LEAST_VOCABULARY,
         f"sub-words need at least {_LEAST_VOCABULARY}")
  need("tokenizer_file", not config.tokenizer_file or config.tokenizer == "file",
       "goes with --config.data.tokenizer=file; add it, or drop this")
  need("tokenizer_file", config.tokenizer != "file" or bool(config.tokenizer_file),
       "name a SentencePiece .model, a tokenizer.json, or a folder of weights")


def own_text(config: Any) -> str:
  """The path of the user's own text, a file or a folder; "" if a TFDS set is read."""
  return config.file or config.folder


def find(config: Any, seed: int, given: Collection[str]) -> tuple[dict[str, Any], list[str]]:
  """What a text of the user's own decides; see `configs.Resolve`.

  Args:
    config: `config.data`.
    seed: the run's seed.
    given: the names of its fields that the user has set.

  Returns:
    Field of `config.data` -> value, for fields that are not given: vocab_size, if the tokens are
    the characters of the text, or those of a folder of weights; validation and test, where a folder
    has no documents for them. And lines that say what the text holds.

  Raises:
    UserError: a value is out of range; or the text is missing, where it is needed, or cannot be
      used.
  """
  validate(config)
  path, folder = own_text(config), config.tokenizer_file
  found: dict[str, Any] = {}
  if folder and "vocab_size" not in given and pretrained.is_folder(folder):
    found["vocab_size"] = pretrained.rows_of(folder, f"{tokenize.FLAG}={folder}")
  if not path:
    return found, []
  needed = config.tokenizer == "character" and "vocab_size" not in given
  if not Path(path).expanduser().exists():
    flag = "file" if config.file else "folder"
    if needed:
      raise UserError(f"--config.data.{flag}={path}: there is no such {flag}; name another, or, "
                      "for a dry run without it, give --config.data.vocab_size")
    return found, []
  texts = TextSet(config, carried=False)  # how the text is read does not matter here
  texts.seed = seed
  sizes = {split: sum(map(len, texts.own_documents[split].values()))
           for split in _SPLITS if config[split]}
  # A folder with a subfolder for each split may lack those for validation and test.
  found |= {split: "" for split in ("validation", "test")
            if config[split] and split not in given and not texts.own_documents[split]}
  sizes = {split: size for split, size in sizes.items() if split not in found}
  parts = ", ".join(f"{split} {size:,}" for split, size in sizes.items())
  lines = [f"{own.show(path)}: {sum(sizes.values()):,} characters ({parts}){texts.remark}"]
  if not needed:
    return found, lines
  characters = set().union(*texts.own_documents["train"].values())
  made = tokenize.Characters("".join(sorted(characters)), config.byte_fallback)
  return found | {"vocab_size": made.size}, lines


def split_text(text: str) -> dict[str, str]:
  """The splits of one text, in order: 90 % of its characters, and two halves of the rest."""
  rest = int(len(text) * 0.9)
  middle = rest + int((len(text) - rest) * 0.5)
  return {"train": text[:rest], "validation": text[rest:middle], "test": text[middle:]}


def split_documents(folder: Path, seed: int, flag: str) -> dict[str, dict[str, str]]:
  """The splits of the .txt files in a folder and its subfolders.

  With subfolders for train, validation and test, these are the splits. Else the splits of `MANY`
  documents or more are drawn by the seed and the documents' contents, by `SHARES`; each of fewer
  is cut by `split_text`.

  Args:
    folder: the folder.
    seed: the run's seed.
    flag: the flag that named the folder, for messages.

  Returns:
    Split -> name of a document -> its text, in the order of the names.

  Raises:
    UserError: the folder is missing, holds no such file, too much text, or one that is no text.
  """
  names = own.find(folder, [SUFFIX], flag).files
  if not names:
    raise UserError(f"{flag}={folder}: holds no {SUFFIX} file; name another folder")
  paths = [folder / name for name in names]
  if (size := sum(path.stat().st_size for path in paths)) > MAX_BYTES:
    raise UserError(f"{flag}={folder} has {size:,} bytes of text; give at most {MAX_BYTES:,}")
  texts = {name: read_file(path, flag) for name, path in zip(names, paths)}
  folders = {name: split for split, name in own.split_folders(folder).items()}
  found: dict[str, dict[str, str]] = {split: {} for split in _SPLITS}
  if folders:
    for name, text in texts.items():
      if split := folders.get(name.partition("/")[0] if "/" in name else ""):
        found[split][name] = text
  elif len(names) < MANY:
    for name, text in texts.items():
      for split, part in split_text(text).items():
        found[split][name] = part
  else:
    keys = [digest.sha256 for digest in own.digests(paths)]
    what = lambda stratum: f"different documents in {folder}"
    for (name, text), split in zip(texts.items(), own.split(keys, SHARES, seed, what=what)):
      found[split][name] = text
  return found


def read_file(path: str | Path, flag: str) -> str:
  """The text in a UTF-8 file.

  Raises:
    UserError: the file cannot be read, is no UTF-8, or is empty; the message starts with `flag`,
      from which the path came.
  """
  try:
    place = Path(path).expanduser()
    info = place.stat()
    if stat.S_ISCHR(info.st_mode) or info.st_size > MAX_BYTES:  # a device may never end
      raise UserError(f"{flag}={path} has more than {MAX_BYTES:,} bytes; name a smaller file")
    text = place.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{flag}={path} is not UTF-8 (byte {error.start}); convert it, e.g. by iconv "
                    "-t utf-8") from None
  except IsADirectoryError:
    raise UserError(f"{flag}={path} is a folder; name a file, or train on a folder of {SUFFIX} "
                    "files by --config.data.folder") from None
  except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte in the path
    if isinstance(error, UserError):
      raise
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{flag}={path} cannot be read ({reason}); name a file of text") from None
  if not text:
    raise UserError(f"{flag}={path} is empty; name a file of text")
  return text


class TextSet(splits.DataSet):
  """What the pipelines of one config share: the documents, and the tokenizer.

  Args:
    config: see `default_config`.
    carried: whether the model carries a state from window to window of a text; otherwise each
      window is read on its own.
    framed: see `RunTokenizer`.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any, carried: bool = True, framed: bool = False):
    validate(config)
    splits.need(config, "eval_stride", not (carried and config.eval_stride),
                "a model that carries its state has read all that comes before a window; set it "
                "to 0")
    splits.need(config, "packed", not (config.packed and carried),
                "a model that carries its state would carry it from document to document; drop it")
    super().__init__(config)
    self._carried = carried
    self.seed = 0  # of the run; it decides which documents of a folder are for which split
    self._tokenizer = RunTokenizer(
        self.config, lambda: self._documents("train").values(), framed)
    self._own: Mapping[str, Mapping[str, str]] | None = None
    self._run: Mapping[str, Any] | None = None  # the record of a run's own text

  def pipelines(self, **options: Any) -> splits.Data:
    """See `DataSet.pipelines`."""
    self.seed = options["seed"]
    return super().pipelines(**options)

  def pipeline(self, split: str, **options: Any) -> Pipeline:
    """See `DataSet.pipeline`."""
    config, read = self.config, functools.partial(self.read, split)
    if not config.documents and self._carried:
      return streams.Streams(read, length=config.length, **options)
    if not config.documents:
      return IndexedPipeline(
          lambda pipeline: streams.Windows(
              read()[0], config.length, stride=config.eval_stride or config.length,
              seed=pipeline.seed, train=pipeline.train),
          lambda windows, plan: windows.gather(plan, plan.rows), **options)
    counts = not options["train"]
    if config.packed:
      return IndexedPipeline(
          lambda _: packing.Packed(streams.Documents(
              read(), config.length, self.tokenizer().end, counts=counts), config.length),
          streams.packed, **options)
    return ragged.RaggedPipeline(
        lambda _: streams.Documents(read(), config.length, self.tokenizer().end, counts=counts),
        lambda documents, plan: documents.gather(plan, plan.rows), longest=config.length,
        flag="--config.data.length", buckets=config.buckets, **options)

  def shapes(self) -> splits.Shapes:
    """See `DataSet.shapes`."""
    row = (self.config.length,)
    shapes = {"tokens": (row, np.int32), "targets": (row, np.int32),
              "target_weight": (row, np.float32), "length": ((), np.int32)}
    if self.config.packed:
      shapes |= {"segment": (row, np.int32), "position": (row, np.int32)}
    elif self._carried or self.config.documents:
      shapes["reset"] = (), np.float32
    return shapes

  def fields(self) -> Mapping[str, Any]:
    """See `DataSet.fields`."""
    fields = {"restore": self.restore, "assets": self.assets}
    if path := own_text(self.config):
      fields |= {"name": path, "fingerprint": self.fingerprint}
    return fields

  def assets(self) -> Mapping[str, Any]:
    """The tokenizer; of the user's own text also its files."""
    assets = {ASSET: self.tokenizer().to_json()}
    return assets | {"files": self._record()} if own_text(self.config) else assets

  def fingerprint(self) -> str:
    """The fingerprint of the user's own text: names, lengths and hashes.

    Raises:
      UserError: the text of a run that was restored has changed since it began.
    """
    config, path = self.config, own_text(self.config)
    if config.file:
      found = self.fingerprint_of(config.file)
    else:
      names, keys = self._files()
      found = self.same_fingerprint(config.folder, own.fingerprint(names, keys))
    if self._run and own.same(path, self._run.get("path", "")) and (
        found != self._run.get("fingerprint")):
      now = {"fingerprint": found, "files": self._keys(dict.fromkeys(own.SPLITS, ()))}
      own.check_same(self._run, now, self._start)
    return found

  @property
  def _start(self) -> str:
    """The flag that names the user's own text, and its value."""
    config = self.config
    return f"--config.data.{'file' if config.file else 'folder'}={own_text(config)}"

  def _files(self) -> tuple[Sequence[str], list[own.Digest]]:
    """The names of the user's own files below their folder, and their digests."""
    path = Path(own_text(self.config)).expanduser()
    if self.config.file:
      return [path.name], own.digests([path])
    names = own.find(path, [SUFFIX], "--config.data.folder").files
    return names, own.digests([path / name for name in names])

  def _keys(self, documents: Mapping[str, Collection[str]]) -> dict[str, tuple[str, str | None]]:
    """Name of each file -> its key, and its split: "train" if any part of it was trained on."""
    names, digests = self._files()
    ours = (lambda name: "document 0") if self.config.file else (lambda name: name)
    return {own.show(name): (
        digest.sha256[:_KEY], next((s for s in _SPLITS if ours(name) in documents[s]), None))
        for name, digest in zip(names, digests)}

  def _record(self) -> dict[str, Any]:
    """What a run keeps of the user's own text; see `own.check_same`."""
    return {"path": own_text(self.config), "fingerprint": self.fingerprint(),
            "files": self._keys(self.own_documents)}

  @property
  def own_documents(self) -> Mapping[str, Mapping[str, str]]:
    """Split -> name of a document -> its text, of the user's own text."""
    with self.lock:
      if self._own is None:
        config = self.config
        if config.file:
          read = functools.partial(read_file, config.file, "--config.data.file")
          parts = split_text(self.read_own(config.file, read))
          self.fingerprint()
          self._own = {split: {"document 0": part} for split, part in parts.items()}
        else:
          folder = Path(config.folder).expanduser()
          self.fingerprint()
          documents = split_documents(folder, self.seed, "--config.data.folder")
          self.fingerprint()  # nothing has changed in between
          self._own = documents
        if not config.train and not config.validation:
          whole: dict[str, str] = {}
          for documents in self._own.values():
            for name, text in documents.items():
              whole[name] = whole.get(name, "") + text
          self._own = {"train": {}, "validation": {}, "test": whole}
        self._own = self._without_known(self._own)
      return self._own

  def _without_known(
      self, documents: Mapping[str, Mapping[str, str]],
  ) -> Mapping[str, Mapping[str, str]]:
    """The documents to evaluate a run on, without those that it was trained on; or all, if they are
    its own."""
    if not self._run or self.fingerprint() == self._run.get("fingerprint"):
      return documents
    files = self._keys(documents)
    known = own.left_out(list(files), [key for key, _ in files.values()], self._run, self._start,
                         "documents")
    if len(known) == len(files):
      raise UserError(f"{self._start} holds nothing but what the run was trained on; name another")
    return {split: {name: text for name, text in part.items() if own.show(name) not in known}
            for split, part in documents.items()}

  @property
  def remark(self) -> str:
    """How many documents of a folder each split has, and what else the folder holds."""
    config = self.config
    if config.file:
      return ""
    found = own.find(Path(config.folder).expanduser(), [SUFFIX], "--config.data.folder")
    read = set().union(*self.own_documents.values())
    # There may be more documents beside the folders of the splits.
    others = [*found.others, *(name for name in found.files if name not in read)]
    counts = [f"{len(self.own_documents[split])} for {split}" for split in _SPLITS if config[split]]
    return f" in documents, {', '.join(counts)}" + (
        f"; left out {own.some(others)}" if others else "")

  def restore(self, assets: Mapping[str, Any]) -> None:
    """Takes the tokenizer that a run has saved; call it before anything is opened.

    Raises:
      UserError: the tokenizer is damaged, or another run's.
    """
    self._run = assets.get("files")
    self._tokenizer.restore(assets)

  def tokenizer(self) -> tokenize.Tokenizer:
    """The tokenizer of the run; see `RunTokenizer`."""
    return self._tokenizer()

  def read(self, split: str) -> tuple[tokenize.Encoded, np.ndarray]:
    """A split's documents as one text, with `end` before each; and i64[n], where each starts.

    Training counts no characters and bytes, so there the arrays of these numbers are empty, which
    saves two thirds of the memory.
    """
    end = self.tokenizer().end
    before = tokenize.Encoded(np.array([end], np.int32), *np.zeros((2, 1), np.int32))
    none = np.zeros(0, np.int32)
    parts, begins, size = [], [], 0
    for _, encoded in self.encoded(split):
      parts += [before, encoded]
      if split == "train":
        parts[-2:] = [part._replace(characters=none, bytes=none) for part in parts[-2:]]
      begins.append(size)
      size += 1 + len(encoded.tokens)
    if size <= len(begins):
      raise UserError(f"{self._flag(split)} has no text; name another")
    return tokenize.Encoded(*map(np.concatenate, zip(*parts))), np.array(begins)

  def encoded(self, split: str) -> Iterator[tuple[str, tokenize.Encoded]]:
    """Yields a split's documents, each as its text and its tokens."""
    for name, document in self._documents(split).items():
      yield document, self.tokenizer().encode(document, f"{self._flag(split)}, {name}")

  def _flag(self, split: str) -> str:
    config = self.config
    if own_text(config):
      return f"{self._start} ({split})"
    return f"--config.data.{split}={config[split]!r}"

  def _documents(self, split: str) -> Mapping[str, str]:
    """Name of a document -> its text."""
    config = self.config
    if own_text(config):
      splits.need(config, split, bool(config[split]), "name the split to train on")
      return self.own_documents[split]
    records = self.dataset.records(config[split])
    return {f"document {i}": self._text(split, i, record[config.field])
            for i, record in enumerate(records[range(len(records))])}

  def _text(self, split: str, number: int, values: Sequence[bytes]) -> str:
    """The text of a record's field."""
    try:
      return values[0].decode()
    except (IndexError, AttributeError, UnicodeDecodeError) as error:
      raise UserError(f"{self._flag(split)}, document {number}: {self.config.field} holds no "
                      f"text in UTF-8 ({error}); prepare the set again") from error

  def check(self, dataset: sources.Dataset) -> None:
    """See `DataSet.check`."""
    config = self.config
    features = {name for name, feature in dataset.features.items()
                if type(feature).__name__ == "Text"}
    if config.field not in features:
      if not features:
        raise UserError(f"--config.data.name: {config.name} has no text, but "
                        f"{', '.join(dataset.features)}; choose another set")
      raise unknown("--config.data.field", config.field, features)
    super().check(dataset)


class RunTokenizer:
  """The tokenizer of a run: after `restore` the one that was saved with it, otherwise a new one.

  Args:
    config: the fields tokenizer, tokenizer_file, vocab_size and byte_fallback of `config.data`.
    texts: () -> the training texts, which a new tokenizer may be fitted to.
    framed: whether a sub-word tokenizer that is fitted has the tokens that BERT needs.
  """

  def __init__(self, config: Any, texts: Callable[[], Iterable[str]], framed: bool = False):
    self._config, self._texts, self._framed = config, texts, framed
    self._made: tokenize.Tokenizer | None = None
    self._lock = threading.RLock()

  def __call__(self) -> tokenize.Tokenizer:
    """The tokenizer, made at the first call.

    Raises:
      UserError: it cannot be made, or has more tokens than the model.
    """
    config = self._config
    with self._lock:
      if self._made is None:
        fitted = config.tokenizer in tokenize.FITTED
        if config.tokenizer == "file":
          made = pretrained.load(config.tokenizer_file)
        else:
          made = tokenize.make(
              config.tokenizer, list(self._texts()) if fitted else (), framed=self._framed,
              vocab_size=config.vocab_size, byte_fallback=config.byte_fallback)
        if made.size > config.vocab_size:
          raise UserError(f"--config.data.vocab_size={config.vocab_size}: the tokenizer has "
                          f"{made.size} tokens; give that number")
        self._made = _agreed(made) if fitted else made
      return self._made

  def restore(self, assets: Mapping[str, Any]) -> None:
    """Takes the tokenizer that a run has saved.

    Raises:
      UserError: the tokenizer is damaged, or another run's.
    """
    tokenizer = tokenize.from_json(assets.get(ASSET))
    if tokenizer.size > self._config.vocab_size:
      raise UserError(f"data/{ASSET}.json has {tokenizer.size} tokens, and "
                      f"--config.data.vocab_size is {self._config.vocab_size}; take that file from "
                      "a copy of the run, or train again")
    with self._lock:
      self._made = tokenizer


def _agreed(tokenizer: tokenize.Tokenizer) -> tokenize.Tokenizer:
  """The first host's tokenizer, for every host: two tokenizers fitted to one text may differ."""
  if jax.process_count() == 1:
    return tokenizer
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(tokenizer.to_json()).encode(), np.uint8)
  padded = np.zeros(int(multihost_utils.broadcast_one_to_all(np.int32(len(data)))), np.uint8)
  padded[:len(data)] = data[:len(padded)]
  return tokenize.from_json(json.loads(bytes(multihost_utils.broadcast_one_to_all(padded))))


def encode_prompts(
    texts: Sequence[str], names: Sequence[str], tokenizer: tokenize.Tokenizer,
) -> HostBatch:
  """Encodes prompts for the model to continue.

  Args:
    texts: the prompts, which may be empty.
    names: their names, for the message about a prompt that cannot be encoded.
    tokenizer: the run's tokenizer.

  Returns:
    A batch of prompt i32[n, P], each with `end` before it and padded; length i32[n]; id i32[n],
    the prompts' numbers; and mask f32[n].
  """
  rows = [np.append(np.int32(tokenizer.end), tokenizer.encode(text, name).tokens)
          for text, name in zip(texts, names)]
  length = np.array([len(row) for row in rows], np.int32)
  none = np.zeros((0, 1), np.int32)
  return {"prompt": ragged.pad(rows, length.max(initial=1)) if rows else none, "length": length,
          "id": np.arange(len(rows), dtype=np.int32), "mask": np.ones(len(rows), np.float32)}
