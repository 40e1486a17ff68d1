"""Reads Debian packages on any system."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path


def files(path: Path) -> Iterator[tuple[str, bytes]]:
  """The files in a package, each with its path without a leading slash.

  A package is an `ar` archive that holds a tar archive data.tar.* (deb(5)).

  Raises:
    ValueError: the file at `path` is no such package.
  """
  data = path.read_bytes()
  position, found = 8, False
  while data[:8] == b"!<arch>\n" and position + 60 <= len(data):
    name = data[position:position + 16].decode().strip(" /")
    size = int(data[position + 48:position + 58])
    position += 60
    if name.startswith("data.tar"):
      found = True
      with tarfile.open(fileobj=io.BytesIO(data[position:position + size])) as archive:
        for entry in archive:
          if entry.isfile():
            yield entry.name.removeprefix("./"), archive.extractfile(entry).read()
    position += size + size % 2
  if not found:
    raise ValueError(f"{path} is no Debian package that holds files")


def read_package(path: Path, member: str) -> bytes:
  """The content of one file in a package.

  Raises:
    ValueError: the file at `path` is no package, or `member` is not in it.
  """
  for name, content in files(path):
    if name == member:
      return content
  raise ValueError(f"{path} is no Debian package that holds {member}")
