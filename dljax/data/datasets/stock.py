"""TFDS's own mnist, fashion_mnist, cifar10, cifar100 and tiny_shakespeare, without TensorFlow.

Each is a subclass of TFDS's builder, with the same name, version, features, splits and checksums;
only the reading of files is replaced. Where TFDS would download files, these builders take files
that `dljax.data.prepare` has downloaded and verified.
"""

import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.datasets.tiny_shakespeare import tiny_shakespeare_dataset_builder as tiny_shakespeare
from tensorflow_datasets.image_classification import cifar, mnist

from dljax.data.text.corpus import split_text
from dljax.errors import UserError


class _LocalFiles:
  """Replaces TFDS's download manager: a URL stands for the file in `folder` that has its name."""

  def __init__(self, folder: Path):
    self._folder = folder

  def download_and_extract(self, urls: Any) -> Any:
    """The path of a gzip file, which stays packed, or of the folder of an unpacked tar file."""
    if isinstance(urls, dict):
      return {key: self.download_and_extract(url) for key, url in urls.items()}
    path = self._folder / urls.rpartition("/")[2]
    if not path.name.endswith(".tar.gz"):
      return str(path)
    unpacked = path.with_name(path.name.removesuffix(".tar.gz"))
    with tarfile.open(path) as archive:
      try:
        if hasattr(tarfile, "data_filter"):
          archive.extractall(unpacked, filter="data")
        else:  # before Python 3.11.4
          _extract_plain(archive, unpacked)
      except tarfile.TarError as error:
        raise UserError(f"{path} cannot be unpacked ({error}); delete it and download it "
                        "again") from error
    return str(unpacked)


def _extract_plain(archive: tarfile.TarFile, folder: Path) -> None:
  """Extracts an archive of nothing but files and folders that stay within `folder`."""
  for member in archive:
    place = Path(member.name)
    if not (member.isfile() or member.isdir()) or place.is_absolute() or ".." in place.parts:
      raise tarfile.ExtractError(f"{member.name!r} is no file within the archive's folder")
  archive.extractall(folder)


class _FromFiles:
  """A mixin for a builder of TFDS; `folder` holds the files that the builder would download."""

  def __init__(self, *, folder: Path, **kwargs: Any):
    self._folder = folder
    super().__init__(**kwargs)

  def _split_generators(self, dl_manager: Any) -> Any:
    return super()._split_generators(_LocalFiles(self._folder))


class _Idx(_FromFiles):
  """Reads files in the format of http://yann.lecun.com/exdb/mnist/."""

  def _generate_examples(
      self, num_examples: int, data_path: str, label_path: str) -> Iterator[tuple[int, Any]]:
    from PIL import Image

    images, labels = read_idx(data_path), read_idx(label_path)
    for index in range(num_examples):
      yield index, {"image": Image.fromarray(images[index]), "label": int(labels[index])}


class _CifarBinary(_FromFiles):
  """Reads the binary version of https://www.cs.toronto.edu/~kriz/cifar.html."""

  def _generate_examples(
      self, split_prefix: str, filepaths: Iterator[str],
  ) -> Iterator[tuple[int, Any]]:
    from PIL import Image

    keys = self._cifar_info.label_keys
    index = 0
    for path in filepaths:
      records = np.frombuffer(Path(path).read_bytes(), np.uint8)
      records = records.reshape(-1, len(keys) + 3 * 32 * 32)
      for record in records:
        labels = {key: int(label) for key, label in zip(keys, record)}
        image = np.ascontiguousarray(record[len(keys):].reshape(3, 32, 32).transpose(1, 2, 0))
        yield index, {**labels, "id": f"{split_prefix}{index:05d}",
                      "image": Image.fromarray(image)}
        index += 1


def read_idx(path: str) -> np.ndarray:
  """uint8[n, ...] in a gzipped IDX file: two zero bytes, type, rank, big-endian sizes, values."""
  data = gzip.decompress(Path(path).read_bytes())
  zero, kind, rank = int.from_bytes(data[:2]), data[2], data[3]
  if zero or kind != 8:
    raise ValueError(f"{path}: not an IDX file of bytes")
  shape = np.frombuffer(data, ">u4", rank, 4)
  return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


with tfds.core.registered.skip_registration():

  class Mnist(_Idx, mnist.MNIST):
    name = "mnist"
    url_infos = mnist.MNIST.url_infos

  class FashionMnist(_Idx, mnist.FashionMNIST):
    name = "fashion_mnist"
    url_infos = mnist.FashionMNIST.url_infos

  class Cifar10(_CifarBinary, cifar.Cifar10):
    name = "cifar10"
    url_infos = cifar.Cifar10.url_infos

  class Cifar100(_CifarBinary, cifar.Cifar100):
    name = "cifar100"
    url_infos = cifar.Cifar100.url_infos

  class TinyShakespeare(_FromFiles, tiny_shakespeare.Builder):
    name = "tiny_shakespeare"
    url_infos = tiny_shakespeare.Builder.url_infos

    def _split_generators(self, dl_manager):  # TFDS's own reads the file by TensorFlow
      parts = split_text((self._folder / "input.txt").read_text("utf-8"))
      return {split: self._generate_examples(split, part) for split, part in parts.items()}
