"""What a wheel holds and says, and the pages beside the README."""

import configparser
import re
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest
import yaml

from tests.families import ROOT

# setuptools reads a list with an entry in each line.
_SETUP = configparser.ConfigParser(interpolation=None)
_SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
VERSION = _SETUP["metadata"]["version"]


def test_one_version_is_stated_everywhere():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert str(citation["version"]) == VERSION
  assert re.search(rf"version = {{{re.escape(VERSION)}}}", (ROOT / "README.md").read_text())
  assert re.search(rf"^## {re.escape(VERSION)}$", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_citation_has_what_its_format_asks_for():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert {"cff-version", "message", "title", "authors"} <= citation.keys()
  assert citation["license"] == _SETUP["metadata"]["license"]
  assert citation["repository-code"] == _SETUP["metadata"]["url"]


def test_type_checkers_are_told_that_the_package_has_types():
  assert "py.typed" in _SETUP["options.package_data"]["dljax"].split()
  assert (ROOT / "dljax" / "py.typed").read_bytes() == b""


@pytest.mark.slow
def test_a_wheel_has_its_types_and_its_metadata(tmp_path):
  copy = tmp_path / "source"
  names = subprocess.run(["git", "ls-files", "-z", "dljax", "experiments", "*.cfg", "*.toml", "*.md", "LICENSE"],
                         cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
  for name in names:  # a build leaves files beside its source
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes((ROOT / name).read_bytes())
  subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", f"--wheel-dir={tmp_path}",
                  str(copy)], check=True, timeout=300)
  wheel, = tmp_path.glob("dljax-*.whl")
  with zipfile.ZipFile(wheel) as file:
    there = file.namelist()
    metadata = Parser().parsestr(file.read(f"dljax-{VERSION}.dist-info/METADATA").decode())
  assert "dljax/py.typed" in there and "experiments/lenet.py" in there
  assert not any(name.startswith(("tests/", "colabs/")) for name in there)
  assert metadata["Requires-Python"] == ">=3.11" and metadata["Version"] == VERSION
  assert metadata["Description-Content-Type"] == "text/markdown"
  assert metadata.get_payload().startswith("# dljax")
  assert "Typing :: Typed" in metadata.get_all("Classifier") and metadata["Keywords"]
  urls = dict(url.split(", ") for url in metadata.get_all("Project-URL"))
  assert {"Documentation", "Issues", "Changelog"} <= urls.keys()
