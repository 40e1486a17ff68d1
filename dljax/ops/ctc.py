"""Connectionist temporal classification: the probability of a text, summed over all its alignments with the frames.

Alex Graves, Santiago Fernández, Faustino Gomez, Jürgen Schmidhuber. "Connectionist Temporal Classification: Labelling
Unsegmented Sequence Data with Recurrent Neural Networks", 2006. https://www.cs.toronto.edu/~graves/icml_2006.pdf

An alignment gives each frame a label or the blank; it spells the text that is left when repeated labels are merged
and then blanks are dropped. What is special here:
- Everything is in log space and at least float32, whatever the logits are.
- The gradient is the closed form of equation 16, softmax less the share of alignments, from the backward variables of
  section 4.1: one scan each way, and no rounding through the derivative of every addition of logarithms.
- At each frame the most probable state is set to 0 and what was taken off is added up apart, so that rounding errors do
  not grow with the length: a loss of 600 leaves only four digits behind the point in float32.
- The sum over alignments cannot exceed 1, but rounding can let it: the loss is cut at 0, which only brings it nearer.
- A text that no alignment spells, because it needs more frames than there are, has loss infinity and gradient 0.

The states of the paper's figure 3 are kept in two arrays, blanks and labels, which need no interleaving.

Dimensions: `B` batch, `T` frames, `U` labels, `V` vocabulary with the blank.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array
_NEVER = -1e30  # the logarithm of 0: finite, so that differences of two are numbers


def ctc_loss(logits: Array, length: Array, labels: Array, label_length: Array, *, blank: int = 0) -> Array:
  """-log p(labels | logits) of each row.

  Args:
    logits: f[B, T, V], of any scale: the softmax is taken here.
    length: i32[B], how many frames of each row count, 0 to T.
    labels: i32[B, U], none of them the blank; what stands beyond `label_length` does not matter.
    label_length: i32[B], 0 to U.
    blank: which entry of V is the blank.

  Returns:
    f[B] of at least float32, 0 or more; infinity where `fits` is false. The gradient with respect to frames beyond
    `length`, and of rows with an infinite loss, is 0.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  return _loss(blank, logits, length, labels, label_length)


def frames_needed(labels: Array, label_length: Array) -> Array:
  """i32[B]: the least frames that spell the labels [B, U]: one for each, and a blank between two that are equal."""
  pairs = jnp.arange(1, labels.shape[1]) < label_length[:, None]
  repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & pairs, axis=1, dtype=jnp.int32)
  return label_length.astype(jnp.int32) + repeats


def fits(length: Array, labels: Array, label_length: Array) -> Array:
  """bool[B]: whether so many frames can spell the labels."""
  return frames_needed(labels, label_length) <= length


def occupancy(
    logits: Array, length: Array, labels: Array, label_length: Array, *, blank: int = 0,
) -> tuple[Array, Array]:
  """In what share of the alignments, by their probability, each frame is in each state.

  Args:
    logits, length, labels, label_length, blank: see `ctc_loss`.

  Returns:
    f[B, T, U + 1], in the blank before label u, or after the last; and f[B, T, U], in label u. For a frame that counts
    they sum to 1 together; the others have zeros, and so have rows whose labels do not fit.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  _, residuals = _forward(blank, logits, length, labels, label_length)
  in_blank, in_label = _occupancy(residuals)
  return in_blank.swapaxes(0, 1), in_label.swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(blank: int, logits: Array, length: Array, labels: Array, label_length: Array) -> Array:
  _, last, log_scale = _run_forward(_emissions(blank, jax.nn.log_softmax(logits), labels), length, labels, keep=False)
  return _as_loss(_total(last, label_length), log_scale)


def _forward(blank, logits, length, labels, label_length):
  """The loss, and what its gradient needs."""
  log_p = jax.nn.log_softmax(logits)
  emissions = _emissions(blank, log_p, labels)
  alphas, last, log_scale = _run_forward(emissions, length, labels, keep=True)
  total = _total(last, label_length)
  return _as_loss(total, log_scale), (log_p, emissions, alphas, total, length, labels, label_length)


def _backward(blank, residuals, g):
  """Equation 16: softmax(logits) - occupancy, of frames that count in rows that fit, times the cotangent g [B]."""
  log_p, _, _, total, length, labels, label_length = residuals
  in_blank, in_label = _occupancy(residuals)
  vocabulary = jnp.arange(log_p.shape[-1])
  used = jnp.arange(labels.shape[1]) < label_length[:, None]
  # A scatter by label is slow on a CPU and a TPU alike; labels beyond the text have occupancy 0.
  one_hot = ((labels[..., None] == vocabulary) & used[..., None]).astype(log_p.dtype)  # [B, U, V]
  share = jnp.einsum("tbu,buv->btv", in_label, one_hot, precision=jax.lax.Precision.HIGHEST)
  share += jnp.sum(in_blank, axis=-1).T[..., None] * (vocabulary == blank)
  counts = (jnp.arange(log_p.shape[1]) < length[:, None]) & _possible(total)[:, None]  # [B, T]
  grad = jnp.where(counts[..., None], (jnp.exp(log_p) - share) * g[:, None, None], 0)
  return grad, None, None, None


_loss.defvjp(_forward, _backward)


def _emissions(blank: int, log_p: Array, labels: Array) -> tuple[Array, Array]:
  """log p of the blank, [T, B, 1], and of each label of the text, [T, B, U], at each frame."""
  log_p = jnp.maximum(log_p, _NEVER)  # a logit may be -infinity
  of_label = jnp.take_along_axis(log_p, labels[:, None, :], axis=2)
  return log_p[..., blank:blank + 1].swapaxes(0, 1), of_label.swapaxes(0, 1)


def _run_forward(emissions, length, labels, *, keep):
  """The forward variables of every frame, [T, B, ...], if they are to be kept; the last; and the log of their scale."""
  of_blank, _ = emissions
  batch, count = labels.shape
  dtype = of_blank.dtype
  # Before the first frame: surely in the blank before the first label.
  start = jnp.full((batch, count + 1), _NEVER, dtype).at[:, 0].set(0), jnp.full((batch, count), _NEVER, dtype)
  skips = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0)))[:, :count]  # no blank needed before the label

  def step(alpha, x):
    """Equations 6 and 7: the probability of all beginnings that end in a state, after one more frame."""
    blanks, texts = alpha
    t, of_blank, of_label = x
    before = jnp.pad(texts, ((0, 0), (1, 0)), constant_values=_NEVER)  # of state u, label u - 1
    after_blank = _add(blanks, before) + of_blank
    after_label = _add(texts, blanks[:, :-1], jnp.where(skips, before[:, :-1], _NEVER)) + of_label
    alpha, scale = _normalize((after_blank, after_label), (blanks, texts), t < length)
    return alpha, (alpha if keep else None, scale)

  last, (alphas, scales) = jax.lax.scan(step, start, (jnp.arange(len(of_blank)), *emissions))
  return alphas, last, jnp.sum(scales, axis=0)


def _occupancy(residuals) -> tuple[Array, Array]:
  """Equations 14 and 15, each state for itself: alpha beta / p, [T, B, U + 1] and [T, B, U]."""
  log_p, emissions, alphas, total, length, labels, label_length = residuals
  count = labels.shape[1]
  end = lambda at, states: jnp.where(jnp.arange(states) == at[:, None], 0, _NEVER).astype(log_p.dtype)
  last = end(label_length, count + 1), end(label_length - 1, count)
  skips = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (0, 1)))[:, :count]  # no blank needed after the label
  possible = _possible(total)

  def step(beta, x):
    """The shares of a frame; and equations 10 and 11, without the emission of the frame before: of all ends."""
    blanks, texts = beta
    t, alpha, (of_blank, of_label) = x
    counts = t < length
    joint, _ = _normalize([a + b for a, b in zip(alpha, beta)], beta, counts)
    joint = [jnp.where((counts & possible)[:, None], jnp.exp(term), 0) for term in joint]
    norm = sum(jnp.sum(term, axis=1, keepdims=True) for term in joint)
    shares = tuple(term / jnp.maximum(norm, 1) for term in joint)  # the largest is 1

    to_blank, to_label = blanks + of_blank, texts + of_label
    after = jnp.pad(to_label, ((0, 0), (0, 1)), constant_values=_NEVER)  # of blank u, label u
    before_blank = _add(to_blank, after)
    before_label = _add(to_label, to_blank[:, 1:], jnp.where(skips, after[:, 1:], _NEVER))
    return _normalize((before_blank, before_label), beta, counts)[0], shares

  _, shares = jax.lax.scan(step, last, (jnp.arange(len(log_p[0])), alphas, emissions), reverse=True)
  return shares


def _add(*terms: Array) -> Array:
  """log of the sum of exponentials."""
  most = functools.reduce(jnp.maximum, terms)
  return most + jnp.log(sum(jnp.exp(term - most) for term in terms))


def _normalize(new, old, counts):
  """`new` with its largest value at 0 and what was taken off, [B]; `old` and 0 where the frame does not count."""
  blanks, texts = new
  most = jnp.max(blanks, axis=1)
  if texts.shape[1]:
    most = jnp.maximum(most, jnp.max(texts, axis=1))
  moved = [jnp.where(counts[:, None], jnp.maximum(x - most[:, None], _NEVER), o) for x, o in zip(new, old)]
  return tuple(moved), jnp.where(counts, most, 0)


def _total(last: tuple[Array, Array], label_length: Array) -> Array:
  """Equation 8: log p [B], but for the scale, of the alignments that end in the last label or in the blank after it."""
  blanks, texts = last
  in_blank = jnp.take_along_axis(blanks, label_length[:, None], axis=1)[:, 0]
  if not texts.shape[1]:
    return in_blank
  in_label = jnp.take_along_axis(texts, jnp.maximum(label_length - 1, 0)[:, None], axis=1)[:, 0]
  return _add(in_blank, jnp.where(label_length > 0, in_label, _NEVER))


def _possible(total: Array) -> Array:
  return total > _NEVER / 2


def _as_loss(total: Array, log_scale: Array) -> Array:
  return jnp.where(_possible(total) & _possible(log_scale), jnp.maximum(-total - log_scale, 0), jnp.inf)
