"""The decoder of many PNG images against Pillow."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dljax.data.image import png

RNG = np.random.default_rng(0)


def pillow_encodes(array):
  out = io.BytesIO()
  Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(out, "png")
  return out.getvalue()


def chunk(kind, data):
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode(lines, width, height, colour, pieces=1, depth=8, interlace=0):
  """A PNG of lines that are filtered already, its data in several chunks."""
  data = zlib.compress(lines)
  cuts = [len(data) * i // pieces for i in range(pieces + 1)]
  parts = b"".join(chunk(b"IDAT", data[a:b]) for a, b in zip(cuts, cuts[1:]))
  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
  return png.SIGNATURE + chunk(b"IHDR", header) + chunk(b"tEXt", b"a\0b") + parts + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels, colour", [(1, 0), (3, 2)])
def test_every_filter_decodes_as_pillow_decodes_it(channels, colour):
  height, width = 13, 11
  files = []
  for i in range(20):
    lines = RNG.integers(0, 256, (height, 1 + width * channels), dtype=np.uint8)
    lines[:, 0] = RNG.integers(0, 5, height)
    files.append(encode(lines.tobytes(), width, height, colour, pieces=1 + i % 3))
  expected = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
  np.testing.assert_array_equal(png.decode(files), expected.reshape(20, height, width, channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_pillow_writes(channels):
  smooth = np.cumsum(RNG.integers(0, 3, (9, 16, 16, channels)), axis=1).astype(np.uint8)
  np.testing.assert_array_equal(png.decode([pillow_encodes(array) for array in smooth]), smooth)


def test_what_it_leaves_to_pillow():
  small, large = (pillow_encodes(np.zeros((n, n, 1), np.uint8)) for n in (4, 5))
  assert png.decode([small, large]) is None
  assert png.decode([b"\xff\xd8\xff" + small]) is None
  assert png.decode([encode(bytes(20), 4, 4, colour=0, interlace=1)]) is None
  assert png.decode([encode(bytes(36), 4, 4, colour=0, depth=16)]) is None
  assert png.decode([encode(bytes(20), 4, 4, colour=3)]) is None


def test_corrupt_files_raise():
  good = pillow_encodes(RNG.integers(0, 256, (8, 8, 1), dtype=np.uint8))
  with pytest.raises((ValueError, zlib.error, struct.error)):
    png.decode([good, good[:len(good) // 2]])
  with pytest.raises(ValueError, match="too early"):
    png.decode([encode(bytes(10), 4, 4, colour=0)])
  with pytest.raises(ValueError, match="no filter 9"):
    png.decode([encode(b"\x09" + bytes(19), 4, 4, colour=0)])
