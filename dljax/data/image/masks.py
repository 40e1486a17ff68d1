"""What the values of the user's masks mean: a class of pixels by its number or by its colour.

`classes.txt` in the folder names the numbers 0, 1, 2, ..., a name a line. `classes.csv` has the
columns name and number, or name and color (#ff0000), or name, r, g and b. Without such a file every
value that occurs is a class of its own.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dljax.data import own
from dljax.data.image import annotations, decode, geometry
from dljax.data.image.folder import FLAG
from dljax.errors import UserError

IGNORED = 255  # the number of pixels that have no class
TABLES = ("classes.csv", "class_dict.csv")  # the colour or the number of each class
LISTS = ("classes.txt", "obj.names")  # a name a line


@dataclasses.dataclass(frozen=True)
class Meaning:
  """What the values of masks mean.

  Attributes:
    names: the names of the classes.
    values: the number of each class in the files; () if they are told by their colours.
    colors: the colour of each, such as "#ff0000"; () if they are told by their numbers.
    ignore: the value or colour of pixels without a class; "" if there is none.
  """

  names: Sequence[str]
  values: Sequence[int] = ()
  colors: Sequence[str] = ()
  ignore: str = ""


def find_meaning(
    config: Any, folder: Path, found: Mapping[str, decode.MaskColors], given: Collection[str],
) -> Meaning:
  """What the values mean: as the user says, else as a file in the folder says, else one class each.

  Args:
    config: `config.data`.
    folder: the user's folder.
    found: what occurs in each mask, by its path.
    given: the fields of `config.data` that the user has given.
  """
  by_color = _told_by_color(found)
  if "mask_colors" in given and config.mask_colors:
    listed = Meaning(config.mask_names, colors=tuple(config.mask_colors))
  elif "mask_values" in given:
    listed = Meaning(config.mask_names, values=config.mask_values)
  else:
    listed = find_list(folder, by_color)
  there: dict[Any, str] = {}  # value -> the first mask that has it
  if listed is not None:
    by_color = bool(listed.colors)
  for mask, colors in found.items():
    for value in _values(colors, by_color, mask):
      there.setdefault(value, mask)
  if listed is None:
    return _one_class_each(there, by_color)
  known = listed.colors if by_color else listed.values
  if not known:  # names alone, in the order of the numbers
    pair = len(listed.names) == 2 and set(there) == {0, IGNORED}
    known = (0, IGNORED) if pair else tuple(range(len(listed.names)))
    listed = dataclasses.replace(listed, values=known)
  ignore = ""
  for value in sorted(there):
    if value in known:
      continue
    if value == IGNORED or config.mask_ignore == str(value):
      ignore = str(value)
      continue
    raise UserError(f"{FLAG}: {there[value]} has pixels of {value}, which is no class ("
                    f"{annotations.few(list(map(str, known)))}); mend the mask, or list all "
                    f"classes in {own.show(folder / TABLES[0])}")
  names = listed.names or [str(value) for value in known]
  if len(names) != len(known):
    raise UserError(f"--config.data.mask_names: there are {len(names)} names for {len(known)} "
                    "classes; give one for each")
  return dataclasses.replace(listed, names=names, ignore=ignore)


def _told_by_color(found: Mapping[str, decode.MaskColors]) -> bool:
  """Whether classes are told by their colours, and not by numbers.

  They are if a mask without a palette has a colour other than grey, or if masks give one number of
  their palettes different colours.
  """
  color_of: dict[int, tuple[int, int, int]] = {}
  for colors in found.values():
    if colors.indices is None:
      if any(len(set(color)) > 1 for color in colors.colors):
        return True
    elif any(color_of.setdefault(i, color) != color
             for i, color in zip(colors.indices, colors.colors)):
      return True
  return False


def _values(colors: decode.MaskColors, by_color: bool, mask: str) -> list[Any]:
  """The numbers or the colours in a mask."""
  if by_color:
    return [decode.hex_color(*color) for color in colors.colors]
  if colors.indices is not None:
    return list(colors.indices)
  for color in colors.colors:
    if len(set(color)) > 1:
      raise UserError(f"{FLAG}: {mask} has the colour {decode.hex_color(*color)}, but the classes "
                      "are numbers; give the colours of the classes, or numbers in all masks")
  return [color[0] for color in colors.colors]


def _one_class_each(there: Mapping[Any, str], by_color: bool) -> Meaning:
  """A class for each value that occurs; 255 is ignored unless it is the only one besides 0."""
  values = sorted(there)
  ignore = ""
  if not by_color and IGNORED in values and values != [0, IGNORED]:
    values.remove(IGNORED)
    ignore = str(IGNORED)
  if len(values) >= geometry.VOID_BYTE:
    raise UserError(f"{FLAG}: the masks hold {len(values)} values, and there can be "
                    f"{geometry.VOID_BYTE - 1} classes; save masks as PNG, without smoothing, or "
                    f"list the classes in {TABLES[0]}")
  names = list(map(str, values))
  return Meaning(names, colors=values, ignore=ignore) if by_color else Meaning(
      names, values=values, ignore=ignore)


def find_list(folder: Path, by_color: bool) -> Meaning | None:
  """The classes that a file in the folder lists; None if there is no such file.

  Its table has the column name and either number, or color (#ff0000), or r, g and b.
  """
  for path in (folder / name for name in LISTS):
    if path.is_file() and not any((folder / name).is_file() for name in TABLES):
      if by_color:
        raise UserError(f"{own.show(path)} names classes without their colours; write them into "
                        f"{TABLES[0]}, with the columns name, r, g and b")
      return Meaning(annotations.class_lines(path))
  path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
  if path is None:
    return None
  table = own.read_table(path, FLAG)
  columns = {name.lower(): name for name in table.columns}

  def cells(*names: str) -> list[str] | None:
    name = next((columns[name] for name in names if name in columns), None)
    return None if name is None else table.column(name, FLAG)

  def bad(fault: str) -> UserError:
    return UserError(f"{own.show(path)}: {fault}; mend the file")

  names = cells("name", "class", "label")
  if names is None:
    raise bad(f"has the columns {', '.join(table.columns)}, and needs name, and number or r, g, b")
  names = annotations.check_classes(names, bad)
  channels = [cells(*pair) for pair in (("r", "red"), ("g", "green"), ("b", "blue"))]
  colors, numbers = cells("color", "colour"), cells("number", "id", "index", "value")
  if all(channels):
    rows = [[_byte(cell, bad) for cell in row] for row in zip(*channels)]
    colors = [decode.hex_color(*row) for row in rows]
  found = colors or [_byte(cell, bad) for cell in numbers or range(len(names))]
  if len(set(found)) < len(found):
    raise bad("two classes have the same colour or number")
  if colors:
    for color in (colors := [color.lower() for color in colors]):
      if not re.fullmatch("#[0-9a-f]{6}", color):
        raise bad(f"{color!r:.40} is no colour such as #ff0000")
  return Meaning(names, colors=colors) if colors else Meaning(names, values=found)


def _byte(cell: Any, bad: Callable[[str], UserError]) -> int:
  if not re.fullmatch("[0-9]{1,3}", str(cell)) or int(cell) > 255:
    raise bad(f"{cell!r:.40} is no whole number from 0 to 255")
  return int(cell)
