"""Time series as TFDS sets: one split, "series", whose only example is the whole series.

time      i64[T], seconds since 1970 by the local clock, ascending
values    f32[T, C], NaN where a value is missing
channels  the names of the C channels

temperatures: the hourly temperatures of Seattle and San Francisco, in degrees Fahrenheit, that the
package vega_datasets ships (seattle-temps.csv and sf-temps.csv). The files date them 2010, but
they are as smooth as averages over many years, such as NOAA's hourly climate normals (1981 to
2010). There are 8759 rows: the hour that summer time skips is missing.

etth1: load and oil temperature of a transformer, 7 channels, hourly for two years. Haoyi Zhou et
al. "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting", 2021.
https://arxiv.org/abs/2012.07436
"""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dljax.data.series import table
from dljax.data.series.times import SECOND
from dljax.errors import UserError

TEMPERATURES = {"seattle": "seattle-temps.csv", "san_francisco": "sf-temps.csv"}
ETTH1_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv"
ETTH1_CHANNELS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")


def _temperatures_folder() -> Path:
  """The package's folder, found without importing the package, which would import pandas."""
  spec = importlib.util.find_spec("vega_datasets")
  if spec is None:
    raise UserError("--config.data.name: temperatures are those of the package vega_datasets, "
                    "which is not installed; run `pip install vega_datasets`")
  return Path(spec.submodule_search_locations[0]) / "_data"


with tfds.core.registered.skip_registration():

  class _Series(tfds.core.GeneratorBasedBuilder):
    """See this file's docstring."""

    VERSION = tfds.core.Version("1.0.0")
    homepage = ""

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
          builder=self,
          description=__doc__,
          features=tfds.features.FeaturesDict({
              "time": tfds.features.Tensor(shape=(None,), dtype=np.int64),
              "values": tfds.features.Tensor(shape=(None, len(self.channels)), dtype=np.float32),
              "channels": tfds.features.Sequence(tfds.features.Text()),
          }),
          homepage=self.homepage,
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {table.SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
      read = self._read()
      yield 0, {"time": read.times // SECOND, "values": read.values.astype(np.float32),
                "channels": list(self.channels)}

  class Temperatures(_Series):
    name = "temperatures"
    channels = tuple(TEMPERATURES)
    homepage = "https://github.com/altair-viz/vega_datasets"

    def _read(self) -> table.Series:
      folder = _temperatures_folder()
      parts = [table.read_csv(folder / file, "date", ["temp"]) for file in TEMPERATURES.values()]
      if not np.array_equal(parts[0].times, parts[1].times):
        raise UserError(f"{folder}: the two files have different times; run `pip install "
                        "vega_datasets==0.9.0`")
      return table.Series(self.name, self.channels, parts[0].times,
                          np.concatenate([p.values for p in parts], axis=1))

  class Etth1(_Series):
    """The series in the file ETTh1.csv, which is in `folder`."""

    name = "etth1"
    channels = ETTH1_CHANNELS
    homepage = "https://github.com/zhouhaoyi/ETDataset"
    url_infos = {ETTH1_URL: tfds.download.checksums.UrlInfo(
        size=2589657, checksum="f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
        filename="ETTh1.csv")}

    def __init__(self, *, folder: Path, **kwargs: Any):
      self._folder = folder
      super().__init__(**kwargs)

    def _read(self) -> table.Series:
      return table.read_csv(self._folder / ETTH1_URL.rpartition("/")[2], "date", self.channels)
