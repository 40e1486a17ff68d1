"""What the recipes that read text share."""

import json

import pytest

from dljax.data.text import tokenize
from dljax.recipes import text_classification, texts
from experiments import bert, gpt
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


def _run(folder, tokenizer):
  """What a run leaves of its tokenizer."""
  (folder / "data").mkdir()
  (folder / "data" / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()))
  return folder


def test_a_run_with_sub_words_passes_them_on_to_what_is_fine_tuned(tmp_path):
  """Otherwise words would get the vectors of other words, which are as many."""
  made = tokenize.make("wordpiece", ["a dog barks"], framed=True, vocab_size=300, byte_fallback=False)
  config = bert.get_config("wordnet_classes")
  config.init.source = str(_run(tmp_path, made))
  expected = {"data.tokenizer": "file", "data.tokenizer_file": str(tmp_path / "data" / "tokenizer.json")}
  assert text_classification.resolve(config, ()) == expected
  assert text_classification.resolve(config, ("data.tokenizer",)) == {}
  config = bert.get_config("wordnet")
  config.init.source = str(tmp_path)
  assert texts.resolve(config, ()) == expected


def test_a_classifier_takes_the_tokenizer_beside_published_weights(weights):
  config = bert.get_config("glue_sst2")
  config.init.source = str(weights)
  assert text_classification.resolve(config, ()) == {
      "data.tokenizer": "file", "data.tokenizer_file": str(weights), "data.vocab_size": 1300}


def test_a_run_of_bytes_has_nothing_to_pass_on(tmp_path):
  config = gpt.get_config("pydoc")
  config.init.source = str(_run(tmp_path, tokenize.Bytes()))
  assert texts.resolve(config, ()) == {}
