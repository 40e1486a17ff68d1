"""The command line of every experiment: flags -> experiment -> fit, evaluate, predict or dry run."""

import functools
import hashlib
import json
import logging as python_logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np
from absl import flags, logging

from dljax import config as config_lib
from dljax import errors
from dljax.errors import RunError, UserError
from dljax.train import parallel
from dljax.train.checkpoint import Checkpointer
from dljax.train.evaluate import Evaluator, evaluate, predict, generate
from dljax.train.experiment import Experiment
from dljax.train.loop import fit
from dljax.train.program import Program, RunOptions
from dljax.train.signals import Preempted
from dljax.train.workdir import Workdir, write_csv, write_json

DONE, FAILED, BAD_INPUT, PREEMPTED = 0, 1, 2, 75  # exit status

GetConfig = Callable[[str], ml_collections.ConfigDict]
Build = Callable[[ml_collections.ConfigDict], Experiment]

_FLAGS = flags.FlagValues()
_string = lambda name, default, text: flags.DEFINE_string(name, default, text, flag_values=_FLAGS)
_enum = lambda name, default, values, text: flags.DEFINE_enum(name, default, values, text, flag_values=_FLAGS)
_bool = lambda name, text: flags.DEFINE_bool(name, False, text, flag_values=_FLAGS)

class _PathParser(flags.ArgumentParser):
  """Paths: of --workdir=~/runs no shell expands the ~."""

  def parse(self, argument):
    return os.path.expanduser(argument)


_path = lambda name, text: flags.DEFINE(_PathParser(), name, "", text, flag_values=_FLAGS)

_PRESET = _string("preset", "", "What to run; see --list_presets. The default runs at once, offline.")
_WORKDIR = _path("workdir", "The run's folder; by default runs/FAMILY-PRESET.")
_MODE = _enum("mode", "train", ["train", "eval", "predict"], "What to do with the workdir's run.")
_STEP = _string("step", "best", "Which checkpoint to evaluate or to predict with: best, latest or a number.")
_INPUT = flags.DEFINE_list("input", [], "What to predict for: files or folders, with commas between.",
                           flag_values=_FLAGS)
_PROMPT = _string("prompt", None,
                  "A text to write on, which may be empty, for families that write text; shown as it comes.")
_OUTPUT = _path("output", "Where to write predictions: a .jsonl, .json or .csv file, or a new folder for those that are "
                "pictures; by default only shown.")
_PARALLELISM = _enum("parallelism", "jit", ["jit", "pmap"], "How to compile for several devices.")
_MESH = _string("mesh", "", "Devices per axis, as in data:4,fsdp:2,tensor:1; by default all on data.")
_RESUME = _enum("resume", "auto", ["auto", "never", "must"],
                "auto continues what is in the workdir; never refuses a run there; must refuses to begin one.")
_SEED = flags.DEFINE_integer("seed", 0, "Of everything random.", lower_bound=0, upper_bound=2**32 - 1,
                             flag_values=_FLAGS)
_DATA_DIR = _path("data_dir", "The TFDS directory; also the variable TFDS_DATA_DIR.")
_WANDB = _string("wandb", "", "A Weights & Biases project to log to.")
_DRY_RUN = _bool("dry_run", "Show the model, the batch and the compiled step's memory; needs no data.")
_TOPOLOGY = _string("topology", "", "With --dry_run: a machine to compile for, such as v5e:4x4 or h100:4.")
_LIST_PRESETS = _bool("list_presets", "List the presets.")
_HELP = _bool("help", "Show this help.")


def main(get_config: GetConfig, build: Build, presets: Mapping[str, str]) -> None:
  """Runs an experiment's command line, and exits.

  Exit status: 0 done; 1 failed; 2 bad input; 75 preempted, with the state saved. In prediction 1
  means that some inputs were skipped, and 2 that none was usable.

  Args:
    get_config: preset -> config.
    build: config -> experiment.
    presets: preset -> one line that says what it runs; the first is the default.
  """
  flags.FLAGS.mark_as_parsed()  # absl's own, which only its logging reads
  logging.use_absl_handler()
  logging.get_absl_handler().setFormatter(_PlainFormatter())
  logging.set_verbosity(logging.WARNING)
  exit_with(lambda: _run(sys.argv, get_config, build, presets), "stopped before there was anything to save")


def exit_with(run: Callable[[], int], stopped: str) -> NoReturn:
  """Exits with what `run` gives, or with the status of its error, of which it prints one line.

  Args:
    run: gives the exit status.
    stopped: what to print where SIGTERM or Ctrl-C ends it and nothing else tells what was saved.
  """
  handler = _end_as_ctrl_c()
  try:
    status = run()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    status = BAD_INPUT
  except RunError as error:
    print(f"error: {error}", file=sys.stderr)
    status = FAILED
  except (Preempted, KeyboardInterrupt) as stop:
    print(str(stop) or stopped, file=sys.stderr)
    status = PREEMPTED
  finally:
    signal.signal(signal.SIGTERM, handler)
  sys.stdout.flush()
  sys.exit(status)


def _end_as_ctrl_c() -> Any:
  """Lets SIGTERM end the process as Ctrl-C does, but in `fit`, which handles both; gives the old handler."""
  return signal.signal(signal.SIGTERM, signal.default_int_handler)


def _run(argv: Sequence[str], get_config: GetConfig, build: Build, presets: Mapping[str, str]) -> int:
  overrides = [a for a in argv[1:] if a.startswith("--config.")]
  try:
    if any(re.match("--?undefok(=|$)", a) for a in argv[1:]):  # absl's own flag, which lets wrong names pass
      raise flags.UnrecognizedFlagError("undefok")
    rest = _FLAGS([argv[0], *(a for a in argv[1:] if a not in overrides)])
  except flags.UnrecognizedFlagError as error:
    known = [f"--{name}" for name in (*_FLAGS, "config.FIELD")]
    raise errors.unknown("the command line", f"--{error.flagname}", known) from None
  except flags.Error as error:
    raise UserError(str(error).replace("\n", " ")) from None
  if rest[1:]:
    raise UserError(f"{rest[1]!r} is not a flag; write --FLAG=VALUE, and see --help")
  preset = _PRESET.value or next(iter(presets))
  errors.choose("--preset", preset, presets)
  config = get_config(preset)
  if _HELP.value:
    print(_help(config, presets))
    return DONE
  if _LIST_PRESETS.value:
    print("\n".join(f"{name:16}{text}" for name, text in presets.items()))
    return DONE
  train, predicts = _MODE.value == "train", _MODE.value == "predict"
  for flag, with_what, there in (
      (_TOPOLOGY, "--dry_run", _DRY_RUN.value),
      (_DRY_RUN, "--mode=train", train),
      (_RESUME, "--mode=train", train),
      (_WANDB, "--mode=train", train),
      # A run that is named brings its own.
      (_PRESET, "--mode=train", train or not _WORKDIR.value),
      (_SEED, "--mode=train", train or not _WORKDIR.value),
      (_STEP, "--mode=eval or --mode=predict", not train),
      (_INPUT, "--mode=predict", predicts),
      (_PROMPT, "--mode=predict", predicts),
      (_OUTPUT, "--mode=predict", predicts)):
    if flag.present and not there:
      raise UserError(f"--{flag.name} goes with {with_what}; add it, or drop --{flag.name}")
  if _DATA_DIR.value:
    if not Path(_DATA_DIR.value).is_dir():
      raise UserError(f"--data_dir={_DATA_DIR.value} is not a folder; name the one that holds the TFDS sets")
    os.environ["TFDS_DATA_DIR"] = _DATA_DIR.value
  options = RunOptions(parallelism=_PARALLELISM.value, mesh=parallel.parse_mesh(_MESH.value), resume=_RESUME.value,
                       wandb=_WANDB.value)
  plain = config_lib.identity(config)
  if train or not _WORKDIR.value:  # a run that is named brings its own config
    config_lib.apply_overrides(config, overrides)
    config.seed = _SEED.value
    config_lib.validate(config)
  name = f"{config.family}-{preset}"
  if (identity := config_lib.identity(config)) != plain:
    name += "-" + hashlib.sha256(identity.encode()).hexdigest()[:8]
  folder = Workdir(_WORKDIR.value or Path("runs", name))
  if not train:
    family, config = config.family, folder.read_config()
    ran, preset = config.get("family", family), config.get("preset", preset)
    if ran != family:
      raise UserError(f"--workdir={folder.path} holds a run of {ran}; use python -m experiments.{ran}")
    like = get_config(preset) if preset in presets else config_lib.base_config(family, preset)
    config_lib.add_later_fields(config, like)
    if lacks := sorted(config_lib.flatten(like).keys() - config_lib.flatten(config).keys()):
      raise UserError(f"{folder.config_file} lacks {', '.join(lacks[:3])}; restore it from a copy, or train again in "
                      "another --workdir")
    config_lib.apply_overrides(config, overrides, like)
    config_lib.validate(config)
  experiment = build(config)
  if config.eval.corruptions and not experiment.data.corruptions:
    raise UserError(f"--config.eval.corruptions={config.eval.corruptions}: there is nothing to disturb in this data; "
                    "drop it")
  if _DRY_RUN.value:
    return _dry_run(experiment, options)
  parallel.initialize()
  _end_as_ctrl_c()  # jax.distributed takes SIGTERM for itself
  act = {"train": _train, "eval": _evaluate, "predict": _predict}[_MODE.value]
  return act(experiment, folder, options)


def _train(experiment: Experiment, folder: Workdir, options: RunOptions) -> int:
  folder.check(experiment.config, options.resume)
  if folder.is_finished(experiment.config.total_steps):
    print("this run has finished; its result:")
  else:
    fit(experiment, folder.path, options)
  if jax.process_index() == 0:
    _print_result(folder)
  return DONE


def _print_result(folder: Workdir) -> None:
  """A short table of results, and where the files are."""
  result = folder.result()
  print(f"\n{result['family']} {result['preset']}: {result['steps']} steps, {result['params']:,} parameters, "
        f"{result['seconds']:.1f} s on {result['devices']}")
  _show(_metrics_table(result["metrics"]))
  places = {"checkpoint": folder.checkpoints / str(result["checkpoint"]), "result": folder.result_file,
            "metrics": folder.metrics_file, "pictures": folder.figures}
  print("\n".join(f"{name:12}{path}" for name, path in places.items()))


def _restore(experiment: Experiment, folder: Workdir, options: RunOptions) -> tuple[Program, int, Any]:
  """The program, and the step and state that --step asks for."""
  with Checkpointer(folder.checkpoints, assets=folder.data, read_only=True) as checkpointer:
    host = checkpointer.host()
    if host is None:
      raise UserError(f"--workdir={folder.path} holds no checkpoint; train first")
    text, steps, best = _STEP.value, checkpointer.steps(), host["best_step"]
    if text not in ("best", "latest") and not text.isdecimal():
      raise UserError(f"--step={text}: must be best, latest or a number, one of {steps}")
    if best not in steps:
      if text == "best" and best >= 0:  # there is none where nothing is monitored
        logging.warning("checkpoint %d, the best, is gone; the latest, %d, takes its place", best, steps[-1])
      best = None
    step = int(text) if text.isdecimal() else best if text == "best" else None
    program = Program(experiment, options)
    restored = checkpointer.restore(program.abstract_state, step)
    if restored is None:
      raise UserError(f"--workdir={folder.path} holds no intact checkpoint; train again in another --workdir")
    return program, restored.step, restored.state


def _evaluate(experiment: Experiment, folder: Workdir, options: RunOptions) -> int:
  program, step, state = _restore(experiment, folder, options)
  evaluator = Evaluator(experiment.task, options.parallelism, program.mesh)
  if assets := folder.read_assets():
    experiment.data.restore(assets)
  found, findings = evaluate(experiment, evaluator, state.variables, state.rng, assets)
  if jax.process_index() == 0:
    print(f"{experiment.config.family} {experiment.config.preset}: checkpoint {step}")
    _show(_metrics_table(found))
    entries = {"checkpoint": step, "metrics": found}
    if experiment.data.corruptions:
      entries["corruptions"] = findings.tables["corruptions"]
      _show(_corruptions_table(entries["corruptions"], found["test"]))
    try:
      folder.write_findings(findings)
      write_json(folder.path / "evaluation.json", entries)
      print(f"written to {folder.path / 'evaluation.json'}")
    except RunError as error:  # a run that one may only read can be evaluated too
      logging.warning("%s", error)
  return DONE


def _predict(experiment: Experiment, folder: Workdir, options: RunOptions) -> int:
  if _PROMPT.present and experiment.prompt is None:
    raise UserError(f"--prompt: {experiment.config.family} writes no text; use --input=FILE_OR_FOLDER")
  if _PROMPT.present and _INPUT.value:
    raise UserError("--prompt and --input do not go together; drop one of them")
  if not _INPUT.value and not _PROMPT.present:
    raise UserError("--mode=predict needs --input=FILE_OR_FOLDER" + " or --prompt=TEXT" * bool(experiment.prompt))
  output = Path(_OUTPUT.value) if _OUTPUT.value else None
  if output:
    _check_output(output, experiment.pictures is not None)
  assets = folder.read_assets()
  if assets:
    experiment.data.restore(assets)
  if _PROMPT.present:
    return _generate(experiment, folder, options, assets, output)
  batch, names, skipped = experiment.encode([os.path.expanduser(path) for path in _INPUT.value], assets)
  if not names:
    rest = [f"and {len(skipped) - 3} more"] if len(skipped) > 3 else []
    raise UserError("--input: " + ("; ".join(skipped[:3] + rest) or f"{','.join(_INPUT.value)} holds no file"))
  for line in skipped:
    print(f"skipped {line}", file=sys.stderr)
  program, _, state = _restore(experiment, folder, options)
  predictions = predict(experiment, program, options.parallelism, state, batch)
  rows = [{"input": name, **row} for name, row in zip(names, experiment.decode(predictions, assets), strict=True)]
  if jax.process_index() == 0:
    for row in rows:
      print("  ".join(f"{v:.4f}" if isinstance(v, float) else v for v in row.values() if not isinstance(v, dict)))
    if output:
      with errors.writing(output):
        if output.suffix in _WRITERS:
          _WRITERS[output.suffix](output, rows)
        else:
          _write_folder(output, rows, experiment.pictures(batch, predictions, assets))
      print(f"{len(rows)} predictions written to {output}")
  return FAILED if skipped else DONE


def _generate(
    experiment: Experiment, folder: Workdir, options: RunOptions, assets: Mapping[str, Any], output: Path | None,
) -> int:
  """Shows --prompt and what the model writes on, as it comes."""
  batch = experiment.prompt([_PROMPT.value], ["--prompt"])
  program, _, state = _restore(experiment, folder, options)
  show = functools.partial(print, end="", flush=True) if jax.process_index() == 0 else lambda text: None
  show(_PROMPT.value)
  parts, text, shown = [], "", 0
  for tokens in generate(experiment, program, options.parallelism, state, batch):
    parts.append(tokens)
    row, = experiment.decode({"tokens": np.concatenate(parts, axis=1)}, assets)
    text = row["text"]
    whole = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))  # the rest may be half of a character that is yet to come
    show(text[shown:whole])
    shown = max(shown, whole)
  show(text[shown:] + "\n")
  if output and jax.process_index() == 0:
    with errors.writing(output):
      _WRITERS[output.suffix](output, [{"input": _PROMPT.value, "text": text}])
    print(f"1 prediction written to {output}")
  return DONE


def _check_output(output: Path, pictures: bool) -> None:
  """Raises `UserError` where predictions cannot be written to `output`, which is a folder if it may and has no suffix."""
  if output.suffix not in _WRITERS and (output.suffix or not pictures):
    raise UserError(f"--output={output}: must end in {', '.join(_WRITERS)}" + ", or be a new folder" * pictures)
  if not output.absolute().parent.is_dir():
    raise UserError(f"--output={output}: there is no folder {output.absolute().parent}; make it first")
  if output.suffix not in _WRITERS and output.is_dir():
    if any(output.iterdir()):
      raise UserError(f"--output={output} is not empty, and nothing is written over; name a new folder")
    output /= _ROWS
  _check_writable(output)


def _check_writable(output: Path) -> None:
  """Asks the file system itself: permissions do not tell of a folder, of /proc or of a read-only disk."""
  new = not output.exists()
  try:
    output.open("a").close()
  except OSError as error:
    raise UserError(f"--output={output} cannot be written ({error.strerror}); name another file") from None
  if new:
    output.unlink(missing_ok=True)


def _dry_run(experiment: Experiment, options: RunOptions) -> int:
  from dljax.train import flops, inspect, topology  # pylint: disable=g-import-not-at-top

  name = _TOPOLOGY.value
  program = Program(experiment, options, topology.topology_devices(name) if name else None)
  lowered = program.lower_train_step()
  compiled = topology.compile_lowered(lowered, name) if name else lowered.compile()
  _show(inspect.render_dry_run(
      experiment.data.batch_spec, flops.task_layers(experiment.task, experiment.data.batch_spec), program.train_step_flops(),
      inspect.summarize_compiled(compiled), devices=program.mesh.devices.size,
      machine=name or jax.devices()[0].device_kind,
      device_memory=topology.TOPOLOGIES[name].memory if name else None))
  return DONE


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_folder(folder: Path, rows: Sequence[Mapping[str, Any]], pictures: Iterable[Any]) -> None:
  """Makes a folder with `_ROWS` and the picture of each row, "a.png" for "scans/a.jpg"; equal names are numbered."""
  folder.mkdir(exist_ok=True)
  names: list[str] = []
  for row, picture in zip(rows, pictures, strict=True):
    stem = re.sub(r"\.\w+(\[(\d+)\])?$", lambda end: f"-{end[2]}" if end[2] else "", Path(row["input"]).name)
    names.append(next(name for name in (stem, *(f"{stem}-{i}" for i in range(2, 2 + len(rows)))) if name not in names))
    picture.save(folder / f"{names[-1]}.png")
  _write_jsonl(folder / _ROWS, [{**row, "picture": f"{name}.png"} for row, name in zip(rows, names)])


_ROWS = "predictions.jsonl"
_MAX_METRIC_COLUMNS = 7  # of a table that has to fit 120 characters
_WRITERS = {".jsonl": _write_jsonl, ".json": write_json, ".csv": write_csv}


def _metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> Any:
  """One row for each split, one column for each metric; with many metrics the other way round."""
  from rich.table import Table  # pylint: disable=g-import-not-at-top

  names = list(dict.fromkeys(name for values in metrics.values() for name in values))
  show = lambda split, name: f"{metrics[split][name]:.4f}" if name in metrics[split] else ""
  if len(names) <= _MAX_METRIC_COLUMNS:
    head, columns, rows = "split", names, [[split, *(show(split, name) for name in names)] for split in metrics]
  else:
    head, columns, rows = "metric", metrics, [[name, *(show(split, name) for split in metrics)] for name in names]
  table = Table(head)
  for column in columns:
    table.add_column(column, justify="right")
  for row in rows:
    table.add_row(*row)
  return table


def _corruptions_table(rows: Sequence[Mapping[str, Any]], clean: Mapping[str, float]) -> Any:
  """One row for each metric under each corruption, one column for each strength."""
  from rich.table import Table  # pylint: disable=g-import-not-at-top

  table = Table("metric", "corruption", "clean")
  for strength in sorted({row["strength"] for row in rows}):
    table.add_column(str(strength), justify="right")
  for metric in list(rows[0])[2:]:
    for name in dict.fromkeys(row["corruption"] for row in rows):
      values = [row[metric] for row in rows if row["corruption"] == name]
      table.add_row(metric, name, f"{clean[metric]:.4f}", *(f"{value:.4f}" for value in values))
  return table


def _show(renderable: Any) -> None:
  from rich.console import Console  # pylint: disable=g-import-not-at-top

  Console(width=None if sys.stdout.isatty() else 120).print(renderable)


def _help(config: ml_collections.ConfigDict, presets: Mapping[str, str]) -> str:
  """Flags, presets, and the config with the preset's values."""
  lines = [f"usage: python -m experiments.{config.family} [--FLAG=VALUE ...]", "", "presets (the first is the default):"]
  lines += [f"  {name:16}{text}" for name, text in presets.items()]
  lines += ["", "flags:"]
  for name in _FLAGS:
    flag = _FLAGS[name]
    lines.append(f"  --{name}" + (f"={flag.default}" if flag.default not in (None, False, "", []) else ""))
    lines.append(f"      {flag.help}")
  lines += ["", f"config of preset {config.preset} (any field can be set):", config_lib.describe(config)]
  return "\n".join(lines)


class _PlainFormatter(python_logging.Formatter):
  """Warnings as a person reads them."""

  def format(self, record):
    return f"{record.levelname.lower()}: {record.getMessage()}"
