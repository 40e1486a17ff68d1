"""The text of Python's own documentation that ships inside Python (`pydoc_data.topics`), as a TFDS set.

What `help("for")` and the like show: 79 topics of 510,586 characters in Python 3.13.0, other numbers in other
versions. So each version has a config of its own, of Python's full version number, and only the running one can be
prepared: beside any number measured on it stands "pydoc/3.13.0".
"""

import hashlib
import platform
from collections.abc import Mapping

import tensorflow_datasets as tfds

HELD_OUT = 0.12  # of the topics, for validation and as many for the test
LARGEST = 0.05  # of all characters: a topic of more is for training, as it would be most of a smaller split


class Pydoc(tfds.core.GeneratorBasedBuilder):
  """A topic is a document, and lies in one split as a whole. Topics of the same text lie in the same."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(
      name=platform.python_version(), description="The topics of this version of Python.")]

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        description=__doc__,
        features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "topic": tfds.features.Text()}),
        homepage="https://docs.python.org/3/library/pydoc.html",
    )

  def _split_generators(self, dl_manager):
    from pydoc_data.topics import topics

    return {name: self._generate_examples(topics, names) for name, names in split_topics(topics).items()}

  def _generate_examples(self, topics, names):
    for name in names:
      yield name, {"text": topics[name], "topic": name}


def split_topics(topics: Mapping[str, str]) -> dict[str, list[str]]:
  """Split name -> topics in order, from the topics' texts alone: by the SHA-256 of each, as a number from 0 to 1."""
  largest = LARGEST * sum(map(len, topics.values()))
  splits = {"train": [], "validation": [], "test": []}
  for name, text in sorted(topics.items()):
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    held_out = len(text) <= largest and ("test" if place < HELD_OUT else place < 2 * HELD_OUT and "validation")
    splits[held_out or "train"].append(name)
  return splits
