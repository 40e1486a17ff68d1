"""Files and threads: a half-written file is never seen, and importing draws nothing."""

import concurrent.futures
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dljax import report


def test_save_replaces_as_a_whole(tmp_path):
  path = tmp_path / "figures" / "grid.png"
  report.save(report.image_grid([np.eye(8)]), path)
  before = path.read_bytes()
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
          "import numpy; report.image_grid([numpy.eye(2)]); "
          "assert 'matplotlib.pyplot' not in sys.modules")
  subprocess.run([sys.executable, "-c", code], check=True)
