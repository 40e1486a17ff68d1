"""The families that there are: a new one is tested without being listed anywhere."""

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAMILIES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
EXPERIMENTS = {name: importlib.import_module(f"experiments.{name}") for name in FAMILIES}
