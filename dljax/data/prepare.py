"""Downloads a TFDS set and prepares it for reading without TensorFlow.

    python -m dljax.data.prepare mnist
    python -m dljax.data.prepare cifar10 --data_dir=/data/tfds --manual_dir=~/Downloads

mnist, fashion_mnist, cifar10, cifar100, tiny_shakespeare and etth1 (a time series) need nothing
else. Nor do the sets of our own that are made of files in Debian 12, installed or downloaded:
emoji and emoji_scenes from a font, telephone_prompts from recorded announcements, and wordnet from
a dictionary. An interrupted download continues where it stopped, and files are checked against
TFDS's checksums.

Other sets are prepared by TFDS itself, which needs TensorFlow for most of them
(`pip install 'dljax[tf]'`).
"""

import argparse
import functools
import socket
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dljax import downloads
from dljax.data import sources
from dljax.data.datasets import DOWNLOADED, EMBEDDED
from dljax.errors import DONE, UserError, exit_status, one_line, unknown

# The Debian packages that hold a set's files.
DEBIAN = {
    "emoji": "fonts-noto-color-emoji unicode-data",
    "emoji_scenes": "fonts-noto-color-emoji unicode-data",
    "telephone_prompts": "asterisk-core-sounds-en-wav asterisk-core-sounds-en",
    "wordnet": "wordnet-base",
}


def prepare(name: str, data_dir: Path, manual_dir: Path | None = None) -> Path:
  """Makes sure that a set is prepared under `data_dir`.

  Args:
    name: a TFDS name, possibly with config and version.
    data_dir: the folder of prepared sets.
    manual_dir: a folder that holds the set's files; if it is given, nothing is downloaded.

  Returns:
    The set's directory.

  Raises:
    UserError: the set is unknown, there is no network, a file is missing or is not the right one,
      or `data_dir` cannot be written.
  """
  try:
    base, config, version = sources.parse_name(name)
  except UserError:
    raise _unknown(name) from None
  if path := sources.find(name, data_dir):
    return path
  if manual_dir is not None and not manual_dir.is_dir():
    raise UserError(f"--manual_dir: {manual_dir} is not a folder")
  if not sources.writable(data_dir):
    raise UserError(f"--data_dir: cannot write to {data_dir}; choose another directory")
  if base in EMBEDDED:
    return sources.prepare_embedded(name, data_dir)
  if base in DOWNLOADED:
    builder = DOWNLOADED[base]()
    if config or version not in ("", str(builder.VERSION)):
      raise UserError(f"{name}: {base} has no configs, and its version is {builder.VERSION}")
    # emoji_scenes is made of the files of emoji.
    folder = manual_dir or data_dir / "downloads" / base.removesuffix("_scenes")
    if base in DEBIAN and manual_dir is None and builder.installed():
      folder = None
    else:
      try:
        collect(builder.url_infos, folder, download=manual_dir is None)
      except UserError as e:
        if base not in DEBIAN:
          raise
        raise UserError(f"{e}; on Debian 12 `apt-get install {DEBIAN[base]}` provides them "
                        "too") from e
    sources.build(functools.partial(builder, folder=folder), data_dir)
  else:
    _prepare_by_tfds(name, data_dir, manual_dir)
  return sources.find(name, data_dir)


def collect(files: Mapping[str, Any], folder: Path, *, download: bool) -> None:
  """Makes sure that `folder` holds the right files.

  Args:
    files: URL -> TFDS's `UrlInfo` (size and SHA-256) of each file.
    folder: the folder of the files, where each has the last part of its URL as its name.
    download: whether to download the missing files.

  Raises:
    UserError: a file is missing or has the wrong checksum, or there is no network.
  """
  paths = {url: folder / url.rpartition("/")[2] for url in files}
  missing = {url: path for url, path in paths.items() if not path.is_file()}
  if missing and not download:
    names = ", ".join(path.name for path in missing.values())
    origins = " and ".join(dict.fromkeys(url.rpartition("/")[0] + "/" for url in missing))
    raise UserError(f"--manual_dir: {folder} lacks {names}; get it from {origins}")
  for url, path in missing.items():
    fetch(url, path, int(files[url].size))
  for url, path in paths.items():
    if downloads.sha256(path) != files[url].checksum:
      if download:
        path.unlink()
        raise UserError(f"{url}: the download does not have TFDS's checksum and was removed; try "
                        "again, or put the right file in a folder and name it by --manual_dir")
      raise UserError(f"--manual_dir: {path} does not have TFDS's checksum; get it again from "
                      f"{url}")


fetch = functools.partial(downloads.fetch,
                          mend="put the file in a folder and name it by --manual_dir")


def _unknown(name: str) -> UserError:
  import tensorflow_datasets as tfds

  stock = tfds.list_builders(with_community_datasets=False)
  return unknown("data set", name, sorted({*stock, *EMBEDDED, *DOWNLOADED}))


def _prepare_by_tfds(name: str, data_dir: Path, manual_dir: Path | None) -> None:
  import tensorflow_datasets as tfds

  base = sources.parse_name(name)[0]
  if base not in tfds.list_builders(with_community_datasets=False):
    raise _unknown(base)
  try:
    builder = tfds.builder(name, data_dir=str(data_dir))
    if how := builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
      if manual_dir is None:
        raise UserError(f"{name}: get the files by hand and name their folder by --manual_dir; "
                        f"TFDS says: {' '.join(how.split())}")
    elif builder.url_infos:
      _require_network(next(iter(builder.url_infos)))
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir and str(manual_dir)))
  except UserError:
    raise
  except ImportError as e:
    raise UserError(f"{name}: TFDS prepares it with a package that is not installed "
                    f"({e.name or e}); run `pip install 'dljax[tf]'` and try again") from e
  except Exception as e:  # TFDS has hundreds of builders, which raise all kinds of errors
    raise UserError(f"{name}: TFDS could not prepare it: {type(e).__name__}: "
                    f"{one_line(e, 300)}") from e


def _require_network(url: str) -> None:
  parts = urllib.parse.urlsplit(url)
  try:  # TFDS itself would try for minutes
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), downloads.TIMEOUT).close()
  except OSError as e:
    raise UserError(f"{url}: no network ({e}); run again when there is one") from e


class _Parser(argparse.ArgumentParser):
  """Raises a `UserError` on bad input, instead of printing the usage and exiting."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Returns:
    The exit status: 0 done, 2 bad input, 75 stopped by Ctrl-C or SIGTERM.
  """
  return exit_status(lambda: _run(argv), "stopped; the same command continues")


def _run(argv: Sequence[str] | None) -> int:
  parser = _Parser(
      prog="python -m dljax.data.prepare", description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("name",
                      help="a TFDS name, possibly with config: mnist, imagenet2012, glue/sst2")
  parser.add_argument(
      "--data_dir", type=lambda p: Path(p).expanduser(), default=sources.data_dir(),
      help="the folder of prepared sets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)")
  parser.add_argument("--manual_dir", type=lambda p: Path(p).expanduser(),
                      help="a folder that holds the set's files; nothing is downloaded then")
  try:
    args, rest = parser.parse_known_args(argv)
    if rest and rest[0].startswith("-"):
      raise unknown("the command line", rest[0].partition("=")[0],
                    ["--data_dir", "--manual_dir", "--help"])
    if rest:
      raise UserError(f"{rest[0]!r} is one name too many; give one, and see --help")
    print(f"{args.name} is prepared in {prepare(args.name, args.data_dir, args.manual_dir)}")
  except UserError as e:
    # This command has no such flag.
    raise UserError(str(e).removeprefix("--config.data.name: ")) from e
  return DONE


if __name__ == "__main__":
  sys.exit(main())
