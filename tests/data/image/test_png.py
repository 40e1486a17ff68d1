"""The decoder of many PNG images against Pillow."""

import io
import struct
import tracemalloc
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


def test_no_file_is_decoded_that_pillow_may_show_otherwise():
  """Transparency, orientation, damage, and what stands behind the end are all left to Pillow."""
  good = pillow_encodes(RNG.integers(0, 256, (8, 8, 1), dtype=np.uint8))
  end = chunk(b"IEND", b"")
  body, lines = good[:-len(end)], chunk(b"IDAT", zlib.compress(bytes(72)))
  exif = Image.Exif()
  exif[0x0112] = 6
  assert png.decode([good]) is not None
  for other in (
      body + chunk(b"tRNS", b"\0\0") + end, body + chunk(b"eXIf", exif.tobytes()) + end,
      body + chunk(b"tEXt", b"Raw profile type exif\0" + bytes(8)) + end,
      body + chunk(b"acTL", bytes(8)) + end, body + lines + chunk(b"tIME", bytes(7)) + lines + end,
      good + b"more", good + good, good + lines, body, good[:len(good) // 2], good[:20], good[:-1] + b"?",
      encode(bytes(10), 4, 4, colour=0), encode(bytes(21), 4, 4, colour=0),
      encode(b"\x09" + bytes(19), 4, 4, colour=0), encode(bytes(20), 2**31 - 1, 2**31 - 1, colour=0),
      encode(bytes(20), 0, 4, colour=0)):
    assert png.decode([other]) is None


def test_lines_that_never_end_are_not_inflated():
  bomb = encode(bytes(10**7), 4, 4, colour=0)
  tracemalloc.start()
  assert png.decode([bomb]) is None
  assert tracemalloc.get_traced_memory()[1] < 10**6
  tracemalloc.stop()
