"""CTC: against torch, against the sum over all alignments, and what it promises beside."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.test_util import check_grads

from dljax.ops import ctc
from tests.fixtures import formula

CASE = formula.ctc_case()


def _merge(alignment, blank=0):
  return tuple(label for label, _ in itertools.groupby(alignment) if label != blank)


def _brute_force(logits, labels, blank=0):
  """-log p in float64, by going through every alignment; and the shares of the states of each frame."""
  logits = np.asarray(logits, np.float64)
  p = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
  frames, vocabulary = p.shape
  total, by_label = 0.0, np.zeros_like(p)
  for alignment in itertools.product(range(vocabulary), repeat=frames):
    if _merge(alignment, blank) == tuple(labels):
      q = np.prod(p[np.arange(frames), list(alignment)])
      total += q
      by_label[np.arange(frames), list(alignment)] += q
  return (-np.log(total) if total else np.inf), by_label / total if total else by_label


@jax.jit
def _loss_and_grad(logits, *rest):
  loss, pull = jax.vjp(lambda x: ctc.ctc_loss(x, *rest), logits)
  return loss, pull(jnp.ones_like(loss))[0]


_loss = jax.jit(ctc.ctc_loss, static_argnames="blank")  # without a gradient the loss is another function
_fits = jax.jit(ctc.fits)
_occupancy = jax.jit(ctc.occupancy, static_argnames="blank")


def test_equals_torch_over_random_lengths_repeats_and_empty_texts():
  with np.load(formula.FOLDER / "ctc.npz") as fixture:
    losses, grad = fixture["losses"], fixture["grad"]
  ours, our_grad = _loss_and_grad(*CASE)
  fits = np.asarray(_fits(*CASE[1:]))
  assert fits.sum() == len(fits) - 2 and not fits[2] and not fits[3]  # torch has 0 where ours is infinite
  np.testing.assert_allclose(np.where(fits, ours, 0), losses, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(our_grad, grad, atol=1e-5)
  np.testing.assert_allclose(_loss(*CASE), ours, rtol=1e-6)
  assert np.isposinf(np.asarray(ours)[~fits]).all()
  assert losses.max() > 30 and np.abs(grad).max() > 0.5


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("frames", [1, 3, 5])
def test_equals_the_sum_over_all_alignments(frames, blank):
  vocabulary = 3
  others = [v for v in range(vocabulary) if v != blank]
  texts = [text for n in range(4) for text in itertools.product(others, repeat=n)]
  logits = 1.5 * formula.noise(f"logits{frames}", (len(texts), frames, vocabulary))
  labels = np.array([[*text, *[others[0]] * (3 - len(text))] for text in texts], np.int32)
  label_length = np.array([len(text) for text in texts], np.int32)
  length = np.full(len(texts), frames, np.int32)
  losses = np.asarray(_loss(logits, length, labels, label_length, blank=blank))
  in_blank, in_label = map(np.asarray, _occupancy(logits, length, labels, label_length, blank=blank))
  fits = np.asarray(_fits(length, labels, label_length))
  for i, text in enumerate(texts):
    expected, shares = _brute_force(logits[i], text, blank)
    np.testing.assert_allclose(losses[i], expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(expected) == fits[i]
    ours = np.zeros_like(shares)
    ours[:, blank] = in_blank[i].sum(axis=-1)
    for u in range(len(text)):
      ours[:, text[u]] += in_label[i, :, u]
    np.testing.assert_allclose(ours, shares, atol=1e-5)


def test_probabilities_of_all_texts_add_up_to_one():
  frames, vocabulary = 4, 3
  texts = [text for n in range(frames + 1) for text in itertools.product([1, 2], repeat=n)]
  logits = np.broadcast_to(formula.noise("all", (frames, vocabulary)), (len(texts), frames, vocabulary))
  labels = np.array([[*text, *[1] * (frames - len(text))] for text in texts], np.int32)
  count = np.array([len(text) for text in texts], np.int32)
  losses = _loss(logits, np.full(len(texts), frames, np.int32), labels, count)
  np.testing.assert_allclose(np.exp(-losses).sum(), 1, rtol=1e-6)


def test_the_gradient_is_that_of_the_loss():
  logits, length, labels, label_length = (x[4:12, :16] if x.ndim == 3 else x[4:12] for x in CASE)
  fits = np.asarray(_fits(np.minimum(length, 16), labels, np.minimum(label_length, 6)))
  assert fits.sum() > 4
  with jax.enable_x64(True):
    loss = lambda x: jnp.sum(jnp.where(fits, ctc.ctc_loss(
        x, np.minimum(length, 16), labels, np.minimum(label_length, 6)), 0) * jnp.arange(1.0, 9.0))
    check_grads(jax.jit(loss), (logits.astype(np.float64),), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_float32_is_as_good_for_long_rows():
  """With a loss of some thousand, whose last digit in float32 is some 1e-4, the gradient is still good to that."""
  frames, count = 600, 60
  logits = 4 * formula.noise("long", (2, frames, 20))
  labels = (1 + np.arange(2 * count).reshape(2, -1) % 7 % 3).astype(np.int32)
  rest = np.array([frames, frames - 7], np.int32), labels, np.array([count, count - 1], np.int32)
  loss, grad = _loss_and_grad(logits, *rest)
  with jax.enable_x64(True):
    exact, exact_grad = map(np.asarray, _loss_and_grad(logits.astype(np.float64), *rest))
  assert exact.min() > 1000
  np.testing.assert_allclose(loss, exact, rtol=1e-6)
  np.testing.assert_allclose(grad, exact_grad, atol=1e-4)


@pytest.mark.parametrize("scale", [1, 10, 30, 100])
def test_is_never_negative(scale):
  """With logits of one alignment so large that its probability is 1 but for rounding."""
  batch, frames = 64, 50
  alignment = np.where(np.arange(frames) % 2, 1 + np.arange(frames) % 9, 0)
  logits = 0.1 * formula.noise("sure", (batch, frames, 10))
  logits[:, np.arange(frames), alignment] += scale
  text = _merge(alignment)
  labels = np.broadcast_to(np.array(text, np.int32), (batch, len(text)))
  rest = np.full(batch, frames, np.int32), labels, np.full(batch, len(text), np.int32)
  loss, grad = _loss_and_grad(logits, *rest)
  assert (np.asarray(_loss(logits, *rest)) >= 0).all()
  assert (np.asarray(loss) >= 0).all() and np.isfinite(grad).all()
  assert (np.asarray(loss) < 1e-3).all() == (scale >= 30)


def test_padding_changes_nothing_and_has_no_gradient():
  logits, length, labels, label_length = CASE
  loss, grad = _loss_and_grad(*CASE)
  beyond = np.arange(logits.shape[1]) >= length[:, None]
  assert not np.asarray(grad)[beyond].any()
  other = np.where(beyond[..., None], np.nan, logits)
  labels = np.where(np.arange(labels.shape[1]) >= label_length[:, None], 3, labels)
  labels = np.pad(labels, ((0, 0), (0, 3)))
  other_loss, other_grad = _loss_and_grad(np.nan_to_num(other, nan=7), length, labels, label_length)
  np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
  np.testing.assert_allclose(grad, other_grad, atol=1e-5)


def test_texts_that_do_not_fit_have_no_gradient_and_leave_the_others_alone():
  loss, grad = _loss_and_grad(*CASE)
  fits = np.asarray(_fits(*CASE[1:]))
  assert not np.asarray(grad)[~fits].any() and np.isfinite(grad).all()
  rest = [x[fits] for x in CASE]
  np.testing.assert_allclose(_loss(*rest), np.asarray(loss)[fits], rtol=1e-6)
  needed = np.asarray(jax.jit(ctc.frames_needed)(*CASE[2:]))
  for row, count, need in zip(CASE[2], CASE[3], needed):
    assert need == count + sum(a == b for a, b in itertools.pairwise(row[:count]))


def test_a_logit_of_minus_infinity_forbids_a_label():
  logits = np.zeros((2, 3, 3), np.float32)
  logits[:, :, 2] = -np.inf
  labels, one = np.array([[1], [2]], np.int32), np.ones(2, np.int32)
  loss, grad = _loss_and_grad(logits, 3 * one, labels, one)
  np.testing.assert_allclose(loss[0], -np.log(6 / 8), rtol=1e-6)  # of 8 alignments the blank alone and 101 spell others
  assert np.isposinf(loss[1]) and np.isfinite(grad).all()


def test_under_vmap_and_in_bfloat16():
  logits, length, labels, label_length = CASE
  loss, grad = _loss_and_grad(*CASE)
  one = lambda *row: ctc.ctc_loss(*(x[None] for x in row))[0]
  losses, grads = jax.jit(jax.vmap(jax.value_and_grad(one)))(*CASE)
  np.testing.assert_allclose(losses, loss, rtol=1e-6)
  np.testing.assert_allclose(grads, grad, atol=1e-5)
  half = logits.astype(jnp.bfloat16)
  half_loss, half_grad = _loss_and_grad(half, *CASE[1:])
  assert half_loss.dtype == jnp.float32 and half_grad.dtype == jnp.bfloat16
  same, same_grad = _loss_and_grad(half.astype(np.float32), *CASE[1:])
  np.testing.assert_array_equal(half_loss, same)
  np.testing.assert_array_equal(half_grad, np.asarray(same_grad).astype(jnp.bfloat16))


def test_without_any_label():
  logits = formula.noise("none", (2, 5, 4))
  loss, grad = _loss_and_grad(
      logits, np.array([5, 3], np.int32), np.zeros((2, 0), np.int32), np.zeros(2, np.int32))
  log_p = scipy.special.log_softmax(logits, axis=-1)[..., 0]
  np.testing.assert_allclose(loss, [-log_p[0].sum(), -log_p[1, :3].sum()], rtol=1e-6)
  assert np.abs(grad[0]).min() > 0
