"""The 1797 handwritten digits that ship inside scikit-learn, as a TFDS set.

They are the test part of the "Optical Recognition of Handwritten Digits" set (E. Alpaydin, C.
Kaynak, 1998, UCI Machine Learning Repository): 8x8 pixels, each a number v from 0 to 16 that
counts the ink in a 4x4 block. They are stored as uint8, u = `round(255 * v / 16)`; `round(16 * u /
255)` gives v back.
"""

import numpy as np
import tensorflow_datasets as tfds

TEST_EXAMPLES = 360
VALIDATION_EXAMPLES = 144


class Digits(tfds.core.GeneratorBasedBuilder):
  """Two splits of 1797 images: 1293 for training, 144 for validation and 360 for the test."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(
          name="stratified",
          description="Test: scikit-learn's `train_test_split(range(1797), test_size=360, "
                      "stratify=labels, random_state=0)`; validation: 144 of the other 1437, "
                      "drawn in the same way. The splits share writers."),
      tfds.core.BuilderConfig(
          name="by_writer",
          description="The images are split in the order of the file, in which writers follow "
                      "each other: the last 360 are the test, the 144 before them validation. "
                      "Harder, as nearly all of the test's writers are new."),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        description=__doc__,
        features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
            "id": tfds.features.Scalar(np.int64),  # position in scikit-learn's file
        }),
        supervised_keys=("image", "label"),
        homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
    )

  def _split_generators(self, dl_manager):
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)
    parts = split_indices(data.target, self.builder_config.name)
    return {name: self._generate_examples(images, data.target, indices)
            for name, indices in parts.items()}

  def _generate_examples(self, images, labels, indices):
    from PIL import Image

    for index in map(int, indices):
      yield index, {"image": Image.fromarray(images[index]), "label": int(labels[index]),
                    "id": index}


def split_indices(labels: np.ndarray, config: str) -> dict[str, np.ndarray]:
  """Split name -> positions in scikit-learn's file, for the config "stratified" or "by_writer"."""
  everything = np.arange(len(labels))
  if config == "by_writer":
    train, validation, test = np.split(everything,
                                       [-TEST_EXAMPLES - VALIDATION_EXAMPLES, -TEST_EXAMPLES])
  else:
    from sklearn.model_selection import train_test_split

    rest, test = train_test_split(everything, test_size=TEST_EXAMPLES, stratify=labels,
                                  random_state=0)
    train, validation = train_test_split(
        rest, test_size=VALIDATION_EXAMPLES, stratify=labels[rest], random_state=0)
  return {"train": train, "validation": validation, "test": test}
