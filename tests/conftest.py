"""Four virtual CPU devices, so that every test can ask what changes with the device count.

Most of a test's time is compilation; XLA at its lowest effort halves it.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
for _flag, _value in (("--xla_force_host_platform_device_count", 4), ("--xla_backend_optimization_level", 0)):
  if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
