"""From a WAV file to log-mel features, and SpecAugment.

Features are the logarithm of the power in bands of equal width on the mel scale, as librosa
computes it (Slaney's scale and norm, frames centred on multiples of the hop, zeros beyond the
ends). The recording's mean in each band is subtracted, and the result divided by the recording's
standard deviation.

SpecAugment (Park et al. 2019, "SpecAugment: A Simple Data Augmentation Method for Automatic Speech
Recognition", section 2) masks spans of time and of frequency. Its time warping, which the authors
found to matter least, is left out.

Dimensions: b rows, N samples, T frames, F bands.
"""

import fractions
import io
import math
import struct
import warnings
from typing import Any

import numpy as np

from dljax.errors import one_line

FLOOR = 1e-10  # the least power of a band, before the logarithm (librosa's)
# The least and the most samples a second of a recording: a tiny rate would make it very long.
RATES = (100, 768_000)
# The greatest factor of a change of rates: the filter has 20 times as many values.
MAX_FACTOR = 2**16
# The sizes by which programs that write into a pipe say that they do not know the size yet.
UNKNOWN_SIZES = (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000)
FRAMES_AT_ONCE = 2**14
# A mel is 200 / 3 Hz up to the knee; above it, 27 mels are a factor of 6.4.
_SLANEY_STEP, _SLANEY_KNEE = 200 / 3, 1000
_SLANEY_LOG = math.log(6.4) / 27


def read_wav(data: bytes) -> tuple[np.ndarray, int]:
  """The samples of a WAV file, f32[N] in [-1, 1], and its sample rate in Hz.

  Several channels are averaged.

  Raises:
    ValueError: it is no WAV file of PCM or floating-point samples, is empty, was cut, has a sample
      rate beyond `RATES`, or holds a sample that is not a finite number.
  """
  import scipy.io.wavfile

  _check_chunks(data)
  try:
    with warnings.catch_warnings():
      # It warns of chunks that hold no sound.
      warnings.simplefilter("ignore", scipy.io.wavfile.WavFileWarning)
      rate, samples = scipy.io.wavfile.read(io.BytesIO(data))
  except Exception as e:  # SciPy raises many kinds of errors for a broken file
    raise ValueError(f"cannot be read as a WAV file ({one_line(e, 100)}); convert it to one of 16 "
                     "bits") from e
  check_rate(rate)
  return to_mono(samples), int(rate)


def check_rate(rate: int) -> None:
  """Raises `ValueError` for a sample rate that no recording of sound has."""
  least, most = RATES
  if not least <= rate <= most:
    raise ValueError(f"has {rate} samples a second, which must be from {least} to {most}; mend "
                     "its header, or convert it again")


def _check_chunks(data: bytes) -> None:
  """Raises `ValueError` for a WAV file whose sound SciPy would cut or misread without a word.

  A file ends with the size that its first chunk says. What is no WAV file passes.
  """
  order, head = ">" if data[:4] == b"RIFX" else "<", data[:4]
  if head not in (b"RIFF", b"RIFX", b"RF64") or len(data) < 44:
    return
  position, end, found = 12, len(data), []
  if head != b"RF64":
    end = min(end, 8 + struct.unpack_from(order + "I", data, 4)[0])
  while position < end and position + 8 <= len(data):
    kind, size = struct.unpack_from(order + "4sI", data, position)
    position += 8
    if kind == b"data" and head == b"RF64":
      size, = struct.unpack_from("<Q", data, 28)  # of the chunk ds64, which comes first
    if kind == b"data" and size > len(data) - position and size not in UNKNOWN_SIZES:
      raise ValueError(f"was cut: it should hold {size:,} bytes of sound, but holds only "
                       f"{len(data) - position:,}; get it again, or take it out")
    if kind == b"fmt " and position + 16 <= len(data):
      channels, align, bits = struct.unpack_from(order + "2xH8xHH", data, position)
      # Samples of up to 8 bits are read as bytes.
      width = 8 * (align // max(channels, 1))
      if channels and (width < bits or bits <= 8 < width):
        raise ValueError(f"has samples of {bits} bits in {align // channels} bytes; convert it to "
                         "a WAV file of 16 bits")
    if kind in (b"fmt ", b"data"):
      found.append(kind)
    position += size + size % 2
  for kind, what in (b"fmt ", "formats"), (b"data", "parts of sound"):
    if found.count(kind) > 1:
      raise ValueError(f"has {found.count(kind)} {what}, of which one would be read; convert it "
                       "to a WAV file that has one")


def to_mono(samples: np.ndarray) -> np.ndarray:
  """Samples [N] or [N, channels], u8, signed integers or floats -> f32[N] in [-1, 1].

  Raises:
    ValueError: there are no samples, or one is not a finite number.
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
    raise ValueError(f"sample {np.argmin(np.isfinite(sound))} is not a finite number; mend it, or "
                     "take it out")
  return sound


def resample(sound: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
  """f32[N] at `rate` Hz -> f32[ceil(N new_rate / rate)] at `new_rate`, low-passed."""
  import scipy.signal

  if rate == new_rate:
    return sound
  ratio, length = fractions.Fraction(new_rate, rate), -(-len(sound) * new_rate // rate)
  if max(ratio.numerator, ratio.denominator) > MAX_FACTOR:
    # In an hour, the nearest ratio of small numbers is off by less than one sample.
    small = min(ratio, 1 / ratio).limit_denominator(MAX_FACTOR)
    ratio = small if ratio < 1 else 1 / small
  resampled = scipy.signal.resample_poly(sound, ratio.numerator, ratio.denominator)
  resampled = resampled[:length].astype(np.float32)
  return np.pad(resampled, (0, length - len(resampled)))


def mel_filters(
    rate: float, fft_length: int, num_mels: int, lowest: float = 0.0, highest: float = 0.0,
) -> np.ndarray:
  """Filters that are triangles of area 1 (in Hz), evenly spaced on Slaney's mel scale.

  Malcolm Slaney, "Auditory Toolbox", Interval Research Technical Report 1998-010.

  Args:
    rate: the sample rate in Hz.
    fft_length: the number of samples in a frame.
    num_mels: F, the number of filters.
    lowest: the lowest frequency in Hz.
    highest: the highest frequency in Hz; 0 is half the sample rate.

  Returns:
    f64[F, 1 + fft_length // 2], each filter's weight of each frequency.
  """
  mels = np.linspace(_mel(lowest), _mel(highest or rate / 2), num_mels + 2)
  above = _SLANEY_KNEE / _SLANEY_STEP
  edges = np.where(mels < above, mels * _SLANEY_STEP,
                   _SLANEY_KNEE * np.exp(_SLANEY_LOG * (mels - above)))
  frequencies = np.fft.rfftfreq(fft_length, 1 / rate)
  left, middle, right = (edges[i:i + num_mels, None] for i in range(3))
  rising = (frequencies - left) / (middle - left)
  falling = (right - frequencies) / (right - middle)
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
    window: the number of samples in the Hann window, which lies in the middle of a frame.
    hop: the number of samples from one frame to the next; the first frame is centred on the first
      sample.

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
  out = np.empty((len(frames), len(filters)), np.float32)
  # The frames overlap, and their spectra would take many times the memory of a long recording.
  for start in range(0, len(frames), FRAMES_AT_ONCE):
    some = slice(start, start + FRAMES_AT_ONCE)
    spectrum = scipy.fft.rfft(frames[some] * shape, axis=-1)
    power = spectrum.real**2 + spectrum.imag**2
    out[some] = np.log(np.maximum(power @ filters.T, FLOOR))
  return out


def normalise(features: np.ndarray) -> np.ndarray:
  """[T, F] minus the mean of each band, divided by the standard deviation of the whole."""
  centred = features - features.mean(axis=0)
  return centred / max(float(centred.std()), 1e-5)


def spec_augment(
    features: np.ndarray, length: np.ndarray, draws: np.ndarray, *, time_masks: int,
    time_mask: int, time_mask_share: float, frequency_mask: int,
) -> np.ndarray:
  """Sets some frames and some bands of features to 0, which is their mean.

  Args:
    features: f32[b, T, F].
    length: i32[b], the number of frames in each row that are no padding.
    draws: f[b, masks, 2] in [0, 1), which decide the width and the place of each mask; the first
      `time_masks` mask time, the others frequency.
    time_masks: the number of masks of time.
    time_mask: the greatest width of a mask of time, in frames.
    time_mask_share: the greatest width of a mask of time, as a share of the row's length.
    frequency_mask: the greatest width of a mask of frequency, in bands.
  """
  def masked(size: Any, widest: Any, draw: np.ndarray, count: int) -> np.ndarray:
    """bool[b, count]: whether each of `count` places is under a mask."""
    width = np.floor(draw[..., 0] * (np.broadcast_to(widest, draw.shape[:1])[:, None] + 1))
    start = np.floor(draw[..., 1] * (np.broadcast_to(size, draw.shape[:1])[:, None] - width + 1))
    at = np.arange(count)
    inside = (at >= start[..., None]) & (at < (start + width)[..., None])  # [b, masks, count]
    return inside.any(axis=1)

  widest = np.minimum(time_mask, np.floor(time_mask_share * length))
  frames = masked(length, widest, draws[:, :time_masks], features.shape[1])
  bands = masked(features.shape[2], frequency_mask, draws[:, time_masks:], features.shape[2])
  return np.where(frames[:, :, None] | bands[:, None, :], np.float32(0), features)
