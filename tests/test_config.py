"""Overrides from the command line: typed, named exactly, refused in one line."""

import json

import ml_collections
import pytest

from dljax import config as config_lib
from dljax.errors import UserError


def _config() -> ml_collections.ConfigDict:
  return config_lib.base_config(
      "toy", "small",
      optimizer=ml_collections.ConfigDict(
          {"name": "adam", "learning_rate": 0.1, "freeze": (), "bounds": (0.5, 0.75)}),
      model=ml_collections.ConfigDict({"widths": (8, 4), "remat": False, "block": {"depth": 2}}))


@pytest.mark.parametrize("argument, path, value", [
    ("--config.total_steps=7", "total_steps", 7),
    ("--config.optimizer.learning_rate=3", "optimizer.learning_rate", 3.0),
    ("--config.optimizer.learning_rate=1e-3", "optimizer.learning_rate", 0.001),
    ("--config.optimizer.name=sgd", "optimizer.name", "sgd"),
    ("--config.optimizer.name=", "optimizer.name", ""),
    ("--config.monitor=validation/loss=x", "monitor", "validation/loss=x"),
    ("--config.model.remat=true", "model.remat", True),
    ("--config.model.remat=0", "model.remat", False),
    ("--config.model.remat=True", "model.remat", True),
    ("--config.model.widths=16", "model.widths", (16,)),
    ("--config.model.widths=(16, 32,64)", "model.widths", (16, 32, 64)),
    ("--config.model.widths=", "model.widths", ()),
    ("--config.model.block.depth=3", "model.block.depth", 3),
    ("--config.optimizer.bounds=0.25,1", "optimizer.bounds", (0.25, 1.0)),
    ("--config.optimizer.freeze=stem/*,*/bias", "optimizer.freeze", ("stem/*", "*/bias")),
])
def test_an_override_takes_the_type_of_what_it_replaces(argument, path, value):
  config = _config()
  before = config_lib.flatten(config)
  config_lib.apply_overrides(config, [argument])
  after = config_lib.flatten(config)
  assert after.pop(path) == value and type(config_lib.flatten(config)[path]) is type(value)
  before.pop(path)
  assert after == before, "another field changed"


def test_a_later_override_wins():
  config = _config()
  config_lib.apply_overrides(config, ["--config.total_steps=7", "--config.total_steps=8"])
  assert config.total_steps == 8


@pytest.mark.parametrize("name, text, value", [
    ("model.widths", "16", (16,)), ("optimizer.bounds", "1", (1.0,)), ("optimizer.freeze", "1", ("1",))])
def test_an_emptied_tuple_remembers_what_it_held(name, text, value):
  config = _config()
  config_lib.apply_overrides(config, [f"--config.{name}=", f"--config.{name}={text}"])
  found = config_lib.flatten(config)[name]
  assert found == value and type(found[0]) is type(value[0])

  stored = _config()  # of a run that emptied it
  config_lib.apply_overrides(stored, [f"--config.{name}="])
  config_lib.apply_overrides(stored, [f"--config.{name}={text}"], _config())
  assert stored.to_json() == config.to_json()


@pytest.mark.parametrize("value, text", [
    (("a", "b"), "a,b"), (("\n\n", "A, B"), '["\\n\\n", "A, B"]'), ((" a",), '[" a"]'), (("[a]",), '["[a]"]'),
    (("",), '[""]'), ((), ""), ((1.5, 2.0), "1.5,2.0")])
def test_texts_with_commas_and_spaces_are_written_as_json(value, text):
  assert config_lib.format_value(value) == text
  config = _config()
  name = "optimizer.bounds" if value and isinstance(value[0], float) else "optimizer.freeze"
  config_lib.apply_overrides(config, [f"--config.{name}={text}"])
  assert config_lib.flatten(config)[name] == value


@pytest.mark.parametrize("text", ["[a, b]", "(a,b)", "a , b,", " [a,b] "])
def test_lists_need_no_quotation_marks(text):
  config = _config()
  config_lib.apply_overrides(config, [f"--config.optimizer.freeze={text}"])
  assert config.optimizer.freeze == ("a", "b")


@pytest.mark.parametrize("argument, words", [
    ("--config.optimizer.learning_rat=1", ["learning_rat'", "did you mean optimizer.learning_rate"]),
    ("--config.learning_rate=1", ["optimizer.learning_rate"]),
    ("--config.optimiser.name=sgd", ["optimizer.name"]),
    ("--config.total_steps.x=1", ["total_steps"]),
    ("--config.optimizer=adam", ["--config.optimizer is a group", "--config.optimizer.name"]),
    ("--config.total_steps", ["needs a value", "--config.total_steps=1000"]),
    ("--config.model.widths", ["needs a value", "--config.model.widths=8,4"]),
    ("--config.total_steps=", ["--config.total_steps=", "whole number"]),
    ("--config.total_steps=1.5", ["--config.total_steps=1.5", "whole number", "1000"]),
    ("--config.optimizer.learning_rate=fast", ["--config.optimizer.learning_rate=fast", "a number", "0.1"]),
    ("--config.model.remat=maybe", ["--config.model.remat=maybe", "true or false"]),
    ("--config.model.widths=8,x", ["--config.model.widths=x", "whole number", "8"]),
    ("--config.optimizer.bounds=a", ["--config.optimizer.bounds=a", "a number"]),
    ("--config.seed=1", ["--config.seed", "--seed"]),
    ("--config.preset=other", ["--config.preset", "--preset"]),
    ("--config.family=other", ["--config.family"]),
])
def test_a_bad_override_is_refused_by_name(argument, words):
  config = _config()
  before = config.to_json()
  with pytest.raises(UserError) as error:
    config_lib.apply_overrides(config, [argument])
  assert all(word in str(error.value) for word in words), error.value
  assert "\n" not in str(error.value)
  assert config.to_json() == before


@pytest.mark.parametrize("name", ["family", "preset", "seed"])
def test_what_cannot_be_set_is_not_suggested(name):
  for wrong in (name[:-1], name + "s", "xyzzy"):  # the last has no near name: all are listed
    with pytest.raises(UserError) as error:
      config_lib.apply_overrides(_config(), [f"--config.{wrong}=1"])
    suggested = str(error.value).partition("; ")[2].replace("?", "").replace(",", "").split()
    assert suggested and name not in suggested, error.value


@pytest.mark.parametrize("field, value", [
    *((field, 0) for field in ("total_steps", "batch_size", "eval_batch_size", "log_every", "eval_every",
                               "checkpoint_every", "keep_checkpoints", "accumulation")),
    ("total_steps", 2**31), ("batch_size", -8), ("shard_above", -1), ("ema_decay", 1.0),
    ("ema_decay", -0.1), ("ema_decay", float("nan")),
    ("early_stopping_patience", -1), ("early_stopping_patience", 3),  # without a monitor
])
def test_a_shared_field_out_of_range_is_refused(field, value):
  config = _config()
  config_lib.validate(config)
  config[field] = value
  with pytest.raises(UserError, match=f"--config.{field}"):
    config_lib.validate(config)


@pytest.mark.parametrize("arguments, words", [
    # Shapes that no memory holds, and loops that never end.
    (["--config.batch_size=3000000000"], ["--config.batch_size=3000000000", "at most 1048576"]),
    (["--config.model.block.depth=99999999999"], ["--config.model.block.depth", "at most 1048576"]),
    (["--config.model.widths=4,99999999999"], ["--config.model.widths=99999999999", "at most"]),
    (["--config.model.widths=" + "4," * 1001], ["--config.model.widths", "1001 values", "at most 1000"]),
    (["--config.keep_checkpoints=9999999999"], ["--config.keep_checkpoints"]),
    (["--config.eval_every=" + "9" * 30], ["--config.eval_every"]),
    (["--config.data.image_shape=9999999999"], ["--config.data.image_shape=9999999999", "3 values"]),
    (["--config.data.image_shape=8,8"], ["--config.data.image_shape=8,8", "3 values"]),
    (["--config.data.image_shape=9999999999,1,1"], ["--config.data.image_shape", "at most"]),
    (["--config.data.shift=inf"], ["--config.data.shift=inf", "finite"]),
    (["--config.data.shift=1e30"], ["--config.data.shift=1e+30", "at most"]),
    (["--config.data.shift=nan"], ["--config.data.shift=nan", "finite"]),
    # What would be a folder "gs:".
    (["--config.init.source=gs://bucket/run"], ["--config.init.source=gs://bucket/run", "local"]),
])
def test_what_would_take_all_memory_or_time_is_refused(arguments, words):
  config = _config()
  config.data = ml_collections.ConfigDict({"image_shape": (8, 8, 1), "shift": 0.0})
  config_lib.validate(config)
  config_lib.apply_overrides(config, arguments)
  with pytest.raises(UserError) as error:
    config_lib.validate(config)
  assert all(word in str(error.value) for word in words), error.value


def _set(config, name, value):
  with config.ignore_type():
    config.update_from_flattened_dict({name: value})


@pytest.mark.parametrize("name, value, words", [
    ("total_steps", "400", ["total_steps is '400'", "a whole number", "1000"]),
    ("total_steps", True, ["total_steps is True", "a whole number"]),
    ("total_steps", 400.0, ["total_steps is 400.0", "a whole number"]),
    ("total_steps", None, ["total_steps is None"]),
    ("model.remat", 1, ["model.remat is 1", "true or false"]),
    ("model.widths", 8, ["model.widths is 8", "a list"]),
    ("model.widths", (8, "4"), ["model.widths is (8, '4')"]),
    ("model.widths", ((8,),), ["model.widths"]),
    ("optimizer.freeze", (None,), ["optimizer.freeze"]),
    ("optimizer.learning_rate", "0.1", ["optimizer.learning_rate is '0.1'", "a number"]),
    ("optimizer.name", 3, ["optimizer.name is 3", "a text"]),
    ("preset", "other", ["preset is 'other'"]),
    ("model.new", 3, ["has model.new"]),
    ("model.widths", {"a": 1}, ["lacks model.widths"]),
])
def test_a_stored_config_is_checked_against_the_preset(name, value, words):
  config, like = _config(), _config()
  _set(config, name, value)
  with pytest.raises(UserError) as error:
    config_lib.check_complete(config, like, "run/config.json")
  assert all(word in str(error.value) for word in ["run/config.json", *words]), error.value
  assert "\n" not in str(error.value)


def test_a_whole_number_may_stand_for_a_number():
  config = _config()
  _set(config, "optimizer.learning_rate", 1)
  _set(config, "optimizer.bounds", (0, 1))
  config_lib.check_complete(config, _config(), "config.json")
  assert isinstance(config.optimizer.learning_rate, float)
  assert [type(bound) for bound in config.optimizer.bounds] == [float, float]


def test_a_run_may_be_as_long_as_the_step_can_count():
  config = _config()
  config.total_steps = 2**31 - 1
  config_lib.validate(config)


def test_early_stopping_is_fine_with_a_monitor():
  config = _config()
  config.update({"early_stopping_patience": 3, "monitor": "validation/loss"})
  config_lib.validate(config)


def test_what_describe_prints_can_be_typed_again():
  changed = ["--config.model.widths=3", "--config.model.remat=true", "--config.optimizer.freeze=a/*,b"]
  config, other = _config(), _config()
  config_lib.apply_overrides(config, changed)
  config_lib.apply_overrides(other, [
      line.strip() for line in config_lib.describe(config).splitlines() if line[2:4] == "--"])
  assert other.to_json() == config.to_json() != _config().to_json()


def test_a_config_is_json():
  assert json.loads(_config().to_json())["optimizer"]["bounds"] == [0.5, 0.75]


def test_a_sentence_survives_what_is_done_with_a_config():
  group = config_lib.Group({
      "rate": config_lib.Field(0.5, "The rate."), "kind": config_lib.Field("a", "")})
  group.update({"rate": 0.25, "size": 3})
  group.describe({"size": "The size."})
  config = config_lib.base_config("x", "y", model=config_lib.ModelConfig(group), optimizer=group)
  copied = config.copy_and_resolve_references()
  for some in (config, copied):
    assert config_lib.sentence(some, "model.rate") == "The rate."
    assert config_lib.sentence(some, "optimizer.size") == "The size."
    assert config_lib.sentence(some, "total_steps") and not config_lib.sentence(some, "model.kind")
  copied.model.describe({"rate": "Another."})
  assert config_lib.sentence(config, "model.rate") == "The rate."
  assert (config.model.rate, config.to_dict()["optimizer"]["size"]) == (0.25, 3)


def test_one_of_lists_the_choices():
  assert config_lib.one_of("The kind", ("a", "b")) == "The kind: a, b."


@pytest.mark.parametrize("data, title", [
    ({"name": "mnist"}, "lenet mnist"), ({"name": "digits/by_writer"}, "lenet digits/by_writer"),
    ({"name": "mnist", "folder": "my/photos/"}, "lenet photos"), ({"file": "", "name": "x"}, "lenet x"),
    ({"name": "data/sales.csv"}, "lenet sales.csv"), ({"noise": 1.0}, "lenet small"),
    ({"folder": "my/photos/../scans"}, "lenet scans"), ({"file": "caf\udce9.txt"}, "lenet caf\\udce9.txt")])
def test_a_run_is_called_by_its_family_and_its_data(data, title):
  config = config_lib.base_config("lenet", "small", data=data)
  assert config_lib.title(config) == config_lib.title(config.to_dict()) == title
