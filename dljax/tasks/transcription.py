"""Transcription: the text of a recording, by connectionist temporal classification (`ops/ctc.py`).

The network gives each frame a distribution over the characters and the blank. What is special:
- A text that needs more frames than the network gives for its recording has no alignment. It is
  left out of the loss and its gradient, and counted in the metric `too_short`.
- Greedy decoding reads the most probable label of each frame. Prefix beam search (Hannun et al.
  2014, "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent
  DNNs", algorithm 1, without a language model) sums the alignments of each text; with a beam that
  is wide enough, it finds the most probable text.
- Error rates are jiwer's: the number of edits divided by the length of the true texts, over the
  whole set. Spaces count as characters.

Dimensions: `B` batch, `T` frames of the network's output, `U` characters, `V` vocabulary with the
blank, `W` beam.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax import report
from dljax.errors import UserError
from dljax.ops import ctc
from dljax.tasks.base import (
    ALL, MIN, Array, Batch, Findings, LossOutput, PyTree, Sums, TaskBase, Variables, Worst,
    at_least_float32)

BLANK = 0
MAX_PICTURED = 4
MAX_LISTED = 20
MAX_BEAM = 1024


@dataclasses.dataclass(frozen=True)
class Transcription(TaskBase):
  """Gives each recording a text.

  Batches have features f32[B, t, F], length i32[B], tokens i32[B, U], token_length i32[B] and mask
  f32[B]; see `data/audio/recordings.py`.

  Attributes:
    model: called as `model(features, length, train=...)`, gives {"logits": [B, T, V], "length":
      i32[B]}; `model.output_length` converts recordings' lengths to output lengths.
    alphabet: the V - 1 characters; label 0 is the blank.
    beam: the number of texts in the beam, W; 1 decodes greedily.
    frame: the time from one frame of the features to the next, in seconds, for pictures; 0 if it
      is not known.

  Raises:
    UserError: the beam is out of range.
  """

  model: nn.Module
  alphabet: str
  beam: int = 1
  frame: float = 0.0

  evaluate_reads = ("length", "tokens", "token_length")
  evaluate_draws = ("features",)

  def __post_init__(self):
    check_beam(self.beam)

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    return self.model.init({"params": rng}, batch["features"], batch["length"], train=False)

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of recordings whose text fits, not counting padding."""
    return {"utterances": jnp.sum(self._fits(batch), dtype=jnp.float32)}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: loss, too_short.

    The loss is -log p of a text in nats; too_short is the share of recordings left out of it.
    """
    del player  # one player: all parameters
    out, model_state = self.apply(
        params, model_state, batch, rng, train, batch["features"], batch["length"])
    losses = ctc.ctc_loss(out["logits"], out["length"], batch["tokens"], batch["token_length"],
                          blank=BLANK)
    fits = self._fits(batch)
    total, count = jnp.sum(jnp.where(fits, losses, 0)), jnp.sum(fits, dtype=losses.dtype)
    there = jnp.sum(batch["mask"].astype(losses.dtype))
    return LossOutput(
        loss=total / jnp.maximum(denominators["utterances"], 1), model_state=model_state,
        metrics={"loss": (total, count), "too_short": (there - count, there)})

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """{"log_probs": f32[B, T, V], "length": i32[B]}, from which the host decodes the texts."""
    del rng, context  # nothing is drawn
    out = self.model.apply(variables, batch["features"], batch["length"], train=False)
    logits = out["logits"]
    return {"log_probs": jax.nn.log_softmax(at_least_float32(logits)), "length": out["length"]}

  @property
  def goals(self) -> Mapping[str, str]:
    """See `Task.goals`."""
    return dict.fromkeys(
        ("loss", "too_short", "word_error_rate", "character_error_rate"), MIN)

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums,
      assets: Mapping[str, Any],
  ) -> Findings:
    """Error rates, and the recordings with the highest rates.

    Metrics: word_error_rate, character_error_rate.
    Table: transcripts, the `MAX_LISTED` worst first. Figure: alignments, the `MAX_PICTURED` worst.
    """
    import jiwer

    del sums, assets
    truths, found, worst = [], [], Worst(MAX_PICTURED)
    for predictions, batch in rows:
      texts, shares = [], []  # (truth, found); minus the share of wrong characters
      for i, text in enumerate(transcribe(predictions, self.alphabet, self.beam)):
        truth = spell(batch["tokens"][i][:batch["token_length"][i]], self.alphabet)
        wrong = jiwer.process_characters(truth, text)
        edits = wrong.substitutions + wrong.deletions + wrong.insertions
        shares.append(-edits / max(len(truth), 1))
        texts.append((truth, text))
      worst.add(shares, lambda kept: [
          (features[:batch["length"][i]],
           np.array(predictions["log_probs"][i][:predictions["length"][i]]), *texts[i])
          for i, features in zip(kept, batch["features"][kept])])
      truths += [truth for truth, _ in texts]
      found += [text for _, text in texts]
    if not truths:
      return Findings({"word_error_rate": math.nan, "character_error_rate": math.nan})
    rates = {"word_error_rate": jiwer.wer(truths, found),
             "character_error_rate": jiwer.cer(truths, found)}
    table = [{"truth": truth, "found": text, "character_error_rate": jiwer.cer(truth, text)}
             for truth, text in zip(truths, found)]
    table.sort(key=lambda row: -row["character_error_rate"])
    features, log_probs, of_truth, of_found = zip(*worst.rows)
    figure = functools.partial(
        report.alignments, features, [np.exp(x) for x in log_probs], ["", *self.alphabet],
        [f"said: {truth}\nread: {text}" for truth, text in zip(of_truth, of_found)],
        frame=self.frame)
    return Findings(rates, {"alignments": figure}, {"transcripts": table[:MAX_LISTED]})

  def _fits(self, batch: Batch) -> Array:
    """bool[B], whether a row is a recording, not padding, with enough frames for its text."""
    length = self.model.output_length(batch["length"])
    return (batch["mask"] > 0) & ctc.fits(length, batch["tokens"], batch["token_length"])


def check_beam(beam: int) -> None:
  """Raises `UserError` if a beam is out of range."""
  if not 1 <= beam <= MAX_BEAM:
    raise UserError(f"--config.model.beam={beam}: must be from 1, greedy decoding, to {MAX_BEAM}")


def spell(labels: Iterable[int], alphabet: str) -> str:
  """The text that labels stand for."""
  return "".join(alphabet[label - 1] for label in labels)


def greedy(log_probs: np.ndarray) -> list[int]:
  """The labels of the most probable alignment under log probabilities f[T, V]."""
  return [int(label) for label, _ in itertools.groupby(np.argmax(log_probs, axis=-1))
          if label != BLANK]


def prefix_beam_search(log_probs: np.ndarray, beam: int) -> list[tuple[tuple[int, ...], float]]:
  """The most probable texts.

  After each frame the `beam` most probable prefixes are kept. A prefix's probability is that of
  all its alignments. Those that end in the blank and those that end in the prefix's last label are
  summed separately, because a label can repeat only after a blank.

  Args:
    log_probs: f[T, V], the log probabilities of the labels in each frame.
    beam: the number of prefixes to keep, W.

  Returns:
    Up to W pairs (labels, log probability), the most probable first. The probability is that of
    all alignments if no prefix of the text ever fell out of the beam, else it is lower.
  """
  log_probs = np.asarray(log_probs, np.float64)
  prefixes: list[tuple[int, ...]] = [()]
  # The log probabilities of the alignments that end in the blank, and in the prefix's last label.
  of_blank, of_label = np.zeros(1), np.full(1, -np.inf)
  with np.errstate(invalid="ignore"):
    for frame in log_probs:
      total = np.logaddexp(of_blank, of_label)
      last = np.array([prefix[-1] if prefix else BLANK for prefix in prefixes])
      stay_blank = total + frame[BLANK]
      stay_label = of_label + frame[last]  # -inf for the empty prefix
      grow = total[:, None] + frame  # [W, V]
      repeats = np.flatnonzero(last != BLANK)
      grow[repeats, last[repeats]] = of_blank[repeats] + frame[last[repeats]]
      grow[:, BLANK] = -np.inf
      place = {prefix: w for w, prefix in enumerate(prefixes)}
      for w, prefix in enumerate(prefixes):  # a prefix may grow into one that is kept
        if prefix and (shorter := place.get(prefix[:-1])) is not None:
          stay_label[w] = np.logaddexp(stay_label[w], grow[shorter, prefix[-1]])
          grow[shorter, prefix[-1]] = -np.inf
      scores = np.concatenate([np.logaddexp(stay_blank, stay_label), grow.ravel()])
      best = np.argsort(-scores, kind="stable")[:beam]
      best = best[scores[best] > -np.inf]
      stays, grown = best[best < len(prefixes)], best[best >= len(prefixes)] - len(prefixes)
      parents, labels = np.divmod(grown, log_probs.shape[1])
      prefixes = [prefixes[w] for w in stays] + [(*prefixes[w], int(label))
                                                 for w, label in zip(parents, labels)]
      of_blank = np.concatenate([stay_blank[stays], np.full(len(grown), -np.inf)])
      of_label = np.concatenate([stay_label[stays], grow[parents, labels]])
  total = np.logaddexp(of_blank, of_label)
  return [(prefixes[w], float(total[w])) for w in np.argsort(-total, kind="stable")]


def transcribe(predictions: PyTree, alphabet: str, beam: int) -> Iterator[str]:
  """The text of each row in a result of `Transcription.predict`."""
  for log_probs, length in zip(predictions["log_probs"], predictions["length"]):
    log_probs = np.asarray(log_probs[:int(length)])
    labels = greedy(log_probs) if beam == 1 else prefix_beam_search(log_probs, beam)[0][0]
    yield spell(labels, alphabet)


def decode(
    predictions: PyTree, assets: Mapping[str, Any], beam: int,
) -> Iterator[Mapping[str, Any]]:
  """A row {"text": ...} for each recording, to print and to write.

  Args:
    predictions: the result of `Transcription.predict`.
    assets: the run's assets; "alphabet" has the characters.
    beam: the number of texts in the beam; 1 decodes greedily.
  """
  yield from ({"text": text}
              for text in transcribe(predictions, "".join(assets["alphabet"]), beam))
