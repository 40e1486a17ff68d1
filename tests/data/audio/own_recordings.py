"""Small recordings of one's own with their tables, for the tests of folders and of command lines."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io.wavfile

RATE = 8000
TEXTS = ("Guten Tag", "auf Wiedersehen", "na ja", "Grüße  aus Köln")


def wav(number: int = 0, rate: int = RATE, seconds: float = 0.2) -> bytes:
  """A file with a tone, whose pitch rises with the number."""
  file = io.BytesIO()
  time = np.arange(round(rate * seconds)) / rate
  scipy.io.wavfile.write(file, rate, (9000 * np.sin(2 * np.pi * (300 + 7 * number) * time)).astype(np.int16))
  return file.getvalue()


def save(path: Path, content: bytes | str) -> Path:
  """Writes a file and the folders above it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def ljspeech(folder: Path, count: int = 20, **how: Any) -> Path:
  """A folder in the form of LJSpeech."""
  for i in range(count):
    save(folder / "wavs" / f"L{i:03}.wav", wav(i, **how))
  save(folder / "metadata.csv", "".join(f'L{i:03}|Nr. "{i}|{TEXTS[i % 4]}\n' for i in range(count)))
  return folder


def common_voice(
    folder: Path, splits: Mapping[str, int], end: str = ".wav", speakers: int = 5, **how: Any,
) -> Path:
  """A folder in the form of Common Voice; split -> the number of recordings."""
  number = 0
  for split, count in splits.items():
    rows = ["client_id\tpath\tsentence\tup_votes"]
    for _ in range(count):
      save(folder / "clips" / f"c{number}{end}", wav(number, **how))
      rows.append(f"s{number % speakers}\tc{number}.mp3\t{TEXTS[number % 4]}\t2")
      number += 1
    save(folder / f"{split}.tsv", "\r\n".join(rows) + "\n")
  return folder
