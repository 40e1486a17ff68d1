"""Unknown names: the nearest ones are offered, or else all."""

import pytest

from dljax import errors

TABLE = {"resnet18": 1, "resnet50": 2, "vit_b16": 3}


def test_a_known_name_is_looked_up():
  assert errors.choose("--x", "vit_b16", TABLE) == 3


@pytest.mark.parametrize("name, mend", [
    ("resnet5", "did you mean resnet50 or resnet18?"),
    ("vitb16", "did you mean vit_b16?"),
    ("zzz", "choose one of: resnet18, resnet50, vit_b16"),
    ("", "choose one of: resnet18, resnet50, vit_b16"),
])
def test_an_unknown_name_gets_the_nearest(name, mend):
  with pytest.raises(errors.UserError) as error:
    errors.choose("--x", name, TABLE)
  assert str(error.value) == f"--x: there is no {name!r}; {mend}"
