"""The families that there are: a new one is tested without being listed anywhere."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAMILIES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
EXPERIMENTS = {name: importlib.import_module(f"experiments.{name}") for name in FAMILIES}

# Family -> the cells of its row in the README's table. A fork's family need not be there.
_ROWS = re.findall(
    r"^\| \[(\w+)\]\(dljax/models/\1\.py\) \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
SHOWN = {family: [cell.strip() for cell in cells.split("|")] for family, cells in _ROWS}
WITH_PEER = [family for family, (_, _, peer, *_) in SHOWN.items() if peer not in ("", "-")]
