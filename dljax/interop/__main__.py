"""`python -m dljax.interop` converts weights; see `dljax/launch/convert.py`."""

import sys

from dljax.launch import convert

if __name__ == "__main__":
  sys.exit(convert.main())
