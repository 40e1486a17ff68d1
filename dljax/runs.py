"""A finished run as an object: its model, its weights, and predictions for new inputs."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from dljax import config as config_lib
from dljax import errors
from dljax.errors import UserError
from dljax.train import evaluate, parallel
from dljax.train.checkpoint import Checkpointer, Restored
from dljax.train.experiment import Experiment, Inputs, Request
from dljax.train.metrics import read_rows, say
from dljax.train.program import Program, RunOptions
from dljax.train.progress import Compilations
from dljax.train.state import TrainState, split_carry
from dljax.train.workdir import Workdir, decisive

Build = Callable[[ml_collections.ConfigDict], Experiment]


class Run:
  """A run with the weights of one of its checkpoints; see `load`.

  The checkpoint is read when its weights are first needed, and the data set never.

  Attributes:
    experiment: what the config builds.
    folder: the run's folder.
    config: the config that ran.
    assets: the values that the run fitted to its data (class names, a tokenizer), by file stem.
    model: the Flax module.
  """

  def __init__(
      self, experiment: Experiment, folder: Workdir, options: RunOptions = RunOptions(),
      step: str = "best",
  ):
    self.experiment, self.folder = experiment, folder
    self.config, self.model = experiment.config, experiment.task.model
    self._options, self._which, self._restored = options, step, None
    self._predictor, self._generator = None, None
    self._mark = None  # how far metrics.jsonl had come at the checkpoint
    self._compilations = Compilations(say if options.progress else None)
    self.assets = folder.read_assets()
    if self.assets:
      experiment.data.restore(self.assets)

  def __repr__(self) -> str:
    return f"<{config_lib.title(self.config)} of {self.folder.path}, step {self.step}>"

  def restore(self) -> tuple[Program, int, TrainState]:
    """The compiled experiment, the checkpoint's step and its training state, read once.

    Raises:
      UserError: there is no such checkpoint, or it does not fit the experiment.
    """
    if self._restored is None:
      program, restored = _restore(self.experiment, self.folder, self._options, self._which)
      self._restored = program, restored.step, restored.state
      self._mark = restored.host.get("metrics")
    return self._restored

  @property
  def step(self) -> int:
    """The step of the checkpoint."""
    return self.restore()[1]

  @property
  def program(self) -> Program:
    """The programs that the experiment compiles to."""
    return self.restore()[0]

  @property
  def state(self) -> TrainState:
    """The whole training state of the checkpoint."""
    return self.restore()[2]

  @property
  def variables(self) -> dict[str, Any]:
    """The variables for `run.model.apply`: the averaged weights if EMA is on."""
    return split_carry(self.state.variables)[0]

  @property
  def metrics(self) -> dict[str, dict[str, float]]:
    """Split -> metric -> the value that the run reported for this step; {} if it reported none.

    Raises:
      UserError: the file that holds them was damaged or edited, or belongs to another run.
    """
    result = self.folder.result()
    if result and result["checkpoint"] == self.step:
      return result["metrics"]
    step = self.step  # reading the checkpoint gives the mark
    return {row.pop("split"): {name: value for name, value in row.items() if name != "step"}
            for row in read_rows(self.folder.metrics_file, self._mark)
            if row["step"] == step and row["split"] != "train"}

  def predict(self, inputs: Any) -> list[dict[str, Any]]:
    """Predictions, as --mode=predict prints them.

    Args:
      inputs: one of these, or a list of them.
        An array that stands in place of a file. Images: [h, w], [h, w, C] or [n, h, w, C], uint8
        or float in [0, 1], of any size; recordings: [N] at the model's sample rate; series:
        [T, C]. The path of a file or of a folder, as a `pathlib.Path` if the model reads text.
        A text, which the model continues, fills in or classifies.

    Returns:
      One dict for each row: its name as "input", and the prediction, such as "label" and
      "probabilities". Inputs that cannot be used are left out, each with a warning.

    Raises:
      UserError: no input can be used.
    """
    found = self.read(self._request(inputs))
    for line in found.skipped:
      logging.warning("skipped %s", line)
    for line in found.warnings:
      logging.warning("%s", line)
    return self.rows(found, self.raw(found))

  def read(self, request: Request) -> Inputs:
    """The rows that a request asks for.

    Raises:
      UserError: a part of the request has no meaning for this family, or no input can be used.
    """
    found = self.experiment.read(request, self.assets)
    if not found.names:
      more = len(found.skipped) - 3
      lines = [*found.skipped[:3], *([f"and {more} more"] if more > 0 else [])]
      names = [str(path) for path in request.paths]
      raise UserError("--input: " + ("; ".join(lines) or f"{','.join(names)} holds no file"))
    return found

  def raw(self, inputs: Inputs) -> Any:
    """The result of `Task.predict` for the rows, as NumPy arrays with leading axis rows."""
    self._check(inputs)
    if getattr(self.experiment.task, "ends_on_host", False):
      return self._made_generator().whole(self.state, inputs.batch)
    if self._predictor is None:
      self._predictor = evaluate.Predictor(
          self.experiment, self.program, self._options.parallelism, self._compilations)
    return self._predictor(self.state, inputs.batch)

  def generate(self, inputs: Inputs) -> Iterator[Any]:
    """The result of `raw` for rows that are prompts, as far as it is generated, again and again."""
    self._check(inputs)
    return self._made_generator()(self.state, inputs.batch)

  def _made_generator(self) -> evaluate.Generator:
    if self._generator is None:
      self._generator = evaluate.Generator(
          self.experiment, self.program, self._options.parallelism, self._compilations)
    return self._generator

  def _check(self, inputs: Inputs) -> None:
    if hasattr(self.experiment.task, "check"):
      self.experiment.task.check(inputs.batch, inputs.names)

  def rows(self, inputs: Inputs, predictions: Any) -> list[dict[str, Any]]:
    """A dict for each row, with its name as "input" and its prediction."""
    shown = self.experiment.show(inputs, predictions, self.assets)
    return [{"input": name, **row} for name, row in zip(inputs.names, shown, strict=True)]

  def _request(self, inputs: Any) -> Request:
    one = isinstance(inputs, (str, os.PathLike)) or hasattr(inputs, "__array__")
    given = [inputs] if one else list(inputs)
    if not given:
      raise UserError("there is nothing to predict for; give an array, a path or a text")
    if not self.experiment.texts:
      return Request(paths=[_path(x) if isinstance(x, (str, os.PathLike)) else np.asarray(x)
                            for x in given])
    texts = [x for x in given if isinstance(x, str)]
    paths = [_path(x) for x in given if isinstance(x, os.PathLike)]
    if len(texts) + len(paths) < len(given):
      raise UserError(f"{self.config.family} reads text, not arrays; give a text, or the path of "
                      "a file as a pathlib.Path")
    if texts and paths:
      raise UserError("texts and files do not go together; give either")
    return Request(texts=texts, paths=paths)


def load(
    workdir: str | os.PathLike[str], step: str | int = "best", build: Build | None = None,
) -> Run:
  """Loads a run, for predictions on one device.

      run = dljax.load("runs/lenet-digits")
      run.predict("digits/")

  Args:
    workdir: the run's folder.
    step: the checkpoint: "best" (the latest if nothing is monitored), "latest" or a step.
    build: config -> experiment, the function that built it for training; by default that of
      experiments.FAMILY, with FAMILY from the run's config.json.

  Raises:
    UserError: the folder holds no run or no such checkpoint, or its family is not known.
  """
  folder = Workdir(os.path.expanduser(workdir))
  config = folder.read_config()
  family, preset = config.get("family"), config.get("preset")
  if build is None:
    module = _experiment_module(folder, family)
    build = module.build
    preset = config_lib.preset_of(config, module.PRESETS, folder.config_file)
    known = preset in module.PRESETS
    like = module.get_config(preset) if known else config_lib.base_config(family, preset)
  else:
    like = config_lib.base_config(family, preset)
  config_lib.check_complete(config, like, folder.config_file)
  config_lib.validate(config)
  options = RunOptions(mesh=parallel.parse_mesh("data:1"), progress=False)
  run = Run(build(config), folder, options, str(step))
  run.restore()
  return run


def _path(path: str | os.PathLike[str]) -> str:
  return os.path.expanduser(os.fspath(path))


def _experiment_module(folder: Workdir, family: Any) -> ModuleType:
  """The module experiments.FAMILY next to this dljax; `UserError` if there is none."""
  home = Path(__file__).absolute().parents[1] / "experiments"
  mend = "or give the function that builds the experiment, dljax.load(workdir, build=build)"
  spec = importlib.util.find_spec("experiments")
  places = [*(spec.submodule_search_locations or [spec.origin])] if spec else []
  if not home.is_dir() or not places:
    raise UserError(f"there is no folder {home} with the experiments; install dljax whole, {mend}")
  if not os.path.samefile(places[0], home):
    raise UserError(f"{places[0]} hides dljax's own experiments, {home}; rename it, {mend}")
  families = {path.stem for path in home.glob("*.py")} - {"__init__"}
  if not isinstance(family, str) or family not in families:
    raise errors.unknown(f"the family in {folder.config_file}", str(family), families)
  return importlib.import_module(f"experiments.{family}")


def _restore(
    experiment: Experiment, folder: Workdir, options: RunOptions, which: str,
) -> tuple[Program, Restored]:
  """The program, and the checkpoint that `which` (best, latest or a number) names."""
  with Checkpointer(folder.checkpoints, assets=folder.data, run=folder.run,
                    config=decisive(folder.read_config()), read_only=True) as checkpointer:
    host = checkpointer.host()
    if host is None:
      raise UserError(f"--workdir={folder.path} holds no checkpoint; train first")
    steps, best = checkpointer.steps(), host["best_step"]
    if which not in ("best", "latest") and not which.isdecimal():
      raise UserError(f"--step={which}: must be best, latest or a number, one of {steps}")
    if best not in steps:
      if which == "best" and best >= 0:  # it is negative if nothing is monitored
        logging.warning(
            "checkpoint %d, the best, is gone; the latest, %d, takes its place", best, steps[-1])
      best = None
    step = int(which) if which.isdecimal() else best if which == "best" else None
    program = Program(experiment, options)
    restored = checkpointer.restore(program.abstract_state, step)
    if restored is None:
      raise UserError(
          f"--workdir={folder.path} holds no intact checkpoint; train again in another --workdir")
    return program, restored
