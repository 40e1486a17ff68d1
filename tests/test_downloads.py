"""A download ends: after the bytes that were announced, and after a bounded time."""

import http.server
import threading
import time

import pytest

from dljax import downloads
from dljax.errors import RunError, UserError


class Server(http.server.BaseHTTPRequestHandler):
  """Answers with `body` in blocks, each after `pause` seconds; the first bytes may be the headers'."""

  body, pause, headers_too, announced, content_range = b"", 0, False, None, None

  def do_GET(self):
    self.send_response(206 if self.content_range else 200)
    if self.announced:
      self.send_header("Content-Length", str(self.announced))
    if self.content_range:
      self.send_header("Content-Range", self.content_range)
    if self.headers_too:
      for i in range(100):
        self.wfile.write(b"A" * i)
        self.wfile.flush()
        time.sleep(self.pause)
    self.end_headers()
    try:
      for i in range(0, len(self.body), 100):
        self.wfile.write(self.body[i:i + 100])
        time.sleep(self.pause)
    except OSError:
      pass  # the client has left

  def log_message(self, *args):
    pass


@pytest.fixture
def server():
  handler = type("Handler", (Server,), {})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True, args=(0.01,)).start()
    handler.url = f"http://127.0.0.1:{httpd.server_address[1]}/file"
    yield handler
    httpd.shutdown()


def _fetch(server, path, size=1000):
  downloads.fetch(server.url, path, size, mend="take another")


def _refused(server, path, words, size=1000):
  with pytest.raises(UserError, match=words) as error:
    _fetch(server, path, size)
  assert "\n" not in str(error.value) and str(error.value).endswith("take another")
  assert not path.exists()


def test_not_more_is_written_than_was_announced(server, tmp_path):
  server.body = bytes(10**6)
  _refused(server, tmp_path / "file", "the server sends more than the 1,000 bytes that it announced")
  assert not list(tmp_path.iterdir())


def test_a_part_that_is_too_large_is_not_taken(server, tmp_path):
  server.body, server.announced = b"right" * 200, 1000
  (tmp_path / "file.part").write_bytes(bytes(1001))
  _fetch(server, tmp_path / "file")
  assert (tmp_path / "file").read_bytes() == server.body and not (tmp_path / "file.part").exists()


def test_an_empty_file_is_a_file(server, tmp_path):
  _fetch(server, tmp_path / "file", 0)
  assert (tmp_path / "file").read_bytes() == b""


def test_another_part_than_was_asked_for_is_not_appended(server, tmp_path):
  server.body, server.content_range = bytes(500), "bytes 0-499/1000"
  (tmp_path / "file.part").write_bytes(b"x" * 500)
  _refused(server, tmp_path / "file", "the server sends another part of the file")
  assert (tmp_path / "file.part").read_bytes() == b"x" * 500


def test_a_server_that_sends_a_little_now_and_then_is_given_up(server, tmp_path, monkeypatch):
  monkeypatch.setattr(downloads, "WINDOW", 0.05)
  server.body, server.pause = bytes(2000), 0.03
  _refused(server, tmp_path / "file", "too slow .* bytes in 0.05 s.; run again to resume", 2000)
  assert 0 < (tmp_path / "file.part").stat().st_size < 2000  # where the next call goes on
  with pytest.raises(TimeoutError, match="longer than 0.05 s"):
    downloads.get(server.url, 2000)


def test_a_server_whose_headers_never_end_is_given_up(server, tmp_path, monkeypatch):
  monkeypatch.setattr(downloads, "OPENING", 0.02)
  server.pause, server.headers_too = 0.01, True
  _refused(server, tmp_path / "file", "no answer within 0.02 s")
  with pytest.raises(TimeoutError, match="no answer within 0.02 s"):
    downloads.get(server.url, 2000)


def test_a_short_answer_is_short(server):
  server.body = b"x" * 1000
  assert downloads.get(server.url, 1000) == server.body
  with pytest.raises(ValueError, match="longer than 999 bytes"):
    downloads.get(server.url, 999)
  with pytest.raises(ValueError, match="no address of the web"):
    downloads.get("file:///etc/hostname", 1000)


def test_what_does_not_fit_on_the_disk_is_not_begun(server, tmp_path):
  _refused(server, tmp_path / "new" / "file", "1,000,000,000,000,000,000 bytes are needed", 10**18)
  assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_no_fault_of_the_network(server, tmp_path):
  server.body = bytes(1000)
  (tmp_path / "in the way").write_text("")
  with pytest.raises(RunError, match="was not written"):
    _fetch(server, tmp_path / "in the way" / "file")
