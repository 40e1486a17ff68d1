"""Downloads that resume where they stopped."""

import hashlib
import http.client
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from dljax.errors import UserError

TIMEOUT = 10  # seconds without an answer
ATTEMPTS = 5  # how many in a row may bring nothing new
BLOCK = 2**16  # bytes


def fetch(url: str, path: Path, size: int, *, mend: str) -> None:
  """Downloads a file, from where an earlier attempt stopped.

  Args:
    url: the address, http or https.
    path: the file to write. It appears once all `size` bytes are there; until then they lie in
      `path`.part.
    size: the file's size in bytes.
    mend: what the user can do if the download fails, in the imperative.

  Raises:
    UserError: there is no connection, or it broke off too often. The part stays for the next call.
  """
  from rich import progress

  part = path.with_name(path.name + ".part")
  columns = (progress.TextColumn("{task.description}"), progress.BarColumn(),
             progress.DownloadColumn(), progress.TransferSpeedColumn(),
             progress.TimeRemainingColumn())
  with progress.Progress(*columns) as bar:
    task = bar.add_task(path.name, total=size, visible=False)
    idle = 0
    while (done := part.stat().st_size if part.exists() else 0) < size:
      try:
        _continue(url, part, done, lambda n: bar.update(task, completed=n, visible=True))
        reason = "the connection broke off"
      except urllib.error.HTTPError as e:
        raise UserError(f"{url}: the server says {e.code} {e.reason}; {mend}") from e
      except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
        if isinstance(reason, socket.gaierror):
          idle = ATTEMPTS  # the host is not found, so this machine is offline
      idle = 0 if part.exists() and part.stat().st_size > done else idle + 1
      if idle >= ATTEMPTS:
        raise UserError(f"{url}: no network ({reason}); run again to resume, or {mend}")
  part.rename(path)


def _continue(url: str, part: Path, done: int, report: Callable[[int], None]) -> None:
  request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
  with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
    if response.status != http.client.PARTIAL_CONTENT:
      done = 0  # the server sends everything again
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab" if done else "wb") as out:
      while block := response.read(BLOCK):
        out.write(block)
        done += len(block)
        report(done)


def sha256(path: Path) -> str:
  """Returns the SHA-256 of a file's content, in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
