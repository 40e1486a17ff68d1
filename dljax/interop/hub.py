"""Weights from the Hugging Face Hub, by plain HTTPS: hub:OWNER/NAME.

Only .safetensors files are downloaded. They lie in the user's cache, under their commit, and a
file in the cache is verified and not downloaded again. What the Hub answers is not trusted: its
names lead nowhere but below that folder, and its sizes are kept to.
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dljax import downloads
from dljax.errors import MALFORMED, UserError, choose, one_line, writing

PREFIX = "hub:"
# One of several files, such as model-00001-of-00002.safetensors.
SHARD = re.compile(r"(?P<stem>.+)-\d{1,9}-of-(?P<count>(?!0*1\.)\d{1,9})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LONGEST_ANSWER = 2**24  # bytes


class _Entry(NamedTuple):
  """A file's size in bytes, and its SHA-256 in hexadecimal; the Hub gives it for large files."""

  size: int
  sha256: str | None


def download(name: str) -> list[Path]:
  """The files of a model's weights, from the cache or the network.

  Every file is compared with the Hub's size and checksum whenever it is used, also one that lies
  in the cache already.

  Args:
    name: "hub:OWNER/NAME", or "hub:OWNER/NAME/FILE.safetensors" if a repository holds several.

  Returns:
    One file, or all parts of a file that was split.

  Raises:
    UserError: there is no such repository or file, there are several files, there are only
      pickles, the answer has another form than the Hub's, a file is damaged, or there is no
      network.
    RunError: the cache cannot be written.
  """
  match = re.fullmatch(PREFIX + r"([^/]+/[^/]+)(?:/(.+))?", name)
  if not match or not all(map(_is_repository, match[1].split("/"))):
    raise UserError(f"{name!r}: write hub:OWNER/NAME, such as hub:timm/resnet50.a1_in1k")
  repository, file = match.groups()
  folder = _cache() / repository
  listing = _listing(name, repository, folder / "listing.json")
  paths = []
  for file in _choose(name, listing["files"], file):
    path = folder / listing["commit"] / file
    entry = _entry(name, listing["files"][file])
    if path.is_file():
      if problem := _damage(path, entry):
        raise UserError(f"{path}, the copy of {name} on this machine, is damaged: {problem}; "
                        "remove that file, and run again to download it")
    else:
      _fetch(name, repository, listing["commit"], file, path, entry)
    paths.append(path)
  return paths


def _fetch(name: str, repository: str, commit: str, file: str, path: Path, entry: _Entry) -> None:
  """Downloads one file into the cache and verifies it."""
  url = f"{_endpoint()}/{repository}/resolve/{commit}/{urllib.parse.quote(file)}"
  downloads.fetch(url, path, entry.size,
                  mend=f"download {file} elsewhere and give its path in place of {name}")
  if entry.sha256 is None:  # so that damage in the cache shows nevertheless
    with writing(_note(path)):
      _note(path).write_text(downloads.sha256(path), "utf-8")
  elif downloads.sha256(path) != entry.sha256:
    path.unlink()
    raise UserError(f"{name}: the download of {file} does not have the Hub's checksum and was "
                    "removed; try again")


def _damage(path: Path, entry: _Entry) -> str:
  """Says in which way a file of the cache differs from the Hub's; "" if it does not."""
  try:
    if (size := path.stat().st_size) != entry.size:
      return f"it has {size:,} bytes, and the Hub's file has {entry.size:,}"
    wanted = entry.sha256
    if wanted is None and _note(path).is_file():
      wanted = _note(path).read_text("utf-8")
    same = wanted is None or downloads.sha256(path) == wanted
    return "" if same else "its SHA-256 is not that of the Hub's file"
  except (OSError, ValueError) as e:
    return f"it cannot be read ({e})"


def _note(path: Path) -> Path:
  """The file with the SHA-256 that a download had, where the Hub gives none."""
  return path.with_name(path.name + ".sha256")


def _endpoint() -> str:
  """The Hub's address, or that of the mirror in HF_ENDPOINT, as Hugging Face's libraries read it.
  """
  return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _cache() -> Path:
  return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dljax" / "hub"


def _is_repository(part: str) -> bool:
  """Whether `part` may be the name of an owner or of a repository."""
  return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}", part) is not None


def _is_file(name: Any) -> bool:
  """Whether a name leads to a file below the folder that it is joined to, and nowhere else."""
  return isinstance(name, str) and len(name) <= 500 and name.isprintable() and all(
      part not in ("", ".", "..") and "\\" not in part and len(part.encode()) <= 200
      for part in name.split("/"))


def _listing(name: str, repository: str, cached: Path) -> dict[str, Any]:
  """{"commit": ..., "files": {name: {"size": bytes, "sha256": hex or None}}}.

  Without a network, it is the listing that was last seen.
  """
  try:
    answer = json.loads(downloads.get(f"{_endpoint()}/api/models/{repository}?blobs=true",
                                      _LONGEST_ANSWER))
    files = {entry["rfilename"]: {"size": entry.get("size"),
                                  "sha256": (entry.get("lfs") or {}).get("sha256")}
             for entry in answer["siblings"]
             if entry["rfilename"].endswith((".safetensors", *_PICKLES))}
    listing = _check_listing({"commit": answer["sha"], "files": files})
  except urllib.error.HTTPError as e:
    raise UserError(f"{name}: the Hub says {e.code} {e.reason}; check the name on "
                    "https://huggingface.co") from e
  except (OSError, http.client.HTTPException) as e:
    if cached.is_file():
      return _read_listing(name, cached)
    reason = getattr(e, "reason", e)
    raise UserError(f"{name}: no network ({reason}); download the .safetensors file elsewhere and "
                    "give its path") from e
  except MALFORMED as e:
    raise UserError(f"{name}: {_endpoint()} does not answer as the Hub does ({one_line(e)}); check "
                    "HF_ENDPOINT") from e
  with writing(cached):
    cached.parent.mkdir(parents=True, exist_ok=True)
    part = cached.with_name(f"{cached.name}.{os.getpid()}")
    part.write_text(json.dumps(listing), "utf-8")
    part.replace(cached)
  return listing


def _read_listing(name: str, cached: Path) -> dict[str, Any]:
  """The listing that was last seen."""
  try:
    return _check_listing(json.loads(cached.read_bytes()))
  except (OSError, *MALFORMED) as e:
    raise UserError(f"{cached}, the copy of {name}'s listing on this machine, is damaged "
                    f"({one_line(e)}); remove it, and run again with a network") from e


def _check_listing(listing: Any) -> dict[str, Any]:
  """The listing, if it has the form that `_listing` describes; `ValueError` otherwise.

  Its names become paths on this machine. Sizes and checksums are left to `_entry`, because only
  those of the files that are wanted matter.
  """
  commit, files = listing["commit"], listing["files"]
  if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{1,64}", commit):
    raise ValueError(f"the commit {commit!r:.80} is no hexadecimal number")
  for file, entry in files.items():
    if not _is_file(file):
      raise ValueError(f"the file name {file!r:.80} leads out of its repository")
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
      raise ValueError(f"the entry of {file} has other fields")
  return {"commit": commit, "files": files}


def _entry(name: str, entry: Mapping[str, Any]) -> _Entry:
  """The size and the checksum of a file that is wanted."""
  size, sha256 = entry["size"], entry["sha256"]
  mend = "check HF_ENDPOINT, or download the .safetensors file elsewhere and give its path"
  if type(size) is not int or not 0 < size < 2**63:
    raise UserError(f"{name}: {_endpoint()} gives {size!r:.80} as a file's size; {mend}")
  if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
    raise UserError(f"{name}: {_endpoint()} gives {sha256!r:.80} as a file's SHA-256; {mend}")
  return _Entry(size, sha256)


def _choose(name: str, files: Mapping[str, Any], file: str | None) -> list[str]:
  """The files of `files` that `name` means."""
  safe = {f: f for f in sorted(files) if f.endswith(".safetensors")}
  if file:
    found = choose(name.removesuffix(f"/{file}"), file, safe)
    if match := SHARD.fullmatch(found):
      raise UserError(f"{name} is one of {int(match['count'])} shards of the weights; name "
                      f"{name.removesuffix(f'/{file}')} if they are all in the main folder, or "
                      "download them elsewhere and give the path of their index")
    return [found]
  if "model.safetensors" in safe:
    return ["model.safetensors"]
  if parts := [f for f in safe if re.fullmatch(r"model-\d+-of-\d+\.safetensors", f)]:
    return parts
  if len(safe) == 1:
    return list(safe)
  if safe:
    raise UserError(f"{name} holds several; choose {' or '.join(f'{name}/{f}' for f in safe)}")
  pickles = [f for f in sorted(files) if f.endswith(_PICKLES)]
  if pickles:
    raise UserError(
        f"{name} holds no .safetensors file but {pickles[0]}, a pickle, which can run any code when opened; convert it "
        f"where PyTorch is installed: safetensors.torch.save_file(torch.load('{pickles[0]}', weights_only=True), "
        "'model.safetensors')")
  raise UserError(f"{name} holds no .safetensors file; choose another repository")
