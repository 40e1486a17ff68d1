"""Tokenizers as they lie beside a model's weights, in a folder that was written for transformers.

    tokenizer = pretrained.from_folder("bert-base-uncased/")
    tokenizer.frame("A text.", "And another.").tokens  # [CLS] a text . [SEP] and another . [SEP]
    tokenizer.roles["mask"]
    pretrained.to_folder(tokenizer, "my-bert/")

Such a folder holds the vocabulary in one of four forms, which are looked for in this order:

  tokenizer.json            all of a tokenizer of Hugging Face's `tokenizers`
  vocab.json, merges.txt    byte pair encoding on bytes (Radford et al. 2019), as GPT-2's or Qwen's
  vocab.txt                 WordPiece (Schuster and Nakajima 2012), as BERT's
  tokenizer.model           a SentencePiece model (Kudo and Richardson 2018)

What the tokens are for stands in tokenizer_config.json, in older folders in special_tokens_map.json
and added_tokens.json, and else in config.json. Token ids are those of transformers 5, with one
exception: a tokenizer.json is always read as it stands, where transformers takes nothing but the
vocabulary from it if tokenizer_config.json names a class such as GPT2Tokenizer. (SmolLM2's digits,
which its tokenizer.json splits, are joined there.)
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dljax.data.text import chat, sentencepiece, tokenize
from dljax.errors import UserError

_JSON, _CONFIG, _MODEL = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
_VOCABULARY, _MERGES, _WORDS = "vocab.json", "merges.txt", "vocab.txt"
# Role -> how transformers calls it; with "_token" its text, with "_token_id" its number.
_NAMES = {"start": "bos", "end": "eos", "unknown": "unk", "separator": "sep", "pad": "pad",
          "class": "cls", "mask": "mask"}
# Class of tokenizer -> the roles' tokens where no file says otherwise.
_GPT2 = dict.fromkeys(("start", "end", "unknown"), "<|endoftext|>")
_QWEN2 = dict.fromkeys(("end", "unknown", "pad"), "<|endoftext|>")
_BERT = {"unknown": "[UNK]", "separator": "[SEP]", "pad": "[PAD]", "class": "[CLS]",
         "mask": "[MASK]"}
_LLAMA = {"unknown": "<unk>", "start": "<s>", "end": "</s>"}
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": _GPT2, "Qwen2Tokenizer": _QWEN2, "LlamaTokenizer": _LLAMA,
    "BertTokenizer": _BERT, "DistilBertTokenizer": _BERT, "ElectraTokenizer": _BERT,
}
# The classes that read each form, the first where a folder names none. "" names no class.
_ANY = ("", "PreTrainedTokenizer", "TokenizersBackend")
_CLASSES = {_VOCABULARY: ("GPT2Tokenizer", "Qwen2Tokenizer"),
            _WORDS: ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"),
            _MODEL: (*_ANY, "LlamaTokenizer")}
_OF_MODELS = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer",
              "bert": "BertTokenizer", "distilbert": "DistilBertTokenizer",
              "electra": "ElectraTokenizer"}
# How Qwen cuts a text into words (Qwen 2 technical report, 2024; the form of GPT-4's pattern).
_QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def load(path: str) -> tokenize.Tokenizer:
  """The tokenizer that --config.data.tokenizer_file names, a file or a folder.

  Raises:
    UserError: it cannot be read.
  """
  if is_folder(path):
    return from_folder(path, f"{tokenize.FLAG}={path}")
  return tokenize.load(path)


def is_folder(path: str) -> bool:
  """Whether a path is that of a folder. One that cannot be a path is none."""
  try:
    return Path(path).expanduser().is_dir()
  except (OSError, ValueError, RuntimeError):
    return False


def holds_tokenizer(path: str) -> bool:
  """Whether a folder holds a tokenizer in one of the four forms."""
  forms = _JSON, _VOCABULARY, _WORDS, _MODEL
  return is_folder(path) and any((Path(path).expanduser() / form).is_file() for form in forms)


def from_folder(path: str | Path, start: str = "") -> tokenize.Subwords:
  """The tokenizer in a folder of weights, with its roles and its chat templates.

  Args:
    path: the folder.
    start: the beginning of messages, such as a flag and its value; otherwise the path.

  Raises:
    UserError: there is no tokenizer in the folder, or one that cannot be read; a token's number is
      not below the number of the embedding's rows; or the number of a special token is not the one
      that config.json or generation_config.json gives it.
  """
  folder, start = Path(path).expanduser(), start or f"{path}"
  settings = _Settings(folder, start)
  with tokenize.failing("{start} holds no tokenizer that can be read ({reason}); get the folder "
                        "again", start=start):
    form = next((form for form in (_JSON, *_CLASSES) if (folder / form).exists()), None)
    if form is None:
      raise UserError(f"{start} holds no tokenizer; it needs a {_JSON}, a {_VOCABULARY} with a "
                      f"{_MERGES}, a {_WORDS} or a {_MODEL}")
    kind = _kind(form, settings)
    tokenizer, defaults = _library_tokenizer(folder, form, kind, settings)
    special = settings.special(defaults)
    _add_tokens(tokenizer, settings, special)
    if tokenizer.post_processor is None:
      _surround(tokenizer, kind, special, {} if form == _JSON else settings.tokenizer)
    roles = {role: tokenizer.token_to_id(token) for role, token in special.items()}
    numbers = tokenizer.get_vocab(with_added_tokens=True)
    for role, number in settings.numbers().items():  # of roles that no other file mentions
      if number in numbers.values():
        roles.setdefault(role, number)
    ends = [roles.get("end"), roles.get("separator"), *map(numbers.get, tokenize.ENDS)]
    end = next((number for number in ends if number is not None), None)
    if end is None:
      raise UserError(f"{start}: no file says which token ends a text; give {_CONFIG} an "
                      "eos_token")
    found = tokenize.Subwords(tokenizer, end, roles, settings.chat(special))
  _check_numbers(found, special, settings)
  rows = settings.model.get("vocab_size")
  if type(rows) is int:
    check_rows(found, rows, start, "config.json's vocab_size")
  return found


def to_folder(tokenizer: tokenize.Subwords, path: str | Path) -> None:
  """Writes a tokenizer as transformers reads it: AutoTokenizer.from_pretrained(path).

  Args:
    tokenizer: the tokenizer, of a run or of a folder.
    path: the folder, such as that of the weights; it is made if it is missing.

  Raises:
    UserError: a file cannot be written.
  """
  folder, chats = Path(path).expanduser(), tokenizer.chat
  roles = tokenizer.roles
  if tokenizer.end not in roles.values():
    roles = {**roles, "end": tokenizer.end}
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            **{f"{_NAMES[role]}_token": tokenizer.name(token) for role, token in roles.items()}}
  files = {_JSON: tokenizer.to_json()["tokenizer"]}
  if chats and set(chats.templates) == {"default"}:
    files["chat_template.jinja"] = chats.templates["default"]
  elif chats:
    config["chat_template"] = [{"name": name, "template": text}
                               for name, text in chats.templates.items()]
  files[_CONFIG] = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
      (folder / name).write_text(text, encoding="utf-8", newline="")
  except OSError as error:
    raise UserError(f"{path}: the tokenizer cannot be written ({error.strerror or error}); name "
                    "another folder") from None


def check_rows(
    tokenizer: tokenize.Tokenizer, rows: int, start: str, what: str = "the model's vocab_size",
) -> None:
  """Checks that each token has a row of the embedding; the embedding may have more.

  Args:
    tokenizer: the tokenizer.
    rows: the number of rows.
    start: the beginning of the message.
    what: where the number of rows stands.

  Raises:
    UserError: a token has none.
  """
  if tokenizer.size > rows:
    last = tokenizer.size - 1
    name = f" {tokenizer.name(last)!r:.60}" if isinstance(tokenizer, tokenize.Subwords) else ""
    raise UserError(f"{start}: the token{name} has the number {last:,}, but {what} is {rows:,}, so "
                    "the embedding has no row for it; take tokenizer and weights of one model")


def rows_of(path: str | Path, start: str = "") -> int:
  """The number of tokens of the model beside which a tokenizer lies.

  It is config.json's vocab_size, or without one the number of the tokenizer's tokens. Raises
  `UserError` as `from_folder` does.
  """
  size = from_folder(path, start).size
  rows = _Settings(Path(path).expanduser(), start or f"{path}").model.get("vocab_size")
  return rows if type(rows) is int else size


class _Settings:
  """What the folder's files say beside the vocabulary.

  Attributes:
    tokenizer: the content of tokenizer_config.json.
    model: the content of config.json.
    kind: the name of transformers' class for the tokenizer; "" if no file names one.
    added: the added tokens, each with its number and the options of `tokenizers.AddedToken`, by
      their numbers.
  """

  def __init__(self, folder: Path, start: str):
    self.start, self._folder = start, folder
    self.tokenizer, self.model = self._read(_CONFIG), self._read("config.json")
    self._files = {"config.json": self.model,
                   "generation_config.json": self._read("generation_config.json")}
    given = self.tokenizer.get("tokenizer_class") or self.model.get("tokenizer_class")
    self.kind = str(given or _OF_MODELS.get(str(self.model.get("model_type")), ""))
    self.kind = self.kind.removesuffix("Fast")
    # Newer folders have all in one file; what lies beside it there is out of date.
    old = {} if "added_tokens_decoder" in self.tokenizer else self._read("special_tokens_map.json")
    self._special = {**self.tokenizer, **old}
    with tokenize.failing("{start}: the added tokens of the tokenizer cannot be read ({reason}); "
                          "get the folder again", start=start):
      added = self.tokenizer.get("added_tokens_decoder", {})
      if not added:
        special = {_text(token) for token in self._extra()}
        special |= {_text(self._special.get(f"{name}_token")) for name in _NAMES.values()}
        added = {number: {"content": text, "special": text in special,
                          "normalized": text not in special}
                 for text, number in self._read("added_tokens.json").items()}
      self.added = sorted((int(number), dict(token)) for number, token in added.items())

  def _read(self, name: str) -> Mapping[str, Any]:
    """The content of a JSON file; empty if there is none."""
    path = self._folder / name
    if not path.exists():
      return {}
    start = f"{self.start}: {name}"
    data = tokenize.read_bytes(path, start, "get the folder again")
    with tokenize.failing("{start} is no JSON object ({reason}); get the folder again",
                          start=start):
      content = json.loads(data)
      if not isinstance(content, dict):
        raise ValueError(f"it is a {type(content).__name__}")
      return content

  def _extra(self) -> Sequence[Any]:
    """Special tokens that have no role."""
    found = self._special.get("extra_special_tokens") or self._special.get(
        "additional_special_tokens") or []
    if isinstance(found, dict):
      found = list(found.values())
    if not isinstance(found, list):
      raise ValueError("the special tokens are no list")
    return found

  def extra(self) -> list[dict[str, Any]]:
    """Special tokens that have no role, as options of `tokenizers.AddedToken`."""
    return [dict(token) if isinstance(token, dict) else {"content": token}
            for token in self._extra()]

  def special(self, defaults: Mapping[str, str]) -> dict[str, str]:
    """Role -> text of its token, where the files of the tokenizer give one.

    Args:
      defaults: the texts of roles that no file mentions.
    """
    found = dict(defaults)
    for role, name in _NAMES.items():
      key = f"{name}_token"
      if key in self._special:
        found.pop(role, None)
        if text := _text(self._special[key]):
          found[role] = text
    return found

  def options(self, role: str) -> dict[str, Any]:
    """What the files say of the token of a role beside its text; see `tokenizers.AddedToken`."""
    token = self._special.get(f"{_NAMES[role]}_token")
    return {name: value for name, value in token.items() if name in (
        "lstrip", "rstrip", "single_word", "normalized")} if isinstance(token, dict) else {}

  def numbers(self) -> dict[str, int]:
    """Role -> number of its token in config.json, for roles that the tokenizer's files omit."""
    return {role: number for role, name in _NAMES.items() if f"{name}_token" not in self._special
            and type(number := self.model.get(f"{name}_token_id")) is int}

  def model_numbers(self, role: str) -> dict[str, tuple[int, ...]]:
    """"FILE's FIELD" -> the numbers that a file of the model gives the token of a role."""
    found = {}
    for file, content in self._files.items():
      key = f"{_NAMES[role]}_token_id"
      value = content.get(key)
      if numbers := tuple(n for n in (value if isinstance(value, list) else [value])
                          if type(n) is int):
        found[f"{file}'s {key}"] = numbers
    return found

  def chat(self, special: Mapping[str, str]) -> chat.Chat | None:
    """The chat templates, which may name the special tokens; None if there are none."""
    found = self.tokenizer.get("chat_template") or {}
    if isinstance(found, str):
      found = {"default": found}
    elif isinstance(found, list):
      found = {entry["name"]: entry["template"] for entry in found}
    files = {"default": self._folder / "chat_template.jinja"}
    files |= {path.stem: path
              for path in sorted(self._folder.glob("additional_chat_templates/*.jinja"))}
    texts = {name: tokenize.read_bytes(path, f"{self.start}: {path.name}", "get the folder again")
             for name, path in files.items() if path.exists()}
    if texts:  # templates in files of their own take the place of those in tokenizer_config.json
      found = {name: data.decode().replace("\r\n", "\n") for name, data in texts.items()}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
      raise ValueError("its chat template is no text")
    tokens = {f"{_NAMES[role]}_token": text for role, text in special.items()}
    return chat.Chat(found, tokens) if found else None


def _text(token: Any) -> str:
  """The text of a token in a file, where it may have options; "" if it has none."""
  text = token.get("content") if isinstance(token, dict) else token
  return text if isinstance(text, str) else ""


def _kind(form: str, settings: _Settings) -> str:
  """The name of transformers' class that reads a form of vocabulary; see `_CLASSES`."""
  if form == _JSON:  # which needs no class
    return settings.kind
  kind = _CLASSES[form][0] if settings.kind in _ANY else settings.kind
  if kind not in _CLASSES[form]:
    raise UserError(f"{settings.start}: a {form} of transformers' {kind} cannot be read; let "
                    f"transformers write a {_JSON}, by save_pretrained of its tokenizer")
  return kind


def _library_tokenizer(
    folder: Path, form: str, kind: str, settings: _Settings,
) -> tuple[Any, Mapping[str, str]]:
  """The tokenizer of `tokenizers` without what other files add; and role -> text by default."""

  def read(name: str) -> bytes:
    return tokenize.read_bytes(folder / name, f"{settings.start}: {name}", "get the folder again")

  data, defaults = read(form), _DEFAULTS.get(kind, {})
  if form == _JSON:
    tokenizer = tokenize.parse(data.decode())
  elif form == _VOCABULARY:
    read(_MERGES)  # which says what is wrong if it cannot be read
    tokenizer = _byte_level(folder, kind, settings)
  elif form == _WORDS:
    tokenizer = _wordpiece(folder, settings)
  else:
    tokenizer = _sentencepiece(data, kind, settings)
    defaults = defaults or sentencepiece.roles(data)
  known = tokenizer.get_vocab(with_added_tokens=True)
  return tokenizer, {role: text for role, text in defaults.items() if text in known}


def _byte_level(folder: Path, kind: str, settings: _Settings) -> Any:
  from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

  vocabulary, merges = models.BPE.read_file(str(folder / _VOCABULARY), str(folder / _MERGES))
  tokenizer = Tokenizer(models.BPE(vocabulary, merges))
  prefix = bool(settings.tokenizer.get("add_prefix_space"))
  if kind == "Qwen2Tokenizer":
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)])
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _wordpiece(folder: Path, settings: _Settings) -> Any:
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

  unknown = settings.special(_BERT).get("unknown", "[UNK]")
  vocabulary = models.WordPiece.read_file(str(folder / _WORDS))
  tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
  option = settings.tokenizer.get
  tokenizer.normalizer = normalizers.BertNormalizer(
      lowercase=option("do_lower_case", True), strip_accents=option("strip_accents"),
      handle_chinese_chars=option("tokenize_chinese_chars", True))
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  return tokenizer


def _sentencepiece(data: bytes, kind: str, settings: _Settings) -> Any:
  if kind != "LlamaTokenizer":
    return sentencepiece.read(data)
  # Its class in transformers adds the space itself, and knows nothing of the model's normaliser.
  if settings.tokenizer.get("add_prefix_space") in (None, True):
    prepend = "always" if settings.tokenizer.get("legacy") else "first"
  else:
    prepend = "never"
  return sentencepiece.read(data, plain=True, prepend=prepend)


def _add_tokens(tokenizer: Any, settings: _Settings, special: Mapping[str, str]) -> None:
  """Adds the tokens that the files name, and makes those that have a role special.

  Args:
    tokenizer: the tokenizer, which is changed.
    settings: the folder's files.
    special: role -> text of its token.
  """
  from tokenizers import AddedToken

  def fields(token: Any) -> dict[str, Any]:
    return {name: getattr(token, name) for name in (
        "content", "lstrip", "rstrip", "single_word", "normalized", "special")}

  there = {token.content: fields(token)
           for token in tokenizer.get_added_tokens_decoder().values()}
  wanted = [token for _, token in settings.added]
  wanted += [{"content": text, "special": True, **settings.options(role)}
             for role, text in special.items()]
  wanted += [{"special": True, **token} for token in settings.extra()]
  for token in wanted:
    token = {name: value for name, value in token.items() if not name.startswith("__")}
    if token["content"] not in there:
      there[token["content"]] = token
      tokenizer.add_tokens([AddedToken(**token)])
  for text in special.values():
    if not there[text].get("special"):
      tokenizer.add_special_tokens([AddedToken(**{**there[text], "special": True})])
  for number, token in settings.added:
    if (got := tokenizer.token_to_id(token["content"])) != number:
      raise UserError(f"{settings.start}: {_CONFIG} or added_tokens.json gives the token "
                      f"{token['content']!r:.60} the number {number:,}, but the vocabulary "
                      f"{got:,}; get the folder again")


def _surround(
    tokenizer: Any, kind: str, special: Mapping[str, str], options: Mapping[str, Any],
) -> None:
  """Sets the special tokens around a text, and around a pair of texts.

  Args:
    tokenizer: the tokenizer, which is changed.
    kind: the name of transformers' class.
    special: role -> text of its token.
    options: add_bos_token and add_eos_token, where they are given.
  """
  from tokenizers import processors

  if _DEFAULTS.get(kind) is _BERT and {"class", "separator"} <= special.keys():
    before, after = [special["class"]], [special["separator"]]
    second = []
  else:
    before, after = ([special[role]] if role in special and options.get(
        f"add_{_NAMES[role]}_token") else [] for role in ("start", "end"))
    second = before
  single = [f"{part}:0" for part in (*before, "$A", *after)]
  tokenizer.post_processor = processors.TemplateProcessing(
      single=single, pair=single + [f"{part}:1" for part in (*second, "$B", *after)],
      special_tokens=[(text, tokenizer.token_to_id(text)) for text in {*before, *after}])


def _check_numbers(
    tokenizer: tokenize.Subwords, special: Mapping[str, str], settings: _Settings,
) -> None:
  """Refuses special tokens that have other numbers in the files of the model."""
  for role, text in special.items():
    for where, numbers in settings.model_numbers(role).items():
      if tokenizer.roles[role] not in numbers:
        raise UserError(f"{settings.start}: {where} is {', '.join(map(str, numbers))}, but the "
                        f"tokenizer's {_NAMES[role]}_token {text!r:.60} has the number "
                        f"{tokenizer.roles[role]}; correct the one that is wrong")
