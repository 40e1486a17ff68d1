"""The plan of the house, held against its source: who imports whom, the doors of a family, what has one place."""

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.families import FAMILIES, ROOT, SHOWN, WITH_PEER

SOURCES = sorted(p for folder in ("dljax", "experiments") for p in (ROOT / folder).rglob("*.py"))
MAX_LINES = 250  # in a model file, and in the loop
MAX_COLUMNS = 100
MAX_LONG = 0.01  # the share of non-blank lines that may be longer
MAX_NAMED_LAMBDAS = 1.5  # per 1,000 lines

# What each room may import of the project; "dljax.data" stands for everything below it too.
TASKS = ["dljax.tasks", "dljax.ops", "dljax.report", "dljax.errors"]
DATA = ["dljax.data", "dljax.downloads", "dljax.errors", "dljax.config"]
INTEROP = ["dljax.interop", "dljax.models", "dljax.downloads", "dljax.errors"]
TRAIN = ["dljax.train", "dljax.tasks", "dljax.ops", "dljax.data.pipeline", "dljax.data.splits", "dljax.optim", "dljax.report",
         "dljax.config", "dljax.errors"]
ALLOWED = {
    "dljax.errors": [],
    "dljax.downloads": ["dljax.errors"],
    "dljax.config": ["dljax.errors"],
    "dljax.report": ["dljax.report", "dljax.errors"],
    "dljax.optim": ["dljax.config", "dljax.errors"],
    "dljax.ops": ["dljax.ops", "dljax.errors"],
    "dljax.models.retinanet": ["dljax.models.layers", "dljax.models.resnet"],  # whose stages carry its pyramid
    "dljax.models.deepspeech": ["dljax.models.layers", "dljax.models.rnn"],  # whose stack hears its convolutions
    "dljax.models": ["dljax.ops", "dljax.models.layers", "dljax.models.blocks", "dljax.errors"],
    "dljax.tasks": TASKS,
    "dljax.data": DATA,
    "dljax.interop.__main__": ["dljax.launch.convert"],  # which reads the checkpoints of runs
    "dljax.interop.families": ["dljax.interop.families", "dljax.interop.table", "dljax.models", "dljax.errors"],
    "dljax.interop": INTEROP,
    "dljax.train.pretrained": [*TRAIN, "dljax.interop"],  # where a run starts from others' weights
    "dljax.train.loop": [*TRAIN, "dljax.interop.variants"],  # which says which model a run holds
    "dljax.train": TRAIN,
    "dljax.recipes": ["dljax.recipes.common", "dljax.recipes.texts", "dljax.data", "dljax.tasks", "dljax.models.baselines",
                      "dljax.train.experiment", "dljax.optim", "dljax.report", "dljax.config", "dljax.errors"],
    "dljax.runs": ["dljax.train", "dljax.report", "dljax.config", "dljax.errors"],
    "dljax.launch.convert": ["dljax.interop", "dljax.train", "dljax.errors"],
    "dljax.launch": ["dljax.launch", "dljax.runs", "dljax.train", "dljax.config", "dljax.errors"],
    "experiments.benchmark": ["dljax", "experiments"],
    "experiments": ["dljax.recipes", "dljax.launch", "dljax.models", "dljax.tasks", "dljax.data",
                    "dljax.train.experiment", "dljax.optim", "dljax.config", "dljax.errors"],
}


def _module(path: Path) -> str:
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _below(module: str, rooms: list[str]) -> bool:
  return any(module == room or module.startswith(f"{room}.") for room in rooms)


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
  """All nodes of a file, whose tree is read once for all tests."""
  return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def _imports(path: Path) -> list[str]:
  """The dotted name of everything that a file imports, wherever in the file."""
  return list(_imported(path))


def _imported(path: Path) -> Iterator[str]:
  for node in _nodes(path):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      for alias in node.names:
        name = f"{node.module}.{alias.name}"
        # `from dljax import optim` names a module, `from dljax.errors import UserError` what is in one.
        inside = ROOT.joinpath(*name.split("."))
        yield name if inside.is_dir() or inside.with_suffix(".py").exists() else node.module


def _uses(path: Path, names: set[str]) -> list[str]:
  """Which of the dotted names ("jax.jit") a file uses, also by `from jax import jit`."""
  return sorted(names & _used(path))


@functools.cache
def _used(path: Path) -> set[str]:
  """Every dotted name that stands in a file or is imported from somewhere."""
  found = set()
  for node in _nodes(path):
    if isinstance(node, ast.Attribute):
      found.add(ast.unparse(node))
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_run_one_way(path):
  module = _module(path)
  rooms = [room for room in ALLOWED if _below(module, [room])]
  if module == "dljax":
    # The one in a program of ours, the other when it is asked for, see tests/test_runs.py.
    assert [name for name in _imports(path) if name.startswith("dljax")] == ["dljax.errors", "dljax.runs"]
    return
  assert rooms, f"{module} lies in no room of the house"
  allowed = ALLOWED[rooms[0]]
  wrong = [name for name in _imports(path) if _below(name, ["dljax", "experiments", "tests"])
           and not _below(name, allowed)]
  assert not wrong, f"{module} may import {allowed} of the project, not {wrong}"


def test_no_module_imports_itself_by_way_of_others():
  imports = {_module(path): set(_imports(path)) for path in SOURCES}
  left = {module: names & imports.keys() - {module} for module, names in imports.items()}
  while free := [module for module, names in left.items() if not names]:
    left = {module: names - set(free) for module, names in left.items() if names}
  assert not left, f"a circle of imports is among {left}"


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_nobody_uses_the_private_names_of_another_file(path):
  froms = [node for node in _nodes(path) if isinstance(node, ast.ImportFrom)]
  private = [alias.name for node in froms if _below(node.module, ["dljax", "experiments"])
             for alias in node.names if alias.name.startswith("_")]
  modules = {alias.asname or alias.name for node in froms if _below(node.module, ["dljax", "experiments"])
             for alias in node.names if f"{node.module}.{alias.name}" in map(_module, SOURCES)}
  private += [ast.unparse(node) for node in _nodes(path) if isinstance(node, ast.Attribute)
              and isinstance(node.value, ast.Name) and node.value.id in modules
              and node.attr.startswith("_") and not node.attr.startswith("__")]
  assert not private


@pytest.mark.parametrize("path", sorted((ROOT / "dljax" / "models").glob("*.py")), ids=_module)
def test_models_know_only_jax_flax_and_numpy(path):
  allowed = ["jax", "flax", "numpy", "dljax", *sys.stdlib_module_names]
  assert not [name for name in _imports(path) if not _below(name, allowed)]
  assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("package, only", [
    ("orbax", ["dljax.train.checkpoint"]),
    ("tensorflow", []),
    ("torch", ["experiments.benchmark.torch_worker", "experiments.benchmark.peers"]),  # another interpreter runs them
    ("torchvision", ["experiments.benchmark.peers"]),
    ("pickle", []),
    ("clu", []),
    ("rich", ["dljax.launch.tables", "dljax.train.inspect", "dljax.downloads", "experiments.benchmark.tables",
              "experiments.benchmark.__main__"]),
    ("tensorboardX", ["dljax.train.metrics"]),
    ("wandb", ["dljax.train.metrics"]),
    ("absl", ["dljax.data.image.folder", "dljax.data.image.own_scenes",
              "dljax.data.own", "dljax.launch", "dljax.launch.configs", "dljax.launch.evaluate", "dljax.launch.flags",
              "dljax.launch.predict", "dljax.runs", "dljax.train.checkpoint",
              "experiments.benchmark.engine", "experiments.benchmark.__main__"]),
])
def test_a_package_has_its_place(package, only):
  users = [_module(path) for path in SOURCES if any(_below(name, [package]) for name in _imports(path))]
  assert not [user for user in users if not _below(user, only)]


def test_steps_are_compiled_in_one_place():
  allowed = ("dljax.train.parallel", "experiments.benchmark.jax_worker")
  names = {"jax.jit", "jax.pmap", "nn.jit", "linen.jit"}
  found = {_module(path): used for path in SOURCES if (used := _uses(path, names))}
  assert set(found) <= set(allowed), found
  assert found["dljax.train.parallel"] == ["jax.jit", "jax.pmap"], "the test looks for the wrong names"


def test_the_axis_of_devices_is_named_in_one_place():
  functions = ("psum", "pmean", "pmax", "all_gather", "axis_index", "psum_scatter", "ppermute")
  names = {f"jax.lax.{function}" for function in functions}
  found = {_module(path): used for path in SOURCES if (used := _uses(path, names))}
  assert set(found) == {"dljax.ops.collectives"}, found


def test_the_loop_can_be_read_in_one_sitting():
  assert len((ROOT / "dljax" / "train" / "loop.py").read_text().splitlines()) <= MAX_LINES


def _worst(counts: dict[Path, int]) -> str:
  files = sorted(counts, key=counts.get, reverse=True)[:8]
  return ", ".join(f"{path.relative_to(ROOT)} {counts[path]}" for path in files if counts[path])


def test_lambdas_have_no_names():
  """Except for the few formulas that read better with one; a function says what it is for."""
  def count(path: Path) -> int:
    assignments = (ast.Assign, ast.AnnAssign, ast.NamedExpr)
    return sum(isinstance(node, assignments) and isinstance(node.value, ast.Lambda)
               for node in _nodes(path))

  counts = {path: count(path) for path in SOURCES}
  lines = sum(len(path.read_text().splitlines()) for path in SOURCES)
  named, most = sum(counts.values()), int(MAX_NAMED_LAMBDAS * lines / 1000)
  assert named <= most, (f"{named} lambdas have a name, and {lines} lines may hold {most}; make "
                         f"some of them functions: {_worst(counts)}")


def test_lines_end_before_column_100():
  """Except for the few that a formula or a link would break."""
  lines = {path: [line for line in path.read_text().splitlines() if line.strip()]
           for path in SOURCES}
  counts = {path: sum(len(line) > MAX_COLUMNS for line in lines[path]) for path in SOURCES}
  long, most = sum(counts.values()), int(MAX_LONG * sum(map(len, lines.values())))
  assert long <= most, (f"{long} lines are longer than {MAX_COLUMNS} columns, and {most} may be; "
                        f"break some of them: {_worst(counts)}")


def _without_encoding(node: ast.AST) -> bool:
  """Whether a call opens text in the encoding of the user's locale, which differs by machine."""
  if not isinstance(node, ast.Call):
    return False
  name = ast.unparse(node.func).rpartition(".")[2]
  keywords = {keyword.arg: keyword.value for keyword in node.keywords}
  if "encoding" in keywords or len(node.args) > {"read_text": 0, "write_text": 1}.get(name, 10):
    return False
  if name in ("read_text", "write_text", "TextIOWrapper"):
    return True
  if any(ast.unparse(keywords.get(word, ast.Constant(None))) == "True" for word in ("text", "universal_newlines")):
    return True
  if name not in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile"):
    return False
  # The mode is the second argument of functions, and the first of methods and of temporary files.
  function = isinstance(node.func, ast.Name) or ast.unparse(node.func) in ("io.open", "os.fdopen", "gzip.open")
  given = [keywords["mode"]] if "mode" in keywords else node.args[function:function + 1]
  mode = given[0].value if given and isinstance(given[0], ast.Constant) else None
  if mode is None:
    return function and "opener" not in keywords and not given
  return isinstance(mode, str) and re.fullmatch("[rwax+t]+", mode) is not None


def test_text_is_utf_8_on_every_machine():
  found = [f"{_module(path)}:{node.lineno}" for path in SOURCES for node in _nodes(path) if _without_encoding(node)]
  assert not found, f"give the encoding, or a mode with b, at {', '.join(found)}"


@pytest.mark.parametrize("line, bad", [
    ("open(p)", True), ("open(p, 'w')", True), ("open(p, mode='a')", True), ("p.open('r+')", True),
    ("p.read_text()", True), ("p.write_text(t)", True), ("os.fdopen(1, 'w')", True),
    ("subprocess.run(c, text=True)", True), ("tempfile.TemporaryFile('w+')", True),
    ("open(p, 'rb')", False), ("open(p, encoding='utf-8')", False), ("p.open('wb')", False), ("p.open()", False),
    ("p.read_text('utf-8')", False), ("p.write_text(t, 'utf-8')", False), ("tempfile.TemporaryFile()", False),
    ("Image.open(p)", False), ("os.open(p, os.O_RDONLY)", False), ("open(p, 'ab', buffering=0)", False),
])
def test_calls_that_open_text_are_recognised(line, bad):
  assert _without_encoding(ast.parse(line, mode="eval").body) == bad


def test_there_are_families():
  assert {"mlp", "lenet", "resnet"} <= set(SHOWN) <= set(FAMILIES)
  models = {path.stem for path in (ROOT / "dljax" / "models").glob("*.py")} - {"__init__", "layers", "blocks", "baselines"}
  assert models == set(FAMILIES)


def _missing(*doors: str) -> list[str]:
  return [door for door in doors if not (ROOT / door).is_file()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_doors_with_one_name(family):
  assert not _missing(
      f"dljax/models/{family}.py", f"experiments/{family}.py", f"tests/models/test_{family}.py")


@pytest.mark.parametrize("family", SHOWN)
def test_a_family_of_the_readme_has_all_doors(family):
  assert not _missing(f"colabs/{family}.ipynb")
  if family in WITH_PEER:
    assert not _missing(
        f"dljax/interop/families/{family}.py", f"experiments/benchmark/peers/{family}.py")


def test_the_readme_shows_every_family_that_has_more_doors_than_a_fork():
  """So that none falls out of the table, and with it out of what is asked of its families."""
  doors = [*(ROOT / "colabs").glob("*.ipynb"), *(ROOT / "dljax/interop/families").glob("[!_]*.py"),
           *(ROOT / "experiments/benchmark/peers").glob("[!_]*.py")]
  assert {path.stem for path in doors} - {"baselines"} == set(SHOWN)


@pytest.mark.parametrize("family", SHOWN)
def test_the_readmes_row_names_the_presets_and_the_notebook(family):
  *_, presets, notebook = SHOWN[family]
  assert presets.split(", ") == list(importlib.import_module(f"experiments.{family}").PRESETS)
  assert notebook == f"[{family}](colabs/{family}.ipynb)"


# Names, or their beginnings, that are the field's own, without the family in them.
OWN_NAMES = {"mlp": ("perceptron",), "gpt": ("llama_", "qwen3_")}


@pytest.mark.parametrize("family", FAMILIES)
def test_variants_carry_the_familys_name(family):
  variants = importlib.import_module(f"dljax.models.{family}").VARIANTS
  assert variants
  assert not [v for v in variants if not v.startswith((family, *OWN_NAMES.get(family, ())))]
  assert all(callable(variant) for variant in variants.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_experiment_is_presets_a_config_and_a_build_function(family):
  experiment = importlib.import_module(f"experiments.{family}")
  tree = ast.parse(Path(experiment.__file__).read_text())
  public = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_")]
  assert public == ["get_config", "build"]
  assert all(text and "\n" not in text for text in experiment.PRESETS.values())
  assert f"python -m experiments.{family}" in experiment.__doc__
  assert experiment.get_config.__doc__ and experiment.build.__doc__
  last = ast.unparse(tree.body[-1])
  assert "launch.main(get_config, build, PRESETS" in last


def test_the_command_line_starts_without_what_it_may_not_need():
  heavy = ["sklearn", "tensorflow_datasets", "grain", "orbax", "matplotlib", "PIL", "scipy", "pandas", "tqdm",
           "tensorboardX", "tensorflow", "torch"]  # and rich, but Flax imports that itself
  models = ", ".join(f"dljax.models.{path.stem}" for path in (ROOT / "dljax/models").glob("[!_]*.py"))
  # A model takes JAX and Flax: a second of a processor for all families together.
  no_model_takes = ["ml_collections", "optax", "dljax.config", "dljax.train", "dljax.data", "dljax.tasks"]
  code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {models}; "
          f"print(*[m for m in {[*heavy, *no_model_takes]} if m in sys.modules]); import experiments.lenet; "
          f"print(*[m for m in {heavy} if m in sys.modules])")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                        env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=120)
  assert done.stdout.split() == []


def test_training_a_family_loads_no_other(tmp_path):
  """In a new process, as the command line does it; the digits need no folder of data sets.

  The modules do not depend on the size of the network, which is one block here, or of the pictures.
  """
  code = """
import functools, runpy, sys
from dljax.models import resnet
resnet.VARIANTS = {"resnet20": functools.partial(resnet.ResNet, block=resnet.BasicBlock, stage_sizes=(1,), width=8)}
sys.argv = ["resnet", "--config.total_steps=1", "--config.batch_size=8", "--config.eval_batch_size=8",
            "--config.data.validation=validation[:8]", "--config.data.test=test[:8]",
            "--config.data.image_shape=8,8,1", "--mesh=data:1", "--workdir=run"]
try:
  runpy.run_module("experiments.resnet", run_name="__main__", alter_sys=True)
except SystemExit as end:
  assert not end.code, end.code
print(*(name for name in sys.modules if name.partition(".")[0] in ("dljax", "experiments")))
"""
  done = subprocess.run(
      [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300,
      env={**os.environ, "PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"})
  loaded = done.stdout.splitlines()[-1].split()
  own = {"dljax.models": {"layers", "resnet"}, "dljax.recipes": {"common", "image_classification"},
         "dljax.interop.families": {"resnet"}, "dljax.data.datasets": {"digits"}}
  foreign = []
  for room, names in own.items():
    there = {path.stem for path in ROOT.joinpath(*room.split(".")).glob("*.py")} - {"__init__"}
    foreign += [name for name in loaded if name in {f"{room}.{other}" for other in there - names}]
  assert not foreign, foreign
  assert len(loaded) <= 70, sorted(loaded)


def test_nothing_is_left_for_later():
  words = ("TO" + "DO", "FIX" + "ME", "X" * 3)
  assert not [(_module(path), word) for path in SOURCES for word in words if word in path.read_text()]
