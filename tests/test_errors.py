"""Unknown names are answered by the nearest ones, and errors by one line and an exit status."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dljax import errors
from dljax.errors import RunError, UserError

TABLE = {"resnet18": 1, "resnet50": 2, "vit_b16": 3}


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_work_goes_on_when_nobody_reads_the_output(monkeypatch, name):
  done = []

  def run():
    for _ in range(3):
      print("x" * 100_000, file=getattr(sys, name), flush=True)
    done.append(True)
    raise RunError("and it failed")

  read, write = os.pipe()
  os.close(read)
  with open(write, "w") as stream:
    monkeypatch.setattr(sys, name, stream)
    assert errors.exit_status(run, "") == errors.FAILED
    assert done and getattr(sys, name) is stream
    monkeypatch.undo()


def test_streams_that_were_closed_before_the_start_are_no_error(monkeypatch):
  monkeypatch.setattr(sys, "stdout", None)
  monkeypatch.setattr(sys, "stderr", None)

  def run():
    print("a")
    assert not sys.stderr.isatty()
    raise UserError("b")

  status = errors.exit_status(run, "")
  monkeypatch.undo()
  assert status == errors.BAD_INPUT


@pytest.mark.parametrize("path", [
    "gs://bucket/run", "s3://bucket", "gs:/bucket", "https://host/run", "file:///tmp/run"])
def test_an_address_is_no_local_path(path):
  with pytest.raises(errors.UserError, match="--workdir=.*only local paths"):
    errors.check_local("--workdir", path)


@pytest.mark.parametrize("path", ["", "run", "/tmp/run", "a:b/c", "runs/lr=0.1:b/x", "C:/run"])
def test_a_local_path_passes(path):
  errors.check_local("--workdir", path)


def test_a_known_name_is_looked_up():
  assert errors.choose("--x", "vit_b16", TABLE) == 3


@pytest.mark.parametrize("name, mend", [
    ("resnet5", "did you mean resnet50 or resnet18?"),
    ("vitb16", "did you mean vit_b16?"),
    ("zzz", "choose one of: resnet18, resnet50, vit_b16"),
    ("", "choose one of: resnet18, resnet50, vit_b16"),
])
def test_an_unknown_name_gets_the_nearest(name, mend):
  with pytest.raises(errors.UserError) as error:
    errors.choose("--x", name, TABLE)
  assert str(error.value) == f"--x: there is no {name!r}; {mend}"


def test_a_command_gives_signals_back_their_handlers():
  before = {number: signal.getsignal(number) for number in errors.STOPS}
  try:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for error in (None, UserError("a"), RunError("b"), KeyboardInterrupt()):
      def run(error=error):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as nohup wants it
        if error is not None:
          raise error
        return 0

      errors.exit_status(run, "stopped")
      assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
      assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def test_a_command_that_has_ended_ignores_signals_where_it_began_by_ending_at_them(monkeypatch):
  before = {number: signal.getsignal(number) for number in errors.STOPS}
  ended = []
  monkeypatch.setattr(errors, "end_process", lambda line, status: ended.append((line, status)))
  try:
    errors.stop_early()
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [("stopped before there was anything to save", errors.PREEMPTED)]
    assert errors.exit_status(lambda: 0, "") == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def test_a_process_ends_though_its_main_thread_comes_to_no_handler(monkeypatch):
  ended = threading.Event()
  monkeypatch.setattr(errors, "end_process", lambda line, status: ended.set())
  monkeypatch.setattr(errors, "_PATIENCE", 0)
  with errors.Stops(lambda: None, "stopped") as stops:
    number = bytes([signal.SIGTERM])
    os.write(stops._write, bytes([signal.SIGCHLD]))  # what Python writes for each signal
    stops.may_end = False
    os.write(stops._write, number)
    assert not ended.wait(0.05)
    stops.may_end = True
    os.write(stops._write, number)
    assert ended.wait(5)


@pytest.mark.parametrize("bar", [True, False])
def test_the_last_line_begins_below_a_progress_bar(monkeypatch, bar):
  from tqdm import tqdm

  written = []
  monkeypatch.setattr(errors.os, "write", lambda stream, data: written.append((stream, data)))
  monkeypatch.setattr(errors.os, "_exit", written.append)
  with tqdm(total=2, file=io.StringIO()) if bar else contextlib.nullcontext():
    errors.end_process("stopped", 75)
  assert written == [(2, b"\nstopped\n" if bar else b"stopped\n"), 75]


def test_a_process_ends_although_nobody_reads_its_last_line(monkeypatch):
  def refuse(stream, data):
    raise BrokenPipeError

  ended = []
  monkeypatch.setattr(errors.os, "write", refuse)
  monkeypatch.setattr(errors.os, "_exit", ended.append)
  errors.end_process("stopped", 75)
  assert ended == [75]


def test_no_file_takes_the_number_of_a_stream_that_was_closed(tmp_path):
  code = ("import sys; from dljax import errors; errors.stop_early(); file = open(sys.argv[1], 'w'); "
          "file.write(str(file.fileno()))")
  subprocess.run(["sh", "-c", '"$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, code, tmp_path / "number"],
                 cwd=Path(__file__).parents[1], check=True, timeout=60)
  assert int((tmp_path / "number").read_text()) > 2


def test_a_process_is_not_ended_while_it_writes(monkeypatch):
  ended = threading.Event()
  monkeypatch.setattr(errors, "end_process", lambda line, status: ended.set())
  monkeypatch.setattr(errors, "_PATIENCE", 0)
  with errors.Stops(lambda: None, "stopped"), errors.Stops(lambda: None, "stopped") as stops:
    with errors.writing("file"):
      with errors.writing("another"):
        pass
      os.write(stops._write, bytes([signal.SIGTERM]))
      assert not ended.wait(0.05)
    os.write(stops._write, bytes([signal.SIGTERM]))
    assert ended.wait(5)
  with errors.writing("file"):  # nothing handles signals now
    pass


def test_a_signal_that_the_main_thread_answers_ends_nothing(monkeypatch):
  ended, answers = [], []
  monkeypatch.setattr(errors, "end_process", lambda *_: ended.append(1))
  monkeypatch.setattr(errors, "_PATIENCE", 0.05)
  with errors.Stops(lambda: answers.append(1), "stopped") as stops:
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.1)
    stops.ignore = True
    os.kill(os.getpid(), signal.SIGINT)
  assert answers == [1] and not ended


def _handled(pid):
  """The mask of the signals for which a process has a handler."""
  lines = Path(f"/proc/{pid}/status").read_text().splitlines()
  return int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("module, number", [
    ("experiments.mlp", signal.SIGTERM), ("experiments.mlp", signal.SIGINT),
    ("dljax.interop", signal.SIGHUP), ("dljax.data.prepare", signal.SIGTERM),
])
def test_from_its_first_line_a_program_ends_in_one_line(module, number):
  process = subprocess.Popen([sys.executable, "-m", module, "--help"], cwd=Path(__file__).parents[1],
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  # Its first handlers are Python's own, for SIGINT; dljax's for SIGTERM follows while it imports.
  while not _handled(process.pid) >> (signal.SIGTERM - 1) & 1:
    time.sleep(0.001)
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (errors.PREEMPTED, "stopped before there was anything to save\n")


def test_a_foreign_program_keeps_its_signals(tmp_path):
  (tmp_path / "lab").mkdir()
  (tmp_path / "lab" / "__init__.py").write_text("import dljax\n")
  (tmp_path / "lab" / "show.py").write_text("import signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)")
  environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
  done = subprocess.run([sys.executable, "-m", "lab.show"], env=environment, capture_output=True, text=True, check=True)
  assert done.stdout == "True\n"


def _raise(error):
  raise error


@pytest.mark.parametrize("run, status, line", [
    (lambda: 0, errors.DONE, ""),
    (lambda: 1, errors.FAILED, ""),
    (lambda: _raise(errors.UserError("--x=3: must be 2")), errors.BAD_INPUT, "error: --x=3: must be 2\n"),
    (lambda: _raise(errors.RunError("disk full")), errors.FAILED, "error: disk full\n"),
    (lambda: _raise(errors.Preempted("stopped after step 3")), errors.PREEMPTED, "stopped after step 3\n"),
    (lambda: _raise(KeyboardInterrupt), errors.PREEMPTED, "nothing is saved\n"),
    *((lambda number=number: os.kill(os.getpid(), number) or 0, errors.PREEMPTED, "nothing is saved\n")
      for number in errors.STOPS),
])
def test_every_end_has_its_status_and_at_most_one_line(capsys, run, status, line):
  before = signal.getsignal(signal.SIGTERM)
  assert errors.exit_status(run, "nothing is saved") == status
  assert tuple(capsys.readouterr()) == ("", line)
  assert signal.getsignal(signal.SIGTERM) == before
  with pytest.raises(SystemExit) as end:
    errors.exit_with(run, "nothing is saved")
  assert end.value.code == status
  with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
    errors.exit_status(lambda: 1 // 0, "")
