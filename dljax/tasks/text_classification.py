"""Classification of texts: one label for each text, or for each pair of texts.

The loss and the metrics are those of `classification.py`. A table shows the texts whose wrong
guesses are the most confident.

Dimensions: B batch, L tokens, C classes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dljax.tasks.base import Array, Batch, Findings, PyTree, Variables, Worst
from dljax.tasks.classification import Classification

MAX_LISTED = 50  # mistakes in the table


@dataclasses.dataclass(frozen=True)
class TextClassification(Classification):
  """Gives each text one of `num_classes` labels.

  Batches have tokens i32[B, L], length i32[B] (the number of tokens in each row before its
  padding), token_type i32[B, L] (1 in the second text of a pair), label i32[B] and mask f32[B].

  Attributes:
    model: called as `model(tokens, length, token_type, train=...)`, gives {"logits": [B, C]}.
    spell: a function from tokens i32[n] to their text, for the table of mistakes; with None there
      is no table.
  """

  spell: Callable[[np.ndarray], str] | None = None

  evaluate_reads = ("label", "length")
  evaluate_draws = ("tokens",)

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    return self.model.init({"params": rng}, batch["tokens"][:, :1], train=False)

  def inputs(self, batch: Batch) -> tuple[Array, ...]:
    """See `Classification.inputs`."""
    return batch["tokens"], batch["length"], batch["token_type"]

  def show_mistakes(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], names: list[str],
  ) -> Findings:
    """The table mistakes: text, truth, guess, probability; the most confident guesses first."""
    worst = Worst(MAX_LISTED)
    for predictions, batch in rows:
      p, labels = np.asarray(predictions["probabilities"]), np.asarray(batch["label"])
      guesses, sure = p.argmax(axis=-1), p.max(axis=-1)
      wrong = np.flatnonzero(guesses != labels)
      if self.spell is None or not len(wrong):
        continue

      def look(kept: np.ndarray) -> Sequence[Mapping[str, Any]]:
        kept = wrong[kept]
        return [{"text": self.spell(tokens[:batch["length"][i]]), "truth": names[labels[i]],
                 "guess": names[guesses[i]], "probability": float(sure[i])}
                for i, tokens in zip(kept, batch["tokens"][kept])]

      worst.add((-sure[wrong]).tolist(), look)
    return Findings(tables={"mistakes": worst.rows} if worst.rows else {})
