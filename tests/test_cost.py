"""The costs that the suite reports are added up by family and by file, and too much of them fails CI."""

from pathlib import Path

import pytest

from tests.cost import Cost, by_family, by_file, carries, over, refusals

COSTS = [
    Cost("tests/models/test_vit.py::test_a", "quick", 20.0),
    Cost("tests/test_experiments.py::test_b[vit-digits]", "quick", 6.0),
    Cost("tests/test_experiments.py::test_b[unet-pets]", "slow", 91.0),
    Cost("tests/interop/test_timm.py::test_c[vit_tiny-resnet]", "slow", 2.0),
]
pytest_plugins = "pytester"
FAMILIES = ("resnet", "unet", "vgg", "vit")


@pytest.mark.parametrize("nodeid, carried", [
    ("tests/models/test_vit.py::test_a", True), ("tests/a.py::test_b[vit-digits]", True),
    ("tests/a.py::test_b[digits-vit]", True), ("tests/a.py::test_b[vit_tiny]", True),
    ("tests/a.py::test_a_vit_learns", True), ("tests/a.py::test_b[vit16]", False),
    ("tests/a.py::test_in_vitro", False), ("tests/a.py::test_evit", False),
])
def test_a_family_is_found_by_its_name_as_a_word(nodeid, carried):
  assert carries(nodeid, "vit") == carried


def test_sums_by_family_and_by_file():
  assert by_family(COSTS, FAMILIES) == {
      "resnet": {"slow": 2.0}, "unet": {"slow": 91.0}, "vit": {"quick": 26.0, "slow": 2.0}}
  assert list(by_file(COSTS).items()) == [
      ("tests/test_experiments.py", {"quick": 6.0, "slow": 91.0}),
      ("tests/models/test_vit.py", {"quick": 20.0}), ("tests/interop/test_timm.py", {"slow": 2.0})]


def test_who_takes_more_than_a_share_is_named_and_much_more_is_refused():
  lines = over(by_family(COSTS, FAMILIES))
  assert [line.split(":")[0] for line in lines] == ["unet", "vit"]
  assert "91.0 slow CPU-seconds; at most 90" in lines[0] and "26.0 quick CPU-seconds; at most 25" in lines[1]
  assert not refusals(COSTS, 1000.0, FAMILIES)
  more = [*COSTS, Cost("tests/test_launch.py::test_vit", "quick", 24.1)]
  assert refusals(more, 1000.0, FAMILIES) == ["vit: 50.1 quick CPU-seconds; at most 50"]
  slow = [*COSTS, Cost("tests/test_experiments.py::test_b[vit-digits]", "slow", 179.0)]
  assert refusals(slow, 1000.0, FAMILIES) == ["vit: 181.0 slow CPU-seconds; at most 180"]
  assert refusals(COSTS, 1000.1, FAMILIES) == ["the quick suite: 1000.1 CPU-seconds; at most 1000"]


@pytest.mark.parametrize("workers, ci, status", [(0, "true", 1), (0, "", 0), (1, "true", 1)])
def test_a_run_prints_its_costs_and_fails_in_ci_alone(pytester, monkeypatch, workers, ci, status):
  monkeypatch.setenv("CI", ci)
  monkeypatch.setattr("tests.cost.SHARE", {"quick": 0.05, "slow": 90.0})
  # A worker's sys.path is that of the outermost pytest at its start.
  pytester.makeconftest(f"""
      import sys
      sys.path.insert(0, {str(Path(__file__).parents[1])!r})
      import pytest
      from tests import cost
      def pytest_configure(config):
        config.addinivalue_line("markers", "slow: slow")
        config.pluginmanager.register(cost.Plugin())
  """)
  pytester.makepyfile(test_vit="""
      import time, pytest
      @pytest.fixture(scope="module")
      def shared():
        start = time.process_time()
        while time.process_time() < start + 0.3:
          pass
      def test_first(shared): pass
      def test_second(shared): pass
      @pytest.mark.slow
      def test_third(): pass
  """, test_other="def test_fourth(): pass")
  result = pytester.runpytest_inprocess(f"-n{workers}", "--dist=loadfile", "-p", "no:cacheprovider")
  result.assert_outcomes(passed=4)
  assert result.ret == status
  rows = {words[2]: words[:2] for words in map(str.split, result.outlines) if len(words) == 3}
  assert 0.3 <= float(rows["vit"][0]) < 2 and float(rows["vit"][1]) < 0.1
  assert rows["test_vit.py"] == rows["vit"] and float(rows["test_other.py"][0]) < 0.1
  assert ("error: vit: " in result.stdout.str()) == bool(status)
