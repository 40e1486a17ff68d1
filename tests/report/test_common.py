"""Files and threads: a half-written file is never seen, and importing draws nothing."""

import concurrent.futures
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dljax import report


def test_save_replaces_as_a_whole(tmp_path):
  path = tmp_path / "figures" / "grid.png"
  report.save(report.image_grid([np.eye(8)]), path)
  untitled = path.read_bytes()
  report.save(report.image_grid([np.eye(8)], caption="what"), path, "lenet $5 [x]")
  before = path.read_bytes()
  assert before != untitled
  assert Image.open(path).width >= 4 * report.DPI

  class Broken:
    def savefig(self, target, **_):
      with open(target, "wb") as file:
        file.write(b"half")
      raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    report.save(Broken(), path)
  assert path.read_bytes() == before
  assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def _png(size, color, mode="RGB"):
  content = io.BytesIO()
  Image.new(mode, size, color).save(content, "PNG")
  return content.getvalue()


def test_pictures_side_by_side_stand_in_reading_order_on_white():
  colors = [(10 * i, 0, 0) for i in range(5)]
  sizes = [(40, 30), (20, 30), (40, 10), (40, 30), (1, 1)]
  grid = report.side_by_side([_png(size, color) for size, color in zip(sizes, colors)])
  assert grid.startswith(b"\x89PNG")
  pixels = np.asarray(Image.open(io.BytesIO(grid)))
  expected = np.full((30 + 38 + 38, 40 + 48, 3), 255)  # 2 columns and 3 rows, with gaps of 8
  for i, ((width, height), color) in enumerate(zip(sizes, colors)):
    top, left = 38 * (i // 2), 48 * (i % 2)
    expected[top:top + height, left:left + width] = color
  np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("count, size, columns, rows", [
    (1, (30, 20), 1, 1), (4, (30, 30), 2, 2), (5, (30, 30), 3, 2), (4, (792, 192), 1, 4),
    (4, (22, 142), 4, 1)])
def test_pictures_side_by_side_are_about_square(count, size, columns, rows):
  grid = Image.open(io.BytesIO(report.side_by_side([_png(size, "black")] * count)))
  assert grid.size == (columns * (size[0] + 8) - 8, rows * (size[1] + 8) - 8)


def test_pictures_side_by_side_may_be_grey_or_transparent():
  parts = [_png((9, 9), 77, "L"), _png((9, 9), (0, 0, 0, 0), "RGBA")]
  pixels = np.asarray(Image.open(io.BytesIO(report.side_by_side(parts))))
  assert (pixels[:, :9] == 77).all() and (pixels[:, 9:] == 255).all()


def test_threads_draw_at_once(tmp_path):
  def draw(i):
    report.save(report.confusion_matrix(np.eye(4) * i, list("abcd")), tmp_path / f"{i}.png")
    return (tmp_path / f"{i}.png").read_bytes()
  alone = draw(3)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    together = list(pool.map(draw, range(6)))
  assert together[3] == alone


def test_importing_needs_no_matplotlib_and_drawing_no_pyplot():
  code = ("import sys; from dljax import report; assert 'matplotlib' not in sys.modules; "
          "import numpy; report.image_grid([numpy.eye(2)]); report.page('a'); "
          "assert 'matplotlib.pyplot' not in sys.modules")
  subprocess.run([sys.executable, "-c", code], check=True)
