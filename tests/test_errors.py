"""Unknown names are answered by the nearest ones, and errors by one line and an exit status."""

import os
import signal
import sys

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


def test_a_command_gives_sigterm_back_its_handler():
  before = signal.getsignal(signal.SIGTERM)
  try:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for error in (None, UserError("a"), RunError("b"), KeyboardInterrupt()):
      def run(error=error):
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        if error is not None:
          raise error
        return 0

      errors.exit_status(run, "stopped")
      assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGTERM, before)


def _raise(error):
  raise error


@pytest.mark.parametrize("run, status, line", [
    (lambda: 0, errors.DONE, ""),
    (lambda: 1, errors.FAILED, ""),
    (lambda: _raise(errors.UserError("--x=3: must be 2")), errors.BAD_INPUT, "error: --x=3: must be 2\n"),
    (lambda: _raise(errors.RunError("disk full")), errors.FAILED, "error: disk full\n"),
    (lambda: _raise(errors.Preempted("stopped after step 3")), errors.PREEMPTED, "stopped after step 3\n"),
    (lambda: _raise(KeyboardInterrupt), errors.PREEMPTED, "nothing is saved\n"),
    (lambda: os.kill(os.getpid(), signal.SIGTERM) or 0, errors.PREEMPTED, "nothing is saved\n"),
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
