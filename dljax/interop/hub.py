"""Weights from the Hugging Face Hub, by plain HTTPS: hub:OWNER/NAME.

Only .safetensors files are downloaded. They lie in the user's cache, under their commit, and a
file in the cache is not downloaded again.
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dljax import downloads
from dljax.errors import UserError, choose, writing

PREFIX = "hub:"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def download(name: str) -> list[Path]:
  """The files of a model's weights, from the cache or the network.

  Args:
    name: "hub:OWNER/NAME", or "hub:OWNER/NAME/FILE.safetensors" if a repository holds several.

  Returns:
    One file, or all parts of a file that was split.

  Raises:
    UserError: there is no such repository or file, there are several files, there are only
      pickles, or there is no network.
  """
  match = re.fullmatch(PREFIX + r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", name)
  if not match:
    raise UserError(f"{name}: write hub:OWNER/NAME, such as hub:timm/resnet50.a1_in1k")
  repository, file = match.groups()
  folder = _cache() / repository
  listing = _listing(name, repository, folder / "listing.json")
  paths = []
  for file in _choose(name, listing["files"], file):
    path = folder / listing["commit"] / file
    entry = listing["files"][file]
    if not path.is_file():
      mend = f"download {file} elsewhere and give its path in place of {name}"
      downloads.fetch(f"{_endpoint()}/{repository}/resolve/{listing['commit']}/{file}", path,
                      entry["size"], mend=mend)
      if entry["sha256"] and downloads.sha256(path) != entry["sha256"]:
        path.unlink()
        raise UserError(f"{name}: the download of {file} does not have the Hub's checksum and was removed; try again")
    paths.append(path)
  return paths


def _endpoint() -> str:
  """The Hub's address, or that of the mirror in HF_ENDPOINT, as Hugging Face's libraries read it.
  """
  return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _cache() -> Path:
  return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dljax" / "hub"


def _listing(name: str, repository: str, cached: Path) -> dict[str, Any]:
  """{"commit": ..., "files": {name: {"size": bytes, "sha256": hex or None}}}.

  Without a network, it is the listing that was last seen.
  """
  try:
    with urllib.request.urlopen(f"{_endpoint()}/api/models/{repository}?blobs=true",
                                timeout=downloads.TIMEOUT) as response:
      answer = json.load(response)
    files = {entry["rfilename"]: {"size": entry["size"],
                                  "sha256": (entry.get("lfs") or {}).get("sha256")}
             for entry in answer["siblings"]}
    listing = {"commit": answer["sha"], "files": files}
  except urllib.error.HTTPError as e:
    raise UserError(f"{name}: the Hub says {e.code} {e.reason}; check the name on https://huggingface.co") from e
  except (OSError, http.client.HTTPException) as e:
    if cached.is_file():
      return json.loads(cached.read_text())
    reason = getattr(e, "reason", e)
    raise UserError(f"{name}: no network ({reason}); download the .safetensors file elsewhere and give its path") from e
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f"{name}: {_endpoint()} does not answer as the Hub does; check HF_ENDPOINT") from e
  with writing(cached):
    cached.parent.mkdir(parents=True, exist_ok=True)
    part = cached.with_name(f"{cached.name}.{os.getpid()}")
    part.write_text(json.dumps(listing))
    part.replace(cached)
  return listing


def _choose(name: str, files: Mapping[str, Any], file: str | None) -> list[str]:
  safe = {f: f for f in sorted(files) if f.endswith(".safetensors")}
  if file:
    return [choose(name.removesuffix(f"/{file}"), file, safe)]
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
