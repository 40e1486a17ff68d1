"""Recordings and what is said in them: log-mel features, the config that speech experiments share, and its pipelines.

A batch holds features f32[b, T, F], length i32[b] (frames that are no padding), tokens i32[b, U] (1 + the place of each
character in `config.data.alphabet`; 0, the blank of CTC, is padding), token_length i32[b], mask f32[b] (0 where a row
is padding) and "host/id" i64[b] (the example's position in its split, -1 for padding). Batches have few shapes: see
`data/ragged.py`.

Features are computed on the host, once where a split fits into memory: the logarithm of the power in `num_mels` bands
of equal width on the mel scale, as librosa has it (Slaney's scale and norm, frames centred on multiples of the hop,
zeros beyond the ends), then less the recording's mean in each band, over the recording's standard deviation.

SpecAugment: Park et al. 2019, "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition", its
masks of time and of frequency (section 2; without time warping, which the authors found to matter least).

Dimensions: b the host's rows, N samples, T frames, F bands, U characters.
"""

import concurrent.futures
import dataclasses
import functools
import io
import logging
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dljax.data import ragged, sources, splits
from dljax.data.pipeline import PADDING, HostBatch, Pipeline
from dljax.errors import UserError

MEMORY_LIMIT = 2 * 2**30  # bytes of features of one split; larger splits are read as they are needed
FLOOR = 1e-10  # of a band's power, before the logarithm (librosa's)
FRAMES = 8  # batches are padded to multiples of so many, so that convolutions with strides see even lengths
READ_AT_ONCE = 256  # recordings
THREADS = 8
_SLANEY_STEP, _SLANEY_KNEE = 200 / 3, 1000  # Hz in a mel up to the knee; above it 27 mels to a factor of 6.4
_SLANEY_LOG = math.log(6.4) / 27
_SPACES = re.compile(r"\s+")

_log = logging.getLogger(__name__)


def default_config() -> ml_collections.ConfigDict:
  """The fields of `config.data`."""
  return ml_collections.ConfigDict({
      "name": "morse",  # a TFDS name, possibly with config and version
      "train": "train",  # TFDS split expressions that must not overlap, e.g. train[:90%]; "" for none
      "validation": "validation",
      "test": "test",
      "audio_feature": "audio",  # of the set: a WAV file, or samples (TFDS' Audio)
      "text_feature": "text",
      "alphabet": " ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",  # letters of a text take its case
      "max_text": 32,  # characters
      "max_frames": 800,  # of a recording
      "sample_rate": 8000,  # Hz; recordings of another are resampled
      "window": 0.032,  # seconds
      "hop": 0.01,  # seconds
      "num_mels": 40,  # F
      "lowest": 0.0,  # Hz
      "highest": 0.0,  # Hz; 0 is half the sample rate
      "buckets": 4,  # lengths to pad to, each of which is compiled
      # SpecAugment in training; 0 masks turn it off.
      "time_masks": 0,
      "time_mask": 20,  # frames, the widest
      "time_mask_share": 0.2,  # of a recording, the widest
      "frequency_masks": 0,
      "frequency_mask": 6,  # bands, the widest
  })


def validate(config: Any) -> None:
  """Checks the fields of `config.data` against each other and their ranges; raises `UserError`."""
  def need(field: str, ok: bool, mend: str) -> None:
    if not ok:
      raise UserError(f"--config.data.{field}={config[field]!r}: {mend}")

  need("train", bool(config.train), "name the split to train on")
  need("alphabet", len(set(config.alphabet)) == len(config.alphabet) > 0, "give each character once")
  for field in ("max_text", "max_frames", "sample_rate", "num_mels"):
    need(field, config[field] > 0, "give a positive number")
  for field in ("hop", "window"):
    need(field, 1 <= config[field] * config.sample_rate < math.inf, "give the seconds of at least one sample")
  need("highest", 0 <= config.highest <= config.sample_rate / 2,
       f"give at most {config.sample_rate / 2:g} Hz, half the sample rate; 0 is that")
  need("lowest", 0 <= config.lowest < (config.highest or config.sample_rate / 2), "give less than the highest")
  for field in ("time_masks", "time_mask", "frequency_masks", "frequency_mask"):
    need(field, config[field] >= 0, "give 0 or more")
  need("frequency_mask", config.frequency_mask <= config.num_mels, f"give at most {config.num_mels}, all bands")
  need("time_mask_share", 0 <= config.time_mask_share <= 1, "give a value from 0 to 1")
  empty = np.flatnonzero(~_filters(config).any(axis=1))
  need("num_mels", not len(empty), f"band {empty[:1]} holds no frequency of a window of {config.window} s; give fewer "
       "bands or a longer window")
  sources.parse_name(config.name)


# --- Sound ------------------------------------------------------------------------------------------------


def read_wav(data: bytes) -> tuple[np.ndarray, int]:
  """Samples f32[N], of both channels' mean where there are two, in [-1, 1]; and the sample rate in Hz.

  Raises:
    ValueError: it is no WAV file of PCM or floating-point samples, is empty, or holds what is no number.
  """
  import scipy.io.wavfile

  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", scipy.io.wavfile.WavFileWarning)  # of chunks that hold no sound
      rate, samples = scipy.io.wavfile.read(io.BytesIO(data))
  except Exception as e:  # SciPy raises many kinds for a broken file
    reason = " ".join(str(e).split())[:100] or type(e).__name__
    raise ValueError(f"cannot be read as a WAV file ({reason}); convert it to one of 16 bits") from e
  return to_mono(samples), int(rate)


def to_mono(samples: np.ndarray) -> np.ndarray:
  """f32[N] in [-1, 1] from [N] or [N, channels] of any width, u8, signed or float.

  Raises:
    ValueError: there are no samples, or some are no numbers.
  """
  if samples.dtype == np.uint8:
    sound = (samples.astype(np.float32) - 128) / 128
  elif np.issubdtype(samples.dtype, np.integer):
    sound = (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
  else:
    sound = samples.astype(np.float32)
  sound = sound.mean(axis=1) if sound.ndim > 1 else sound
  if not len(sound):
    raise ValueError("holds no sound (0 samples); record it again, or take it out")
  if not np.isfinite(sound).all():
    raise ValueError(f"sample {np.argmin(np.isfinite(sound))} is not a finite number; mend it, or take it out")
  return sound


def resample(sound: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
  """f32[N] at `rate` Hz -> f32[ceil(N new_rate / rate)] at `new_rate`, low-passed."""
  import scipy.signal

  if rate == new_rate:
    return sound
  common = math.gcd(rate, new_rate)
  return scipy.signal.resample_poly(sound, new_rate // common, rate // common).astype(np.float32)


def mel_filters(rate: float, fft_length: int, num_mels: int, lowest: float = 0.0, highest: float = 0.0) -> np.ndarray:
  """f64[F, 1 + fft_length // 2]: triangles of area 1 (in Hz), evenly spaced on Slaney's mel scale.

  Malcolm Slaney, "Auditory Toolbox", Interval Research Technical Report 1998-010. `highest` 0 is half the rate.
  """
  mels = np.linspace(_mel(lowest), _mel(highest or rate / 2), num_mels + 2)
  above = _SLANEY_KNEE / _SLANEY_STEP
  edges = np.where(mels < above, mels * _SLANEY_STEP, _SLANEY_KNEE * np.exp(_SLANEY_LOG * (mels - above)))
  frequencies = np.fft.rfftfreq(fft_length, 1 / rate)
  left, middle, right = (edges[i:i + num_mels, None] for i in range(3))
  rising, falling = (frequencies - left) / (middle - left), (right - frequencies) / (right - middle)
  return np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)


def _mel(hertz: float) -> float:
  if hertz < _SLANEY_KNEE:
    return hertz / _SLANEY_STEP
  return _SLANEY_KNEE / _SLANEY_STEP + math.log(hertz / _SLANEY_KNEE) / _SLANEY_LOG


def log_mel(sound: np.ndarray, filters: np.ndarray, window: int, hop: int) -> np.ndarray:
  """The logarithm (base e) of the power in each band.

  Args:
    sound: f[N].
    filters: [F, 1 + fft_length // 2]; see `mel_filters`.
    window: samples of the Hann window, in the middle of a frame of fft_length.
    hop: samples from one frame to the next; the first is centred on the first sample.

  Returns:
    f32[1 + N // hop, F], computed in float64.
  """
  import scipy.fft
  import scipy.signal

  size = 2 * (filters.shape[1] - 1)
  shape = np.zeros(size)
  start = (size - window) // 2
  shape[start:start + window] = scipy.signal.get_window("hann", window)
  padded = np.pad(np.asarray(sound, np.float64), size // 2)
  frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
  spectrum = scipy.fft.rfft(frames * shape, axis=-1)
  power = spectrum.real**2 + spectrum.imag**2
  return np.log(np.maximum(power @ filters.T, FLOOR)).astype(np.float32)


def _filters(config: Any) -> np.ndarray:
  size = 2**math.ceil(math.log2(max(2, config.window * config.sample_rate)))
  return mel_filters(config.sample_rate, size, config.num_mels, config.lowest, config.highest)


def normalise(features: np.ndarray) -> np.ndarray:
  """[T, F] less the mean of each band, over the standard deviation of all."""
  centred = features - features.mean(axis=0)
  return centred / max(float(centred.std()), 1e-5)


def spec_augment(
    features: np.ndarray, length: np.ndarray, draws: np.ndarray, *, time_masks: int, time_mask: int,
    time_mask_share: float, frequency_mask: int,
) -> np.ndarray:
  """Features with some frames and some bands set to 0, their mean.

  Args:
    features: f32[b, T, F].
    length: i32[b], frames of each that are no padding.
    draws: f[b, masks, 2] in [0, 1), which say how wide each mask is and where; the first `time_masks` are of time.
    time_masks: see there.
    time_mask: frames, the widest.
    time_mask_share: of each length, the widest.
    frequency_mask: bands, the widest.
  """
  def masked(size: Any, widest: Any, draw: np.ndarray, count: int) -> np.ndarray:
    """bool[b, count]: whether a mask lies on it."""
    width = np.floor(draw[..., 0] * (np.broadcast_to(widest, draw.shape[:1])[:, None] + 1))
    start = np.floor(draw[..., 1] * (np.broadcast_to(size, draw.shape[:1])[:, None] - width + 1))
    at = np.arange(count)
    inside = (at >= start[..., None]) & (at < (start + width)[..., None])  # [b, masks, count]
    return inside.any(axis=1)

  widest = np.minimum(time_mask, np.floor(time_mask_share * length))
  frames = masked(length, widest, draws[:, :time_masks], features.shape[1])
  bands = masked(features.shape[2], frequency_mask, draws[:, time_masks:], features.shape[2])
  return np.where(frames[:, :, None] | bands[:, None, :], np.float32(0), features)


# --- Text -------------------------------------------------------------------------------------------------


def tokenize(text: str, alphabet: str) -> np.ndarray:
  """i32[U]: 1 + the place in the alphabet of each character, which takes the case that is there; single spaces.

  Raises:
    ValueError: a character is not in the alphabet.
  """
  places = {character: place for place, character in enumerate(alphabet, 1)}
  tokens = []
  for character in _SPACES.sub(" ", text).strip():
    place = places.get(character) or places.get(character.swapcase())
    if place is None:
      raise ValueError(f"the character {character!r} of {text[:40]!r} is not in the alphabet; add it to "
                       "--config.data.alphabet")
    tokens.append(place)
  return np.array(tokens, np.int32)


# --- Pipelines --------------------------------------------------------------------------------------------


def encode(paths: Sequence[str], config: Any) -> tuple[HostBatch, list[str], list[str]]:
  """Reads recordings as evaluation would.

  Args:
    paths: WAV files, or folders, which are searched for them to the bottom. Other sample rates are resampled, with a
      warning; of stereo the mean is taken.
    config: `config.data`.

  Returns:
    A batch of features, length, mask and "host/id", without rows if nothing was usable; the name of each row; and one
    line for each file that could not be used.

  Raises:
    UserError: a path does not exist.
  """
  recordings = AudioSet(config)
  found, names, skipped = [], [], []
  for path in _files(paths):
    try:
      sound, rate = read_wav(path.read_bytes())
    except (ValueError, OSError) as e:
      skipped.append(f"{path}: {e}")
      continue
    if rate != config.sample_rate:
      _log.warning("%s has %d samples a second, and was resampled to %d", path, rate, config.sample_rate)
    found.append(recordings.features(sound, rate))
    names.append(str(path))
  length = np.array([len(features) for features in found], np.int32)
  longest = -(-int(length.max(initial=1)) // FRAMES) * FRAMES
  none = np.empty((0, longest, config.num_mels), np.float32)
  return {"features": ragged.pad(found, longest) if found else none, "length": length,
          "mask": np.ones(len(found), np.float32), "host/id": np.arange(len(found))}, names, skipped


def _files(paths: Sequence[str]) -> Iterator[Path]:
  for path in map(Path, paths):
    if not path.exists():
      raise UserError(f"--input: there is no {path}; name a WAV file, or a folder of them")
    if path.is_dir():
      yield from sorted(p for p in path.rglob("*") if p.suffix.lower() == ".wav" and not p.name.startswith("."))
    else:
      yield path


@dataclasses.dataclass(frozen=True)
class _Recordings:
  """The `ragged.RaggedExamples` of a split.

  Attributes:
    lengths: i64[n], frames.
    read: indices -> the features [T, F] of each.
    texts: the tokens of each, i32[u].
    max_text: U.
  """

  lengths: np.ndarray
  read: Callable[[Sequence[int]], Sequence[np.ndarray]]
  texts: Sequence[np.ndarray]
  max_text: int

  def __len__(self) -> int:
    return len(self.texts)

  def gather(self, plan: ragged.RaggedPlan, rows: np.ndarray) -> HostBatch:
    """The batch's fields, in place of padding rows of zeros."""
    indices = plan.indices[rows]
    real = indices != PADDING
    read = iter(self.read(indices[real]))
    num_mels = self.read([0])[0].shape[1] if not real.all() else 0
    features = [next(read) if ok else np.zeros((0, num_mels), np.float32) for ok in real]
    texts = [self.texts[i] if ok else np.zeros(0, np.int32) for i, ok in zip(indices, real)]
    count = lambda arrays: np.array([len(array) for array in arrays], np.int32)
    return {"features": ragged.pad(features, plan.padded), "length": count(features),
            "tokens": ragged.pad(texts, self.max_text), "token_length": count(texts),
            "mask": real.astype(np.float32), "host/id": indices}

  def close(self) -> None:
    pass


class AudioSet:
  """What the pipelines of one config share: the opened set, and how its examples become batches.

  Args:
    config: see `default_config`.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any):
    validate(config)
    self.config = config = ml_collections.FrozenConfigDict(config)  # later changes are not ours
    self._mel_filters = _filters(config)
    self._window, self._hop = (round(config[field] * config.sample_rate) for field in ("window", "hop"))
    self._dataset: sources.Dataset | None = None
    self._lock = threading.Lock()

  @property
  def dataset(self) -> sources.Dataset:
    """The set, opened and held against the config."""
    with self._lock:
      if self._dataset is None:
        dataset = sources.open_dataset(self.config.name)
        for field in ("audio_feature", "text_feature"):
          if self.config[field] not in dataset.features:
            raise UserError(f"--config.data.{field}={self.config[field]}: {self.config.name} has no such feature, but "
                            f"{', '.join(dataset.features)}")
        splits.check_splits(dataset, self.config)
        self._dataset = dataset
      return self._dataset

  def pipelines(
      self, *, batch_size: int, eval_batch_size: int, seed: int, host: int | None = None, hosts: int | None = None,
  ) -> splits.Data:
    """The set's pipelines; opens nothing.

    Args:
      batch_size: rows of a global training batch.
      eval_batch_size: rows of a global evaluation batch.
      seed: the run's seed.
      host: this host's number and
      hosts: how many there are; by default what JAX says.

    Raises:
      UserError: a value out of range; when opened, data that is missing or does not fit the config.
    """
    config = self.config
    for field, size in ("batch_size", batch_size), ("eval_batch_size", eval_batch_size):
      if size < 1:
        raise UserError(f"--config.{field}={size}: give a positive number")
    make = lambda split, finish, **kwargs: ragged.RaggedPipeline(
        functools.partial(self.open_split, split), finish, longest=config.max_frames,
        flag="--config.data.max_frames", buckets=config.buckets, multiple=FRAMES, host=host, hosts=hosts, **kwargs)
    train = make("train", self.train_batch, batch_size=batch_size, seed=seed, train=True)
    evals = {split: make(split, self.batch, batch_size=eval_batch_size)
             for split in ("validation", "test") if config[split]}
    longest = -(-config.max_frames // FRAMES) * FRAMES
    shapes = {"features": ((longest, config.num_mels), np.float32), "length": ((), np.int32),
              "tokens": ((config.max_text,), np.int32), "token_length": ((), np.int32), "mask": ((), np.float32)}
    return splits.Data(
        name=config.name, train=train, evals=evals,
        batch_spec={key: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for key, (shape, dtype) in shapes.items()},
        fingerprint=lambda: self.dataset.fingerprint, assets=lambda: {"alphabet": list(config.alphabet)})

  def features(self, sound: np.ndarray, rate: int) -> np.ndarray:
    """f32[T, F] of a recording."""
    sound = resample(sound, rate, self.config.sample_rate)
    return normalise(log_mel(sound, self._mel_filters, self._window, self._hop))

  def sound(self, record: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    """Samples and sample rate of a record; raises `ValueError`."""
    stored = record[self.config.audio_feature]
    if len(stored) and isinstance(stored[0], bytes):
      return read_wav(stored[0])
    rate = getattr(self.dataset.features[self.config.audio_feature], "sample_rate", None)
    return to_mono(np.asarray(stored, np.int64).astype(np.int16)), rate or self.config.sample_rate

  def open_split(self, split: str, pipeline: Pipeline) -> _Recordings:
    """Reads a split: texts and lengths, and the features too if they fit into memory."""
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
          raise UserError(f"--config.data.{split}={config[split]!r}: example {index} of {config.name}: {e}") from e
        if len(texts[-1]) > config.max_text:
          raise UserError(f"--config.data.max_text={config.max_text}: example {index} of {config.name}, {split}, has "
                          f"{len(texts[-1])} characters; allow as many")
        rates |= {rate} - {config.sample_rate}
        if size <= MEMORY_LIMIT:
          kept.append(self.features(sound, rate))
          size += kept[-1].nbytes
          lengths.append(len(kept[-1]))
        else:
          lengths.append(1 + math.ceil(len(sound) * config.sample_rate / rate) // self._hop)
    if rates:
      _log.warning("%s, %s: recordings of %s samples a second were resampled to %d", config.name, split,
                   ", ".join(map(str, sorted(rates))), config.sample_rate)
    read = functools.partial(self._read, records) if size > MEMORY_LIMIT else lambda indices: [kept[i] for i in indices]
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
      batch["features"] = spec_augment(
          batch["features"], batch["length"], draws, time_masks=config.time_masks, time_mask=config.time_mask,
          time_mask_share=config.time_mask_share, frequency_mask=config.frequency_mask)
    return batch
