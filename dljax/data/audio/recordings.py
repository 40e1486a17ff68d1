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
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from dljax.config import Field, Group
from dljax.data import inputs, own, ragged, sources, splits
from dljax.data.audio import features, transcripts
from dljax.data.pipeline import PADDING, HostBatch, Pipeline
from dljax.errors import UserError

# Bytes of features of one split; larger splits are read as they are needed.
MEMORY_LIMIT = 2 * 2**30
# Bucket lengths are multiples of it, so that convolutions with strides see even lengths.
FRAMES = 8
# The most seconds of a recording, unless `config.data.max_frames` allows more.
MAX_SECONDS = 3600
MAX_MELS, MAX_WINDOW = 512, 2**16  # bands, and samples of a window
MAX_FILE = 2**31  # bytes of a recording
MAX_FOUND_RATE = 16000  # Hz; speech has little above half of it
READ_AT_ONCE = 256  # number of recordings
THREADS = 8
_SPACES = re.compile(r"\s+")

_log = logging.getLogger(__name__)


def default_config() -> Group:
  """The fields of `config.data`."""
  return Group({
      "name": Field("morse", splits.NAME),
      "folder": Field("", "Your own recordings in place of a set: a folder of WAV files with a "
                      "table of transcripts, see dljax/data/README.md."),
      "table": Field("", "The table in the folder, unless it has one of the usual names."),
      "shares": Field(own.SHARES, "The shares of train, validation and test, where the table names "
                      "no splits."),
      "fitted_to": Field("", "The folder that was looked at when the run started."),
      "skip_corrupt": Field(0, "The number of recordings that may be left out as they cannot be "
                            "read."),
      **splits.fields("train", "validation", "test"),
      "audio_feature": Field("audio", "The feature of the set with a WAV file, or with samples "
                             "(TFDS's Audio); of your own table the column of files."),
      "text_feature": Field("text", "The feature of the set, or the column of your own table, with "
                            "the text of a recording."),
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
  need("skip_corrupt", config.skip_corrupt >= 0, "give a positive number, or 0 to skip none")
  own.check_shares(config.shares)
  if not config.folder:
    sources.parse_name(config.name)


def look_up(
    config: Any, seed: int, given: Collection[str],
) -> tuple[dict[str, Any], list[str]]:
  """What a folder of the user's own recordings decides; see `configs.Resolve`.

  Args:
    config: `config.data`.
    seed: the run's seed.
    given: the names of its fields that the user has set.

  Returns:
    Field of `config.data` -> value, for fields that are not given; and lines that say what the
    folder holds. Both are empty if there is no folder, but what a dry run needs is given.

  Raises:
    UserError: the folder is missing or cannot be used; or more recordings cannot be read than
      config.skip_corrupt allows.
  """
  if not config.folder:
    return {}, []
  for split in own.SPLITS:
    splits.need(config, split, split not in given or config[split] in ("", split),
                f"own data have the split {split}; write {split}, or nothing to leave it out")
  if not Path(config.folder).expanduser().exists():
    needed = [f"--config.data.{field}" for field in ("alphabet", "max_text", "max_frames")
              if field not in given]
    if needed:
      raise UserError(f"{transcripts.FLAG}={config.folder}: there is no such folder; name one, or "
                      f"for --dry_run without it give {' and '.join(needed)}")
    return {}, []
  own.check_shares(config.shares)
  utterances, lines = transcripts.scan(config)
  config = ml_collections.ConfigDict(config.to_dict())
  named = {utterance.split for utterance in utterances}
  for split, share in zip(own.SPLITS, config.shares):
    if split not in given:
      there = split in named or share > 0 and ("" in named or split != "test")
      config[split] = split if there else ""
  lengths, bad = [], []
  for utterance, length in zip(utterances, transcripts.each(utterances, _length)):
    if isinstance(length, str):
      bad.append(f"{own.show(utterance.path)}: {length}")
    else:
      lengths.append(length)
  if len(bad) > config.skip_corrupt or not lengths:
    raise _too_many(config, bad)
  found: dict[str, Any] = {"fitted_to": config.folder,
                           **{split: config[split] for split in own.SPLITS}}
  texts = [utterance.text for utterance in utterances]
  found["alphabet"] = transcripts.alphabet(texts)
  found["max_text"] = max(len(_SPACES.sub(" ", text).strip()) for text in texts)
  rate = config.sample_rate
  if "sample_rate" not in given:
    rate = min(transcripts.most_common([rate for _, rate in lengths]), MAX_FOUND_RATE)
  found |= {"sample_rate": rate, "lowest": 0.0, "highest": 0.0}
  config.sample_rate = rate
  found["max_frames"] = max(frames(config, *length) for length in lengths)
  found = {field: value for field, value in found.items() if field not in given}
  config.update(found)
  validate(config)
  dataset, _ = transcripts.open_folder(config, seed)
  hours = sum(samples / rate for samples, rate in lengths) / 3600
  speakers = len({utterance.speaker for utterance in utterances} - {""})
  parts = ", ".join(f"{split} {len(dataset.splits[split]):,}" for split in own.SPLITS
                    if config[split])
  lines.append(f"{own.show(config.folder)}: {len(utterances):,} recordings, {hours:.2f} hours"
               + f", {speakers:,} speakers" * (speakers > 0) + f"; {parts}")
  return found, lines


def _length(utterance: transcripts.Utterance) -> tuple[int, int] | str:
  """The number of samples of a recording and its sample rate, or why it cannot be read."""
  try:
    sound, rate = features.read_wav(read_file(utterance.path))
    if len(sound) > MAX_SECONDS * rate:
      raise ValueError(f"is more than {MAX_SECONDS} s long; cut it into shorter recordings")
    return len(sound), rate
  except (ValueError, OSError) as e:
    return str(e)


def _too_many(config: Any, bad: Sequence[str]) -> UserError:
  """The error for recordings that cannot be read; "FILE: why; what to do" for each."""
  if not config.skip_corrupt:
    return UserError(f"{bad[0]}, or skip it by --config.data.skip_corrupt={len(bad)}")
  return UserError(f"--config.data.skip_corrupt={config.skip_corrupt}: {len(bad)} recordings "
                   f"cannot be read, such as {bad[0].partition('; ')[0]}; give a larger number, or mend "
                   "them")


def read_file(path: Path) -> bytes:
  """The bytes of a recording; raises `ValueError` for a device or a file beyond `MAX_FILE`."""
  info = path.stat()
  if stat.S_ISCHR(info.st_mode) or info.st_size > MAX_FILE:
    raise ValueError(f"has more than {MAX_FILE:,} bytes; cut it into shorter recordings")
  return path.read_bytes()


def frames(config: Any, samples: int, rate: int) -> int:
  """T, the number of frames of a recording, exactly as `AudioSet.features` gives them.

  Args:
    config: `config.data`.
    samples: the number of its samples.
    rate: its sample rate.
  """
  hop = round(config.hop * config.sample_rate)
  return 1 + -(-samples * config.sample_rate // rate) // hop


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
        sound, rate = features.read_wav(read_file(source))
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
    output_length: numbers of frames i64[n] -> the numbers of frames that the network gives for
      them. If it is given, recordings that are too short for their texts are named.

  Raises:
    UserError: a value out of range.
  """

  def __init__(
      self, config: Any, output_length: Callable[[np.ndarray], Any] | None = None,
  ):
    validate(config)
    self.seed, self._run, self._output_length = 0, None, output_length
    # A folder that the run was not trained on can only be evaluated.
    self._foreign = bool(config.folder) and not own.same(config.folder, config.fitted_to)
    if self._foreign:
      config = ml_collections.ConfigDict(config.to_dict())
      config.update(train="train", validation="", test="test")
    self._skipped: dict[str, list[str]] = {}
    self._record: Mapping[str, Any] = {}
    super().__init__(config)
    self._mel_filters = _filters(config)
    self._window, self._hop = (round(config[field] * config.sample_rate)
                               for field in ("window", "hop"))

  def pipelines(self, **options: Any) -> splits.Data:
    """See `DataSet.pipelines`."""
    self.seed = options["seed"]
    return super().pipelines(**options)

  def open(self) -> Any:
    """See `DataSet.open`."""
    config, run = self.config, self._run or {}
    if not config.folder:
      return super().open()
    dataset, self._record = transcripts.open_folder(
        config, self.seed, run.get("files", {}) if self._foreign else None)
    if self._run is not None and not self._foreign:
      own.check_same(run.get("files", {}), self._record, f"{transcripts.FLAG}={config.folder}")
    return dataset

  def restore(self, assets: Mapping[str, Any]) -> None:
    """Takes the assets of a run, to continue or to evaluate it; call it before anything is opened.
    """
    self._run = assets

  def check(self, dataset: Any) -> None:
    """See `DataSet.check`."""
    if self._foreign:
      return
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
    fields = {"assets": self.assets, "restore": self.restore}
    return fields | {"name": self.config.folder} if self.config.folder else fields

  def assets(self) -> Mapping[str, Any]:
    """The characters, and what was left out; of the user's own recordings also the files."""
    assets: dict[str, Any] = {"alphabet": list(self.config.alphabet)}
    if self.config.folder:
      assets["files"] = self._record
    return assets | {"skipped": self._skipped} if self.config.skip_corrupt else assets

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

  def open_split(self, split: str, pipeline: Pipeline) -> _Recordings:
    """Reads a split's texts and lengths, and also its features if they fit into memory."""
    del pipeline
    config, dataset = self.config, self.dataset
    if self._foreign:
      if split == "train":
        raise UserError(f"{transcripts.FLAG}={config.folder}: this is not what the run was trained "
                        "on; another folder can be evaluated by --mode=eval")
      dataset.ranges(split, split)
    records = dataset.records(config[split])
    kept, size, lengths, texts, rates = [], 0, [], [], set()
    numbers, bad = [], {}  # of the examples that can be read; those that cannot -> why
    for start in range(0, len(records), READ_AT_ONCE):
      block = range(start, min(start + READ_AT_ONCE, len(records)))
      for index, record in zip(block, records[block]):
        example = dataset.example(config[split], index)
        try:
          text = tokenize(record[config.text_feature][0].decode(), config.alphabet)
        except ValueError as e:
          reason = str(e) if self._run is None else (
              f"{str(e).partition('; ')[0]} of the run; write it otherwise, or take it out")
          raise UserError(f"--config.data.{split}={config[split]!r}: {example}: {reason}") from e
        try:
          sound, rate = self.sound(record)
          length = frames(config, len(sound), rate)
          # A recording that is too long is refused below.
          heard = (self.features(sound, rate)
                   if size <= MEMORY_LIMIT and length <= config.max_frames else None)
        except ValueError as e:
          bad[index] = f"{example}: {e}"
          if not config.skip_corrupt:
            raise UserError(f"--config.data.{split}={config[split]!r}: {bad[index]}, or skip it by "
                            "--config.data.skip_corrupt=1") from e
          continue
        texts.append(text)
        numbers.append(index)
        rates |= {rate} - {config.sample_rate}
        lengths.append(length)
        if heard is not None:
          kept.append(heard)
          size += heard.nbytes
    names = [dataset.example(config[split], i) for i in numbers]
    self._check_most("max_text", split, list(map(len, texts)), names, "characters")
    self._check_most("max_frames", split, lengths, names, "frames")
    self._check_fit(split, lengths, texts, names)
    self._skip(split, [dataset.example(config[split], index) for index in bad], list(bad.values()))
    if rates:
      _log.warning("%s, %s: recordings of %s samples a second were resampled to %d",
                   dataset.name, split, ", ".join(map(str, sorted(rates))), config.sample_rate)
    read = functools.partial(self._read, sources.Subset(records, np.array(numbers, np.int64)))
    if size <= MEMORY_LIMIT:
      read = lambda indices: [kept[i] for i in indices]
    return _Recordings(np.array(lengths, np.int64), read, texts, config.max_text)

  def _check_most(
      self, field: str, split: str, sizes: Sequence[int], names: Sequence[str], unit: str,
  ) -> None:
    """Raises `UserError` if an example of a split is larger than `config[field]` allows."""
    most, largest = self.config[field], int(np.argmax(sizes)) if len(sizes) else 0
    if len(sizes) and sizes[largest] > most:
      count = sum(size > most for size in sizes)
      raise UserError(f"--config.data.{field}={most}: {count:,} of {len(sizes):,} recordings of "
                      f"{split} have more, such as {names[largest]} with {sizes[largest]} {unit}; "
                      "raise it to that, or take them out")

  def _check_fit(
      self, split: str, lengths: Sequence[int], texts: Sequence[np.ndarray], names: Sequence[str],
  ) -> None:
    """Names the recordings of a split that are too short for their texts.

    CTC writes at most one label in a frame of the network's output, and a blank between two equal
    labels; see `ops/ctc.py`.

    Raises:
      UserError: all recordings of the training split are too short.
    """
    if self._output_length is None:
      return
    there = np.asarray(self._output_length(np.array(lengths, np.int64)))
    needed = np.array([len(text) + np.sum(text[1:] == text[:-1]) for text in texts], np.int64)
    short = np.flatnonzero(needed > there)
    if not len(short):
      return
    first = short[0]
    what = (f"--config.data.{split}={self.config[split]!r}: {len(short):,} of {len(texts):,} texts "
            "need more frames than the network gives for their recordings")
    if split == "train" and len(short) == len(texts):
      raise UserError(f"{what}, such as {names[first]} ({needed[first]} and {there[first]}), so "
                      "that nothing can be learnt; correct the transcripts, or make "
                      f"--config.data.hop={self.config.hop:g} smaller")
    _log.warning("%s, and are left out of the loss: %s", what, own.some([names[i] for i in short]))

  def _skip(self, split: str, names: list[str], reasons: Sequence[str]) -> None:
    """Notes which recordings of a split cannot be read.

    Raises:
      UserError: there are more than `config.skip_corrupt` allows, over the splits that are open; or
        others than when the run began.
    """
    config = self.config
    before = (self._run or {}).get("skipped", {}).get(split)
    if before is not None and before != names and not self._foreign:
      raise UserError(f"--config.data.skip_corrupt: {len(names)} recordings of {split} cannot be "
                      f"read ({own.some(names)}), and {len(before)} could not when the run began "
                      f"({own.some(before)}); restore the data, or name another --workdir")
    self._skipped[split] = names
    if sum(map(len, self._skipped.values())) > config.skip_corrupt:
      others = [name for found in self._skipped.values() for name in found if name not in names]
      raise _too_many(config, [*reasons, *others])
    if names:
      _log.warning("skipped %d recording%s of %s that cannot be read: %s", len(names),
                   "s" * (len(names) > 1), split, own.some(names, len(names)))

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
