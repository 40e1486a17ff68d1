"""Reads what others' tools write about images: boxes as COCO's JSON or YOLO's text, and the names
of classes.

COCO (Lin et al. 2014, "Microsoft COCO: Common Objects in Context"): a JSON object of images (id,
file_name, width, height), categories (id, name; the ids may have gaps) and annotations (id,
image_id, category_id, bbox (x, y, width, height) in pixels, iscrowd).

YOLO, as Ultralytics reads it: for each image a text file of the same name, each line of which is
"class cx cy width height", in shares of the image's sides, or "class x y x y x y ..." around an
object, whose box is taken. An image without a file, or with an empty one, shows no object.

Nothing here decodes an image, and every file is held against a bound before it is read.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dljax.data import own
from dljax.errors import MALFORMED, UserError, one_line

MOST_BYTES = {".json": 2**30, ".txt": 2**24, ".yaml": 2**18, ".yml": 2**18}  # of one file
MOST_CLASSES = 2**15
_LARGEST = 1e9  # the largest number in a box
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # not 1_0, nan or inf


@dataclasses.dataclass(frozen=True)
class Boxes:
  """What a file says of the objects in one image.

  Attributes:
    corners: f64[N, 4], (x0, y0, x1, y1), in pixels or in shares of the image's sides.
    labels: i64[N], the class of each.
    crowd: bool[N], whether a box stands for a crowd.
    places: where each box stands in the file, for messages.
    file: the file that holds them; it may not exist if there are none.
    size: the image's width and height that the file gives, or None.
    relative: whether the corners are shares.
  """

  corners: np.ndarray
  labels: np.ndarray
  crowd: np.ndarray
  places: Sequence[str]
  file: Path
  size: tuple[int, int] | None = None
  relative: bool = False


@dataclasses.dataclass(frozen=True)
class Annotated:
  """What a file, or a folder of files, says of several images.

  Attributes:
    classes: the names of the classes.
    images: the name of an image's file, as it is written there -> its boxes.
  """

  classes: Sequence[str]
  images: Mapping[str, Boxes]

  def relabelled(self, classes: Sequence[str]) -> "Annotated":
    """The same with the labels of another list of classes.

    Raises:
      UserError: a box has a class that is not in the list.
    """
    if list(classes) == list(self.classes):
      return self
    known = {name: number for number, name in enumerate(classes)}
    table = np.array([known.get(name, -1) for name in self.classes], np.int64)
    images = {}
    for name, boxes in self.images.items():
      labels = table[boxes.labels]
      for i in np.flatnonzero(labels < 0)[:1]:
        raise UserError(f"{own.show(boxes.file)}: {boxes.places[i]} has the class "
                        f"{self.classes[boxes.labels[i]]!r}, which is none of the classes "
                        f"({few(classes)}); mend the file, or give all classes by "
                        "--config.data.classes")
      images[name] = dataclasses.replace(boxes, labels=labels)
    return Annotated(classes, images)


def read_text(file: Path) -> str:
  """The text of a user's file; raises `UserError` if it is missing, too large or no text."""
  try:
    most = MOST_BYTES.get(file.suffix.lower(), 2**20)
    if (size := file.stat().st_size) > most:
      raise UserError(f"{own.show(file)} has {size:,} bytes, and {most:,} are read at most; make "
                      "it smaller")
    return file.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{own.show(file)} is not UTF-8 text ({one_line(error)}); save it as UTF-8"
                    ) from None
  except OSError as error:
    raise UserError(f"{own.show(file)} cannot be read ({error.strerror})") from None


def read_json(file: Path) -> Any:
  """The value in a JSON file; raises `UserError` if it holds something else."""
  try:
    return json.loads(read_text(file))
  except UserError:
    raise
  except MALFORMED as error:
    raise UserError(f"{own.show(file)} is not JSON ({one_line(error)}); mend or remove it"
                    ) from None


def is_coco(value: Any) -> bool:
  """Whether the value of a JSON file has the three parts of COCO's form."""
  return isinstance(value, dict) and {"images", "annotations", "categories"} <= value.keys()


def parse_coco(file: Path, value: Any) -> Annotated:
  """What a file of COCO's form says.

  Args:
    file: the file, for messages.
    value: the value in it.

  Returns:
    The categories in the order of their ids, and the images in the order of the file.

  Raises:
    UserError: something is missing, has another type, or occurs twice; a box is no box.
  """
  bad = _refusing(file)

  def rows(name: str) -> list[Mapping[str, Any]]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
      raise bad(f"{name!r} is no list of objects, as COCO's form has it")
    return found

  categories = _coco_categories(rows("categories"), bad)
  number = {key: i for i, key in enumerate(categories)}
  images: dict[Any, tuple[str, tuple[int, int] | None]] = {}
  for row in rows("images"):
    key, name = _key(row.get("id"), "an image", bad), row.get("file_name")
    if key in images:
      raise bad(f"two images have the id {key!r}")
    if not isinstance(name, str) or not name:
      raise bad(f"image {key!r} has no file_name")
    images[key] = name, _coco_size(row, key, bad)
  if twice := _twice(name for name, _ in images.values()):
    raise bad(f"two images have the file_name {twice!r}")

  of_image: dict[Any, list[tuple]] = {key: [] for key in images}
  seen = set()
  for i, row in enumerate(rows("annotations")):
    key = _key(row["id"], "an annotation", bad) if "id" in row else f"number {i}"
    where = f"annotation {key}"
    if key in seen:
      raise bad(f"two annotations have the id {key!r}")
    seen.add(key)
    image, category = (_key(row.get(f"{what}_id"), f"the {what} of {where}", bad)
                       for what in ("image", "category"))
    if image not in of_image:
      raise bad(f"{where} is of image {image!r}, which is not among the images")
    if category not in number:
      raise bad(f"{where} has the category {category!r}, which is not among the categories")
    crowd = row.get("iscrowd", 0)
    if crowd not in (0, 1):
      raise bad(f"{where} has iscrowd {crowd!r:.40}, which is neither 0 nor 1")
    of_image[image].append((_coco_corners(row.get("bbox"), where, bad), number[category],
                            bool(crowd), where))
  found = {name: _boxes(of_image[key], file, size) for key, (name, size) in images.items()}
  return _without_unused_twins(Annotated(list(categories.values()), found), bad)


def _coco_categories(
    rows: Iterable[Mapping[str, Any]], bad: Callable[[str], UserError],
) -> dict[int, str]:
  """Category id -> name, in the order of the ids."""
  found = {}
  for row in rows:
    key, name = row.get("id"), row.get("name")
    if not isinstance(key, int) or isinstance(key, bool):
      raise bad(f"a category has the id {key!r:.40}, which is no whole number")
    if key in found:
      raise bad(f"two categories have the id {key}")
    found[key] = check_class(name, f"category {key}", bad)
  check_number(len(found), bad)
  return dict(sorted(found.items()))


def _coco_size(
    row: Mapping[str, Any], key: Any, bad: Callable[[str], UserError],
) -> tuple[int, int] | None:
  if row.get("width") is None and row.get("height") is None:
    return None
  sides = [row.get("width"), row.get("height")]
  for side in sides:
    if not _is_number(side) or side != round(side) or not 0 < side <= 2**31:
      raise bad(f"image {key!r} has the width and height {sides!r:.80}")
  return round(sides[0]), round(sides[1])


def _coco_corners(
    box: Any, where: str, bad: Callable[[str], UserError],
) -> tuple[float, float, float, float]:
  if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
    raise bad(f"{where} has the bbox {box!r:.80}, which is not (x, y, width, height) in pixels")
  x, y, width, height = map(float, box)
  return x, y, x + width, y + height


def _without_unused_twins(annotated: Annotated, bad: Callable[[str], UserError]) -> Annotated:
  """Drops a class without boxes whose name another has; some tools write a category above all."""
  counts = Counter(annotated.classes)
  if not (twins := [name for name, count in counts.items() if count > 1]):
    return annotated
  used = set()
  for boxes in annotated.images.values():
    used |= set(boxes.labels.tolist())
  for name in twins:
    if len([i for i in used if annotated.classes[i] == name]) > 1:
      raise bad(f"two categories have the name {name!r}")
  kept = {}
  for i, name in enumerate(annotated.classes):
    if name not in kept or i in used:
      kept[name] = i
  order = sorted(kept.values())
  table = np.full(len(annotated.classes), -1)
  table[order] = np.arange(len(order))
  return Annotated([annotated.classes[i] for i in order], {
      name: dataclasses.replace(boxes, labels=table[boxes.labels])
      for name, boxes in annotated.images.items()})


def safe_name(file_name: str, file: Path) -> str:
  """A file's name relative to a folder, as a tool on any system wrote it.

  Args:
    file_name: the name.
    file: the file in which it stands, for the message.

  Raises:
    UserError: the name leads out of the folder.
  """
  name = file_name.replace("\\", "/")
  path = PurePosixPath(name)
  if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:|[A-Za-z]+://", name):
    raise _refusing(file)(f"the file_name {file_name!r:.80} leads out of the folder; write it "
                          "relative to the folder of the images")
  return str(path)


def parse_yolo(file: Path, num_classes: int | None) -> Boxes:
  """What a text file of YOLO's form says of an image.

  Args:
    file: the file; if it does not exist, the image shows no object.
    num_classes: the number of classes, or None if it is not known.

  Raises:
    UserError: a line has another form, or a class that does not exist.
  """
  rows = []
  for number, line in enumerate(read_text(file).splitlines() if file.exists() else (), 1):
    if not (parts := line.split()):
      continue
    where = f"line {number}"
    bad = _refusing(file, where)
    if len(parts) != 5 and (len(parts) < 7 or len(parts) % 2 == 0):
      raise bad(f"has {len(parts)} numbers, and needs 5 (class, centre x and y, width, height) or "
                "a class and 3 or more points")
    for part in parts:
      if not _NUMBER.fullmatch(part) or not abs(float(part)) <= _LARGEST:
        raise bad(f"has {part!r:.40}, which is no number that can stand there")
    label, *values = map(float, parts)
    if label != round(label) or not 0 <= label < (num_classes or MOST_CLASSES):
      there = f"0 to {num_classes - 1}" if num_classes else f"whole numbers below {MOST_CLASSES}"
      raise bad(f"has the class {parts[0]:.40}, and the classes are {there}")
    if len(values) == 4:
      x, y, width, height = values
      corners = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    else:
      xs, ys = values[::2], values[1::2]
      corners = min(xs), min(ys), max(xs), max(ys)
    rows.append((corners, int(label), False, where))
  return dataclasses.replace(_boxes(rows, file, None), relative=True)


def yolo_classes(file: Path) -> list[str] | None:
  """The names of the classes in a data.yaml, or in a text file of a name a line.

  Returns:
    The names in order, or None if a YAML file has none.

  Raises:
    UserError: the file cannot be read, or its names are no names.
  """
  bad = _refusing(file)
  if file.suffix.lower() not in (".yaml", ".yml"):
    return class_lines(file)
  import yaml

  try:
    # Its scalars are texts, so that the class "no" is not False.
    value = yaml.load(read_text(file), Loader=yaml.BaseLoader)
  except UserError:
    raise
  except (yaml.YAMLError, *MALFORMED) as error:
    raise bad(f"is not YAML ({one_line(error)})") from None
  names = value.get("names") if isinstance(value, dict) else None
  if names is None:
    return None
  if isinstance(names, dict):
    check_number(len(names), bad)
    if set(names) != {str(i) for i in range(len(names))}:
      raise bad("the keys of 'names' are not 0, 1, 2, ...")
    names = [names[str(i)] for i in range(len(names))]
  if not isinstance(names, list):
    raise bad("'names' is no list of names")
  return check_classes(names, bad)


def class_lines(file: Path) -> list[str]:
  """The names of the classes in a text file of a name a line; raises `UserError` if it has none."""
  lines = read_text(file).splitlines()
  while lines and not lines[-1].strip():
    lines.pop()
  return check_classes([line.strip() for line in lines], _refusing(file))


def check_classes(names: Sequence[Any], bad: Callable[[str], UserError]) -> list[str]:
  """Returns the names of classes, or raises the error of `bad` if they cannot be."""
  check_number(len(names), bad)
  found = [check_class(name, f"class {i}", bad) for i, name in enumerate(names)]
  if twice := _twice(found):
    raise bad(f"two classes have the name {twice!r}")
  return found


def check_class(name: Any, what: str, bad: Callable[[str], UserError]) -> str:
  """Returns a class's name, or raises the error of `bad` if it is none."""
  if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > 200:
    raise bad(f"{what} has the name {name!r:.80}; give it a text of 1 to 200 printable characters")
  return name


def check_number(count: int, bad: Callable[[str], UserError]) -> None:
  """Raises the error of `bad` if there are no classes or too many."""
  if not 0 < count <= MOST_CLASSES:
    raise bad(f"there are {count:,} classes, and there must be 1 to {MOST_CLASSES:,}")


def _refusing(file: Path, where: str = "") -> Callable[[str], UserError]:
  """Makes the error that says what is wrong with a file."""
  start = f"{own.show(file)}, {where}" if where else own.show(file)
  return lambda fault: UserError(f"{start}: {fault}; mend the file")


def _boxes(rows: Sequence[tuple], file: Path, size: tuple[int, int] | None) -> Boxes:
  """The `Boxes` of rows (corners, label, crowd, place)."""
  corners, labels, crowd, places = zip(*rows) if rows else ((),) * 4
  return Boxes(np.array(corners, np.float64).reshape(-1, 4), np.array(labels, np.int64),
               np.array(crowd, bool), places, file, size)


def _key(key: Any, what: str, bad: Callable[[str], UserError]) -> int | str:
  """An id, which is a whole number or a text."""
  if isinstance(key, bool) or not isinstance(key, (int, str)):
    raise bad(f"{what} has the id {key!r:.40}, which is no whole number")
  return key


def _is_number(value: Any) -> bool:
  return (isinstance(value, (int, float)) and not isinstance(value, bool)
          and abs(value) <= _LARGEST)  # NaN is not


def _twice(names: Iterable[str]) -> str | None:
  """The first name that occurs twice, or None."""
  return next((name for name, count in Counter(names).items() if count > 1), None)


def few(names: Sequence[str]) -> str:
  """The first ten of some texts, and how many more there are."""
  more = len(names) - 10
  return ", ".join([*names[:10], *([f"and {more} more"] if more > 0 else [])])
