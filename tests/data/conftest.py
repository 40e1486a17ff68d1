"""The digits, as most tests of this folder read them."""

import pytest

from dljax.data.image import labelled


@pytest.fixture(scope="session")
def digits_dir(prepared):
  """A data directory that holds both configs of digits."""
  return prepared("digits/stratified", "digits/by_writer")


@pytest.fixture
def digits(digits_dir, monkeypatch):
  """Makes the prepared digits the default, and gives a config for them."""
  monkeypatch.setenv("TFDS_DATA_DIR", str(digits_dir))
  return labelled.default_config()
