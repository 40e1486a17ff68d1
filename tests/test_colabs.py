"""The notebooks: they install, hold their outputs, redefine nothing, and run from top to bottom."""

import ast
import os
import re
import resource
from pathlib import Path

import nbformat
import pytest

from dljax.data.datasets import EMBEDDED
from tests.command import xla_flags
from tests.families import EXPERIMENTS

ROOT = Path(__file__).parent.parent
FAMILIES = sorted(path.stem for path in (ROOT / "colabs").glob("*.ipynb"))
MAX_BYTES = 500_000
MAX_CPU_SECONDS = 120  # one minute of two cores, whatever else the machine does
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=`])((?:/[\w.-]+){2,}|[A-Z]:\\\w+)""", re.MULTILINE)
# For the rest of the kernel's life.
COMPILES_FAST = """
from tests import smallest
smallest.native_convolutions().start()
smallest.shallow("{family}").start()
"""

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def read(family):
  return nbformat.read(ROOT / "colabs" / f"{family}.ipynb", as_version=4)


def sources(notebook, kind):
  return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def parse(notebook):
  """The code as one module, without the magics."""
  lines = [line for source in sources(notebook, "code")[1:] for line in source.splitlines()]
  return ast.parse("\n".join(line for line in lines if not line.startswith("%")))


def definitions(tree):
  return {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def test_the_first_cell_installs_on_colab_only(family):
  first, *others = sources(read(family), "code")
  assert read(family).cells[0].source == first
  guard, install = first.rstrip().splitlines()[-2:]
  assert guard == 'if "google.colab" in sys.modules:'
  assert install.startswith("  %pip install") and "dljax" in install
  assert not any("pip install" in source for source in others)


def test_imports_the_experiment_and_redefines_nothing(family):
  tree = parse(read(family))
  imported = {(node.module, name.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
              for name in node.names}
  assert ("experiments", family) in imported
  for home in ("dljax/models", "experiments"):
    there = definitions(ast.parse((ROOT / home / f"{family}.py").read_text()))
    assert not definitions(tree) & there


def test_is_stored_as_it_ran_from_top_to_bottom(family):
  code = [cell for cell in read(family).cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  outputs = [output for cell in code for output in cell.outputs]
  assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
  assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
  assert (ROOT / "colabs" / f"{family}.ipynb").stat().st_size < MAX_BYTES


def test_names_no_place_of_the_machine_that_ran_it(family):
  notebook = read(family)
  texts = [cell.source for cell in notebook.cells]
  for cell in notebook.cells:
    for output in cell.get("outputs", []):
      texts.append(str(output.get("text", "")))
      texts += [str(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/")]
  assert not [match for text in texts for match in ABSOLUTE.findall(text)]


def test_has_prose_equations_an_exercise_and_links_that_lead_somewhere(family):
  text = "\n".join(sources(read(family), "markdown"))
  assert len(text.split()) > 400
  assert text.count("$$") >= 4
  assert re.search("^## Exercise$", text, re.MULTILINE)
  links = re.findall(r"\]\(([^)\s]+)\)", text)
  assert links
  for link in links:
    assert link.startswith("https://") or (ROOT / "colabs" / link).exists(), link


@pytest.mark.slow
def test_runs_in_a_minute(family, prepared):
  """With CI=1, which takes fewer steps, on one device; most of it is compilation, here with little effort.

  The convolutions are XLA's own, which compile in half the time, and the deep networks have fewer layers of each kind:
  test_experiments trains the default preset as it is.
  """
  nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebooks]'")
  pytest.importorskip("ipykernel", reason="pip install -e '.[notebooks]'")
  module = EXPERIMENTS[family]
  data = module.get_config(next(iter(module.PRESETS))).data.get("name")
  folder = prepared(*({"digits", data} & set(EMBEDDED)))
  env = os.environ | {"CI": "1", "XLA_FLAGS": xla_flags(1), "TFDS_DATA_DIR": str(folder)}
  notebook = read(family)
  notebook.cells.insert(0, nbformat.v4.new_code_cell(COMPILES_FAST.format(family=family)))
  client = nbclient.NotebookClient(
      notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
  before = _children_cpu_seconds()
  client.execute(env=env)
  assert _children_cpu_seconds() - before < MAX_CPU_SECONDS


def _children_cpu_seconds():
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime
