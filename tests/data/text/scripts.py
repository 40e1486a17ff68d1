"""A text of 10,000 lines in several scripts, the same with every version of Python, and small tokenizers for it.

The text is made of sentences in fourteen languages, of the names of characters in Unicode 3.2 (which the standard
library keeps as `unicodedata.ucd_3_2_0`), of words whose letters are drawn from the alphabets there, of numbers, code,
emoji, combining marks, all kinds of white space, and of what special tokens are called.

The tokenizers lie in folders as transformers writes them. `folders` trains them, which gives the same tokenizers each
time; fixtures/pretrained.json holds what transformers makes of the text with them.
"""

import collections
import functools
import hashlib
import json
import random
import re
import struct
from pathlib import Path
from unicodedata import ucd_3_2_0 as ucd

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = 10_000
CHUNK = 250  # lines
SENTENCES = """All human beings are born free and equal in dignity and rights.
Tous les êtres humains naissent libres et égaux en dignité et en droits.
Alle Menschen sind frei und gleich an Würde und Rechten geboren; daß heißt: STRASSE, Straße.
Todos los seres humanos nacen libres e iguales en dignidad y derechos. ¿Qué? ¡Sí!
Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.
Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İstanbul'da ışık.
Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.
Все люди рождаются свободными и равными в своём достоинстве и правах.
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.
يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ
人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.""".splitlines()
CODE = """def f(x): return x**2 + 1  # it's 3.14e-10
for i in range(10):\tprint(f"{i:>5}", end='\\n')
    if a != b and not (c <= d or e >= f): pass
<div class="x">&amp; </div> https://example.org/a?b=c#d user@example.com
I'll you've they're he'd I'm we'LL don't DON'T 'tis o'clock""".splitlines()
SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]", "<|im_start|>user",
           "<|im_end|>", "<think>", "<0x41>", "▁", "##ing", "Ġthe"]
SPACES = [" ", "  ", "   ", "\t", "\u00a0", "\u3000", "\u2009", "\r", " \t ", "\u200b", "\ufeff", "\x85", "\x00", "\x7f"]
EMOJI = ["😀", "🐈", "👩‍💻", "🇩🇪", "👍🏽", "❤️", "🏴", "⚽", "\U0001f9d1\u200d\U0001f680"]
MARKS = ["e\u0301", "n\u0303", "a\u030a", "ﬁ", "²", "Å", "ｆｕｌｌ", "ǅ", "ß", "İ", "ı", "\u0301", "\ufffd", "가", "각"]
BLOCKS = [(0x41, 0x7B), (0xC0, 0x180), (0x370, 0x400), (0x400, 0x460), (0x531, 0x587), (0x5D0, 0x5EB), (0x621, 0x64B),
          (0x905, 0x93A), (0x985, 0x9BA), (0xE01, 0xE31), (0x10A0, 0x10F7), (0x1200, 0x1247), (0x3041, 0x3097),
          (0x30A1, 0x30FB), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0x1D400, 0x1D440)]


@functools.cache
def lines():
  """The text."""
  draw = random.Random(17)
  pick = lambda things: things[int(draw.random() * len(things))]
  alphabets = [[chr(c) for c in range(*block) if ucd.category(chr(c))[0] in "LM"] for block in BLOCKS]
  names = [name for c in range(0x20, 0xFFFF) if (name := ucd.name(chr(c), "")) and not name.startswith(("CJK", "HANGUL"))]

  def word():
    alphabet = pick(alphabets)
    return "".join(pick(alphabet) for _ in range(1 + int(draw.random() * 8)))

  def part():
    kind = draw.random()
    if kind < 0.35:
      sentence = pick(SENTENCES).split(" ")
      begin = int(draw.random() * len(sentence))
      return " ".join(sentence[begin:begin + 6])
    if kind < 0.5:
      name = pick(names)
      return name.lower() if draw.random() < 0.5 else name.title()
    if kind < 0.65:
      return word()
    if kind < 0.73:
      return str(int(10 ** (12 * draw.random()))) + pick(["", ".5", ",000", "%", "th", " km/h"])
    if kind < 0.8:
      return pick(CODE)
    return pick(pick([SPECIAL, EMOJI, MARKS, ["...", "—", "«", "“”", "!?", "$", "€", "(", "\\", "`", "~"]]))

  return ["".join(part() + (" " if draw.random() < 0.8 else pick(SPACES)) for _ in range(1 + int(draw.random() * 8)))
          for _ in range(LINES)]


CHAT = """{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('there is no role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if tools %}
    {{- tools | tojson(indent=2) }}
{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set ns = namespace(system=messages[0]['content']) %}{% set loop_messages"
    " = messages[1:] %}{% else %}{% set ns = namespace(system='') %}{% set loop_messages = messages %}{% endif %}\n"
    "{% for message in loop_messages %}\n  {% if message['role'] == 'user' %}\n{{ bos_token + '[INST] ' + ns.system + "
    "message['content'].strip() + ' [/INST]' }}{% else %}\n{% generation %}{{ ' ' + message['content'] + eos_token }}"
    "{% endgeneration %}{% endif %}\n  {% if loop.index > 8 %}{% break %}{% endif %}\n{% endfor %}")


def _json(path, content):
  path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@functools.cache
def _byte_pairs():
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(lines()[:2000], trainers.BpeTrainer(
      vocab_size=1200, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False))
  return tokenizer.to_str()


@functools.cache
def _word_pieces(lowercase):
  """Words, beginnings and endings that are frequent, in the order of vocab.txt.

  The library's trainer breaks ties by chance.
  """
  whole, ends = collections.Counter(), collections.Counter()
  for line in lines()[:2000]:
    for word in re.findall(r"\w+", line.lower() if lowercase else line):
      whole.update(word[:i] for i in range(1, len(word) + 1))
      ends.update("##" + word[i:j] for i in range(1, len(word)) for j in range(i + 1, min(i + 5, len(word) + 1)))
  most = lambda counts, n: sorted(sorted(counts, key=lambda text: (-counts[text], text))[:n])
  single = sorted({c for line in lines() for c in (line.lower() if lowercase else line) if c.isprintable() and c > "!"})
  return list(dict.fromkeys(["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *single[::2], *most(whole, 700),
                             *most(ends, 900)]))


def _message(**fields):
  """A protocol buffer of the fields that are given as _NUMBER=value."""
  out = b""
  for name, value in fields.items():
    number = int(name[1:])
    if isinstance(value, float):
      out += _varint(number << 3 | 5) + struct.pack("<f", value)
    elif isinstance(value, int):
      out += _varint(number << 3) + _varint(value)
    else:
      data = value if isinstance(value, bytes) else value.encode()
      out += _varint(number << 3 | 2) + _varint(len(data)) + data
  return out


def _varint(value):
  out = b""
  while value > 127:
    out, value = out + bytes([value & 127 | 128]), value >> 7
  return out + bytes([value])


@functools.cache
def sentencepiece_model(tidy):
  """A SentencePiece model of BPE with bytes, as llama's; `tidy` says whether it removes extra spaces."""
  counts = collections.Counter("".join(lines()[:2000]))
  letters = {"▁"} | {c for c in sorted(counts, key=lambda c: (-counts[c], c))[:300] if c > " "}
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  # With other characters the library's trainer would break ties by chance.
  tokenizer.train_from_iterator(
      ["".join(c if c in letters else " " for c in line) for line in lines()[:2000]], trainers.BpeTrainer(
          vocab_size=1000, initial_alphabet=sorted(letters), show_progress=False))
  trained = json.loads(tokenizer.to_str())["model"]
  merged = ["".join(pair) for pair in trained["merges"]]
  single = sorted(set(trained["vocab"]) - set(merged))
  pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{i:02X}>", 0.0, 6) for i in range(256))]
  pieces += [(text, -float(i), 1) for i, text in enumerate(dict.fromkeys(merged))] + [(c, -5000.0, 1) for c in single]
  body = b"".join(_message(_1=_message(_1=text, _2=score, _3=kind)) for text, score, kind in pieces)
  return body + _message(_2=_message(_3=2, _35=1, _40=0, _41=1, _42=2), _3=_message(_1="identity", _3=1, _4=int(tidy)))


def folders(root):
  """Writes a folder of each form below `root`; name -> folder."""
  found = {}

  def folder(name, model_type, config=(), **files):
    found[name] = root / name
    found[name].mkdir(parents=True)
    _json(found[name] / "config.json", {"model_type": model_type, **dict(config)})
    for file, content in files.items():
      path = found[name] / file.replace("__", ".")
      if isinstance(content, dict):
        _json(path, content)
      else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

  model = json.loads(_byte_pairs())["model"]
  merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
  vocabulary = {"vocab__json": model["vocab"], "merges__txt": merges}
  size = len(model["vocab"])
  folder("gpt2", "gpt2", {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": size}, **vocabulary)
  folder("gpt2_prefix", "gpt2", **vocabulary, tokenizer_config__json={
      "add_prefix_space": True, "add_bos_token": True, "pad_token": "<pad>", "additional_special_tokens": ["<sep>"]},
         special_tokens_map__json={"eos_token": {"content": "<|endoftext|>", "lstrip": False, "rstrip": False,
                                                 "single_word": False, "normalized": True}})
  added = {str(size + i): {"content": text, "special": special, "lstrip": False, "rstrip": False, "single_word": False,
                           "normalized": False}
           for i, (text, special) in enumerate([("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False)])}
  folder("qwen", "qwen3", {"eos_token_id": size + 1, "bos_token_id": 0, "vocab_size": size + 100}, **vocabulary,
         chat_template__jinja=CHAT, generation_config__json={"eos_token_id": [size + 1, 0], "pad_token_id": 0},
         tokenizer_config__json={
             "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {"0": {**added[str(size)],
                                                                                 "content": "<|endoftext|>"}, **added},
             "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None})
  whole = tokenizers.Tokenizer.from_str(_byte_pairs())
  whole.normalizer = normalizers.NFKC()
  whole.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
  whole.post_processor = processors.TemplateProcessing(
      single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|> $B:1", special_tokens=[("<|endoftext|>", 0)])
  whole.enable_truncation(max_length=7)
  whole.enable_padding(length=9, pad_id=0, pad_token="<|endoftext|>")
  folder("whole", "llama", tokenizer__json=whole.to_str(), tokenizer_config__json={
      "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
      "chat_template": [{"name": "default", "template": LLAMA_CHAT}, {"name": "tool_use", "template": CHAT}]})
  for name, lowercase, options in (
      ("bert", True, None), ("bert_cased", False, {"do_lower_case": False}),
      ("bert_accents", True, {"strip_accents": False, "tokenize_chinese_chars": False, "tokenizer_class":
                              "BertTokenizer", "mask_token": "[MASK]"})):
    files = {"vocab__txt": "".join(f"{word}\n" for word in _word_pieces(lowercase))}
    folder(name, "bert", {"pad_token_id": 0}, **files, **({"tokenizer_config__json": options} if options else {}))
  folder("llama", "llama", {"bos_token_id": 1, "eos_token_id": 2}, tokenizer__model=sentencepiece_model(False),
         tokenizer_config__json={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                                 "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False,
                                 "chat_template": LLAMA_CHAT})
  folder("pieces", "", tokenizer__model=sentencepiece_model(True))
  folder("unigram", "", tokenizer__model=(Path(__file__).parents[2] / "fixtures" / "unigram.model").read_bytes())
  return found


def lines_for(name):
  """The text for a tokenizer of `folders`."""
  if name != "unigram":
    return lines()
  # Where a text spells a piece that stands for no text, we give SentencePiece's tokens, and transformers that piece.
  return [re.sub("<0x41>|</?s>|<unk>", "x", line) for line in lines()]


MESSAGES = [
    [{"role": "user", "content": "  Hello, <b>wörld</b>! "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?\n"},
     {"role": "assistant", "content": "4</s>", "reasoning": None}, {"role": "user", "content": "<|im_end|> 日本"}],
    [{"role": "user", "content": f"{i}"} for i in range(12)],
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <two> numbers: ½ + ½"}}]
FORMS = ("spelled", "text", "pair", "cut", "decoded")
LONGEST = 24


def digest(rows):
  """A hash of lists of numbers, or of texts."""
  return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:8]


def chunks(name):
  """The text for a tokenizer in chunks; each is a list of pairs of a line and the next one."""
  text = lines_for(name)
  pairs = list(zip(text, [*text[1:], text[0]]))
  return [pairs[i:i + CHUNK] for i in range(0, len(pairs), CHUNK)]
