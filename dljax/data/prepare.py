"""Downloads a TFDS set and prepares it for reading without TensorFlow.

    python -m dljax.data.prepare mnist
    python -m dljax.data.prepare cifar10 --data_dir=/data/tfds --manual_dir=~/Downloads

mnist, fashion_mnist, cifar10, cifar100 and tiny_shakespeare need nothing else: an interrupted download goes on where it
stopped, and files are held against TFDS's checksums. So do etth1, a time series, and sets of ours whose files Debian 12
has, installed or downloaded: emoji and emoji_scenes, of a font and its names, and telephone_prompts, of announcements
and their text. Other sets are prepared by TFDS itself, which for most of them needs TensorFlow
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
from dljax.errors import DONE, UserError, exit_status, unknown

# The packages of Debian that hold a set's files.
DEBIAN = {
    "emoji": "fonts-noto-color-emoji unicode-data",
    "emoji_scenes": "fonts-noto-color-emoji unicode-data",
    "telephone_prompts": "asterisk-core-sounds-en-wav asterisk-core-sounds-en",
}


def prepare(name: str, data_dir: Path, manual_dir: Path | None = None) -> Path:
  """Makes sure that a set is prepared under `data_dir`.

  Args:
    name: a TFDS name, possibly with config.
    data_dir: where prepared sets live.
    manual_dir: a folder that holds the files already; nothing is downloaded then.

  Returns:
    The set's directory.

  Raises:
    UserError: unknown set, no network, files missing or other than they should be, no place to write.
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
    folder = manual_dir or data_dir / "downloads" / base.removesuffix("_scenes")  # of the same files
    if base in DEBIAN and manual_dir is None and builder.installed():
      folder = None
    else:
      try:
        collect(builder.url_infos, folder, download=manual_dir is None)
      except UserError as e:
        if base not in DEBIAN:
          raise
        raise UserError(f"{e}; on Debian 12 `apt-get install {DEBIAN[base]}` will do, too") from e
    sources.build(functools.partial(builder, folder=folder), data_dir)
  else:
    _prepare_by_tfds(name, data_dir, manual_dir)
  return sources.find(name, data_dir)


def collect(files: Mapping[str, Any], folder: Path, *, download: bool) -> None:
  """Sees to it that `folder` holds the right files.

  Args:
    files: URL -> TFDS's `UrlInfo` (size and SHA-256).
    folder: where the files are or go, by the last part of their URLs.
    download: fetch what is missing.

  Raises:
    UserError: a file is missing or has the wrong checksum; no network.
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
        raise UserError(f"{url}: the download does not have TFDS's checksum and was removed; try again, or "
                        "put the right file in a folder and name it by --manual_dir")
      raise UserError(f"--manual_dir: {path} does not have TFDS's checksum; get it again from {url}")


fetch = functools.partial(downloads.fetch, mend="put the file in a folder and name it by --manual_dir")


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
    raise UserError(f"{name}: TFDS prepares it with a package that is not installed ({e.name or e}); "
                    "run `pip install 'dljax[tf]'` and try again") from e
  except Exception as e:  # hundreds of builders, which raise what they like
    reason = " ".join(str(e).split())[:300]
    raise UserError(f"{name}: TFDS could not prepare it: {type(e).__name__}: {reason}") from e


def _require_network(url: str) -> None:
  parts = urllib.parse.urlsplit(url)
  try:  # TFDS itself would try for minutes
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), downloads.TIMEOUT).close()
  except OSError as e:
    raise UserError(f"{url}: no network ({e}); run again when there is one") from e


class _Parser(argparse.ArgumentParser):
  """Bad input is a `UserError`, in place of the usage and an exit."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit status: 0 done, 2 bad input, 75 stopped by Ctrl-C or SIGTERM."""
  return exit_status(lambda: _run(argv), "stopped; the same command continues")


def _run(argv: Sequence[str] | None) -> int:
  parser = _Parser(
      prog="python -m dljax.data.prepare", description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("name", help="TFDS name, possibly with config: mnist, imagenet2012, glue/sst2")
  parser.add_argument("--data_dir", type=lambda p: Path(p).expanduser(), default=sources.data_dir(),
                      help="where prepared sets live (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)")
  parser.add_argument("--manual_dir", type=lambda p: Path(p).expanduser(),
                      help="a folder that holds the files already; nothing is downloaded")
  try:
    args, rest = parser.parse_known_args(argv)
    if rest and rest[0].startswith("-"):
      raise unknown("the command line", rest[0].partition("=")[0], ["--data_dir", "--manual_dir", "--help"])
    if rest:
      raise UserError(f"{rest[0]!r} is one name too many; give one, and see --help")
    print(f"{args.name} is prepared in {prepare(args.name, args.data_dir, args.manual_dir)}")
  except UserError as e:
    raise UserError(str(e).removeprefix("--config.data.name: ")) from e  # here it is no flag
  return DONE


if __name__ == "__main__":
  sys.exit(main())
