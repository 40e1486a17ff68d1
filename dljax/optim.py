"""The Optax layer: typed config -> optimizer and learning-rate schedule.

An optimizer is a chain of these parts, in this order; a part that is off is absent:

  1. `clip_norm`: scales the gradient down to that global norm, taken over all trainable arrays.
  2. `l2`: adds `l2 * parameter` to the gradient, as torch's `weight_decay` does.
  3. The rule `name` turns the gradient into a direction (table below).
  4. `weight_decay`: adds `weight_decay * parameter` to the direction (Loshchilov & Hutter,
     "Decoupled Weight Decay Regularization", 2019). The learning rate multiplies it too, as in
     optax and torch.
  5. Lamb only: the layer-wise trust ratio.
  6. `learning_rates`: multiplies the direction by a factor that depends on the parameter's path.
  7. The scheduled learning rate, with a minus. It is the last factor of everything, decay
     included, so scaling the final updates is the same as scaling the learning rate.

Both decays act on kernels and embeddings only. Arrays of rank <= 1 and arrays named `bias` or
`scale` (biases and norms) are exempt, and so is what the model's file names (NO_DECAY).

The rules are, with the gradient g, `**` and sqrt elementwise, and `momentum`, `b1`, `b2` and `eps`
from the config:

  sgd       g
  momentum  m = momentum * m + g; direction m (Polyak 1964, in torch's form without dampening)
  nesterov  m as above; direction g + momentum * m (Sutskever et al. 2013, in torch's form)
  adagrad   s = s + g**2 from 0; g / sqrt(s + eps**2) (Duchi et al. 2011)
  rmsprop   v = b2 * v + (1 - b2) * g**2 from 0; g / (sqrt(v) + eps), then heavy-ball by `momentum`
            if that is not 0 (Tieleman & Hinton 2012, with torch's eps and momentum)
  adam      bias-corrected m / (sqrt(v) + eps) (Kingma & Ba 2015)
  adamw     the same as adam; the name to use with `weight_decay`
  lamb      adam's direction plus decay, times |parameter| / |direction| per array, or times 1
            where either norm is 0 (You et al. 2020, Algorithm 2, with phi(z) = z)
  lion      sign(b1 * m + (1 - b1) * g); m = b2 * m + (1 - b2) * g (Chen et al. 2023)
  muon      kernels: nesterov's direction, orthogonalised by five Newton-Schulz steps, times
            sqrt(max(1, fan_out / fan_in)) (Jordan et al. 2024); embeddings, biases and norms take
            adam's rule

Path patterns (`freeze`, `learning_rates`) are globs over the whole path of a parameter, such as
"stage1/conv1/kernel": `*` matches any text, slashes included, `?` matches one character, and
`[ab]` matches one of a set. So "stage1/*" is a whole module and "*/bias" is every bias.

A task with several players (a GAN) has an optimizer for each, `config.optimizers.<player>`. The
paths in its patterns start with the player's name ("critic/conv1/*"). A player that is updated n
times per step goes through its schedule n times as fast. All players share what is done on a
plateau.
"""

import contextlib
import dataclasses
import difflib
import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dljax.config import Field, Group, one_of
from dljax.errors import UserError, unknown

PyTree = Any

# Decay rates and eps are as published (of adagrad and rmsprop, eps is torch's). Learning rates and
# weight decays are usual starting points.
_PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "sgd": {"learning_rate": 0.1},
    "momentum": {"learning_rate": 0.1, "momentum": 0.9},
    "nesterov": {"learning_rate": 0.1, "momentum": 0.9},
    "adagrad": {"learning_rate": 0.01, "eps": 1e-10},
    "rmsprop": {"learning_rate": 0.001, "b2": 0.9},
    "adam": {"learning_rate": 0.001},
    "adamw": {"learning_rate": 0.001, "weight_decay": 0.01},
    "lamb": {"learning_rate": 0.001, "eps": 1e-6, "weight_decay": 0.01},
    "lion": {"learning_rate": 0.0001, "b2": 0.99, "weight_decay": 0.1},
    "muon": {"learning_rate": 0.02, "momentum": 0.95},
}
OPTIMIZERS = tuple(_PUBLISHED)
SCHEDULES = ("constant", "linear", "cosine", "step", "exponential", "inverse_sqrt", "one_cycle")

# The share of the steps before the peak, and the first rate as a share of the peak (torch, optax).
_ONE_CYCLE_RISE, _ONE_CYCLE_START = 0.3, 1 / 25


def default_config(name: str = "adamw") -> ml_collections.ConfigDict:
  """Returns the config of optimizer `name` with its usual numbers.

  Setting only `config.name` afterwards keeps the other numbers as they are.
  """
  if name not in _PUBLISHED:
    raise unknown("--config.optimizer.name", name, OPTIMIZERS)
  config = Group({
      "name": Field(name, one_of("The update rule", OPTIMIZERS)),
      "learning_rate": Field(0.0, "The schedule's peak."),
      "momentum": Field(0.0, "The decay of the sum of past gradients (momentum, nesterov, muon; "
                        "rmsprop, where 0 means no momentum)."),
      "b1": Field(0.9, "The decay of the average of gradients (adam, adamw, lamb, muon's adam; "
                  "lion's beta_1)."),
      "b2": Field(0.999, "The decay of the average of squared gradients (rmsprop, adam, adamw, "
                  "lamb, muon's adam). Lion keeps no squares: there it is the decay of the "
                  "gradients that it remembers (its beta_2)."),
      "eps": Field(1e-8, "The number added to the root of the squares, in units of the gradient "
                   "(all rules that divide by a root)."),
      "schedule": Field("cosine", one_of("The course of the learning rate", SCHEDULES)),
      "warmup_fraction": Field(0.05, "The share of total_steps in which the learning rate rises "
                               "linearly from 0."),
      "end_factor": Field(0.0, "The final learning rate as a share of the peak (linear, cosine, "
                          "exponential, one_cycle)."),
      "decay_boundaries": Field((0.5, 0.75), "The shares of total_steps at which the schedule "
                                '"step" multiplies the learning rate by decay_factor.'),
      "decay_factor": Field(0.1, "The factor at each of decay_boundaries."),
      "clip_norm": Field(0.0, "The largest global norm of the gradient; 0 is off."),
      "weight_decay": Field(0.0, "The coefficient of decoupled decay; 0 is off."),
      "l2": Field(0.0, "The coefficient of decay through the gradient, the alternative to "
                  "weight_decay; 0 is off."),
      "freeze": Field((), "Patterns of parameters that never change and have no optimizer state, "
                      "such as stem*."),
      "learning_rates": Field((), 'Entries "pattern=factor" that multiply the learning rate of '
                              "parameters; the first match counts."),
      "plateau_factor": Field(1.0, "The factor on the learning rate at each plateau of the "
                              "monitored metric; 1 is off."),
      "plateau_patience": Field(5, "The number of evaluations in a row without improvement that "
                                "make a plateau."),
      "plateau_min_delta": Field(0.0, "The difference that an improvement must exceed to count, in "
                                 "the metric's units."),
  })
  config.update(_PUBLISHED[name])
  return config


def player_configs(
    config: ml_collections.ConfigDict, players: Sequence[str],
) -> dict[str, ml_collections.ConfigDict]:
  """Returns each player's optimizer config.

  With one player this is `config.optimizer`, with several `config.optimizers.<player>`.

  Args:
    config: the experiment's config.
    players: the task's players; see `tasks.base.Task`.

  Raises:
    UserError: the players differ in what they do on a plateau.
    ValueError: `config.optimizers` names other players than the task has.
  """
  names = list(dict.fromkeys(players))
  if len(names) == 1:
    return {names[0]: config.optimizer}
  if set(config.optimizers) != set(names):
    raise ValueError(f"config.optimizers has {sorted(config.optimizers)}, the task's players are "
                     f"{sorted(names)}")
  configs = {name: config.optimizers[name] for name in names}
  for field in ("plateau_factor", "plateau_patience", "plateau_min_delta"):
    if len({player[field] for player in configs.values()}) > 1:
      value = configs[names[-1]][field]
      raise UserError(f"--config.optimizers.{names[-1]}.{field}={value}: all players share the "
                      "monitored metric, so give each of them the same value")
  return configs


@contextlib.contextmanager
def _flags_of(player: str) -> Iterator[None]:
  """Makes errors raised inside name the flags of `player`, if there are several players."""
  try:
    yield
  except UserError as error:
    if not player:
      raise
    line = str(error).replace("--config.optimizer", f"--config.optimizers.{player}", 1)
    raise UserError(line) from None


def make_optimizer(
    config: ml_collections.ConfigDict, total_steps: int, player: str = "",
    input_dimensions: Sequence[tuple[str, int]] = (), no_decay: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Returns the optimizer and its learning-rate schedule.

  Args:
    config: the optimizer's config, as `default_config` makes it.
    total_steps: the number of updates in the whole run.
    player: the player whose parameters it updates, if there are several players. The paths that
      the patterns match then start with it.
    input_dimensions: (pattern of a kernel's path, number of its leading dimensions that are
      inputs). Muon needs it to read a kernel as a matrix. All dimensions but the last are inputs
      of a kernel that no pattern matches. See `tasks.base.TaskBase.input_dimensions`.
    no_decay: the patterns of arrays that do not decay, whatever their rank. See
      `tasks.base.TaskBase.no_decay`.

  Returns:
    An optimizer for any pytree of parameters, whose updates are added to the parameters (`update`
    needs them as its third argument); and the schedule, step -> learning rate f[], traceable.

  Raises:
    UserError: a name is unknown, or a value is out of range.
  """
  with _flags_of(player):
    _check(config)
    schedule = make_schedule(config, total_steps)
  chain, prefix = [], f"{player}/" if player else ""
  mask = functools.partial(decay_mask, no_decay=no_decay, prefix=prefix)
  if config.clip_norm:
    chain.append(optax.clip_by_global_norm(config.clip_norm))
  if config.l2:
    chain.append(optax.add_decayed_weights(config.l2, mask=mask))
  chain.append(_rule(config, input_dimensions, prefix))
  if config.weight_decay:
    chain.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
  if config.name == "lamb":
    chain.append(optax.scale_by_trust_ratio())
  if config.learning_rates:
    chain.append(_scale_by_path(_factors(config), prefix))
  chain.append(optax.scale_by_learning_rate(schedule))
  tx = optax.chain(*chain)
  if config.freeze:
    def label(name: str, _: Any) -> str:
      return "frozen" if _matches(prefix + name, config.freeze) else "trained"

    tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()},
                         lambda params: _map_by_name(label, params))
  return tx, schedule


def make_schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
  """Returns the function step i32[] -> learning rate f[], for steps 0 to total_steps - 1.

  The N = total_steps - W steps of the schedule follow the W = warmup_fraction * total_steps steps
  of the warm-up (rounded, at most total_steps - 1). The schedules are, as shares of
  `learning_rate`, where k counts the schedule's steps from 0, p = k / N, and e is `end_factor`:

    constant      1
    linear        1 - (1 - e) * p
    cosine        e + (1 - e) * (1 + cos(pi * p)) / 2
    step          decay_factor ** (number of round(boundary * total_steps) that are <= step)
    exponential   e ** p, needs e > 0
    inverse_sqrt  sqrt(W / (W + k)), W at least 1
    one_cycle     1/25 -> 1 -> e, half-cosines that meet at p = 0.3 (Smith & Topin 2018, with
                  torch's numbers)

  The warm-up is linear, from 0 at step 0 to the schedule's first value at step W.
  """
  if total_steps < 1:
    raise UserError(f"--config.total_steps={total_steps}: must be at least 1")
  peak, end = config.learning_rate, config.end_factor
  warmup = min(round(config.warmup_fraction * total_steps), total_steps - 1)
  decay = total_steps - warmup
  if config.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif config.schedule == "linear":
    after = optax.linear_schedule(peak, peak * end, decay)
  elif config.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, decay, end)
  elif config.schedule == "exponential":
    after = optax.exponential_decay(peak, decay, end, end_value=peak * end)
  elif config.schedule == "step":
    boundaries = [round(boundary * total_steps) - warmup for boundary in config.decay_boundaries]
    boundaries = jnp.array(boundaries, jnp.int32)
    after = lambda k: peak * config.decay_factor ** jnp.sum(k >= boundaries)
  elif config.schedule == "inverse_sqrt":
    after = lambda k: peak * jnp.sqrt(max(warmup, 1) / (max(warmup, 1) + k))
  elif config.schedule == "one_cycle":
    after = lambda k: peak * _one_cycle(jnp.minimum(k / decay, 1.0), end)
  else:
    raise unknown("--config.optimizer.schedule", config.schedule, SCHEDULES)
  if warmup:
    after = optax.join_schedules([optax.linear_schedule(0.0, after(0), warmup), after], [warmup])
  return lambda step: jnp.asarray(after(jnp.asarray(step, float)), float)


def _one_cycle(p: jax.Array, end: float) -> jax.Array:
  rise, start = _ONE_CYCLE_RISE, _ONE_CYCLE_START
  return jnp.where(p < rise, _half_cosine(start, 1.0, p / rise),
                   _half_cosine(1.0, end, (p - rise) / (1 - rise)))


def _half_cosine(a: float, b: float, t: jax.Array) -> jax.Array:
  """The curve from a at t = 0 to b at t = 1."""
  return b + (a - b) * (1 + jnp.cos(jnp.pi * t)) / 2


def check_patterns(config: ml_collections.ConfigDict, params: PyTree, player: str = "") -> None:
  """Refuses path patterns that match nothing.

  Call it as soon as the parameters' paths are known.

  Args:
    config: the optimizer's config, as `default_config` makes it.
    params: the parameters that the optimizer updates, or their specifications.
    player: the player whose parameters they are; see `make_optimizer`.

  Raises:
    UserError: a pattern matches no parameter, or nothing is left to train.
  """
  with _flags_of(player):
    _check_patterns(config, params, f"{player}/" if player else "")


def _check_patterns(config: ml_collections.ConfigDict, params: PyTree, prefix: str) -> None:
  names: list[str] = []
  _map_by_name(lambda name, _: names.append(prefix + name), params)
  patterns = [("freeze", pattern) for pattern in config.freeze]
  patterns += [("learning_rates", pattern) for pattern, _ in _factors(config)]
  for field, pattern in patterns:
    if not any(_matches(name, [pattern]) for name in names):
      near = difflib.get_close_matches(pattern.replace("*", ""), names, n=1, cutoff=0.0)
      mend = f"the nearest is {near[0]!r}" if near else "the model has none; drop it"
      raise UserError(f"--config.optimizer.{field}: {pattern!r} matches no parameter; {mend}")
  if config.freeze and all(_matches(name, config.freeze) for name in names):
    raise UserError(f"--config.optimizer.freeze={tuple(config.freeze)}: leaves nothing to train")


def decay_mask(params: PyTree, no_decay: Sequence[str] = (), prefix: str = "") -> PyTree:
  """Returns True for each array that decays: of rank >= 2, and no `bias` or `scale`.

  Args:
    params: the parameters.
    no_decay: the patterns of the paths of other arrays that do not decay.
    prefix: what the paths start with for the patterns.

  Returns:
    Booleans in the structure of `params`.
  """
  def decays(name: str, x: jax.Array) -> bool:
    vector = x.ndim < 2 or name.split("/")[-1] in ("bias", "scale")
    return not vector and not _matches(prefix + name, no_decay)

  return _map_by_name(decays, params)


@dataclasses.dataclass(frozen=True)
class Tracker:
  """What the host remembers of the monitored metric.

  The best checkpoint, early stopping and the plateau all depend on it. Its fields are JSON-able:
  `dataclasses.asdict(tracker)` and `Tracker(**fields)` round-trip.

  Attributes:
    best_value: the best finite value so far; None before there is one.
    best_step: the step of that value; -1 before there is one.
    reference: the value that the next one must beat by more than `plateau_min_delta` to count as
      an improvement; None before there is one.
    stale: the number of evaluations since the last improvement, for early stopping.
    plateau_stale: the same number, but counted again from 0 after each reduction.
    lr_scale: the factor on the learning rate.
  """

  best_value: float | None = None
  best_step: int = -1
  reference: float | None = None
  stale: int = 0
  plateau_stale: int = 0
  lr_scale: float = 1.0


def track(
    config: ml_collections.ConfigDict, tracker: Tracker, step: int, value: float,
    higher_is_better: bool,
) -> Tracker:
  """Returns the tracker after one evaluation; a value that is not finite is no improvement."""
  def beats(old: float | None, margin: float) -> bool:
    gain = math.inf if old is None else (value - old if higher_is_better else old - value)
    return math.isfinite(value) and gain > margin

  if beats(tracker.best_value, 0.0):
    tracker = dataclasses.replace(tracker, best_value=value, best_step=step)
  if beats(tracker.reference, config.plateau_min_delta):
    return dataclasses.replace(tracker, reference=value, stale=0, plateau_stale=0)
  tracker = dataclasses.replace(tracker, stale=tracker.stale + 1,
                                plateau_stale=tracker.plateau_stale + 1)
  if tracker.plateau_stale < config.plateau_patience:
    return tracker
  return dataclasses.replace(tracker, plateau_stale=0,
                             lr_scale=tracker.lr_scale * config.plateau_factor)


def _rule(
    config: ml_collections.ConfigDict, input_dimensions: Sequence[tuple[str, int]], prefix: str,
) -> optax.GradientTransformation:
  """The transformation gradient -> direction, before decay and learning rate."""
  adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
  match config.name:
    case "sgd":
      return optax.identity()
    case "momentum":
      return optax.trace(config.momentum)
    case "nesterov":
      return optax.trace(config.momentum, nesterov=True)
    case "adagrad":
      return optax.scale_by_rss(initial_accumulator_value=0.0, eps=config.eps**2)
    case "rmsprop":
      rms = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False)
      return optax.chain(rms, optax.trace(config.momentum)) if config.momentum else rms
    case "adam" | "adamw" | "lamb":
      return adam
    case "lion":
      return optax.scale_by_lion(config.b1, config.b2)
    case "muon":
      # This is not optax.contrib.muon, which takes kernels of rank 2 only and, unlike the
      # published rule, corrects the two terms of Nesterov's sum by unequal bias factors.
      orthogonal = optax.chain(optax.trace(config.momentum, nesterov=True),
                               _orthogonalize_kernels(input_dimensions, prefix))
      return optax.partition({"muon": orthogonal, "adam": adam},
                             lambda params: _map_by_name(_muon_or_adam, params))
  raise unknown("--config.optimizer.name", config.name, OPTIMIZERS)


def _muon_or_adam(name: str, x: jax.Array) -> str:
  """Which of the two updates the parameter with path `name`, if the optimizer is muon."""
  return "muon" if name.split("/")[-1] == "kernel" and x.ndim >= 2 else "adam"


def newton_schulz(x: jax.Array) -> jax.Array:
  """Approximates U V^T for x [M, N] = U S V^T.

  Every singular value above 1 % of |x| ends between 0.68 and 1.14. These are five steps of the
  quintic iteration with the coefficients of Jordan et al., "Muon: An optimizer for hidden layers
  in neural networks", 2024 (https://kellerjordan.github.io/posts/muon).
  """
  a, b, c = 3.4445, -4.7750, 2.0315
  wide = x.T if x.shape[0] > x.shape[1] else x  # the smaller Gram matrix
  wide = wide / (jnp.linalg.norm(wide) + 1e-7)
  for _ in range(5):
    gram = wide @ wide.T
    wide = a * wide + (b * gram + c * gram @ gram) @ wide
  return wide.T if x.shape[0] > x.shape[1] else wide


def _orthogonalize_kernels(
    input_dimensions: Sequence[tuple[str, int]], prefix: str,
) -> optax.GradientTransformation:
  """Orthogonalises kernels, as matrices [fan_in, fan_out], and scales them by their shape.

  The last dimension is the output and all dimensions before it are inputs, as in Dense, Conv and
  the projection that joins attention heads. `input_dimensions` says which kernels differ, such as
  a projection whose output is [heads, head size].
  """
  def orthogonalize(name: str, x: jax.Array) -> jax.Array:
    own = (count for pattern, count in input_dimensions if _matches(prefix + name, [pattern]))
    inputs = next(own, x.ndim - 1)
    fan_in = math.prod(x.shape[:inputs])
    fan_out = x.size // fan_in
    matrix = newton_schulz(x.reshape(fan_in, fan_out))
    return (matrix * math.sqrt(max(1.0, fan_out / fan_in))).reshape(x.shape)

  return optax.stateless(lambda updates, _: _map_by_name(orthogonalize, updates))


def _scale_by_path(factors: list[tuple[str, float]], prefix: str) -> optax.GradientTransformation:
  def scale(name: str, x: jax.Array) -> jax.Array:
    own = (factor for pattern, factor in factors if _matches(prefix + name, [pattern]))
    return x * next(own, 1.0)

  return optax.stateless(lambda updates, _: _map_by_name(scale, updates))


def _factors(config: ml_collections.ConfigDict) -> list[tuple[str, float]]:
  """The entries of `learning_rates` as (pattern, factor)."""
  factors = []
  for entry in config.learning_rates:
    pattern, _, factor = str(entry).rpartition("=")
    try:
      valid = pattern and 0 < float(factor) < math.inf
    except ValueError:
      valid = False
    if not valid:
      raise UserError(
          f"--config.optimizer.learning_rates: {entry!r} is not 'pattern=factor' with a factor "
          "above 0, such as 'stem/*=0.1' (put what should not learn into freeze)")
    factors.append((pattern, float(factor)))
  return factors


def _map_by_name(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
  """Maps (path as "conv1/kernel", leaf) over `tree`."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: function(jax.tree_util.keystr(path, simple=True, separator="/"), x), tree)


def _matches(name: str, patterns: Iterable[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check(config: ml_collections.ConfigDict) -> None:
  """Checks the names and ranges of the whole config; NaN is out of every range."""
  if config.name not in OPTIMIZERS:
    raise unknown("--config.optimizer.name", config.name, OPTIMIZERS)
  if config.schedule not in SCHEDULES:
    raise unknown("--config.optimizer.schedule", config.schedule, SCHEDULES)
  c, inf = config, math.inf
  needs_momentum = c.name in ("momentum", "nesterov", "muon")
  end_can_be_0 = c.schedule != "exponential"
  bounds = tuple(c.decay_boundaries)
  shares = all(isinstance(b, (int, float)) and 0 < b < 1 for b in bounds)
  for field, valid, mend in (
      ("learning_rate", 0 < c.learning_rate < inf, "must be above 0"),
      ("momentum", 0 <= c.momentum < 1, "must be at least 0 and below 1"),
      ("momentum", c.momentum > 0 or not needs_momentum,
       f"{c.name} needs one above 0, such as 0.9"),
      ("b1", 0 <= c.b1 < 1, "must be at least 0 and below 1"),
      ("b2", 0 < c.b2 < 1, "must be above 0 and below 1"),
      ("eps", 0 < c.eps < inf, "must be above 0"),
      ("warmup_fraction", 0 <= c.warmup_fraction < 1, "must be at least 0 and below 1"),
      ("end_factor", 0 <= c.end_factor <= 1, "must be from 0 to 1"),
      ("end_factor", c.end_factor > 0 or end_can_be_0,
       "the exponential schedule needs one above 0"),
      ("decay_boundaries", shares and all(a < b for a, b in zip(bounds, bounds[1:])),
       "must be rising shares of total_steps between 0 and 1"),
      ("decay_boundaries",
       c.schedule != "step" or shares and all(b > c.warmup_fraction for b in bounds),
       f"must lie after the warm-up, which ends at {c.warmup_fraction}"),
      ("decay_factor", 0 < c.decay_factor <= 1, "must be above 0 and at most 1"),
      ("clip_norm", 0 <= c.clip_norm < inf, "must be at least 0; 0 is off"),
      ("weight_decay", 0 <= c.weight_decay < inf, "must be at least 0; 0 is off"),
      ("weight_decay", not (c.weight_decay and c.name == "adam"),
       "adam has no weight decay; use adamw, or l2"),
      ("l2", 0 <= c.l2 < inf, "must be at least 0; 0 is off"),
      ("l2", not (c.l2 and c.weight_decay),
       "is the alternative to weight_decay; set one of them to 0"),
      ("plateau_factor", 0 < c.plateau_factor <= 1, "must be above 0 and at most 1; 1 is off"),
      ("plateau_patience", c.plateau_patience >= 1, "must be at least 1"),
      ("plateau_min_delta", 0 <= c.plateau_min_delta < inf, "must be at least 0"),
  ):
    if not valid:
      raise UserError(f"--config.optimizer.{field}={c[field]}: {mend}")
  _factors(config)
