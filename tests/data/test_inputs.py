"""The names of inputs."""

import os
from pathlib import Path

import numpy as np

from dljax.data import inputs


def test_a_name_can_be_printed_and_written_whatever_bytes_the_path_has():
  paths = [os.fsdecode(path) for path in (b"a/caf\xe9.npy", b"\xff\xfe.png", "a/café.npy".encode())]
  found = list(inputs.each([paths[0], np.zeros(1), *paths[1:]], lambda path: [path]))
  assert [name for name, _ in found] == ["a/caf\\xe9.npy", "array 0", "\\xff\\xfe.png", "a/café.npy"]
  assert [path for _, path in found if isinstance(path, Path)] == list(map(Path, paths))
  for name, _ in found:
    name.encode()
