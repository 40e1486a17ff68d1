"""The documentation that ships inside Python (`pydoc_data.topics`), as a TFDS set.

It is what `help("for")` shows: in Python 3.13.0, 79 topics of 510,586 characters; other versions
have other texts. Each version of Python therefore has a config of its own, named by its full
number, and only that of the running Python can be prepared. A number measured on the set should
name the config, such as "pydoc/3.13.0".
"""

import hashlib
import platform
from collections.abc import Mapping

import tensorflow_datasets as tfds

HELD_OUT = 0.12  # share of the topics for validation, and of those for the test
# Share of all characters; a larger topic would fill a small split, so it is for training.
LARGEST = 0.05


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


def split_topics(topics: Mapping[str, str]) -> dict[str, list[str]]:
  """Split name -> its topics in order, chosen by the SHA-256 of their texts as a share of 1."""
  largest = LARGEST * sum(map(len, topics.values()))
  splits = {"train": [], "validation": [], "test": []}
  for name, text in sorted(topics.items()):
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    split = "train"
    if len(text) <= largest and place < 2 * HELD_OUT:
      split = "test" if place < HELD_OUT else "validation"
    splits[split].append(name)
  return splits
