"""What a run writes down holds no password and no token."""

import json
import sys

import pytest

from dljax import optim
from dljax.config import base_config, flatten
from dljax.errors import UserError
from dljax.train import redact
from dljax.train.workdir import Workdir
from tests.families import EXPERIMENTS, FAMILIES

HUB, GITHUB = "hf_" + "a1B2" * 8, "ghp_" + "Z9y8" * 9
WANDB = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize("argument, shown", [
    ("--config.init.source=https://user:pa55@host/w.safetensors", "--config.init.source=https://***@host/w.safetensors"),
    (f"https://{GITHUB}@github.com/x", "https://***@github.com/x"),
    (f"--config.init.source=https://host/{HUB}/w", "--config.init.source=https://host/***/w"),
    (f"--config.data.name={GITHUB}", "--config.data.name=***"),
    ("https://host/w?token=abc&x=1", "https://host/w?token=***&x=1"),
    ("https://host/w?X-Amz-Sig=abc&x=1", "https://host/w?X-Amz-Sig=***&x=1"),
    (f"--wandb-api-key={WANDB}", "--wandb-api-key=***"), (f"WANDB_API_KEY={WANDB}", "WANDB_API_KEY=***"),
    ("--hf_token=x", "--hf_token=***"), ("--password=x y", "--password=*** y"),
    # And what only looks like one.
    ("--config.data.tokenizer=byte", None), ("--config.sampling.max_new_tokens=20", None),
    ("--config.data.tokenizer_file=my.model", None), ("--workdir=runs/a@b", None), ("--config.author=me", None),
    ("--config.model.class_tokens=2", None), ("/home/me/sk-1/x", None), ("https://host/a@b", None),
])
def test_secrets_are_hidden_and_the_rest_stays(argument, shown):
  assert redact.hide(argument) == (argument if shown is None else shown)


def test_the_argument_after_a_flag_is_its_value():
  command = ["my.py", "--hf-token", "abc", "--lr", "0.1", "--tokenizer", "byte", "-password", "x", "--api_key"]
  assert redact.hide_in_command(command) == [
      "my.py", "--hf-token", "***", "--lr", "0.1", "--tokenizer", "byte", "-password", "***", "--api_key"]


def test_config_json_keeps_no_secret_of_the_command_line(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["train.py", "--hf-token", "s3cret", f"--key={HUB}", "https://me:pa55@host/x"])
  folder = Workdir(tmp_path)
  folder.start(base_config("toy", "toy", optimizer=optim.default_config("sgd")), {}, "x")
  for path in tmp_path.rglob("*"):
    assert not [secret for secret in ("s3cret", HUB, "pa55") if path.is_file() and secret in path.read_text()]
  assert json.loads(folder.config_file.read_text())["command"] == [
      "train.py", "--hf-token", "***", "--key=***", "https://***@host/x"]


@pytest.mark.parametrize("value", [f"hub:{HUB}/net", "https://user:pa55@host/w.safetensors"])
def test_a_config_that_holds_a_secret_is_refused_before_anything(tmp_path, value):
  config = base_config("toy", "toy", optimizer=optim.default_config("sgd"), init={"source": value})
  with pytest.raises(UserError, match=r"--config.init.source=.*\*\*\*.* holds a password or a token") as error:
    Workdir(tmp_path / "run").check(config, "auto")
  assert "pa55" not in str(error.value) and HUB not in str(error.value) and "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_presets_command_is_hidden(family):
  module = EXPERIMENTS[family]
  for preset in module.PRESETS:
    for name, value in flatten(module.get_config(preset)).items():
      line = f"--config.{name}={value}"
      assert redact.hide(line) == line
