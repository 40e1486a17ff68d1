"""What the recipes that read text share."""

import pytest

from dljax.recipes import texts
from experiments import gpt
from tests.data.text import scripts


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A folder with a tokenizer beside what would be weights."""
  return scripts.folders(tmp_path_factory.mktemp("folders"))["qwen"]


@pytest.mark.parametrize("given, tokenizer", [
    ((), "file"), (("data.tokenizer",), "byte"), (("data.tokenizer_file",), "byte")])
def test_the_tokenizer_beside_the_weights_is_taken_unless_another_was_chosen(weights, given, tokenizer):
  config = gpt.get_config("pydoc")
  config.init.source = str(weights)
  found = texts.resolve(config, given)
  assert found.get("data.tokenizer", "byte") == tokenizer
  if not given:
    assert found["data.tokenizer_file"] == str(weights) and found["data.vocab_size"] == 1300
  assert config.data.tokenizer == "byte"  # the caller changes it


def test_weights_without_a_tokenizer_decide_nothing(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  config = gpt.get_config("pydoc")
  config.init.source = str(tmp_path)
  assert texts.resolve(config, ()) == {}
