"""The user's own recordings: a folder of WAV files, and a table of what is said in them.

The table is one of

  metadata.csv          as of LJSpeech: id|text or id|text|normalised text, without names of
                        columns; the recording is wavs/ID.wav
  train.tsv, dev.tsv,   as of Common Voice: columns path, sentence and client_id, and recordings in
  test.tsv              clips/; validated.tsv if there is no train.tsv
  *.trans.txt           as of LibriSpeech, in any subfolder: "ID TEXT" in each line, the recordings
                        lie beside
  a .csv or .tsv file   with names of columns in its first line, if the folder holds only one, or
                        `config.data.table` names it

Columns are found by their names, see `_COLUMNS`; `config.data.audio_feature` and `text_feature` may
name others. Where the table names no splits, they are drawn by the seed: the recordings of one
speaker come into one split, if the table says who speaks and there are enough.
"""

import collections
import concurrent.futures
import dataclasses
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dljax.data import own
from dljax.errors import UserError

FLAG = "--config.data.folder"
WAV = ".wav"
# Recordings of these kinds have to be converted.
_OTHERS = (".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff", ".webm")
_COMMON_VOICE = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
_FOLDERS = ("", "wavs", "wav", "clips", "audio")  # where a table's recordings may lie
_COLUMNS = {
    "file": ("path", "file", "file_name", "filename", "audio", "wav", "id"),
    "text": ("normalized_transcription", "sentence", "text", "transcription", "transcript"),
    "speaker": ("client_id", "speaker", "speaker_id"),
    "split": ("split",),
}
_KEY = 16  # hexadecimal digits of a hash that name a recording
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Utterance:
  """A recording and what is said in it.

  Attributes:
    name: the recording's path below the folder.
    path: its path.
    text: what is said, in Unicode's form NFC.
    speaker: who speaks; "" if the table does not say.
    split: the split that the table names; "" if it names none.
    where: the table and the line, for messages.
  """

  name: str
  path: Path
  text: str
  speaker: str
  split: str
  where: str


def scan(config: Any) -> tuple[list[Utterance], list[str]]:
  """Reads the table of `config.folder`.

  Args:
    config: `config.data`.

  Returns:
    What it lists, in its order; and lines that say what else the folder holds.

  Raises:
    UserError: there is no folder or no table; or the table lists a recording that is missing, is
      there twice or has no text, or one that has to be converted.
  """
  folder = Path(config.folder).expanduser()
  found = own.find(folder, (WAV, *_OTHERS), FLAG)
  files = {name: folder / name for name in found.files}
  utterances = list(_read_tables(config, folder, files, found.others))
  if not utterances:
    raise UserError(f"{FLAG}={config.folder}: its table lists no recording; name another")
  lines: dict[str, str] = {}
  for utterance in utterances:
    if not utterance.text.strip():
      raise UserError(f"{utterance.where}: {utterance.name} has no text; add it, or take the line "
                      "out")
    if utterance.name in lines:
      raise UserError(f"{utterance.where}: {utterance.name} is also in {lines[utterance.name]}; "
                      "take one of them out")
    lines[utterance.name] = utterance.where
  left_out = [name for name in found.files if name.lower().endswith(WAV) and name not in lines]
  return utterances, [f"left out {own.some(left_out)}, which the table does not list"
                      ] if left_out else []


def _read_tables(
    config: Any, folder: Path, files: Mapping[str, Path], others: Sequence[str],
) -> Iterator[Utterance]:
  """The utterances in the table or tables of a folder; see this file's docstring."""
  top = sorted(name for name in others if "/" not in name)
  given = config.table
  if given:
    yield from _read_table(config, folder, files, given)
  elif "metadata.csv" in top:
    yield from _read_table(config, folder, files, "metadata.csv")
  elif "train.tsv" in top:
    for split, name in _COMMON_VOICE.items():
      if name in top:
        yield from _read_table(config, folder, files, name, split, quotes=False)
  elif "validated.tsv" in top:
    yield from _read_table(config, folder, files, "validated.tsv", quotes=False)
  elif trans := [name for name in others if name.endswith(".trans.txt")]:
    for name in trans:
      yield from _read_librispeech(folder, files, name)
  else:
    tables = [name for name in top if name.lower().endswith((".csv", ".tsv"))]
    if len(tables) != 1:
      there = f"{len(tables)} tables ({own.some(tables)})" if tables else "no table of transcripts"
      raise UserError(f"{FLAG}={config.folder}: holds {there}; put a metadata.csv there, or name "
                      "the table by --config.data.table")
    yield from _read_table(config, folder, files, tables[0])


def _read_table(
    config: Any, folder: Path, files: Mapping[str, Path], name: str, split: str = "",
    quotes: bool = True,
) -> Iterator[Utterance]:
  """The utterances in a table; in one without names of columns they are id, text, normalised text.
  """
  path, flag = folder / name, "--config.data.table"
  columns, delimiter = (), ""
  try:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
      first = file.readline(2**20).rstrip("\n")
  except OSError as e:
    raise UserError(f"{flag}={own.show(path)} cannot be read ({e.strerror}); name a table in the "
                    "folder") from None
  if "|" in first:
    delimiter, quotes, cells = "|", False, first.split("|")
    if _column(cells, config, "file") is None or _column(cells, config, "text") is None:
      if len(cells) > 3:
        raise UserError(f"{own.show(path)}: has {len(cells)} columns without names; give 2 or 3, "
                        "id|text|normalised text, or a line of names")
      columns = ("id", "text") if len(cells) == 2 else ("id", "raw", "text")
  elif name.lower().endswith(".tsv"):
    delimiter = "\t"
  table = own.read_table(path, flag, delimiter, columns, quotes)
  cells = {}
  for kind in _COLUMNS:
    column = _column(table.columns, config, kind)
    if column is None and kind in ("file", "text"):
      mend = {"file": "--config.data.audio_feature", "text": "--config.data.text_feature"}[kind]
      raise UserError(f"{table.path}: none of the columns {', '.join(table.columns)} holds the "
                      f"{kind} of a recording; name it by {mend}")
    cells[kind] = table.column(column, flag) if column else [""] * len(table.rows)
  for i, (file, text) in enumerate(zip(cells["file"], cells["text"])):
    said = cells["split"][i]
    if said and own.split_name(said) is None:
      raise UserError(f"{table.where(i)}: {said!r} is no split; write train, validation or test")
    found = _find(folder, files, file, table.where(i))
    yield Utterance(found, files[found], unicodedata.normalize("NFC", text), cells["speaker"][i],
                    split or own.split_name(said) or "", table.where(i))


def _column(columns: Sequence[str], config: Any, kind: str) -> str | None:
  """The column of a kind of `_COLUMNS`, or None."""
  usual = {"file": "audio_feature", "text": "text_feature"}
  names = [config[usual[kind]]] if kind in usual else []
  lower = {column.strip().lower(): column for column in columns}
  return next((lower[name] for name in (*names, *_COLUMNS[kind]) if name in lower), None)


def _read_librispeech(
    folder: Path, files: Mapping[str, Path], name: str,
) -> Iterator[Utterance]:
  """The utterances in a file "ID TEXT" whose recordings lie beside it."""
  try:
    if (size := (folder / name).stat().st_size) > own.MAX_TABLE:
      raise UserError(f"{own.show(folder / name)} has {size:,} bytes; give at most "
                      f"{own.MAX_TABLE:,}")
    lines = (folder / name).read_text(encoding="utf-8-sig").splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f"{own.show(folder / name)} is no UTF-8 text ({e}); mend it") from None
  below, _, _ = name.rpartition("/")
  # The folders of LibriSpeech are train-clean-100, dev-clean and so on.
  split = own.split_name(name.partition("/")[0].partition("-")[0]) or ""
  for i, line in enumerate(lines, 1):
    identity, _, text = line.strip().partition(" ")
    if not identity:
      continue
    where = f"{own.show(folder / name)}, line {i}"
    found = _find(folder, files, f"{below}/{identity}" if below else identity, where)
    yield Utterance(found, files[found], unicodedata.normalize("NFC", text),
                    identity.partition("-")[0], split, where)


def _find(folder: Path, files: Mapping[str, Path], written: str, where: str) -> str:
  """The name in `files` of the WAV file that a table means."""
  written = written.replace("\\", "/")
  if Path(written).is_absolute():
    try:
      written = Path(written).relative_to(folder.absolute()).as_posix()
    except ValueError:
      raise UserError(f"{where}: {written} lies outside of the folder; put it there") from None
  stem = written
  for suffix in (WAV, *_OTHERS):
    stem = written[:-len(suffix)] if written.lower().endswith(suffix) else stem
  for below in _FOLDERS:
    for end in (WAV, WAV.upper(), WAV.title()):
      name = f"{below}/{stem}{end}" if below else f"{stem}{end}"
      if name in files:
        return name
  for below in _FOLDERS:
    for suffix in _OTHERS:
      name = f"{below}/{stem}{suffix}" if below else f"{stem}{suffix}"
      if name in files:
        raise UserError(f"{where}: {name} is no WAV file; convert all, as by `for f in "
                        f"{(folder / name).parent}/*{suffix}; do ffmpeg -i \"$f\" "
                        f"\"${{f%{suffix}}}{WAV}\"; done`")
  raise UserError(f"{where}: there is no {stem}{WAV} in {own.show(folder)}; add it, or take the "
                  "line out")


def open_folder(
    config: Any, seed: int, trained: Mapping[str, Any] | None = None,
) -> tuple[own.Dataset, dict[str, Any]]:
  """The user's own recordings as a data set.

  Args:
    config: `config.data`.
    seed: the run's seed, which decides the splits that the table does not name.
    trained: the record of a run, {} if it has none, to evaluate it on other recordings: those
      named test, or all, are in the split test, but none that the run was trained on.

  Returns:
    The set; and the record to keep with a run: the fingerprint, and each file's key and split.

  Raises:
    UserError: see `scan`; or there are too few recordings for the splits.
  """
  utterances, _ = scan(config)
  digests = own.digests([utterance.path for utterance in utterances])
  names = [utterance.name for utterance in utterances]
  fingerprint = own.fingerprint(names, digests, json.dumps(
      [(u.name, u.text, u.speaker, u.split) for u in utterances]))
  keys = [digest.sha256[:_KEY] for digest in digests]
  if trained is None:
    splits = split(utterances, keys, config, seed)
  else:
    splits = _all_to_test(utterances, keys, trained, config.folder)
  chosen: dict[str, list[Utterance]] = {name: [] for name in own.SPLITS}
  for utterance, name in zip(utterances, splits):
    if name:
      chosen[name].append(utterance)
  record = {"fingerprint": fingerprint, "files": {
      own.show(name): [key, part] for name, key, part in zip(names, keys, splits)}}
  features = {config.audio_feature: None, config.text_feature: own.Text()}

  def read(utterance: Utterance) -> Mapping[str, Any]:
    return {config.audio_feature: [utterance.path.read_bytes()],
            config.text_feature: [utterance.text.encode()]}

  return own.Dataset(config.folder, features, fingerprint, chosen, read,
                     lambda utterance: own.show(utterance.path)), record


def split(
    utterances: Sequence[Utterance], keys: Sequence[str], config: Any, seed: int,
) -> list[str]:
  """The split of each utterance: as the table says, else drawn by the seed.

  Args:
    utterances: the utterances.
    keys: a text for each that tells its recording from others.
    config: `config.data`.
    seed: the run's seed.
  """
  own.check_shares(config.shares)
  shares = list(config.shares)
  for i, name in enumerate(own.SPLITS):
    if not config[name]:  # its recordings are for training
      shares[0], shares[i] = shares[0] + shares[i], 0
  given = [utterance.split for utterance in utterances]
  free = list(range(len(given)))
  if any(given):
    free = [i for i in free if given[i] == "train"]
    if not free:
      raise UserError(f"{FLAG}={config.folder}: its table names no recording for the split train; "
                      "add some")
    if "validation" in given or not shares[1]:
      return given
    shares = [shares[0] / (shares[0] + shares[1]), shares[1] / (shares[0] + shares[1]), 0]
  speakers = {utterances[i].speaker for i in free}
  by_speaker = "" not in speakers and len(speakers) >= sum(share > 0 for share in shares)
  whose = [utterances[i].speaker if by_speaker else keys[i] for i in free]
  drawn = own.split(whose, shares, seed, what=lambda _: (
      f"different {'speakers' if by_speaker else 'recordings'} in {config.folder}"))
  for i, name in zip(free, drawn):
    given[i] = name
  return given


def _all_to_test(
    utterances: Sequence[Utterance], keys: Sequence[str], trained: Mapping[str, Any], folder: str,
) -> list[str]:
  """The split test for those that it names, or else for all, but not for what was trained on."""
  named = any(utterance.split == "test" for utterance in utterances)
  rest = [(u.name, key) for u, key in zip(utterances, keys) if u.split == "test" or not named]
  known = own.left_out(*zip(*rest), trained, f"{FLAG}={folder}", "recordings")
  kept = {name for name, _ in rest} - known
  return ["test" if utterance.name in kept else "" for utterance in utterances]


def alphabet(texts: Sequence[str]) -> str:
  """The characters of texts, each once, in the order of their code points.

  White space is a single space. If there are lower-case letters, upper-case ones count as these.
  """
  characters = {" " if c.isspace() else c for text in texts for c in text.strip()}
  if any(c.islower() for c in characters):
    lower = {c: c.lower() for c in characters if c.isupper()}
    characters = {lower[c] if c in lower and c.swapcase() == lower[c] and len(lower[c]) == 1 else c
                  for c in characters}
  return "".join(sorted(characters))


def most_common(values: Sequence[int]) -> int:
  """The most frequent of some numbers; of several the largest."""
  counts = collections.Counter(values)
  return max(counts, key=lambda value: (counts[value], value))


def each(utterances: Sequence[Utterance], function: Any) -> Iterator[Any]:
  """The function's result for each utterance, computed in threads, some at a time."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for start in range(0, len(utterances), 64):
      yield from pool.map(function, utterances[start:start + 64])
