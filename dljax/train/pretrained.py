"""Starting from weights that were trained before: `--config.init.source`.

The model takes the source's arrays by name. The head, that is every array whose size depends on
the number of classes, starts from scratch if the source has another number of classes or no head,
or if `--config.init.new_head` is set. Any other array that is missing, left over or of another
shape is an error that names it.

Some families have models with several heads, one for pre-training and others for fine-tuning. Of
these, the model takes what the source has; the others start from scratch or are left out.

A model with an attribute `backbone`, a module whose variables lie under "backbone/" in the model's
own, can start from the backbone's weights alone. All else then starts from scratch, and the
source's head is left out.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dljax import interop
from dljax.errors import UserError
from dljax.interop import files, folder, hub, variants
from dljax.tasks.base import CARRY
from dljax.train import parallel
from dljax.train.checkpoint import Checkpointer
from dljax.train.experiment import Experiment
from dljax.train.state import TrainState, averaged, split_carry
from dljax.train.workdir import Workdir, decisive


BACKBONE = "backbone/"


@dataclasses.dataclass(frozen=True)
class Weights:
  """Variables to start from.

  Attributes:
    arrays: path ("params/conv1/kernel", "batch_stats/norm1/mean") -> array, without the arrays
      that start from scratch.
    summary: one line that names the source, and the arrays that start from scratch.
  """

  arrays: Mapping[str, np.ndarray]
  summary: str

  def put(self, state: TrainState) -> TrainState:
    """The initial `state`, on its devices, with these variables, and the averages equal to them.
    """
    flat = traverse_util.flatten_dict({"params": state.params, **state.model_state}, sep="/")
    flat |= {path: parallel.put_array(np.asarray(array), flat[path].sharding)
             for path, array in self.arrays.items()}
    variables = traverse_util.unflatten_dict(flat, sep="/")
    params = variables.pop("params")
    model_state = state.model_state | variables
    ema = jax.tree.map(jnp.copy, averaged(params, model_state)) if state.ema else {}
    return state.replace(params=params, model_state=model_state, ema=ema)


def load(experiment: Experiment, abstract_state: TrainState) -> Weights:
  """The weights that `experiment.config.init` names.

  Args:
    experiment: the experiment to train.
    abstract_state: the shapes of its state.

  Raises:
    UserError: the source does not exist, holds no weights, or does not fit the model.
  """
  init, task = experiment.config.init, experiment.task
  state, _ = split_carry(abstract_state)  # the carry belongs to the data, and starts from scratch
  specs = traverse_util.flatten_dict({"params": state.params, **state.model_state}, sep="/")
  model, prefix = getattr(task, "model", None), ""
  head = {}
  if hasattr(model, "num_classes"):
    batch = _zeros(experiment.data.batch_spec)
    head = variants.head(lambda n: dataclasses.replace(task, model=model.clone(num_classes=n)).init(
        jax.random.key(0), batch))
  if init.new_head and not head:
    raise UserError("--config.init.new_head: this model has no head that depends on a number of classes; drop it")
  where = f"--config.init.source={init.source}"
  images, notes = experiment.data.batch_spec.get("image"), []
  image = images.shape[1:3] if images is not None and len(images.shape) == 4 else None
  try:
    tensors, source, place = _read(init.source)
    if init.format:
      source = init.format
      if source not in (interop.OURS, *interop.sources(model)):
        interop.check_source("--config.init.format", source)
    backbone = getattr(model, "backbone", None)
    if backbone is not None and not _is_of(model, tensors, specs):
      prefix, part = BACKBONE, {path.replace(BACKBONE, "", 1): spec for path, spec in specs.items()
                                if BACKBONE in path}
      source = source or interop.recognise(backbone, tensors, part)
      inputs = _inputs(experiment, BACKBONE.rstrip("/"))
      variables = interop.load(backbone, _headless(backbone, inputs, tensors, source, part),
                               source, specs=part, image=image, note=notes.append)
    else:
      source = source or interop.recognise(model, tensors, specs)
      variables = interop.load(model, tensors, source, specs=specs, head=head, partial=True,
                               image=image, note=notes.append)
  except UserError as error:
    raise UserError(str(error) if str(error).startswith("--") else f"{where}: {error}") from error
  arrays = {path.replace("/", f"/{prefix}", 1): array
            for path, array in traverse_util.flatten_dict(variables, sep="/").items()}
  if init.new_head:
    arrays = {path: array for path, array in arrays.items() if path not in head}
  fresh = sorted(path.removeprefix("params/") for path in specs.keys() - arrays.keys())
  summary = f"starting from {place}: {len(arrays)} of {len(specs)} arrays"
  if prefix:
    summary += ", the backbone; the rest starts from scratch"
  elif fresh:
    verb = "start" if len(fresh) > 1 else "starts"
    named = ", ".join(fresh[:4]) + (f" and {len(fresh) - 4} more" if len(fresh) > 4 else "")
    summary += f"; {named} {verb} from scratch"
    if not head.keys().isdisjoint(specs.keys() - arrays.keys()):
      summary += f" for {model.num_classes} classes"
  return Weights(arrays, "; ".join([summary, *notes]))


def _is_of(model: Any, tensors: interop.Tensors, specs: interop.Specs) -> bool:
  """Whether any tensor has a name that this model has in some source."""
  try:
    return interop.recognise(model, tensors,
                             specs) != interop.OURS or bool(specs.keys() & tensors.keys())
  except UserError:
    return False


def _zeros(specs: Any) -> Any:
  return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)


def _inputs(experiment: Experiment, part: str) -> tuple[Any, ...]:
  """The shapes and dtypes of the arguments of the submodule `part`, for a training batch."""
  found = []

  def record(
      call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext,
  ) -> Any:
    if context.module.name == part and context.method_name == "__call__":
      found.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args))
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    batch = _zeros(experiment.data.batch_spec)
    jax.eval_shape(lambda: experiment.task.init(jax.random.key(0), batch))
  return found[0]


def _headless(
    backbone: Any, inputs: tuple[Any, ...], tensors: interop.Tensors, source: str,
    specs: interop.Specs,
) -> dict[str, np.ndarray]:
  """The tensors without the backbone's head.

  Our own tensors of norms get the names of frozen norms if `specs` has frozen norms.

  Args:
    backbone: the module.
    inputs: the shapes and dtypes of its arguments.
    tensors: name -> array, as `source` has them.
    source: the library whose names the tensors have.
    specs: path -> shape and dtype of the wanted variables.
  """
  table = interop.find_table(backbone, source)
  head = variants.head(
      lambda n: backbone.clone(num_classes=n).init(jax.random.key(0), *_zeros(inputs)))
  names = {name for entry in table.entries(head) for name in entry.names}
  kept = {name: tensor for name, tensor in tensors.items() if name not in names}
  if source == interop.OURS:
    for path in specs.keys() - kept.keys():
      trained = path.replace("batch_stats/", "params/", 1)
      if trained in kept:
        kept[path] = kept.pop(trained)
  return kept


def _read(source: str) -> tuple[Mapping[str, np.ndarray], str, str]:
  """(tensors, the source of their names or "" if it is not known yet, the place for the message).
  """
  path = Path(source).expanduser()
  if source.startswith(hub.PREFIX) or not path.is_dir():
    return interop.read(source if source.startswith(hub.PREFIX) else path), "", source
  if is_run(path):
    step, tensors = read_run(path)
    return tensors, interop.OURS, f"checkpoint {step} of {source}"
  if (path / folder.WEIGHTS).exists():
    return interop.read(path / folder.WEIGHTS), interop.OURS, source
  if files.has_weights(path):
    return interop.read(path), "", source
  raise UserError(f"the folder holds neither a run nor {folder.WEIGHTS} nor {files.WHOLE}; name the "
                  "workdir of a run, a .safetensors file or a folder that holds one of these")


def is_run(path: Path) -> bool:
  """Whether a folder is a run's. Another library's folder may also hold a config.json."""
  run = Workdir(path)
  return run.config_file.exists() and (run.checkpoints.exists() or not files.has_weights(path))


def read_run(path: Path) -> tuple[int, dict[str, np.ndarray]]:
  """The best checkpoint of a run, or the latest where nothing was monitored or the best is gone.

  Args:
    path: the run's workdir.

  Returns:
    The step, and the variables that evaluation uses: path ("params/conv1/kernel") -> array,
      averaged if the run averages.

  Raises:
    UserError: the run has no intact checkpoint, it is another run's, or config.json was damaged.
  """
  run = Workdir(path)
  with Checkpointer(run.checkpoints, run=run.run, config=decisive(run.read_config()),
                    read_only=True) as checkpointer:
    best = (checkpointer.host() or {}).get("best_step")
    restored = checkpointer.restore_arrays(_of_evaluation,
                                           best if best in checkpointer.steps() else None)
  if restored is None:
    raise UserError(f"{path} holds no intact checkpoint; train there first")
  return restored.step, {_variable(name): array for name, array in restored.state.items()}


def _of_evaluation(names: Iterable[str]) -> list[str]:
  """The arrays of a state that evaluation uses: each variable's average, or else the variable."""
  chosen = {}
  # An average replaces what came before.
  for name in sorted(names, key=lambda name: name.startswith("ema/")):
    if name.startswith(("params/", "model_state/",
                        "ema/")) and not name.startswith(f"model_state/{CARRY}/"):
      chosen[_variable(name)] = name
  return list(chosen.values())


def _variable(name: str) -> str:
  """"params/x" for "params/x" and "ema/params/x", "batch_stats/x" for "model_state/batch_stats/x".
  """
  return name.removeprefix("model_state/").removeprefix("ema/")
