"""Connectionist temporal classification (CTC): a text's probability over all its alignments.

Alex Graves, Santiago Fernández, Faustino Gomez, Jürgen Schmidhuber. "Connectionist Temporal
Classification: Labelling Unsegmented Sequence Data with Recurrent Neural Networks", 2006.
https://www.cs.toronto.edu/~graves/icml_2006.pdf

An alignment gives each frame a label or the blank. It spells the text that is left when first
repeated labels are merged and then blanks are dropped. The probability of a text is the sum over
all alignments that spell it. What is special here:
- Everything is in log space and at least float32, whatever the logits are.
- The gradient is the closed form of equation 16, softmax minus the share of alignments, from the
  backward variables of section 4.1. It takes one scan each way, and avoids the rounding of a
  derivative through every addition of logarithms.
- At each frame the log-probability of the most probable state is set to 0, and what was subtracted
  is summed separately, so that rounding errors do not grow with the length. Otherwise a loss of
  600 leaves only four digits behind the point in float32.
- The sum over alignments cannot exceed 1, but its rounded value can. So the loss is clipped at 0,
  which is always nearer to the exact value.
- A text that no alignment spells, because it needs more frames than there are, has an infinite
  loss and gradient 0.

The states of the paper's figure 3 are kept in two arrays, one of blanks and one of labels, which
need no interleaving.

Dimensions: `B` batch, `T` frames, `U` labels, `V` vocabulary with the blank.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
_NEVER = -1e30  # stands for the logarithm of 0; it is finite, so that a difference is no NaN


def ctc_loss(
    logits: Array, length: Array, labels: Array, label_length: Array, *, blank: int = 0,
) -> Array:
  """Computes -log p(labels | logits) of each row.

  Args:
    logits: f[B, T, V], of any scale: the function takes the softmax itself.
    length: i32[B], the number of frames of each row that count, 0 to T.
    labels: i32[B, U], none of them the blank; entries beyond `label_length` have no effect.
    label_length: i32[B], the number of labels of each row, 0 to U.
    blank: the index of the blank in V.

  Returns:
    f[B] of at least float32, 0 or more; infinity where `fits` is false. The gradient is 0 for
    frames beyond `length` and for rows with an infinite loss.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  return _loss(blank, logits, length, labels, label_length)


def frames_needed(labels: Array, label_length: Array) -> Array:
  """Returns how many frames the labels need at least.

  Each label needs a frame, and so does the blank between two equal labels.

  Args:
    labels: i32[B, U].
    label_length: i32[B], the number of labels of each row.

  Returns:
    i32[B].
  """
  pairs = jnp.arange(1, labels.shape[1]) < label_length[:, None]
  repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & pairs, axis=1, dtype=jnp.int32)
  return label_length.astype(jnp.int32) + repeats


def fits(length: Array, labels: Array, label_length: Array) -> Array:
  """Returns bool[B]: whether `length` frames of a row can spell its labels."""
  return frames_needed(labels, label_length) <= length


def occupancy(
    logits: Array, length: Array, labels: Array, label_length: Array, *, blank: int = 0,
) -> tuple[Array, Array]:
  """Computes the probability of each state at each frame, given that the text is spelled.

  Args:
    logits, length, labels, label_length, blank: the arguments of `ctc_loss`.

  Returns:
    f[B, T, U + 1], the probability of the blank before label u, or after the last label; and f[B,
    T, U], the probability of label u. For a frame that counts they sum to 1 together. Other frames
    have zeros, and so do rows whose labels do not fit.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  _, residuals = _forward(blank, logits, length, labels, label_length)
  in_blank, in_label = _occupancy(residuals)
  return in_blank.swapaxes(0, 1), in_label.swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(blank: int, logits: Array, length: Array, labels: Array, label_length: Array) -> Array:
  emissions = _emissions(blank, jax.nn.log_softmax(logits), labels)
  _, last, log_scale = _run_forward(emissions, length, labels, keep=False)
  return _as_loss(_total(last, label_length), log_scale)


def _forward(blank, logits, length, labels, label_length):
  """Returns the loss and what its gradient needs."""
  log_p = jax.nn.log_softmax(logits)
  emissions = _emissions(blank, log_p, labels)
  alphas, last, log_scale = _run_forward(emissions, length, labels, keep=True)
  total = _total(last, label_length)
  residuals = log_p, emissions, alphas, total, length, labels, label_length
  return _as_loss(total, log_scale), residuals


def _backward(blank, residuals, g):
  """Equation 16: softmax(logits) - occupancy, times the cotangent g [B].

  It is 0 for frames that do not count and for rows whose labels do not fit.
  """
  log_p, _, _, total, length, labels, label_length = residuals
  in_blank, in_label = _occupancy(residuals)
  vocabulary = jnp.arange(log_p.shape[-1])
  used = jnp.arange(labels.shape[1]) < label_length[:, None]
  # The product stands for a scatter by label, which is slow on a CPU and on a TPU. Labels beyond
  # the text have occupancy 0.
  one_hot = ((labels[..., None] == vocabulary) & used[..., None]).astype(log_p.dtype)  # [B, U, V]
  share = jnp.einsum("tbu,buv->btv", in_label, one_hot, precision=jax.lax.Precision.HIGHEST)
  share += jnp.sum(in_blank, axis=-1).T[..., None] * (vocabulary == blank)
  counts = (jnp.arange(log_p.shape[1]) < length[:, None]) & _possible(total)[:, None]  # [B, T]
  grad = jnp.where(counts[..., None], (jnp.exp(log_p) - share) * g[:, None, None], 0)
  return grad, None, None, None


_loss.defvjp(_forward, _backward)


def _emissions(blank: int, log_p: Array, labels: Array) -> tuple[Array, Array]:
  """Returns log p at each frame: of the blank [T, B, 1] and of each label [T, B, U]."""
  log_p = jnp.maximum(log_p, _NEVER)  # a logit may be -infinity
  of_label = jnp.take_along_axis(log_p, labels[:, None, :], axis=2)
  return log_p[..., blank:blank + 1].swapaxes(0, 1), of_label.swapaxes(0, 1)


def _run_forward(emissions, length, labels, *, keep):
  """Computes the forward variables of section 4.1.

  Returns:
    The forward variables of every frame, [T, B, ...], if `keep`; those of the last frame; and the
    logarithm of their scale.
  """
  of_blank, _ = emissions
  batch, count = labels.shape
  dtype = of_blank.dtype
  # Before the first frame the state is the blank before the first label, with probability 1.
  blanks = jnp.full((batch, count + 1), _NEVER, dtype).at[:, 0].set(0)
  start = blanks, jnp.full((batch, count), _NEVER, dtype)
  # Whether the label may follow the one before it without a blank.
  skips = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0)))[:, :count]

  def step(alpha, x):
    """Equations 6 and 7: the probability of all prefixes that end in a state, a frame later."""
    blanks, texts = alpha
    t, of_blank, of_label = x
    before = jnp.pad(texts, ((0, 0), (1, 0)), constant_values=_NEVER)  # at u stands label u - 1
    after_blank = _add(blanks, before) + of_blank
    after_label = _add(texts, blanks[:, :-1], jnp.where(skips, before[:, :-1], _NEVER)) + of_label
    alpha, scale = _normalize((after_blank, after_label), (blanks, texts), t < length)
    return alpha, (alpha if keep else None, scale)

  last, (alphas, scales) = jax.lax.scan(step, start, (jnp.arange(len(of_blank)), *emissions))
  return alphas, last, jnp.sum(scales, axis=0)


def _occupancy(residuals) -> tuple[Array, Array]:
  """Equations 14 and 15 for each state: alpha beta / p, [T, B, U + 1] and [T, B, U]."""
  log_p, emissions, alphas, total, length, labels, label_length = residuals
  count = labels.shape[1]
  last = (_only(label_length, count + 1, log_p.dtype), _only(label_length - 1, count, log_p.dtype))
  # Whether the next label may follow without a blank.
  skips = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (0, 1)))[:, :count]
  possible = _possible(total)

  def step(beta, x):
    """The shares of a frame; then equations 10 and 11, for all suffixes that start in a state.

    The emission of the frame before is left out, as that frame's forward variables hold it.
    """
    blanks, texts = beta
    t, alpha, (of_blank, of_label) = x
    counts = t < length
    joint, _ = _normalize([a + b for a, b in zip(alpha, beta)], beta, counts)
    joint = [jnp.where((counts & possible)[:, None], jnp.exp(term), 0) for term in joint]
    norm = sum(jnp.sum(term, axis=1, keepdims=True) for term in joint)
    shares = tuple(term / jnp.maximum(norm, 1) for term in joint)  # the largest is 1

    to_blank, to_label = blanks + of_blank, texts + of_label
    after = jnp.pad(to_label, ((0, 0), (0, 1)), constant_values=_NEVER)  # after blank u: label u
    before_blank = _add(to_blank, after)
    before_label = _add(to_label, to_blank[:, 1:], jnp.where(skips, after[:, 1:], _NEVER))
    return _normalize((before_blank, before_label), beta, counts)[0], shares

  frames = jnp.arange(log_p.shape[1])
  _, shares = jax.lax.scan(step, last, (frames, alphas, emissions), reverse=True)
  return shares


def _only(state: Array, states: int, dtype: Any) -> Array:
  """Log-probabilities [B, states]: `state` [B] has probability 1."""
  return jnp.where(jnp.arange(states) == state[:, None], 0, _NEVER).astype(dtype)


def _add(*terms: Array) -> Array:
  """The logarithm of the sum of the exponentials."""
  most = functools.reduce(jnp.maximum, terms)
  return most + jnp.log(sum(jnp.exp(term - most) for term in terms))


def _normalize(new, old, counts):
  """Subtracts the largest value of `new`.

  Returns:
    `new`, with its largest value at 0, and what was subtracted, [B]; `old` and 0 in rows where the
    frame does not count.
  """
  blanks, texts = new
  most = jnp.max(blanks, axis=1)
  if texts.shape[1]:
    most = jnp.maximum(most, jnp.max(texts, axis=1))
  moved = [jnp.where(counts[:, None], jnp.maximum(x - most[:, None], _NEVER), o)
           for x, o in zip(new, old)]
  return tuple(moved), jnp.where(counts, most, 0)


def _total(last: tuple[Array, Array], label_length: Array) -> Array:
  """Equation 8 without the scale: log p [B] of the text.

  Its alignments end in the last label or in the blank after it.
  """
  blanks, texts = last
  in_blank = jnp.take_along_axis(blanks, label_length[:, None], axis=1)[:, 0]
  if not texts.shape[1]:
    return in_blank
  in_label = jnp.take_along_axis(texts, jnp.maximum(label_length - 1, 0)[:, None], axis=1)[:, 0]
  return _add(in_blank, jnp.where(label_length > 0, in_label, _NEVER))


def _possible(total: Array) -> Array:
  return total > _NEVER / 2


def _as_loss(total: Array, log_scale: Array) -> Array:
  possible = _possible(total) & _possible(log_scale)
  return jnp.where(possible, jnp.maximum(-total - log_scale, 0), jnp.inf)
