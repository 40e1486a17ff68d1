"""XLA's own convolutions for the tests of models."""

from collections.abc import Iterator

import pytest

from tests import smallest


@pytest.fixture(autouse=True)
def native_convolutions() -> Iterator[None]:
  with smallest.native_convolutions():
    yield
