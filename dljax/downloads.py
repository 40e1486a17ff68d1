"""Downloads that resume where they stopped, and whose size and time have bounds."""

import hashlib
import http.client
import queue
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dljax.errors import UserError, writing

TIMEOUT = 10  # seconds without an answer
ATTEMPTS = 5  # how many in a row may bring nothing new
BLOCK = 2**16  # bytes
OPENING = 20  # seconds until the headers of an answer are complete
WINDOW = 30  # seconds in which at least LEAST bytes have to come
LEAST = 30_000  # bytes


def fetch(url: str, path: Path, size: int, *, mend: str) -> None:
  """Downloads a file, from where an earlier attempt stopped.

  Args:
    url: the address, http or https.
    path: the file to write. It appears once all `size` bytes are there; until then they lie in
      `path`.part.
    size: the file's size in bytes. Not more is written, whatever the server sends.
    mend: what the user can do if the download fails, in the imperative.

  Raises:
    UserError: there is no connection, it is too slow or broke off too often, the file does not fit
      on the disk, or the server sends more than `size` bytes. Except in the last case the part
      stays for the next call.
    RunError: the file cannot be written.
  """
  from rich import progress

  part = path.with_name(path.name + ".part")
  columns = (progress.TextColumn("{task.description}"), progress.BarColumn(),
             progress.DownloadColumn(), progress.TransferSpeedColumn(),
             progress.TimeRemainingColumn())
  with progress.Progress(*columns) as bar:
    task = bar.add_task(path.name, total=size, visible=False)
    pace = _Pace(url, mend)

    def report(done: int, came: int) -> None:
      if done < size:
        pace.check(came)
      bar.update(task, completed=done, visible=True)

    idle = 0
    # A part that is larger than the file is none of its parts.
    while (done := part.stat().st_size if part.exists() else 0) != size or not part.exists():
      if done > size:
        part.unlink()
        continue
      if (free := _free(part.parent)) < size - done:
        raise UserError(f"{url}: {size - done:,} bytes are needed in {part.parent}, where "
                        f"{free:,} are free; make room, or {mend}")
      try:
        _continue(url, part, done, size, report)
        reason = "the connection broke off"
      except _TooMuchError as e:
        part.unlink()
        raise UserError(f"{url}: the server sends more than the {size:,} bytes that it "
                        f"announced; {mend}") from e
      except urllib.error.HTTPError as e:
        raise UserError(f"{url}: the server says {e.code} {e.reason}; {mend}") from e
      except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
        if isinstance(reason, socket.gaierror):
          idle = ATTEMPTS  # the host is not found, so this machine is offline
      idle = 0 if part.exists() and part.stat().st_size > done else idle + 1
      if idle >= ATTEMPTS:
        raise UserError(f"{url}: no network ({reason}); run again to resume, or {mend}")
      if idle:
        pace.check(0)
  with writing(path):
    part.rename(path)


def _free(folder: Path) -> int:
  """The free bytes where `folder` lies, or will lie."""
  while not folder.exists():
    folder = folder.parent
  return shutil.disk_usage(folder).free


class _TooMuchError(Exception):
  """The server sends more than was announced."""


class _Pace:
  """Ends a download that would not end in any useful time."""

  def __init__(self, url: str, mend: str):
    self._url, self._mend = url, mend
    self._begin, self._came = time.monotonic(), 0

  def check(self, came: int) -> None:
    """Counts bytes that came; raises `UserError` if there were too few since the window began."""
    self._came += came
    if time.monotonic() - self._begin > WINDOW:
      if self._came < LEAST:
        raise UserError(f"{self._url}: the network is too slow ({self._came:,} bytes in {WINDOW} "
                        f"s); run again to resume, or {self._mend}")
      self._begin, self._came = time.monotonic(), 0


def _continue(
    url: str, part: Path, done: int, size: int, report: Callable[[int, int], None],
) -> None:
  request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
  with _open(request) as response:
    if response.status != http.client.PARTIAL_CONTENT:
      done = 0  # the server sends everything again
    elif not re.match(rf"bytes {done}-|$", response.headers.get("Content-Range", "")):
      raise http.client.HTTPException("the server sends another part of the file")
    with writing(part):
      part.parent.mkdir(parents=True, exist_ok=True)
      out = open(part, "ab" if done else "wb", buffering=0)
    with out:
      while block := response.read1(BLOCK):
        if done + len(block) > size:
          raise _TooMuchError
        rest = memoryview(block)
        with writing(part):
          while rest:
            rest = rest[out.write(rest):]
        done += len(block)
        report(done, len(block))


def get(url: str, limit: int) -> bytes:
  """The body of a short answer.

  Args:
    url: the address, http or https.
    limit: the most bytes that the body may have.

  Raises:
    OSError: there is no connection, the server reports an error (`urllib.error.HTTPError`), or the
      answer takes longer than `WINDOW` seconds.
    http.client.HTTPException: the answer is not HTTP, or breaks off.
    ValueError: `url` is no address, or the body is longer than `limit`.
  """
  begin, parts, size = time.monotonic(), [], 0
  with _open(urllib.request.Request(url)) as response:
    announced = response.length  # None where the server does not say it
    while block := response.read1(BLOCK):
      parts.append(block)
      size += len(block)
      if size > limit:
        raise ValueError(f"the answer is longer than {limit:,} bytes")
      if time.monotonic() - begin > WINDOW:
        raise TimeoutError(f"the answer took longer than {WINDOW} s")
  if announced is not None and size < announced:
    raise http.client.HTTPException("the connection broke off")
  return b"".join(parts)


def _open(request: urllib.request.Request) -> Any:
  """The answer to a request, once its headers are complete.

  A socket's timeout bounds the time of a single read alone: a server that sends a byte now and
  then is never late. The wait is in another thread, therefore, and is given up after `OPENING`
  seconds.
  """
  if request.type not in ("http", "https"):
    raise ValueError(f"{request.full_url} is no address of the web")
  answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

  def ask() -> None:
    try:
      answers.put(urllib.request.urlopen(request, timeout=TIMEOUT))
    except Exception as e:  # for the thread that waits
      answers.put(e)

  threading.Thread(target=ask, daemon=True).start()
  try:
    answer = answers.get(timeout=OPENING)
  except queue.Empty:
    raise TimeoutError(f"no answer within {OPENING} s") from None
  if isinstance(answer, Exception):
    raise answer
  return answer


def sha256(path: Path) -> str:
  """Returns the SHA-256 of a file's content, in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
