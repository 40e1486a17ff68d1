"""The list of mutants: every line is still there, and no room of dljax is left out."""

import collections

from tests.mutants import MUTANTS, ROOMS, ROOT


def test_every_mutant_changes_one_place_and_names_tests_that_exist():
  for mutant in MUTANTS:
    text = (ROOT / mutant.file).read_text()
    assert mutant.mutate(text) != text
    assert mutant.tests, mutant.name
    for test in mutant.tests:
      path, _, function = test.partition("::")
      there = f"\ndef {function}(" in (ROOT / path).read_text()
      assert there, f"{mutant.name}: {test} is not there"
  assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_every_room_has_five():
  counts = collections.Counter(mutant.room for mutant in MUTANTS)
  assert set(counts) == set(ROOMS) and min(counts.values()) >= 5, counts
