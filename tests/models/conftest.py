"""XLA's own convolutions for the tests of models: ours make programs that take twice as long to trace and compile.

That ours equal them is the matter of tests/ops/test_conv.py; tests/interop runs whole networks with ours.
"""

import pytest

from dljax.ops import conv


@pytest.fixture(autouse=True)
def native_convolutions(monkeypatch):
  monkeypatch.setattr(conv, "_by_platform", lambda form, native, *args: native(*args))
