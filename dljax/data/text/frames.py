"""The special tokens of a tokenizer, and the frame of a text that is read as a whole."""

from collections.abc import Mapping

import numpy as np

from dljax.data.text import tokenize


def roles(tokenizer: tokenize.Tokenizer) -> Mapping[str, int]:
  """Role -> token, such as "mask"; {} for a tokenizer that knows none but `end`."""
  return getattr(tokenizer, "roles", {})


def frame(tokenizer: tokenize.Tokenizer) -> tuple[int, int]:
  """The token before a text, and the token after each text: BERT's [CLS] and [SEP].

  A tokenizer that has no such tokens gives the one that it begins texts with, and `end`.
  """
  known = roles(tokenizer)
  before = known.get("class", known.get("start", tokenizer.end))
  return before, known.get("separator", tokenizer.end)


def special_tokens(tokenizer: tokenize.Tokenizer) -> np.ndarray:
  """The tokens that stand for no text, i64[k], ascending."""
  return np.unique([tokenizer.end, *roles(tokenizer).values()])
