"""The user's own data, as folders of files and tables: what the modalities share.

A recipe's `resolve(config, given)` looks at the data once, when a run starts; the fields that it
finds are stored in config.json. A modality's `DataSet` opens the data later, as it opens a TFDS
set, by overriding `DataSet.open`. In both places it

1. finds the files by `find` (natural order, hidden files left out, others counted), or reads a
   table by `read_table`;
2. takes the splits from the data if they name them (`split_folders`, `split_name`), else from
   `split`, which depends only on the seed and on each example's key;
3. takes `digests` of the files, whose `fingerprint` names the data; equal files are twins, and
   serve as the keys of `split`, so that no two of them lie in different splits;
4. gives a `Dataset`, which has the interface of `sources.Dataset`: pipelines, fingerprints and
   checks of splits then work as for a TFDS set. `FolderSet` is the `DataSet` of such a folder.
"""

import concurrent.futures
import csv
import dataclasses
import hashlib
import io
import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from dljax.data import splits
from dljax.data.splits import natural
from dljax.errors import UserError, unknown

SPLITS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)  # of the examples, where the data name no splits
# How folders and the cells of a table name a split; upper and lower case count as the same.
_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "dev"),
          "test": ("test", "testing")}
MAX_TABLE = 2**30  # bytes of a table
DELIMITERS = (",", ";", "\t", "|")
_THREADS = 16
# A decimal number. Python's `float` also reads "1_0" as 10, and digits of other scripts.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Found:
  """The files of a folder.

  Attributes:
    files: the paths below the folder, as text with "/", in natural order.
    others: those of files with other endings, which are no examples.
  """

  files: tuple[str, ...]
  others: tuple[str, ...]


def find(folder: Path, suffixes: Collection[str], flag: str) -> Found:
  """The files of a folder and its subfolders, also behind links; hidden ones are left out.

  Args:
    folder: the folder.
    suffixes: the ends of the names to take, in lower case, such as ".png".
    flag: the flag that named the folder, for the message.

  Raises:
    UserError: the folder does not exist, or cannot be read.
  """
  if not folder.is_dir():
    raise UserError(f"{flag}={show(folder)}: there is no such folder; name the folder of your data")
  files, others = [], []
  for path in splits.walk(folder, f"{flag}={show(folder)}"):
    wanted = os.path.splitext(path.name)[1].lower() in suffixes
    (files if wanted else others).append(path.relative_to(folder).as_posix())
  return Found(tuple(sorted(files, key=natural)), tuple(sorted(others, key=natural)))


def expand(path: str, flag: str) -> Path:
  """The path with the user's home folder in place of ~; a message names the path by `flag`."""
  try:
    return Path(path).expanduser()
  except RuntimeError as e:  # ~NAME of a user that does not exist
    raise UserError(f"{flag}={path}: {e}; name a folder") from None


def same(path: str, other: str) -> bool:
  """Whether two paths, as users write them, lead to the same place; "" leads to none."""
  if not path or not other:
    return False
  one, two = (os.path.abspath(os.path.expanduser(place)) for place in (path, other))
  return one == two


def show(path: str | os.PathLike[str]) -> str:
  """A path as text on one line: bytes that are no UTF-8 become \\xHH, and a line's end \\n."""
  text = os.fsencode(path).decode(errors="backslashreplace")
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def some(names: Sequence[str], most: int = 3) -> str:
  """The first names of a list as text, and how many more there are."""
  more = f" and {len(names) - most:,} more" if len(names) > most else ""
  return ", ".join(map(show, names[:most])) + more


def split_name(text: str) -> str | None:
  """The split that a folder's name or a table's cell means, such as "validation" for "Val"."""
  for split, names in _NAMES.items():
    if text.strip().lower() in names:
      return split
  return None


def split_folders(folder: Path) -> dict[str, str]:
  """Split -> the name of its subfolder, if the folder has one called train; else {}.

  Raises:
    UserError: two subfolders are for one split.
  """
  found: dict[str, str] = {}
  for name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
    if split := split_name(name):
      if split in found:
        raise UserError(f"{show(folder)}: the folders {found[split]} and {name} are both for "
                        f"{split}; rename one")
      found[split] = name
  return found if "train" in found else {}


def check_shares(shares: Sequence[float]) -> None:
  """Raises `UserError` unless `config.data.shares` are three parts of 1, with some to train on."""
  if len(shares) != 3 or not all(0 <= s <= 1 for s in shares) or shares[0] == 0 or (
      abs(sum(shares) - 1) > 1e-6):
    written = ",".join(map(str, shares))
    raise UserError(f"--config.data.shares={written}: give the shares of train, validation and "
                    "test, which add up to 1, such as 0.8,0.1,0.1; 0 leaves a split out")


def split(
    keys: Sequence[str], shares: Sequence[float], seed: int, strata: Sequence[Hashable] = (),
    what: Callable[[Hashable], str] = lambda stratum: "examples",
) -> list[str]:
  """The split of each example, drawn by the seed and the same share of every stratum.

  Within a stratum the examples are ordered by a hash of seed and key, so that neither their order
  nor other examples matter. Examples of one key come into one split.

  Args:
    keys: a text for each example; those that must not be torn apart (twins, one speaker's
      recordings) have the same.
    shares: those of train, validation and test; see `check_shares`.
    seed: the run's seed.
    strata: each example's stratum, such as its class; by default all are in one.
    what: says what the examples of a stratum are, for the message.

  Returns:
    The name in `SPLITS` for each example.

  Raises:
    UserError: a stratum has fewer keys than there are shares above 0.
  """
  stratum_of: dict[str, Hashable] = {}
  for key, stratum in zip(keys, strata or [None] * len(keys)):
    stratum_of.setdefault(key, stratum)
  members: dict[Hashable, list[str]] = {}
  for key, stratum in stratum_of.items():
    members.setdefault(stratum, []).append(key)
  parts = [name for name, share in zip(SPLITS, shares) if share > 0]
  chosen = {}
  for stratum, own in members.items():
    if len(own) < len(parts):
      raise UserError(f"there are only {len(own)} {what(stratum)}, too few for "
                      f"{' and '.join(parts)}; add more, or give other --config.data.shares "
                      "(now " + ",".join(f"{share:g}" for share in shares) + ")")
    own.sort(key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    counts = [max(round(share * len(own)), 1) if share > 0 else 0 for share in shares[1:]]
    while sum(counts) >= len(own):  # at least one is left for training
      counts[int(np.argmax(counts))] -= 1
    bounds = np.cumsum([len(own) - sum(counts), *counts])
    for place, key in enumerate(own):
      chosen[key] = SPLITS[int(np.searchsorted(bounds, place, side="right"))]
  return [chosen[key] for key in keys]


@dataclasses.dataclass(frozen=True)
class Digest:
  """The length of a file in bytes, and the SHA-256 of its bytes as hexadecimal text."""

  length: int
  sha256: str


def digests(files: Sequence[Path]) -> list[Digest]:
  """The digest of each file, read in threads; raises `UserError` if one cannot be read."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(_digest, files))


def _digest(file: Path) -> Digest:
  try:
    with open(file, "rb") as content:
      digest = hashlib.file_digest(content, "sha256")
      return Digest(content.tell(), digest.hexdigest())
  except OSError as e:
    raise UserError(f"{show(file)} cannot be read ({e.strerror}); mend it, or remove it") from e


def fingerprint(names: Sequence[str], found: Sequence[Digest], more: str = "") -> str:
  """A text that differs for other names, lengths or contents of files, or another `more`.

  Args:
    names: the paths below the folder, so that the folder may be moved.
    found: the digest of each.
    more: what else the examples depend on, such as the labels in a table.
  """
  whole = hashlib.sha256()
  for name, digest in sorted(zip(names, found), key=lambda pair: pair[0]):
    whole.update(os.fsencode(f"{name}\0{digest.length}\0{digest.sha256}\0"))
  whole.update(os.fsencode(more))
  size = sum(digest.length for digest in found)
  return f"{len(names)} files of {size} bytes, SHA-256 {whole.hexdigest()}"


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], start: str) -> None:
  """Raises `UserError` if data have changed since a run began; names the files that differ.

  Args:
    before: the record that was kept then: fingerprint, and files: name -> (key, split).
    now: the record of the same data now.
    start: the flag and the path of the data, for the message.
  """
  if before.get("fingerprint") == now["fingerprint"]:
    return
  old, new = ({name: key for name, (key, _) in record.get("files", {}).items()}
              for record in (before, now))
  changes = [f"{what} {some(names)}" for what, names in (
      ("added:", sorted(new.keys() - old.keys(), key=natural)),
      ("removed:", sorted(old.keys() - new.keys(), key=natural)),
      ("changed:", sorted((name for name in old.keys() & new.keys() if old[name] != new[name]),
                          key=natural))) if names]
  raise UserError(f"{start} has changed since the run began "
                  f"({'; '.join(changes) or 'other labels, texts or splits'}); restore it, or name "
                  "another --workdir")


def left_out(
    names: Sequence[str], keys: Sequence[str], trained: Mapping[str, Any], start: str, what: str,
) -> set[str]:
  """Returns the names of the examples that a run was trained on, and warns of them.

  Args:
    names: the name of each example that would be evaluated.
    keys: the key of each.
    trained: the record of the run, see `check_same`; {} if it has none.
    start: the flag and the path of the data, for the warning.
    what: what the warning calls the examples, such as "images".
  """
  seen = {key for key, split in trained.get("files", {}).values() if split == "train"}
  known = [name for name, key in zip(names, keys) if key in seen]
  if known:
    logging.warning("%s: left out what the run was trained on, %d of %d %s: %s", start, len(known),
                    len(names), what, some(known))
  return set(known)


def clash(names: Sequence[str]) -> tuple[str, str, str] | None:
  """Two names that are different but look alike, and how they differ; None if there are none."""
  for form, how in ((lambda name: unicodedata.normalize("NFC", name), "Unicode normalisation"),
                    (lambda name: unicodedata.normalize("NFC", name).casefold(), "case")):
    seen: dict[str, str] = {}
    for name in names:
      if seen.setdefault(form(name), name) != name:
        return seen[form(name)], name, how
  return None


@dataclasses.dataclass(frozen=True)
class Table:
  """The cells of a table, as text without spaces around it.

  Attributes:
    path: the file's path, for messages.
    columns: the names of the columns.
    rows: the cells of each row.
    lines: the number of each row's line in the file.
  """

  path: str
  columns: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  lines: tuple[int, ...]

  def column(self, name: str, flag: str) -> list[str]:
    """The cells of a column.

    Raises:
      UserError: there is no such column; the message names `flag`, which chooses one.
    """
    if name not in self.columns:
      raise unknown(f"{flag}={name}: {self.path}", name, self.columns)
    place = self.columns.index(name)
    return [row[place] for row in self.rows]

  def where(self, row: int) -> str:
    """The file and the line of a row, for messages."""
    return f"{self.path}, line {self.lines[row]}"


def read_table(
    path: str | os.PathLike[str], flag: str, delimiter: str = "", columns: Sequence[str] = (),
    quotes: bool = True,
) -> Table:
  """Reads a UTF-8 table: a row a line, with the columns' names in the first.

  Args:
    path: the file's path.
    flag: the flag that named it, for messages.
    delimiter: what separates cells; by default the one of `DELIMITERS` that is most frequent in
      the first line.
    columns: the columns' names, if the file's first line does not hold them.
    quotes: whether a cell may stand in double quotes; LJSpeech's transcripts may not.

  Raises:
    UserError: the file is missing, larger than `MAX_TABLE` bytes or no such table; a row has too
      few or too many cells, or two columns have one name.
  """
  start = f"{flag}={show(path)}"
  try:
    if not stat.S_ISREG((info := os.stat(Path(path).expanduser())).st_mode):
      raise UserError(f"{start} is no file; name a table")
    if info.st_size > MAX_TABLE:
      raise UserError(f"{start} has {info.st_size:,} bytes; give at most {MAX_TABLE:,}")
    text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise UserError(f"{start} is not UTF-8 (byte {e.start}); convert it, e.g. by iconv -t utf-8"
                    ) from None
  except (OSError, ValueError, RuntimeError) as e:  # ValueError: a zero byte in the path
    reason = getattr(e, "strerror", None) or e
    raise UserError(f"{start} cannot be read ({reason}); name a table") from None
  first = text.partition("\n")[0]
  delimiter = delimiter or max(DELIMITERS, key=first.count)
  reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=quotes,
                      quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE)
  rows, lines = [], []
  try:
    for row in reader:
      if any(cell.strip() for cell in row):
        rows.append(tuple(cell.strip() for cell in row))
        lines.append(reader.line_num)
  except csv.Error as e:
    raise UserError(f"{start}, line {reader.line_num}: is no row of a table ({e}); mend it"
                    ) from None
  if not columns:
    columns, rows, lines = (rows or [()])[0], rows[1:], lines[1:]
  if not rows:
    raise UserError(f"{start}: holds no rows; name a table with the names of its columns in the "
                    "first line")
  for name in columns:
    if columns.count(name) > 1:
      raise UserError(f"{start}: {columns.count(name)} columns are called {name!r}; give each a "
                      "name of its own")
  for row, line in zip(rows, lines):
    if len(row) != len(columns):
      raise UserError(f"{start}, line {line}: has {len(row)} cells, but there are {len(columns)} "
                      "columns; mend it")
  return Table(show(path), tuple(columns), tuple(rows), tuple(lines))


def parse_number(cell: str) -> float:
  """The decimal number in a cell; raises `ValueError` for anything else, such as nan or 1e999."""
  value = float(cell) if _NUMBER.fullmatch(cell) else math.nan
  if not math.isfinite(value):
    raise ValueError(f"{cell!r} is no number")
  return value


# Features as TFDS has them, as far as the modalities look at them; those of sources.Dataset have
# the same names.
@dataclasses.dataclass(frozen=True)
class Image:
  """Images; shape is (height, width, channels), with None where images differ."""

  shape: tuple[int | None, int | None, int | None]


@dataclasses.dataclass(frozen=True)
class ClassLabel:
  """One of some classes."""

  names: tuple[str, ...]

  @property
  def num_classes(self) -> int:
    """The number of classes."""
    return len(self.names)

  def int2str(self, number: int) -> str:
    """The name of a class."""
    return self.names[number]


@dataclasses.dataclass(frozen=True)
class Text:
  """A text."""


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The user's own data, with the interface of `sources.Dataset`.

  Attributes:
    name: the path as the user wrote it.
    features: feature name -> feature.
    fingerprint: a text that differs for other data; see `fingerprint`.
    splits: split -> its examples, in the modality's own form.
    read: an example -> feature name -> list of values, as `sources.Records` gives them; files
      stay encoded. Raises `UserError` or `OSError`.
    describe: an example -> its name for messages, such as the file's path.
  """

  name: str
  features: Mapping[str, Any]
  fingerprint: str
  splits: Mapping[str, Sequence[Any]]
  read: Callable[[Any], Mapping[str, Any]]
  describe: Callable[[Any], str]

  def ranges(self, split: str, field: str) -> list[tuple[str, int, int]]:
    """The examples that a split has, as (split, first, end); see `sources.Dataset.ranges`."""
    if split not in self.splits:
      raise unknown(f"--config.data.{field}", split, self.splits)
    if not self.splits[split]:
      raise UserError(f"--config.data.{field}={split!r}: {self.name} has no example for it; add "
                      "some, or leave the split out")
    return [(split, 0, len(self.splits[split]))]

  def records(self, split: str) -> "Records":
    """Random access to the encoded examples of a split."""
    return Records(self.splits[split], self.read, self.describe)

  def example(self, split: str, number: int) -> str:
    """The name of an example, for messages."""
    return self.describe(self.splits[split][number])


@dataclasses.dataclass(frozen=True)
class Records:
  """The examples of a split; see `Dataset` for the attributes."""

  examples: Sequence[Any]
  read: Callable[[Any], Mapping[str, Any]]
  describe: Callable[[Any], str]

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
    """Feature name -> list of values, for each of the examples `indices`."""
    found = []
    for example in (self.examples[int(i)] for i in indices):
      try:
        found.append(self.read(example))
      except OSError as e:
        raise UserError(f"{self.describe(example)} cannot be read ({e.strerror}); restore it"
                        ) from e
    return found


def unsound(records: Any, check: Callable[[int, Mapping[str, Any]], None]) -> dict[int, str]:
  """The numbers of the records that cannot be read or decoded, and why.

  Args:
    records: `own.Records` or `sources.Records`.
    check: (number, record) -> nothing; raises `UserError` if the record cannot be decoded.
  """

  def reason(number: int) -> str:
    try:
      check(number, records[[number]][0])
      return ""
    except UserError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return {number: text for number, text in enumerate(pool.map(reason, range(len(records))))
            if text}


class Skipped:
  """The examples that a run leaves out.

  Attributes:
    names: split expression -> the names of its examples that are left out.
  """

  def __init__(self, most: int):
    """
    Args:
      most: the largest number of examples that may be left out, over all splits.
    """
    self._most = most
    self.names: dict[str, list[str]] = {}

  def keep(
      self, split: str, expression: str, total: int, bad: Mapping[int, str],
      name: Callable[[int], str], before: Sequence[str] | None = None, warn: bool = True,
  ) -> np.ndarray:
    """The numbers of the examples to keep, i64[n]; says which are left out.

    Args:
      split: "train", "validation" or "test", for messages.
      expression: which examples of the set it is, such as train[:90%].
      total: the number of its examples.
      bad: the numbers of those that cannot be used, and why.
      name: number -> the example's name.
      before: the names that were left out when the run began, or None.
      warn: whether the first host warns of them. It has to be false until all hosts are connected,
        because JAX does not know before which host is the first.

    Raises:
      UserError: there are more than may be left out, or others than when the run began.
    """
    names = [name(number) for number in bad]
    if before is not None and list(before) != names:
      raise UserError(f"--config.data.skip_corrupt: {len(names)} examples of {split} cannot be "
                      f"decoded ({some(names)}), and {len(before)} could not when the run "
                      f"began ({some(before)}); restore the data, or name another --workdir")
    self.names[expression] = names
    if (count := sum(map(len, self.names.values()))) > self._most:
      raise UserError(f"--config.data.skip_corrupt={self._most}: {count} examples cannot be "
                      f"decoded, such as {next(iter(bad.values())).partition('; ')[0]}; give a "
                      "larger number, or mend them")
    if names and warn and jax.process_index() == 0:
      logging.warning("skipped %d of %d examples of %s that cannot be decoded: %s", len(names),
                      total, split, some(names, len(names)))
    return np.setdiff1d(np.arange(total), list(bad))


class FolderSet(splits.DataSet):
  """A data set that may be a folder of the user's own, and the record of it that a run keeps.

  A subclass defines `open_folder`, and extends `assets`.

  Attributes:
    seed: the run's seed, which draws the splits that the data do not name.
    run: the assets of a run that is continued or evaluated, or None.
    foreign: whether the run was trained on another folder. Then this one can only be evaluated,
      and its only split is test.
    looked_at: the config as it was given; `config` names the splits of a foreign folder.
    skipped: the examples that are left out.

  Args:
    config: `config.data`, with the fields folder, fitted_to and skip_corrupt.
    flag: the flag that names the folder, for messages.
  """

  def __init__(self, config: Any, flag: str):
    self.seed, self.run, self._flag = 0, None, flag
    self.foreign = bool(config.folder) and not same(config.folder, config.fitted_to)
    self.looked_at = ml_collections.FrozenConfigDict(config)
    if self.foreign:
      config = ml_collections.ConfigDict(config)
      config.update({"train": "train", "validation": "", "test": "test"})
    self.skipped = Skipped(config.skip_corrupt)
    self._record: Mapping[str, Any] = {}
    super().__init__(config)

  def open_folder(self, trained: Mapping[str, Any] | None) -> tuple[Dataset, dict[str, Any]]:
    """Opens the user's folder.

    Args:
      trained: the record of a run, {} if it has none, that is evaluated on another folder; or None.

    Returns:
      The set; and the record to keep with a run, see `check_same`.
    """
    raise NotImplementedError

  def pipelines(self, **options: Any) -> splits.Data:
    """See `DataSet.pipelines`."""
    self.seed = options["seed"]
    return super().pipelines(**options)

  def open(self) -> Any:
    """See `DataSet.open`."""
    if not self.config.folder:
      return super().open()
    files = (self.run or {}).get("files", {})
    dataset, self._record = self.open_folder(files if self.foreign else None)
    if self.run is not None and not self.foreign:
      check_same(files, self._record, f"{self._flag}={self.config.folder}")
    return dataset

  def check_foreign(self, split: str) -> None:
    """Raises `UserError` if a split of a foreign folder is to be trained on, or is empty."""
    if not self.foreign:
      return
    if split == "train":
      raise UserError(f"{self._flag}={self.config.folder}: this is not what the run was trained "
                      "on; others can be evaluated by --mode=eval")
    self.dataset.ranges(split, split)

  def fields(self) -> Mapping[str, Any]:
    """See `DataSet.fields`."""
    fields = {"assets": self.assets, "restore": self.restore}
    return fields | {"name": self.config.folder} if self.config.folder else fields

  def assets(self) -> dict[str, Any]:
    """The files of the user's own folder, and what was left out."""
    dataset, assets = self.dataset, {}
    if self.config.folder:
      assets["files"] = self._record  # which is filled when the set is opened
    if self.config.skip_corrupt:
      assets["skipped"] = {"fingerprint": dataset.fingerprint, "examples": self.skipped.names}
    return assets

  def restore(self, assets: Mapping[str, Any]) -> None:
    """Takes the assets of a run, to continue or to evaluate it; call it before anything is opened.
    """
    self.run = assets

  def skipped_before(self, split: str) -> Sequence[str] | None:
    """The names of a split's examples that the run left out, or None if it did not look."""
    before = (self.run or {}).get("skipped", {})
    if before.get("fingerprint") != self.dataset.fingerprint:
      return None
    return before.get("examples", {}).get(self.config[split])
