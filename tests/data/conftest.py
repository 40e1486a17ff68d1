"""The digits, prepared once for all tests of this folder."""

import pytest

from dljax.data import sources
from dljax.data.image import labelled


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
  """A data directory that holds both configs of digits."""
  root = tmp_path_factory.mktemp("tfds")
  for config in ("stratified", "by_writer"):
    sources.prepare_embedded(f"digits/{config}", root)
  return root


@pytest.fixture
def digits(digits_dir, monkeypatch):
  """Makes the prepared digits the default, and gives a config for them."""
  monkeypatch.setenv("TFDS_DATA_DIR", str(digits_dir))
  return labelled.default_config()
