"""fit: the one training loop, for every family."""

import collections
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dljax import optim, report
from dljax.config import title
from dljax.data.pipeline import opened
from dljax.errors import Preempted, UserError
from dljax.interop import variants
from dljax.train import metrics, parallel
from dljax.train.checkpoint import Checkpointer
from dljax.train.evaluate import Evaluator, draw_samples, evaluate, prefetch
from dljax.train.experiment import Experiment
from dljax.train.monitor import EVALUATION, Monitor
from dljax.train.preview import Preview
from dljax.train.program import Program, RunOptions
from dljax.train.progress import Compilations
from dljax.train.signals import StopSignals
from dljax.train.state import TrainState, parameter_count, state_sha256
from dljax.train.workdir import Workdir, decisive


def fit(
    experiment: Experiment, workdir: str | os.PathLike[str], options: RunOptions = RunOptions(),
) -> TrainState:
  """Trains to the end, from scratch or from the workdir's last checkpoint.

  A finished run is only restored.

  Args:
    experiment: the experiment to train.
    workdir: the run's folder; see `Workdir` for what it holds afterwards.
    options: how to run it.

  Returns:
    The last state. The best one is a checkpoint, named in result.json.

  Raises:
    UserError: bad input; nothing was written.
    metrics.Diverged: the loss or gradient was not finite.
    Preempted: SIGTERM or Ctrl-C; the state is saved.
    RunError: a checkpoint or another file could not be written.
  """
  folder, config = Workdir(workdir), experiment.config
  folder.check(config, options.resume)
  metrics.check_wandb(options.wandb)
  program = Program(experiment, options)
  weights = functools.cache(program.start_weights)
  if config.init.source and not Checkpointer(folder.checkpoints, read_only=True).steps():
    weights()  # may be bad input, which has to be reported before anything is written
  if assets := folder.read_assets():
    experiment.data.restore(assets)
  draw_samples(experiment)
  rows = functools.partial(parallel.batch_rows, program.mesh)
  with opened(experiment.data.train, *experiment.data.evals.values(), rows=rows):
    folder.check_data(experiment.data.name, experiment.data.fingerprint())
    signals = StopSignals()
    compilations = Compilations(metrics.say if options.progress else None, signals.wait)
    evaluator = Evaluator(experiment.task, options.parallelism, program.mesh,
                          experiment.data.context, compilations, signals.check)
    monitor = Monitor(experiment, program, evaluator, folder, compilations.say)
    check = functools.partial(folder.check, config, options.resume)
    parallel.on_first_host(lambda: folder.acquire(check), f"--workdir={folder.path} cannot be used")
    try:
      checkpointer = Checkpointer(folder.checkpoints, keep=config.keep_checkpoints,
                                  assets=folder.data, run=folder.run, config=decisive(config))
      with signals, checkpointer:
        return _Run(experiment, folder, options, program, weights, evaluator, monitor,
                    checkpointer, signals, compilations).run()
    finally:
      folder.release()


class _Run:
  """One call of `fit`, after all checks."""

  def __init__(
      self, experiment: Experiment, folder: Workdir, options: RunOptions, program: Program,
      weights: Callable[[], Any], evaluator: Evaluator, monitor: Monitor,
      checkpointer: Checkpointer, signals: StopSignals, compilations: Compilations,
  ):
    self.experiment, self.config, self.options = experiment, experiment.config, options
    self.folder, self.program, self.weights, self.evaluator = folder, program, weights, evaluator
    self.monitor, self.checkpointer, self.signals = monitor, checkpointer, signals
    self.compilations = compilations
    # The seconds that earlier calls took, and the start of this one.
    self.seconds, self.started = 0.0, time.monotonic()

  def run(self) -> TrainState:
    """Restores the run or starts one, trains, and reports."""
    total = self.config.total_steps
    restored = self.checkpointer.restore(self.program.abstract_state)
    if restored is None and self.options.resume == "must":
      raise UserError(f"--resume=must: --workdir={self.folder.path} holds no intact checkpoint; drop "
                      "the flag to start a run")
    start = 0
    if restored is not None:
      start, state = restored.step, restored.state
      self.monitor.tracker = optim.Tracker(**restored.host["tracker"])
      self.seconds = restored.host["seconds"]
      self.monitor.left = restored.host.get("left", "")
      if self.folder.is_finished(total) and self.folder.result()["steps"] == start:
        return state
      if start > total:
        raise UserError(f"--config.total_steps={total}: --workdir={self.folder.path} has done "
                        f"{start} steps already; ask for more, or name another --workdir")
    writer = metrics.MetricWriter(
        self.folder.path, start, self.options.wandb, self.config.to_dict(),
        restored and restored.host.get("metrics"))
    if restored is not None and (old := self.folder.total_steps()) != total:
      self.program.warn_of_schedule(old, start)
    if jax.process_index() == 0:
      data = self.experiment.data
      model = variants.describe(getattr(self.experiment.task, "model", None))
      self.folder.start(self.config, data.assets(), data.fingerprint(), model)
    if restored is None:
      state = self.program.init_state()
      if self.config.init.source:
        state = self.weights().put(state)
        metrics.say(self.weights().summary)
    elif start < total and not self.monitor.exhausted:
      metrics.say(f"continuing from step {start}")
    with writer, Preview(self.experiment, self.program, self.options.parallelism, self.folder,
                         writer, self.compilations) as preview:
      # A run that stopped early and was interrupted before its report has nothing left to train.
      if self.monitor.left or not self.monitor.exhausted:
        state = self._train(state, start, writer, preview)
    self._report(state)
    return state

  def _train(
      self, state: TrainState, start: int, writer: metrics.MetricWriter, preview: Preview,
  ) -> TrainState:
    """Trains from step `start` to the end; logs, evaluates and saves."""
    config, mode, mesh = self.config, self.options.parallelism, self.program.mesh
    state = parallel.step_state(state, mode, mesh)
    evaluate = functools.partial(self.monitor.advance, writer, preview, self.signals.check)
    if self.monitor.left:  # a signal has cut the evaluation of this step short
      self.signals.hold()
      evaluate(start, state)
      self.signals.check()
      self.checkpointer.amend(start, self._host(writer))
    load = lambda step: parallel.put_batch(self.experiment.data.train.batch(step), mode, mesh)
    lr_scale = parallel.put_shared(np.float32(self.monitor.tracker.lr_scale), mesh)
    log = metrics.TrainLog(
        self.experiment, start, writer, self.options.progress, self.compilations)
    train_step = self.compilations.of(self.program.train_step, "train step", batch=1)
    running = collections.deque()  # a small result of each step that may still be computed
    due = lambda every: every and done % every == 0 or done == config.total_steps
    total = start if self.monitor.exhausted else config.total_steps
    batches = prefetch(load, range(start, total))
    with contextlib.closing(batches), contextlib.closing(log):
      for done, batch in enumerate(batches, start + 1):
        state, out = train_step(state, batch, lr_scale)
        self.signals.hold()  # until the first step is compiled, there is nothing to save
        running.append(out["failed_step"])
        if len(running) == parallel.steps_in_flight(mesh):
          running.popleft().block_until_ready()
        log.step(done, out if due(config.log_every) else None)
        if due(config.log_every):
          self.folder.check_place(parallel.any_host)
        # If the last save has failed, the save below raises its error. Several hosts learn of it only
        # when a step is logged.
        failed = (jax.process_count() == 1 or due(config.log_every)) and parallel.any_host(
            self.checkpointer.failed)
        stopping = self.signals.reached() or failed
        evaluating = due(config.eval_every) or due(config.full_eval_every)
        if not (stopping or evaluating or due(config.checkpoint_every)):
          continue

        with log.paused(out, evaluating):  # every step until here is done and good
          self.folder.check_place(parallel.any_host)
          tracker = self.monitor.tracker
          if evaluating:
            self.monitor.left = EVALUATION
            if not stopping:
              evaluate(done, state)
              stopping = bool(self.monitor.left)
            lr_scale = parallel.put_shared(np.float32(self.monitor.tracker.lr_scale), mesh)
          is_best = self.monitor.tracker.best_step != tracker.best_step
          if stopping or self.monitor.exhausted or is_best or due(config.checkpoint_every):
            self.checkpointer.save(
                done, parallel.global_state(state, mode, mesh), self._host(writer))
        if stopping:
          raise Preempted(f"stopped after step {done}; the same command continues from there")
        if self.monitor.exhausted:
          metrics.say(f"stopped early at step {done}: {self.experiment.monitor} has not improved in "
                      f"{self.monitor.tracker.stale} evaluations")
          break
    return parallel.global_state(state, mode, mesh)

  def _host(self, writer: metrics.MetricWriter) -> dict[str, Any]:
    """What a checkpoint holds in addition to the state."""
    tracker = self.monitor.tracker
    return {"tracker": dataclasses.asdict(tracker), "best_step": tracker.best_step,
            "seconds": self._seconds(), "metrics": writer.mark(), "left": self.monitor.left}

  def _report(self, state: TrainState) -> None:
    """Writes the metrics of the best state on every split, the pictures, and result.json."""
    self.folder.check_place(parallel.any_host)
    steps = checkpoint = int(state.step)
    stopped = f"stopped after the last step, {steps}; the same command evaluates it"
    self.checkpointer.wait()  # a result exists once what it names is on disk
    self.checkpointer.close()
    if jax.process_count() == 1:
      self.signals.release(stopped)
    variables = state.variables
    if self.experiment.monitor and self.monitor.tracker.best_step not in (-1, steps):
      try:
        best = self.checkpointer.restore(self.program.abstract_state,
                                         self.monitor.tracker.best_step)
        checkpoint, variables = best.step, best.state.variables
      except UserError as fault:  # damaged since
        metrics.say(f"warning: {fault}; the results are those of the last step")
    found, findings = evaluate(self.experiment, self.evaluator, variables, state.rng,
                               self.folder.read_assets())
    # All hosts take part, as each holds a part of the arrays.
    digest = state_sha256(state, parallel.array_to_first_host)
    self.folder.check_place(parallel.any_host)
    self.signals.release(stopped)  # the hosts no longer wait for each other
    if jax.process_index() != 0:
      return
    rows = report.read_metrics(self.folder.metrics_file)
    curves = functools.partial(report.learning_curves, rows, self.experiment.task.titles)
    figures = {**findings.figures, "learning_curves": curves}
    self.folder.write_findings(
        dataclasses.replace(findings, figures=figures), title(self.config))
    self.folder.write_result({
        "family": self.config.family, "preset": self.config.preset,
        "data": self.experiment.data.name, "steps": steps,
        "total_steps": self.config.total_steps, "metrics": found, "checkpoint": checkpoint,
        "params": parameter_count(state.params), "seconds": self._seconds(),
        "examples_per_second": metrics.median_rate(rows), "seed": self.config.seed,
        "devices": f"{self.program.mesh.devices.size} x {jax.devices()[0].device_kind}",
        "state_sha256": digest,
    })

  def _seconds(self) -> float:
    return round(self.seconds + time.monotonic() - self.started, 3)
