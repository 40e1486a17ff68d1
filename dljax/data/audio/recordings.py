"""Recordings and their transcripts: log-mel features, the config that speech experiments share,
and its pipelines.

A batch holds features f32[b, T, F], length i32[b] (the number of frames that are no padding),
tokens i32[b, U], token_length i32[b], mask and id (see `data/pipeline.py`). A token is 1 + the
place of a character in `config.data.alphabet`; 0, the blank of CTC, is padding. Batches have few
shapes: see `data/ragged.py`.

Features are computed on the host (`data/audio/features.py`); if a split fits into memory, only
once.

Dimensions: b the host's rows, N samples, T frames, F bands, U characters.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dljax.config import Field, Group
from dljax.data import inputs, ragged, sources, splits
from dljax.data.audio import features
from dljax.data.pipeline import PADDING, HostBatch, Pipeline
from dljax.errors import UserError

# Bytes of features of one split; larger splits are read as they are needed.
MEMORY_LIMIT = 2 * 2**30
# Bucket lengths are multiples of it, so that convolutions with strides see even lengths.
FRAMES = 8
# The most seconds of a recording, unless `config.data.max_frames` allows more.
MAX_SECONDS = 3600
MAX_MELS, MAX_WINDOW = 512, 2**16  # bands, and samples of a window
READ_AT_ONCE = 256  # number of recordings
THREADS = 8
_SPACES = re.compile(r"\s+")

_log = logging.getLogger(__name__)


def default_config() -> Group:
  """The fields of `config.data`."""
  return Group({
      "name": Field("morse", splits.NAME),
      **splits.fields("train", "validation", "test"),
      "audio_feature": Field("audio", "The feature of the set with a WAV file, or with samples "
                             "(TFDS's Audio)."),
      "text_feature": Field("text", "The feature of the set with the text of a recording."),
      "alphabet": Field(" ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", "The characters that the model "
                        "writes; a text's letters take their case."),
      "max_text": Field(32, "The greatest number of characters in a text."),
      "max_frames": Field(800, "The greatest number of frames in a recording."),
      "sample_rate": Field(8000, "The sample rate in Hz; other recordings are resampled."),
      "window": Field(0.032, "The length of a frame's window, in seconds."),
      "hop": Field(0.01, "The time from one frame to the next, in seconds."),
      "num_mels": Field(40, "The number of mel bands."),
      "lowest": Field(0.0, "The lowest frequency of the bands, in Hz."),
      "highest": Field(0.0, "The bands' highest frequency in Hz; 0 is half the sample rate."),
      "buckets": Field(4, "The number of lengths that batches are padded to; each is compiled."),
      "time_masks": Field(0, "The number of SpecAugment's masks over frames; 0 is off."),
      "time_mask": Field(20, "The greatest width of such a mask, in frames."),
      "time_mask_share": Field(0.2, "The greatest share of a recording that such a mask covers."),
      "frequency_masks": Field(0, "The number of SpecAugment's masks over bands in training; 0 is "
                               "off."),
      "frequency_mask": Field(6, "The greatest width of such a mask, in bands."),
  })


def validate(config: Any) -> None:
  """Checks the fields of `config.data` against their ranges and each other; raises `UserError`."""
  need = functools.partial(splits.need, config)
  need("train", bool(config.train), "name the split to train on")
  need("alphabet", len(set(config.alphabet)) == len(config.alphabet) > 0,
       "give each character once")
  for field in ("max_text", "max_frames", "sample_rate", "num_mels"):
    need(field, config[field] > 0, "give a positive number")
  for field in ("hop", "window"):
    need(field, 1 <= config[field] * config.sample_rate < math.inf,
         "give the seconds of at least one sample")
  least, most = features.RATES
  need("sample_rate", least <= config.sample_rate <= most, f"give {least} to {most} Hz")
  need("window", config.window * config.sample_rate <= MAX_WINDOW,
       f"give at most {MAX_WINDOW / config.sample_rate:g} seconds, {MAX_WINDOW} samples")
  need("num_mels", config.num_mels <= MAX_MELS, f"give at most {MAX_MELS}")
  need("highest", 0 <= config.highest <= config.sample_rate / 2,
       f"give at most {config.sample_rate / 2:g} Hz, half the sample rate; 0 is that")
  need("lowest", 0 <= config.lowest < (config.highest or config.sample_rate / 2),
       "give less than the highest")
  for field in ("time_masks", "time_mask", "frequency_masks", "frequency_mask"):
    need(field, config[field] >= 0, "give 0 or more")
  need("frequency_mask", config.frequency_mask <= config.num_mels,
       f"give at most {config.num_mels}, all bands")
  need("time_mask_share", 0 <= config.time_mask_share <= 1, "give a value from 0 to 1")
  empty = np.flatnonzero(~_filters(config).any(axis=1))
  need("num_mels", not len(empty),
       f"band {empty[:1]} holds no frequency of a window of {config.window} s; give fewer "
       "bands or a longer window")
  sources.parse_name(config.name)


def _filters(config: Any) -> np.ndarray:
  size = 2**math.ceil(math.log2(max(2, config.window * config.sample_rate)))
  return features.mel_filters(config.sample_rate, size, config.num_mels, config.lowest,
                              config.highest)


def tokenize(text: str, alphabet: str) -> np.ndarray:
  """i32[U]: 1 + the place of each character in the alphabet.

  A letter takes the case that the alphabet has, and white space becomes a single space.

  Raises:
    ValueError: a character is not in the alphabet.
  """
  places = {character: place for place, character in enumerate(alphabet, 1)}
  tokens = []
  for character in _SPACES.sub(" ", text).strip():
    place = places.get(character) or places.get(character.swapcase())
    if place is None:
      raise ValueError(f"the character {character!r} of {text[:40]!r} is not in the alphabet; add "
                       "it to --config.data.alphabet")
    tokens.append(place)
  return np.array(tokens, np.int32)


def encode(
    paths: Sequence[str | np.ndarray], config: Any,
) -> tuple[HostBatch, list[str], list[str]]:
  """Reads recordings as an evaluation reads them.

  Args:
    paths: the paths of WAV files or of folders, which are searched with their subfolders; or
      arrays of samples [N] or [N, channels] at `config.sample_rate`, integers or floats in [-1,
      1]. Files of another sample rate are resampled, with a warning. Several channels are
      averaged.
    config: `config.data`.

  Returns:
    A batch of features, length, mask and id, which has no rows if nothing was usable; the name of
    each row; and a line for each file that could not be used.

  Raises:
    UserError: a path does not exist.
  """
  recordings = AudioSet(config)
  found, names, skipped = [], [], []
  mend = "a WAV file, or a folder of them"
  for name, source in inputs.each(paths, lambda path: splits.find_files([path], mend, ".wav")):
    try:
      if isinstance(source, Path):
        sound, rate = features.read_wav(source.read_bytes())
      else:
        sound, rate = _check_samples(source), config.sample_rate
      heard = recordings.features(sound, rate)
    except (ValueError, OSError) as e:
      skipped.append(f"{name}: {e}")
      continue
    if rate != config.sample_rate:
      _log.warning(
          "%s has %d samples a second, and was resampled to %d", name, rate, config.sample_rate)
    found.append(heard)
    names.append(name)
  length = np.array([len(sound) for sound in found], np.int32)
  longest = -(-int(length.max(initial=1)) // FRAMES) * FRAMES
  none = np.empty((0, longest, config.num_mels), np.float32)
  return {"features": ragged.pad(found, longest) if found else none, "length": length,
          "mask": np.ones(len(found), np.float32),
          "id": np.arange(len(found), dtype=np.int32)}, names, skipped


def _check_samples(array: np.ndarray) -> np.ndarray:
  if array.ndim not in (1, 2):
    raise ValueError(f"an array of shape {array.shape} is no recording; give [N] or [N, channels]")
  if array.dtype.kind not in "iuf":
    raise ValueError(f"{array.dtype} is no type of samples; give integers or floats in [-1, 1]")
  return features.to_mono(array)


@dataclasses.dataclass(frozen=True)
class _Recordings:
  """The `ragged.RaggedExamples` of a split.

  Attributes:
    lengths: i64[n], the number of frames in each recording.
    read: (indices) -> the features [T, F] of each.
    texts: the tokens i32[u] of each recording.
    max_text: U, the length that tokens are padded to.
  """

  lengths: np.ndarray
  read: Callable[[Sequence[int]], Sequence[np.ndarray]]
  texts: Sequence[np.ndarray]
  max_text: int

  def __len__(self) -> int:
    return len(self.texts)

  def gather(self, plan: ragged.RaggedPlan, rows: np.ndarray) -> HostBatch:
    """The fields of some rows of a batch; padding rows are zeros."""
    indices = plan.indices[rows]
    real = indices != PADDING
    read = iter(self.read(indices[real]))
    num_mels = self.read([0])[0].shape[1] if not real.all() else 0
    sounds = [next(read) if ok else np.zeros((0, num_mels), np.float32) for ok in real]
    texts = [self.texts[i] if ok else np.zeros(0, np.int32) for i, ok in zip(indices, real)]
    length, token_length = (
        np.array(list(map(len, arrays)), np.int32) for arrays in (sounds, texts))
    return {"features": ragged.pad(sounds, plan.padded), "length": length,
            "tokens": ragged.pad(texts, self.max_text), "token_length": token_length}

  def close(self) -> None:
    pass


class AudioSet(splits.DataSet):
  """What the pipelines of one config share: the opened set, and how its examples become batches.

  Args:
    config: see `default_config`.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any):
    validate(config)
    super().__init__(config)
    self._mel_filters = _filters(config)
    self._window, self._hop = (round(config[field] * config.sample_rate)
                               for field in ("window", "hop"))

  def check(self, dataset: sources.Dataset) -> None:
    """See `DataSet.check`."""
    for field in ("audio_feature", "text_feature"):
      if self.config[field] not in dataset.features:
        raise UserError(f"--config.data.{field}={self.config[field]}: {self.config.name} has no "
                        f"such feature, but {', '.join(dataset.features)}")
    super().check(dataset)

  def pipeline(self, split: str, **options: Any) -> Pipeline:
    """See `DataSet.pipeline`."""
    config = self.config
    return ragged.RaggedPipeline(
        functools.partial(self.open_split, split),
        self.train_batch if options["train"] else self.batch, longest=config.max_frames,
        flag="--config.data.max_frames", buckets=config.buckets, multiple=FRAMES, **options)

  def shapes(self) -> splits.Shapes:
    """See `DataSet.shapes`."""
    config = self.config
    longest = -(-config.max_frames // FRAMES) * FRAMES
    return {"features": ((longest, config.num_mels), np.float32), "length": ((), np.int32),
            "tokens": ((config.max_text,), np.int32), "token_length": ((), np.int32)}

  def fields(self) -> Mapping[str, Any]:
    """See `DataSet.fields`."""
    return {"assets": lambda: {"alphabet": list(self.config.alphabet)}}

  def features(self, sound: np.ndarray, rate: int) -> np.ndarray:
    """The features f32[T, F] of a recording; raises `ValueError` if it is too long."""
    longest = max(MAX_SECONDS, self.config.max_frames * self.config.hop)
    if len(sound) > longest * rate:
      raise ValueError(f"is {len(sound) / rate:.0f} s long, more than {longest:.0f}; cut it into "
                       "shorter recordings")
    sound = features.resample(sound, rate, self.config.sample_rate)
    return features.normalise(
        features.log_mel(sound, self._mel_filters, self._window, self._hop))

  def sound(self, record: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    """The samples and the sample rate of a record; raises `ValueError` if it holds no sound."""
    stored = record[self.config.audio_feature]
    if len(stored) and isinstance(stored[0], bytes):
      return features.read_wav(stored[0])
    rate = getattr(self.dataset.features[self.config.audio_feature], "sample_rate", None)
    rate = self.config.sample_rate if rate is None else int(rate)
    features.check_rate(rate)
    samples = np.asarray(stored)
    if samples.dtype.kind != "f":
      samples, limits = samples.astype(np.int64), np.iinfo(np.int16)
      if samples.size and (samples.min() < limits.min or samples.max() > limits.max):
        raise ValueError("holds samples of more than 16 bits; store them as 16 bits or as WAV "
                         "files")
      samples = samples.astype(np.int16)
    return features.to_mono(samples), rate

  def frames(self, samples: int, rate: int) -> int:
    """T, the number of frames of a recording, exactly as `features` gives them."""
    return 1 + -(-samples * self.config.sample_rate // rate) // self._hop

  def open_split(self, split: str, pipeline: Pipeline) -> _Recordings:
    """Reads a split's texts and lengths, and also its features if they fit into memory."""
    del pipeline
    config, records = self.config, self.dataset.records(self.config[split])
    kept, size, lengths, texts, rates = [], 0, [], [], set()
    for start in range(0, len(records), READ_AT_ONCE):
      block = range(start, min(start + READ_AT_ONCE, len(records)))
      for index, record in zip(block, records[block]):
        try:
          sound, rate = self.sound(record)
          texts.append(tokenize(record[config.text_feature][0].decode(), config.alphabet))
        except ValueError as e:
          raise UserError(f"--config.data.{split}={config[split]!r}: example {index} of "
                          f"{config.name}: {e}") from e
        if len(texts[-1]) > config.max_text:
          raise UserError(f"--config.data.max_text={config.max_text}: example {index} of "
                          f"{config.name}, {split}, has {len(texts[-1])} characters; raise it to "
                          "that")
        rates |= {rate} - {config.sample_rate}
        lengths.append(self.frames(len(sound), rate))
        # The pipeline refuses a recording that is too long by its length.
        if size <= MEMORY_LIMIT and lengths[-1] <= config.max_frames:
          kept.append(self.features(sound, rate))
          size += kept[-1].nbytes
    if rates:
      _log.warning("%s, %s: recordings of %s samples a second were resampled to %d", config.name,
                   split, ", ".join(map(str, sorted(rates))), config.sample_rate)
    read = functools.partial(self._read, records)
    if size <= MEMORY_LIMIT:
      read = lambda indices: [kept[i] for i in indices]
    return _Recordings(np.array(lengths, np.int64), read, texts, config.max_text)

  def _read(self, records: sources.Records, indices: Sequence[int]) -> list[np.ndarray]:
    """The features of some recordings, from disk."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      return list(pool.map(lambda record: self.features(*self.sound(record)), records[indices]))

  def batch(self, examples: _Recordings, plan: ragged.RaggedPlan) -> HostBatch:
    return examples.gather(plan, plan.rows)

  def train_batch(self, examples: _Recordings, plan: ragged.RaggedPlan) -> HostBatch:
    config, batch = self.config, examples.gather(plan, plan.rows)
    masks = config.time_masks + config.frequency_masks
    if masks:
      draws = plan.rng("spec_augment").random((len(plan.indices), masks, 2))[plan.rows]
      batch["features"] = features.spec_augment(
          batch["features"], batch["length"], draws, time_masks=config.time_masks,
          time_mask=config.time_mask, time_mask_share=config.time_mask_share,
          frequency_mask=config.frequency_mask)
    return batch
