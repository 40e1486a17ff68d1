"""The documentation that ships inside Python (`pydoc_data.topics`), as a TFDS set.

It is what `help("for")` shows: in Python 3.13.0, 79 topics of 510,586 characters; other versions
have other texts. Each version of Python therefore has a config of its own, named by its full
number, and only that of the running Python can be prepared. A number measured on the set should
name the config, such as "pydoc/3.13.0".

`PydocParagraphs` has the paragraphs of eight large topics, each with the name of its topic as its
class; 1,040 in Python 3.13.0.
"""

import hashlib
import platform
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds

HELD_OUT = 0.12  # share of the topics for validation, and of those for the test
# Share of all characters; a larger topic would fill a small split, so it is for training.
LARGEST = 0.05


# These topics have the most paragraphs; others repeat some of theirs.
PARAGRAPHS_OF = ("compound", "debugger", "formatstrings", "specialnames", "string-methods", "types",
                 "typesmapping", "typesseq")
SHORTEST = 60  # characters of a paragraph; shorter ones are headings and single lines


class Pydoc(tfds.core.GeneratorBasedBuilder):
  """Each topic is a document in one split. Topics with the same text are in the same split."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(
      name=platform.python_version(), description="The topics of this version of Python.")]

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        description=__doc__,
        features=tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "topic": tfds.features.Text()}),
        homepage="https://docs.python.org/3/library/pydoc.html",
    )

  def _split_generators(self, dl_manager):
    from pydoc_data.topics import topics

    return {name: self._generate_examples(topics, names)
            for name, names in split_topics(topics).items()}

  def _generate_examples(self, topics, names):
    for name in names:
      yield name, {"text": topics[name], "topic": name}


class PydocParagraphs(tfds.core.GeneratorBasedBuilder):
  """The split of a paragraph is drawn by a hash of its text, as `Pydoc` draws that of a topic."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(
      name=platform.python_version(), description="The paragraphs of this version of Python.")]

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        description=__doc__,
        features=tfds.features.FeaturesDict({
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=PARAGRAPHS_OF)}),
        homepage="https://docs.python.org/3/library/pydoc.html",
    )

  def _split_generators(self, dl_manager):
    from pydoc_data.topics import topics

    found = paragraphs(topics)
    splits = {text: draw_split(text) for text in found}
    return {name: self._generate_examples(
        {text: topic for text, topic in found.items() if splits[text] == name})
        for name in ("train", "validation", "test")}

  def _generate_examples(self, found: Mapping[str, str]) -> Iterator[tuple[int, dict]]:
    for number, (text, topic) in enumerate(found.items()):
      yield number, {"text": text, "label": topic}


def paragraphs(topics: Mapping[str, str]) -> dict[str, str]:
  """Text of a paragraph -> its topic, for the paragraphs that only one of `PARAGRAPHS_OF` has.

  White space within a paragraph, which shows how deep it is indented, is single spaces.
  """
  found: dict[str, set[str]] = {}
  for topic in PARAGRAPHS_OF:
    for paragraph in topics[topic].split("\n\n"):
      text = " ".join(paragraph.split())
      if len(text) >= SHORTEST:
        found.setdefault(text, set()).add(topic)
  return {text: min(of) for text, of in found.items() if len(of) == 1}


def draw_split(text: str) -> str:
  """The split of a text by its SHA-256 as a share of 1."""
  place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
  if place < 2 * HELD_OUT:
    return "test" if place < HELD_OUT else "validation"
  return "train"


def split_topics(topics: Mapping[str, str]) -> dict[str, list[str]]:
  """Split name -> its topics in order, chosen by the SHA-256 of their texts as a share of 1."""
  largest = LARGEST * sum(map(len, topics.values()))
  splits = {"train": [], "validation": [], "test": []}
  for name, text in sorted(topics.items()):
    splits[draw_split(text) if len(text) <= largest else "train"].append(name)
  return splits
