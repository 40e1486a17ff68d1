"""From a tokenized text to batches: as parallel streams, as windows, or document by document.

`Streams` reads the documents of a split as one text. The text is cut into as many parallel streams
as a batch has rows, and step s gives the s-th window of each. A state that is carried from batch
to batch has thus read all that came before (truncated backpropagation through time; Werbos 1990,
"Backpropagation through time: what it does and how to do it").

`Windows` reads the documents of a split as one text too, but each window of it on its own: what a
transformer reads, which carries no state.

`Documents` reads each document on its own, in batches of documents of similar length (`ragged`), or
several in each row (`packing`).

In all of them, an evaluation predicts every token of its split once, and the first token of a text
from `Tokenizer.end`.
"""

import threading
from collections.abc import Callable

import numpy as np

from dljax.data import ragged
from dljax.data.pipeline import PADDING, HostBatch, Plan, Rows, all_rows, rng
from dljax.data.text import packing, tokenize
from dljax.errors import UserError


class Streams:
  """The `Pipeline` of one text in reading order, in as many streams as a batch has rows.

  Training cuts the text into as many whole windows as it holds. Each epoch starts at another
  place, so that no part of the text is left out for ever, and its first batch has `reset`.
  Evaluation pads and masks the ends of the streams.

  Args:
    read: () -> the text, and where its documents start; called once, by `open`.
    batch_size: B, the number of rows of the global batch.
    length: L, the number of tokens in a window.
    seed: the run's seed.
    train: whether to repeat for ever; otherwise there is one pass.
  """

  def __init__(
      self, read: Callable[[], tuple[tokenize.Encoded, np.ndarray]], *, batch_size: int,
      length: int, seed: int = 0, train: bool = False,
  ):
    self._read, self._size, self._length = read, batch_size, length
    self._seed, self._train = seed, train
    self._rows = np.arange(0)
    self._text: tokenize.Encoded | None = None
    self._lock = threading.RLock()

  num_sample_batches = 0

  def sample(self, count: int, seed: int) -> None:
    del seed
    if count:
      raise UserError(f"--config.eval.examples={count}: a text is read from its start to its end; "
                      "set it to 0")

  def open(self, rows: Rows = all_rows) -> bool:
    with self._lock:
      if self._text is not None:
        return False
      self._rows = rows(self._size)
      text, _ = self._read()
      targets = len(text.tokens) - 1
      if self._train and targets < self._size * self._length:
        raise UserError(f"--config.data.length={self._length}: the training text has {targets} "
                        f"tokens, too few for one window in each of {self._size} streams; make it "
                        "or --config.batch_size smaller")
      self._text = text
      return True

  def close(self) -> None:
    with self._lock:
      self._text = None

  @property
  def num_examples(self) -> int:
    """The number of windows in all streams."""
    return self.num_batches * self._size

  @property
  def num_batches(self) -> int:
    targets = self._targets()
    if self._train:
      return targets // (self._size * self._length)
    return -(-self._per_stream(targets) // self._length)

  def batch(self, step: int) -> HostBatch:
    targets, length, windows = self._targets(), self._length, self.num_batches
    rows = self._rows
    epoch, window = divmod(step, windows)
    if self._train:
      spare = targets - windows * length * self._size
      first = int(rng(self._seed, epoch, "first").integers(spare + 1))
      begins = first + (rows * windows + window) * length
      counts = np.full(len(rows), length)
    else:
      if epoch:
        raise IndexError(f"batch {step} of a pass over {windows} windows")
      stream = self._per_stream(targets)
      begins = rows * stream + window * length
      counts = np.clip(np.minimum(stream - window * length, targets - begins), 0, length)
    batch = _windows(self._text, begins, counts, length, counts_of_text=not self._train)
    ids = rows if self._train else np.where(counts > 0, begins, 0)
    reset = np.full(len(rows), window == 0, np.float32)
    return {**batch, "id": ids.astype(np.int32), "reset": reset}

  def _targets(self) -> int:
    if self._text is None:
      raise RuntimeError("open() the pipeline first")
    return len(self._text.tokens) - 1

  def _per_stream(self, targets: int) -> int:
    return -(-targets // self._size)


class Windows:
  """The `Examples` of one text in windows that know nothing of each other.

  Training cuts the text into windows that do not overlap, so that an epoch reads every token once
  (but for less than two windows at the ends), and `IndexedPipeline` shuffles them. Each epoch
  starts at another place, so that the windows differ from epoch to epoch, and with them how much
  of the text a token is predicted from. A batch has B L tokens, as in recipes that draw each
  window's place at random and may read a token twice before another is read once.

  Evaluation predicts every token once. Windows that overlap count only their ends, so that each
  token but those of the first window is predicted from at least `length - stride` others.

  Args:
    text: the text, which begins with `Tokenizer.end`.
    length: L, the number of tokens in a window.
    stride: in evaluation, the number of tokens from one window to the next, from 1 to `length`.
    seed: the run's seed.
    train: whether these are the windows of training.

  Raises:
    UserError: the training text is shorter than a window.
  """

  def __init__(
      self, text: tokenize.Encoded, length: int, *, stride: int, seed: int = 0,
      train: bool = False,
  ):
    self._text, self._length, self._stride = text, length, stride
    self._seed, self._train = seed, train
    targets = len(text.tokens) - 1
    if not train:
      self._size = 1 + -(-max(targets - length, 0) // stride)
      return
    if targets < length:
      raise UserError(f"--config.data.length={length}: the training text has {targets} tokens, too "
                      "few for one window; make it smaller")
    # One window less than would fit leaves room for different starts, unless it is the only one.
    self._size = max(1, (targets + 1) // length - 1)
    self._spare = targets - self._size * length

  def __len__(self) -> int:
    return self._size

  def gather(self, plan: Plan, rows: np.ndarray) -> HostBatch:
    indices, length = plan.indices[rows], self._length
    if self._train:
      epochs = (plan.step * len(plan.indices) + rows) // self._size
      first = {epoch: rng(self._seed, epoch, "first").integers(self._spare + 1)
               for epoch in np.unique(epochs)}
      begins = np.array([first[epoch] for epoch in epochs], np.int64) + indices * length
      counts, skipped = np.full(len(rows), length), np.zeros(len(rows), np.int64)
    else:
      begins = np.maximum(indices, 0) * self._stride
      counts = np.minimum(length, len(self._text.tokens) - 1 - begins) * (indices != PADDING)
      skipped = np.where(indices > 0, length - self._stride, 0)
    return _windows(self._text, begins, counts, length, skipped=skipped,
                    counts_of_text=not self._train)

  def close(self) -> None:
    pass


class Documents:
  """The `RaggedExamples` of documents, each on its own and closed by `end`; long ones are cut into
  pieces.

  Args:
    text: the documents as one text, with `end` before each; and where each starts.
    length: the greatest number of tokens to predict in a piece.
    end: the token that closes a document.
    counts: whether batches hold the numbers of characters and bytes.
  """

  def __init__(
      self, text: tuple[tokenize.Encoded, np.ndarray], length: int, end: int, *, counts: bool,
  ):
    encoded, begins = text
    self._text = tokenize.Encoded(np.append(encoded.tokens, np.int32(end)),
                                  *(np.append(x, np.int32(0)) for x in encoded[1:]))
    self._counts = counts
    # Tokens to predict, with the `end` after the document.
    self._begins, self.lengths = packing.cut(
        begins, np.append(begins[1:], len(encoded.tokens)), length)

  def __len__(self) -> int:
    return len(self.lengths)

  def gather(self, plan: ragged.RaggedPlan, rows: np.ndarray) -> HostBatch:
    indices = plan.indices[rows]
    begins, counts = self._begins[indices], np.where(indices == PADDING, 0, self.lengths[indices])
    batch = _windows(self._text, begins, counts, plan.padded, counts_of_text=self._counts)
    return {**batch, "reset": np.ones(len(rows), np.float32)}

  def read(self, indices: np.ndarray) -> HostBatch:
    """See `packing.Pieces`; of the numbers of characters and bytes, those of each token."""
    sizes = self.lengths[indices]
    first = np.cumsum(sizes) - sizes
    places = np.arange(sizes.sum()) + np.repeat(self._begins[indices] - first, sizes)
    flat = {"tokens": self._text.tokens[places], "targets": self._text.tokens[places + 1],
            "target_weight": np.ones(len(places), np.float32)}
    if self._counts:
      flat |= {"characters": self._text.characters[places + 1],
               "bytes": self._text.bytes[places + 1], "host/position": places}
    return flat

  def close(self) -> None:
    pass


def packed(documents: packing.Packed, plan: Plan) -> HostBatch:
  """A batch of packed `Documents`: the numbers of characters and bytes are added up by row."""
  batch = documents.gather(plan, plan.rows)
  if "characters" in batch:
    for field in "characters", "bytes":
      batch[field] = np.sum(batch[field], axis=1).astype(np.float32)
    batch["host/position"] = np.where(batch["segment"] > 0, batch["host/position"], PADDING)
  return batch


def _windows(
    text: tokenize.Encoded, begins: np.ndarray, counts: np.ndarray, length: int, *,
    counts_of_text: bool, skipped: np.ndarray | int = 0,
) -> HostBatch:
  """The windows that start at `begins` and have `counts` tokens, padded to `length`; of each all
  tokens but the `skipped` first are to be predicted."""
  inside = np.arange(length) < counts[:, None]
  predicted = inside & (np.arange(length) >= np.reshape(skipped, (-1, 1)))
  places = np.where(inside, begins[:, None] + np.arange(length), 0)
  following = np.where(inside, places + 1, 0)
  batch = {"tokens": np.where(inside, text.tokens[places], 0).astype(np.int32),
           "targets": np.where(inside, text.tokens[following], 0).astype(np.int32),
           "target_weight": predicted.astype(np.float32), "length": counts.astype(np.int32),
           "mask": (counts > 0).astype(np.float32)}
  if counts_of_text:
    batch["characters"] = np.sum(text.characters[following] * predicted, axis=1).astype(np.float32)
    batch["bytes"] = np.sum(text.bytes[following] * predicted, axis=1).astype(np.float32)
    batch["host/position"] = np.where(counts > 0, begins, PADDING)
  return batch
