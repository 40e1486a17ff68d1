"""The user's own images: a folder for each class, or a table that says what each image shows.

    photos/cat/1.jpg                      photos/train/cat/1.jpg
    photos/dog/1.jpg                      photos/test/dog/1.jpg

    file,label      file,label            file,cat,dog      file,label
    1.jpg,cat       1.jpg,cat;dog         1.jpg,1,1         1.jpg,2.5
    2.jpg,dog       2.jpg,                2.jpg,0,1         2.jpg,-1

`config.data.labels` says which of three kinds the labels are: one "class", any number of "classes",
or a "number" (or several, one a column). `look_up` finds once what the data decide; `open_folder`
opens them by a config that has these fields.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dljax.data import own
from dljax.data.image import decode
from dljax.data.pipeline import rng
from dljax.data.splits import natural
from dljax.errors import UserError

CLASS, CLASSES, NUMBER = KINDS = ("class", "classes", "number")
FLAG = "--config.data.folder"
TABLE = "labels.csv"  # the table of a folder
SUFFIXES = frozenset(
    ".avif .bmp .gif .ico .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"
    .split())
SAMPLE = 20_000  # training images that mean and std are computed over, drawn by the seed
_THREADS = 16
_AT_ONCE = 1024  # images whose results lie in memory
_SEPARATOR = re.compile("[;|]")
_COMMA = re.compile(r"[+-]?\d+(,\d+)?", re.ASCII)  # a number whose decimals follow a comma
_GREY = ("1", "L", "LA", "La")  # Pillow's modes of images without colour
_KEY = 16  # hexadecimal digits of a SHA-256 that tell images apart


@dataclasses.dataclass(frozen=True)
class Photo:
  """An image with its label.

  Attributes:
    name: its path below the folder.
    path: its path.
    label: its class, its classes or its numbers.
    more: the cells of other columns of the table, by column.
    where: the line of the table that names it, or its path.
    split: the split that the folder or the table gives it to, or None.
  """

  name: str
  path: Path
  label: tuple[Any, ...]
  more: Mapping[str, str]
  where: str
  split: str | None


@dataclasses.dataclass(frozen=True)
class Listing:
  """What a folder or a table says, before any image is read.

  Attributes:
    photos: the images; their labels are names of classes, or numbers.
    kind: one of `KINDS`.
    columns: the names of the classes or numbers if each is a column of a table, else ().
    others: the names of columns that examples can be grouped by.
    remarks: what was left out, a line each.
  """

  photos: Sequence[Photo]
  kind: str
  columns: tuple[str, ...] = ()
  others: tuple[str, ...] = ()
  remarks: tuple[str, ...] = ()


def scan(config: Any, kind: str | None = None) -> Listing:
  """Lists the images of `config.folder` with their labels.

  Args:
    config: `config.data`.
    kind: the kind of the labels; by default it is found, where only one is possible.

  Raises:
    UserError: there is no such folder, or it is no set of labelled images; the message names the
      file, class or line.
  """
  folder = own.expand(config.folder, FLAG)
  if folder.is_file() and folder.suffix.lower() in SUFFIXES:
    raise UserError(f"{FLAG}={config.folder}: is an image; name a folder, or a table")
  if folder.is_file():
    return _scan_table(config, folder, kind)
  if (table := _table_in(folder)) is not None:
    return _scan_table(config, table, kind)
  if kind not in (None, CLASS):
    raise UserError(f"--config.data.labels={kind}: {config.folder} has no {TABLE}, and folders "
                    "give each image one class; add the table, or name it by "
                    "--config.data.folder")
  return _scan_folders(config, folder)


def _table_in(folder: Path) -> Path | None:
  """The folder's table, whatever the case of its name; None if there is none."""
  paths = sorted(folder.iterdir()) if folder.is_dir() else []
  return next((path for path in paths if path.name.lower() == TABLE and path.is_file()), None)


def exists(config: Any) -> bool:
  """Whether there is something at `config.folder`."""
  return os.path.exists(own.expand(config.folder, FLAG))


def _scan_folders(config: Any, folder: Path) -> Listing:
  """Lists images whose folders are their classes, below those of the splits if there are any."""
  found = own.find(folder, SUFFIXES, FLAG)
  remarks = []
  if found.others:
    remarks.append(f"{config.folder}: left out what has no image's ending, "
                   f"{_count(found.others, 'file')}: {own.some(found.others)}")
  if not found.files:
    raise UserError(f"{FLAG}={config.folder}: holds no image; make a folder for each class in it, "
                    f"or {_a_table(folder, found)}")
  splits = own.split_folders(folder)
  names, photos = {name: split for split, name in splits.items()}, []
  for file in found.files:
    first, *rest = parts = file.split("/")
    if splits and first not in names:
      raise UserError(f"{folder / own.show(file)} lies in no split, but beside "
                      f"{' and '.join(splits.values())}; move it, or remove it")
    *above, _ = rest if splits else parts
    if not above:
      raise UserError(f"{folder / own.show(file)} lies in no class's folder; move it into one, or "
                      + _a_table(folder, found))
    photos.append(Photo(file, folder / file, (_class(own.show(above[0])),), {},
                        str(folder / own.show(file)), names.get(first)))
  depth = 2 if splits else 1
  filled = {"/".join(file.split("/")[:depth]) for file in found.files}
  for place in [folder / name for name in splits.values()] or [folder]:
    for path in sorted(place.iterdir()):
      below = path.relative_to(folder).as_posix()
      if path.is_dir() and not path.name.startswith(".") and below not in filled:
        raise UserError(f"{own.show(path)} holds no image, as a class's folder should; add images, "
                        "or remove it")
  return Listing(photos, CLASS, remarks=tuple(remarks))


def _a_table(folder: Path, found: own.Found) -> str:
  """The advice of a message on how to give a table of the images."""
  tables = [name for name in found.others if name.lower().endswith(".csv") and "/" not in name]
  if len(tables) == 1:
    return f"name the table by {FLAG}={own.show(folder / tables[0])}"
  return f"add a table {TABLE}"


def _class(text: str) -> str:
  """A class's name on one line, the same whichever way its letters are encoded."""
  return unicodedata.normalize("NFC", " ".join(text.split()))


def _count(names: Sequence[str], what: str) -> str:
  return f"{len(names):,} {what}{'s' * (len(names) != 1)}"


def _scan_table(config: Any, path: Path, kind: str | None) -> Listing:
  """Lists the images that a table names."""
  table = own.read_table(path, FLAG)
  files = table.column(config.file_column, "--config.data.file_column")
  splits: Sequence[str | None] = [None] * len(files)
  own_split = config.split_column in table.columns
  if own_split or config.split_column != "split":  # the default
    cells = table.column(config.split_column, "--config.data.split_column")
    splits = [own.split_name(cell) for cell in cells]
    for row, (cell, split) in enumerate(zip(cells, splits)):
      if split is None:
        raise UserError(f"{table.where(row)}: {cell!r} is no split; write train, validation or "
                        "test, or name another --config.data.split_column")
  columns = _label_columns(config, table, own_split)
  kind = kind or _kind(table, columns)
  labels = list(_labels(table, columns, kind))
  by_column = kind == NUMBER or kind == CLASSES and _binary(table, columns)
  others = tuple(name for name in table.columns
                 if name not in (*columns, config.file_column, config.split_column))
  more = {name: table.column(name, "--config.data.groups") for name in others}
  photos, lines = [], {}
  for row, (file, label, split) in enumerate(zip(files, labels, splits)):
    if not file or "\0" in file:
      raise UserError(f"{table.where(row)}: names no file; mend it, or remove the line")
    if "\\" in file and not (path.parent / file).is_file():  # as Windows writes paths
      file = file.replace("\\", "/")
    if (first := lines.setdefault(os.path.normpath(file), row)) != row:
      raise UserError(f"{table.where(row)}: {file} stands in line {table.lines[first]} too; give "
                      "it one line, with several labels as cat;dog")
    photos.append(Photo(file, path.parent / file, label, {k: v[row] for k, v in more.items()},
                        table.where(row), split))
  missing = [photo for photo in photos if not photo.path.is_file()]
  if missing:
    names = own.some([photo.name for photo in missing])
    raise UserError(f"{missing[0].where}: there is no file {missing[0].path}; "
                    f"{len(missing):,} of {len(photos):,} are missing ({names}): restore them, or "
                    "remove their lines")
  remarks = []
  whole = {name for name in itertools.chain(*labels)} if kind == CLASS else set()
  lists = sorted(name for name in whole if "," in name and whole & set(
      part.strip() for part in name.split(",")))
  if lists:
    remarks.append(f"{path}: each of the labels {own.some(lists)} is read as one class, though "
                   "parts of it are labels too; separate several classes by ;")
  if unnamed := _beside(photos):
    remarks.append(f"{path}: left out what has no label there, {_count(unnamed, 'image')}: "
                   f"{own.some(unnamed)}")
  return Listing(photos, kind, tuple(map(_class, columns)) if by_column else (), others,
                 tuple(remarks))


def _beside(photos: Sequence[Photo]) -> list[str]:
  """The images that lie beside those of a table but are not named in it."""
  named = {os.path.normpath(photo.path) for photo in photos}
  found = []
  for folder in sorted({photo.path.parent for photo in photos}):
    found += [str(path) for path in sorted(folder.iterdir(), key=natural)
              if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
              and os.path.normpath(path) not in named]
  return found


def _label_columns(config: Any, table: own.Table, own_split: bool) -> list[str]:
  columns = list(config.label_columns)
  if columns != ["label"] or "label" in table.columns:
    for name in columns:
      table.column(name, "--config.data.label_columns")
    return columns
  taken = {config.file_column, *config.groups} | ({config.split_column} if own_split else set())
  columns = [name for name in table.columns if name not in taken]
  if not columns or not _binary(table, columns):
    raise UserError(f"{table.path}: has no column label, and {', '.join(columns) or 'no other'} "
                    "do not all hold 0 or 1; name the columns by --config.data.label_columns")
  return columns


def _binary(table: own.Table, columns: Iterable[str]) -> bool:
  """Whether there is nothing but 0 and 1 in some columns."""
  return all(cell in ("0", "1") for name in columns for cell in table.column(name, ""))


def _kind(table: own.Table, columns: Sequence[str]) -> str:
  """The kind of the labels in a table, if only one is possible."""
  cells = [cell for name in columns for cell in table.column(name, "")]
  numbers = [cell for cell in cells if _is_number(cell)]
  if len(columns) > 1 and _binary(table, columns):
    return CLASSES
  if len(columns) > 1 and len(numbers) == len(cells):
    return NUMBER
  if len(columns) > 1:
    raise UserError(f"{table.path}: {', '.join(columns)} hold neither numbers nor only 0 and 1; "
                    "name other --config.data.label_columns")
  if any(_SEPARATOR.search(cell) for cell in cells):
    return CLASSES
  if len(numbers) < len(cells):
    _refuse_near_numbers(table, columns[0], cells)
    return CLASS
  if all(cell.lstrip("+-").isdecimal() for cell in cells):
    raise UserError(f"{table.path}: the labels are whole numbers such as {cells[0]}, which may be "
                    "classes or amounts; add --config.data.labels=class or "
                    "--config.data.labels=number")
  return NUMBER


def _refuse_near_numbers(table: own.Table, column: str, cells: Sequence[str]) -> None:
  """Raises `UserError` if a column seems to hold numbers, but some cells cannot be read as one."""
  if all(_COMMA.fullmatch(cell) for cell in cells) and any("," in cell for cell in cells):
    first = next(cell for cell in cells if "," in cell)
    raise UserError(f"{table.path}: the column {column} has decimal commas, such as {first}; write "
                    "decimal points, or for classes add --config.data.labels=class")
  others = [row for row, cell in enumerate(cells) if not _is_number(cell)]
  broken = any(_is_number(cell) and not cell.lstrip("+-").isdecimal() for cell in cells)
  if broken and 2 * len(others) < len(cells):
    raise UserError(f"{table.where(others[0])}: {cells[others[0]]!r} is no number, but most cells "
                    f"of the column {column} are; mend it, or for classes add "
                    "--config.data.labels=class")


def _is_number(cell: str) -> bool:
  try:
    own.parse_number(cell)
    return True
  except ValueError:
    return False


def _labels(table: own.Table, columns: Sequence[str], kind: str) -> Iterable[tuple[Any, ...]]:
  """Each row's label: names of classes, or numbers."""
  cells = [table.column(name, "--config.data.label_columns") for name in columns]
  if kind == CLASS and len(columns) > 1:
    raise UserError("--config.data.labels=class: name one column by --config.data.label_columns, "
                    f"not {', '.join(columns)}")
  binary = kind == CLASSES and _binary(table, columns)
  if kind == CLASSES and len(columns) > 1 and not binary:
    raise UserError(f"{table.path}: {', '.join(columns)} hold more than 0 and 1; mend them, or "
                    "name one column by --config.data.label_columns")
  for row, values in enumerate(zip(*cells)):
    if kind == NUMBER:
      for name, value in zip(columns, values):
        if not _is_number(value):
          raise UserError(f"{table.where(row)}: {value!r} in the column {name} is no number; mend "
                          "it, or remove the line")
      yield tuple(map(own.parse_number, values))
    elif binary:
      yield tuple(_class(name) for name, value in zip(columns, values) if value == "1")
    elif kind == CLASSES:
      names = [_class(name) for name in _SEPARATOR.split(values[0]) if name.strip()]
      yield tuple(dict.fromkeys(names))
    elif not values[0]:
      raise UserError(f"{table.where(row)}: has no label; add one, or remove the line")
    else:
      yield (_class(values[0]),)


def open_folder(
    config: Any, kind: str, seed: int, classes: Sequence[str] = (),
    trained: Mapping[str, Any] | None = None, listing: Listing | None = None,
) -> tuple[own.Dataset, dict[str, Any]]:
  """Opens the user's own images.

  Args:
    config: `config.data`.
    kind: one of `KINDS`.
    seed: the run's seed, which draws the splits that the data do not name.
    classes: the names of the classes, or of the numbers; by default those that are found.
    trained: the record of a run, {} if it has none, to evaluate it: of other data than the run's
      all images are in the split test, but none that the run was trained on.
    listing: the result of `scan`, from `look_up`; then twins are warned of.

  Returns:
    The set, and the record to keep with a run: the fingerprint, and each file's key and split.

  Raises:
    UserError: the data cannot be used; the message names the file or the class.
  """
  first = listing is not None  # `look_up` asks
  listing = listing or scan(config, kind)
  photos = listing.photos
  names = listing.columns or tuple(
      sorted({name for photo in photos for name in photo.label}, key=natural))
  classes = tuple(map(_class, classes)) or _checked(config, names, kind)
  if kind == NUMBER and listing.columns != classes:
    raise UserError(f"{config.folder}: the columns of numbers are {', '.join(listing.columns)}, "
                    f"and should be {', '.join(classes)}; name them by "
                    "--config.data.label_columns")
  if kind != NUMBER:
    _check_known(photos, names, classes, config.folder)
  keys = own.digests([photo.path for photo in photos])
  text = json.dumps([(photo.name, photo.label, photo.more, photo.split) for photo in photos])
  fingerprint = own.fingerprint([photo.name for photo in photos], keys, text)
  if first or trained is not None:
    _warn_of_twins(photos, [key.sha256 for key in keys])
  short = [key.sha256[:_KEY] for key in keys]
  if trained is not None and trained.get("fingerprint") != fingerprint:
    splits = _all_to_test(photos, short, trained, config.folder)
  else:
    splits = _splits(config, photos, short, seed, kind)
  number = {name: i for i, name in enumerate(classes)}
  chosen: dict[str, list[Photo]] = {split: [] for split in own.SPLITS}
  for photo, split in zip(photos, splits):
    if split:
      label = photo.label if kind == NUMBER else tuple(number[name] for name in photo.label)
      chosen[split].append(dataclasses.replace(photo, label=label, split=split))
  record = {"fingerprint": fingerprint, "files": {
      own.show(photo.name): [key, split] for photo, key, split in zip(photos, short, splits)}}
  features = {"image": own.Image((None, None, None)), "label": own.ClassLabel(classes),
              **{name: own.Text() for name in listing.others}}
  return own.Dataset(config.folder, features, fingerprint, chosen, _read,
                     lambda photo: own.show(photo.path)), record


def _read(photo: Photo) -> Mapping[str, Any]:
  return {"image": [photo.path.read_bytes()], "label": photo.label,
          **{name: [cell.encode()] for name, cell in photo.more.items()}}


def _checked(config: Any, names: tuple[str, ...], kind: str) -> tuple[str, ...]:
  """The names of the classes that were found, if they can be learnt."""
  if kind == NUMBER:
    return names
  if found := own.clash(names):
    one, other, how = found
    raise UserError(f"{config.folder}: the classes {one!r} and {other!r} differ only by {how}; "
                    f"give them one name, or list all by --config.data.classes={','.join(names)}")
  if not names:
    raise UserError(f"{config.folder}: no image has a label; add some")
  if kind == CLASS and len(names) < 2:
    raise UserError(f"{config.folder}: there is only one class, {names[0]}; add images of another, "
                    "or name the folder in which each class has a folder")
  return names


def _check_known(
    photos: Sequence[Photo], names: Sequence[str], classes: Sequence[str], folder: str,
) -> None:
  """Raises `UserError` for a label that is none of the classes."""
  if unknown := [name for name in names if name not in set(classes)]:
    first = next((photo.where for photo in photos if unknown[0] in photo.label), folder)
    raise UserError(f"{first}: {unknown[0]!r} is none of the {len(classes)} classes "
                    f"({own.some(classes, 5)}); rename it, or remove its images")


def _warn_of_twins(photos: Sequence[Photo], keys: Sequence[str]) -> None:
  """Warns of equal images that have different labels, or were put into different splits."""
  groups = collections.defaultdict(list)
  for photo, key in zip(photos, keys):
    groups[key].append(photo)
  for what, of in (("labels", lambda photo: photo.label), ("splits", lambda photo: photo.split)):
    pairs = []
    for twins in groups.values():
      other = next((photo for photo in twins if of(photo) != of(twins[0])), None)
      if other is not None:
        pairs.append(f"{own.show(twins[0].name)} and {own.show(other.name)}")
    if pairs:
      logging.warning("equal images have different %s: %s", what, own.some(pairs))


def _all_to_test(
    photos: Sequence[Photo], keys: Sequence[str], trained: Mapping[str, Any], folder: str,
) -> list[str | None]:
  """The splits of images that are not those of the run: those named test if there are any, else
  all, without those that the run was trained on."""
  named = any(photo.split == "test" for photo in photos)
  rest = [(photo.name, key) for photo, key in zip(photos, keys)
          if photo.split == "test" or not named]
  known = own.left_out(*zip(*rest), trained, f"{FLAG}={folder}", "images")
  kept = {name for name, _ in rest} - known
  return ["test" if photo.name in kept else None for photo in photos]


def _splits(
    config: Any, photos: Sequence[Photo], keys: Sequence[str], seed: int, kind: str,
) -> list[str]:
  """The split of each image: as the data say, else drawn by the seed."""
  own.check_shares(config.shares)
  shares = list(config.shares)
  for i, split in enumerate(own.SPLITS):
    if not config[split]:  # its images are for training
      shares[0], shares[i] = shares[0] + shares[i], 0
  given = [photo.split for photo in photos]
  if any(given):
    if "train" not in given:
      raise UserError(f"{config.folder}: names no image for the split train; add some")
    free = [i for i, split in enumerate(given) if split == "train"]
    if "validation" in given or not shares[1]:
      free = []
    shares = [shares[0] / (shares[0] + shares[1]), shares[1] / (shares[0] + shares[1]), 0]
  else:
    free = list(range(len(photos)))
  if free:
    strata = _strata([photos[i] for i in free], kind, sum(share > 0 for share in shares))
    what = lambda stratum: (
        f"different images of {stratum!r} in {config.folder}" if kind == CLASS
        else f"different images in {config.folder}")
    drawn = own.split([keys[i] for i in free], shares, seed, strata, what)
    for i, split in zip(free, drawn):
      given[i] = split
  _check_trained(config, photos, given, kind)
  return given


def _strata(photos: Sequence[Photo], kind: str, parts: int) -> list[str]:
  """What the shares of the splits hold of: each class, or each image's rarest class.

  Of several classes, those that are the rarest of too few images are put together.
  """
  if kind == NUMBER:
    return [""] * len(photos)
  count = collections.Counter(name for photo in photos for name in photo.label)
  strata = [min(photo.label, key=lambda name: (count[name], name), default="")
            for photo in photos]
  if kind == CLASS:
    return strata
  size = collections.Counter(strata)
  # Ten images of a stratum are spread over all splits by the usual shares.
  return [stratum if size[stratum] >= max(10, parts) else "" for stratum in strata]


def _check_trained(
    config: Any, photos: Sequence[Photo], splits: Sequence[str | None], kind: str,
) -> None:
  """Raises `UserError` for a class that is in another split but not among the training images."""
  if kind == NUMBER:
    return
  train = {name for photo, split in zip(photos, splits) if split == "train"
           for name in photo.label}
  for photo, split in zip(photos, splits):
    for name in photo.label:
      if split != "train" and name not in train:
        raise UserError(f"{photo.where}: the class {name!r} is in {split}, but no training image "
                        "has it; add some, or remove the class")


def look_up(config: Any, seed: int, given: Collection[str]) -> dict[str, Any]:
  """Finds what the user's own images decide.

  Args:
    config: `config.data`.
    seed: the run's seed.
    given: the names of the fields of `config.data` that the user has given; they are not found.

  Returns:
    Field -> value, for the fields of `config.data`.

  Raises:
    UserError: the data cannot be used; the message names the file or the class.
  """
  for split in own.SPLITS:
    if split in given and config[split] not in ("", split):
      raise UserError(f"--config.data.{split}={config[split]!r}: own data have the split {split}; "
                      f"write {split}, or nothing to leave it out")
  listing = scan(config, config.labels if "labels" in given else None)
  for remark in listing.remarks:
    logging.warning("%s", remark)
  config = config.copy_and_resolve_references()
  named = {photo.split for photo in listing.photos}
  for split, share in zip(own.SPLITS, config.shares):
    if split not in given:
      there = split in named or None in named and share > 0 or split == "validation" and share > 0
      config[split] = split if there else ""
  kind, classes = listing.kind, config.classes if "classes" in given else ()
  dataset, _ = open_folder(config, kind, seed, classes, listing=listing)
  train, count = dataset.splits["train"], len(dataset.features["label"].names)
  if "num_classes" in given and config.num_classes != count:
    what = "numbers" if kind == NUMBER else "classes"
    raise UserError(f"--config.data.num_classes={config.num_classes}: {config.folder} has {count} "
                    f"{what}; give that number, or drop the flag")
  classes, labels = dataset.features["label"].names, [photo.label for photo in train]
  skipped: list[str] = []
  found: dict[str, Any] = {
      "fitted_to": config.folder, "labels": kind, "classes": classes, "num_classes": len(classes),
      **{split: config[split] for split in own.SPLITS}}
  everything = [photo for photos in dataset.splits.values() for photo in photos]
  height, width, _ = config.image_shape
  if "image_shape" not in given:
    found["image_shape"] = (height, width, 3 if _coloured(everything) else 1)
  config.image_shape = found.get("image_shape", config.image_shape)
  if not {"mean", "std"} <= set(given):
    found["mean"], found["std"] = _mean_and_std(config, train, seed, skipped)
  sound = [photo for photo in train if own.show(photo.path) not in skipped]
  found["num_train_examples"] = len(sound)
  if kind == NUMBER:
    found["target_mean"], found["target_std"] = _targets(np.array(labels, np.float64))
  else:
    counts = collections.Counter(number for photo in sound for number in photo.label)
    found["class_counts"] = tuple(counts[i] for i in range(len(classes)))
  if config.per_class:
    found["class_counts"] = (config.per_class,) * len(classes)
    found["num_train_examples"] = sum(found["class_counts"])
  return {field: value for field, value in found.items() if field not in given}


def _targets(values: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """The mean and the standard deviation of each column; 1 in place of a deviation of 0."""
  varies = values.max(axis=0) > values.min(axis=0)
  return (tuple(map(float, values.mean(axis=0))),
          tuple(map(float, np.where(varies, values.std(axis=0), 1.0))))


def _coloured(photos: Sequence[Photo]) -> bool:
  """Whether an image has colours, as its header says; one that has no header says nothing."""
  return any(colour for _, colour in _each(_has_colour, photos))


def _each(
    function: Callable[[Photo], Any], photos: Sequence[Photo],
) -> Iterator[tuple[Photo, Any]]:
  """Each photo with the function's result, computed in threads, some at a time."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for start in range(0, len(photos), _AT_ONCE):
      block = photos[start:start + _AT_ONCE]
      yield from zip(block, pool.map(function, block))


def _has_colour(photo: Photo) -> bool:
  from PIL import Image

  try:
    with Image.open(photo.path) as image:
      if image.mode == "P":
        palette = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
        return bool((palette != palette[:, :1]).any())
      return image.mode not in _GREY and not image.mode.startswith(("I", "F"))
  except Exception:  # the decoder names a damaged file
    return False


def _mean_and_std(
    config: Any, photos: Sequence[Photo], seed: int, skipped: list[str],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """The mean and the standard deviation of each channel over training images of the model's size.

  It adds to `skipped` what cannot be decoded.
  """
  if len(photos) > SAMPLE and not config.skip_corrupt:
    order = rng(seed, 0, "mean_and_std").permutation(len(photos))
    photos = [photos[i] for i in np.sort(order[:SAMPLE])]
  histogram = np.zeros((config.image_shape[-1], 256), np.int64)
  for photo, counts in _each(functools.partial(_histogram, config), photos):
    if isinstance(counts, UserError):
      if not config.skip_corrupt:
        raise counts
      skipped.append(own.show(photo.path))
    else:
      histogram += counts
  total, values = histogram.sum(axis=1), np.arange(256) / 255
  if not total.all():
    raise UserError(f"{config.folder}: no training image can be decoded; mend the files")
  mean = histogram @ values / total
  std = np.sqrt(histogram @ values**2 / total - mean**2)
  varies = (histogram > 0).sum(axis=1) > 1
  return (tuple(round(float(m), 4) for m in mean),
          tuple(max(round(float(s), 4), 1e-4) if v else 1.0 for s, v in zip(std, varies)))


def _histogram(config: Any, photo: Photo) -> np.ndarray | UserError:
  """How often each channel of an image has each value; or the reason that it cannot be decoded."""
  try:
    with decode.naming(own.show(photo.path), decode.MEND_FILE):
      image = decode.decode_image(photo.path.read_bytes(), config.image_shape[-1],
                                  config.background)
      image = decode.fit(image, config)
  except UserError as e:
    return e
  return np.stack([np.bincount(channel.ravel(), minlength=256)
                   for channel in np.moveaxis(image, -1, 0)])
