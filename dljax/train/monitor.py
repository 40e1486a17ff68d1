"""Evaluation during training: the metrics of every split but test, and what follows from the monitored one."""

import contextlib
from collections.abc import Callable, Mapping

from dljax import optim
from dljax.data.pipeline import Pipeline
from dljax.errors import Preempted, UserError, unknown
from dljax.tasks.base import MAX
from dljax.train import parallel
from dljax.train.evaluate import Evaluator
from dljax.train.experiment import Experiment
from dljax.train.metrics import MetricWriter
from dljax.train.preview import Preview
from dljax.train.program import Program
from dljax.train.state import TrainState
from dljax.train.workdir import Workdir

_SHOWN = 4  # metrics of a split in the line of an evaluation
# What a signal may have left undone after a step.
EVALUATION, PREVIEW = "evaluation", "preview"


class Monitor:
  """Evaluates, and remembers the best value of the metric that `config.monitor` names.

  Metrics that add up over batches are in every evaluation. Metrics of a whole set (average precision,
  error rates) cost more: they are in every evaluation if the monitor is one of them and
  `config.full_eval_every` is 0, else in those that `full_eval_every` asks for. Only an evaluation
  that has the monitored metric moves the tracker.

  Attributes:
    tracker: the best value so far, and how long ago it was; restored from a checkpoint on a resume.
    left: what is left to be done after the last step, `EVALUATION` or `PREVIEW`, or ""; restored too.
  """

  def __init__(
      self, experiment: Experiment, program: Program, evaluator: Evaluator, folder: Workdir,
      say: Callable[[str], None],
  ):
    """The data must be open.

    Args:
      experiment: gives the splits, the task and the monitored metric.
      program: gives the shapes of the state.
      evaluator: evaluates.
      folder: the run's folder, with what was fitted to the data.
      say: shows a line, that of each evaluation.

    Raises:
      UserError: there is no such metric or split.
    """
    self._experiment, self._evaluator, self._folder = experiment, evaluator, folder
    self._say = say
    self._optimizer, *_ = optim.player_configs(experiment.config, experiment.task.players).values()
    self._always_full = self._check(program)
    self.tracker, self.left = optim.Tracker(), ""

  def _check(self, program: Program) -> bool:
    """Whether every evaluation needs the metrics of whole sets."""
    experiment, name = self._experiment, self._experiment.monitor
    if not name:
      return False
    known = [f"{split}/{metric}" for split in experiment.data.evals if split != "test"
             for metric in experiment.task.goals]
    if not known:
      raise UserError(
          f"--config.monitor={name}: there is no split but test; write --config.monitor=")
    if name not in known:
      raise unknown("--config.monitor", name, known)
    split, _, metric = name.partition("/")
    state = program.abstract_state
    summed = self._evaluator.metric_names(
        state.variables, state.rng, experiment.data.evals[split])
    return metric not in summed and not experiment.config.full_eval_every

  @property
  def exhausted(self) -> bool:
    """Whether the monitored metric has not improved for as long as early stopping waits."""
    return 0 < self._experiment.config.early_stopping_patience <= self.tracker.stale

  def advance(
      self, writer: MetricWriter, preview: Preview, check: Callable[[], None], step: int,
      state: TrainState,
  ) -> None:
    """Does what is `left` after `step`, and the rest is left if a signal ends it.

    Args:
      writer: gets the metrics.
      preview: is drawn after the evaluation.
      check: raises `Preempted` where the run has to stop.
      step: the number of completed steps.
      state: the state after `step`.
    """
    with contextlib.suppress(Preempted):
      if self.left == EVALUATION:
        self.evaluate(state, step, writer)
        self.left = PREVIEW
        check()
      preview.draw(step, state)
      self.left = ""

  def evaluate(self, state: TrainState, step: int, writer: MetricWriter) -> None:
    """Evaluates the state after `step`, writes the metrics, and moves the tracker.

    A signal may end it before it has written anything.
    """
    values, lines = {}, []
    found = {split: self._metrics(state, pipeline, split, step)
             for split, pipeline in self._experiment.data.evals.items() if split != "test"}
    for split, metrics in found.items():
      writer.write(step, split, metrics)
      values |= {f"{split}/{name}": value for name, value in metrics.items()}
      lines.append(self._line(split, metrics))
    name = self._experiment.monitor
    if name in values:
      goal = self._experiment.task.goals[name.partition("/")[2]]
      value = parallel.of_first_host(values[name])
      self.tracker = optim.track(self._optimizer, self.tracker, step, value, goal == MAX)
    if lines:
      best = f"; the best {name} so far" if name in values and self.tracker.best_step == step else ""
      self._say(f"step {step}: {'; '.join(lines)}{best}")

  def _line(self, split: str, found: Mapping[str, float]) -> str:
    """The first metrics of a split, of which the monitored one is always one."""
    monitored = (self._experiment.monitor or "").removeprefix(f"{split}/")
    names = sorted(found, key=lambda name: name != monitored)[:_SHOWN]
    return f"{split} " + ", ".join(f"{name} {found[name]:.4g}" for name in names)

  def _metrics(
      self, state: TrainState, pipeline: Pipeline, split: str, step: int,
  ) -> Mapping[str, float]:
    config = self._experiment.config
    every = config.full_eval_every
    due = every and (step % every == 0 or step == config.total_steps)
    if not (self._always_full or due):
      return self._evaluator.sums(state.variables, state.rng, pipeline, split)
    assets = self._folder.read_assets()
    return self._evaluator.full(state.variables, state.rng, pipeline, split, assets).metrics
