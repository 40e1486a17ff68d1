"""The READMEs: their links lead somewhere, and their commands are understood."""

import re
import shlex
from pathlib import Path

import pytest

from dljax import config as config_lib
from dljax.data import datasets
from dljax.launch import flags
from tests.families import EXPERIMENTS, ROOT

READMES = sorted([ROOT / "README.md", *(ROOT / "dljax").rglob("README.md"),
                  *(ROOT / "experiments").rglob("README.md")])
EXAMPLES = ("x", "mixer", "benchmark", "benchmark.peers._full_size")  # what stands where a family's name would, or is none


def _name(path: Path) -> str:
  return str(path.relative_to(ROOT))


def _anchor(heading: str) -> str:
  """The part of a link after #, as GitHub makes it."""
  return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _commands(module: str) -> list[tuple[str, list[str]]]:
  """(page, words) of each command `python -m MODULE...` in a block or between backquotes."""
  found = []
  for path in READMES:
    text = path.read_text().replace("\\\n", " ")
    for line in re.findall(rf"python -m ({re.escape(module)}[^\n`]*)", text):
      found.append((_name(path), shlex.split(re.split(r"\s[#(&]", line)[0])))
  return found


@pytest.mark.parametrize("path", READMES, ids=_name)
def test_links_lead_somewhere(path):
  links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
  assert links or path.parent != ROOT
  for link in links:
    if link.startswith("https://"):
      continue
    file, _, anchor = link.partition("#")
    target = path.parent / file if file else path
    assert target.exists(), link
    if anchor:
      headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
      assert anchor in map(_anchor, headings), link


def test_commands_of_experiments_are_understood():
  commands, families = _commands("experiments."), set()
  for page, (module, *arguments) in commands:
    family = module.removeprefix("experiments.")
    if family in EXAMPLES:
      continue
    experiment = EXPERIMENTS[family]
    values, overrides = flags.parse([module, *arguments])
    flags.check_together(values, overrides)
    preset = values.preset or next(iter(experiment.PRESETS))
    assert preset in experiment.PRESETS, (page, module, preset)
    config_lib.apply_overrides(experiment.get_config(preset), overrides)
    families.add(family)
  assert len(families) > 5, "the test reads no commands"


def test_data_sets_that_are_to_be_prepared_can_be():
  names = {words[1] for _, words in _commands("dljax.data.prepare") if len(words) > 1}
  assert names - {"NAME"} <= set(datasets.DOWNLOADED) and len(names) > 3
