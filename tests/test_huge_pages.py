"""`python -m experiments.x` starts itself again with its memory in huge pages, once, where that is of use."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import experiments

NAME = "glibc.malloc.hugetlb"


def restart(monkeypatch, tunables=None, pages="always [madvise] never", library="glibc 2.36", trace=None):
  """The call of `os.execv`, or None."""
  monkeypatch.setattr(os, "confstr", lambda name: library, raising=False)
  monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: pages)
  monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "-m", "experiments.lenet", "--seed=1"])
  monkeypatch.setattr(sys, "gettrace", lambda: trace)
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  if tunables is not None:
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
  with mock.patch.object(os, "execv") as execv:
    experiments._use_huge_pages()
  return execv.call_args


@pytest.mark.parametrize("before, after", [
    (None, f"{NAME}=1"),
    ("", f"{NAME}=1"),
    ("glibc.malloc.arena_max=2", f"glibc.malloc.arena_max=2:{NAME}=1"),
])
def test_the_same_command_starts_again_with_the_setting_added(before, after, monkeypatch):
  call = restart(monkeypatch, before)
  assert call.args == (sys.executable, [sys.executable, "-X", "utf8", "-m", "experiments.lenet", "--seed=1"])
  assert os.environ["GLIBC_TUNABLES"] == after


@pytest.mark.parametrize("where", [
    {"tunables": f"{NAME}=1"},  # which it has done already
    {"tunables": f"{NAME}=0"},  # the user's wish
    {"pages": "[always] madvise never"},
    {"pages": "always madvise [never]"},
    {"library": "glibc 2.34"},
    {"library": "musl 1.2"},
    {"library": None},
    {"trace": print},
])
def test_elsewhere_it_goes_on(where, monkeypatch):
  assert restart(monkeypatch, **where) is None


def test_only_python_m_restarts():
  """Whoever imports an experiment, as notebooks and tests do, keeps the process."""
  show = "import os, experiments.lenet; print(os.environ.get('GLIBC_TUNABLES'))"
  env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  result = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, env=env, check=True)
  assert result.stdout == "None\n"


def test_the_program_that_started_again_has_its_arguments():
  env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  result = subprocess.run([sys.executable, "-m", "experiments.lenet", "--list_presets", "--nonsense"],
                          capture_output=True, text=True, env=env, check=False)
  assert result.returncode == 2 and "--nonsense" in result.stderr
