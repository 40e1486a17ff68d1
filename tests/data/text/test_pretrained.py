"""Tokenizers beside weights: the tokens, roles and chats are those of transformers; see fixtures/make_pretrained.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dljax.data.text import chat, corpus, pretrained, tokenize
from dljax.errors import UserError
from tests.data.text import scripts

PEER = json.loads((Path(__file__).parents[2] / "fixtures" / "pretrained.json").read_text())
WITH_CHAT = [name for name, found in PEER.items() if found["chats"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  return scripts.folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def tokenizers(folders):
  return {name: pretrained.from_folder(folder) for name, folder in folders.items()}


@pytest.fixture
def copy(folders, tmp_path):
  """A function: name -> a copy of that folder, to be spoilt; with files of JSON that are changed or new."""
  def make(name, **files):
    folder = tmp_path / name
    shutil.copytree(folders[name], folder)
    for file, content in files.items():
      path = folder / file.replace("__", ".")
      old = json.loads(path.read_text()) if path.exists() and isinstance(content, dict) else {}
      path.write_text(json.dumps(old | content) if isinstance(content, dict) else content)
    return folder
  return make


def _hashes(tokenizer, chunk):
  rows = {form: [] for form in scripts.FORMS}
  for line, other in chunk:
    rows["spelled"].append(tokenizer.frame(line, spelled=True).tokens.tolist())
    rows["text"].append(tokenizer.encode(line).tokens.tolist())
    for form, longest in (("pair", None), ("cut", scripts.LONGEST)):
      rows[form].append([part.tolist() for part in tokenizer.frame(line, other, longest=longest)])
    rows["decoded"].append(tokenizer.decode(rows["spelled"][-1]))
  return [scripts.digest(found) for found in rows.values()]


@pytest.mark.parametrize("name", PEER)
def test_the_tokens_are_those_of_transformers(tokenizers, name):
  number = 3 * list(PEER).index(name)
  assert _hashes(tokenizers[name], scripts.chunks(name)[number]) == PEER[name]["chunks"][number]


@pytest.mark.slow
@pytest.mark.parametrize("name", PEER)
def test_the_tokens_of_10_000_lines_are_those_of_transformers(tokenizers, name):
  chunks = scripts.chunks(name)
  assert sum(map(len, chunks)) == scripts.LINES and len(chunks) == len(PEER[name]["chunks"])
  for chunk, expected in zip(chunks, PEER[name]["chunks"]):
    assert _hashes(tokenizers[name], chunk) == expected


@pytest.mark.parametrize("name", PEER)
def test_sizes_and_roles_are_those_of_transformers(tokenizers, name):
  tokenizer, special = tokenizers[name], PEER[name]["special"]
  names = {"bos": "start", "eos": "end", "unk": "unknown", "sep": "separator", "pad": "pad", "cls": "class",
           "mask": "mask"}
  expected = {names[key.removesuffix("_token")]: number for key, (_, number) in special.items()}
  if name == "whole":
    del expected["pad"]  # what its tokenizer.json says of padding is left out
  assert tokenizer.roles == expected and tokenizer.size == PEER[name]["size"]
  assert tokenizer.end == expected.get("end", expected.get("separator"))
  for text, number in special.values():
    assert tokenizer.number(text) == number and tokenizer.name(number) == text


def test_special_tokens_surround_a_text_and_a_pair(tokenizers):
  bert = tokenizers["bert"]
  tokens, kinds = bert.frame("Free, and equal!", "[MASK] born")
  names = [bert.name(token) for token in tokens]
  assert names[0] == "[CLS]" and [i for i, name in enumerate(names) if name == "[SEP]"] == [
      kinds.tolist().index(1) - 1, len(names) - 1]
  assert bert.roles["mask"] not in tokens and bert.roles["mask"] in bert.frame("[MASK]", spelled=True).tokens
  assert tokens.dtype == kinds.dtype == np.int32 and sorted(kinds) == kinds.tolist()
  llama = tokenizers["llama"]
  assert llama.frame("x").tokens[0] == llama.roles["start"] and llama.roles["start"] not in llama.encode("x").tokens


@pytest.mark.parametrize("one, other", [(3, 30), (30, 3), (30, 30), (31, 30), (8, 9), (0, 40), (40, 0)])
def test_the_longer_text_is_cut(tokenizers, one, other):
  tokenizer = tokenizers["gpt2"]
  a, b = "é" * one, "日" * other
  whole = [len(tokenizer.encode(text).tokens) for text in (a, b)]
  for longest in (2, 7, 8, 20, 200):
    tokens, kinds = tokenizer.frame(a, b, longest=longest)
    sizes = [int((kinds == kind).sum()) for kind in (0, 1)]
    assert sum(sizes) == len(tokens) == min(longest, sum(whole))
    kept = sorted([min(whole[0], longest), min(whole[1], longest)])
    assert min(sizes) >= min(kept[0], longest // 2)  # the shorter one loses nothing before both are as short
    np.testing.assert_array_equal(tokens[:sizes[0]], tokenizer.encode(a).tokens[:sizes[0]])


@pytest.mark.parametrize("name", PEER)
def test_a_run_keeps_the_tokenizer_its_roles_and_its_chat(tokenizers, name):
  tokenizer = tokenizers[name]
  again = tokenize.from_json(json.loads(json.dumps(tokenizer.to_json())))
  assert (again.size, again.end, again.roles, again.chat) == (
      tokenizer.size, tokenizer.end, tokenizer.roles, tokenizer.chat)
  chunk = scripts.chunks(name)[0][:50]
  assert _hashes(again, chunk) == _hashes(tokenizer, chunk)


@pytest.mark.parametrize("name", PEER)
def test_a_tokenizer_is_written_for_others(tokenizers, name, tmp_path):
  """fixtures/make_pretrained.py has transformers read these folders, and compares."""
  tokenizer = tokenizers[name]
  pretrained.to_folder(tokenizer, tmp_path / "new")
  again = pretrained.from_folder(tmp_path / "new")
  assert (again.roles, again.end, again.size) == (tokenizer.roles, tokenizer.end, tokenizer.size)
  assert (again.chat is None) == (tokenizer.chat is None)
  if again.chat:
    assert again.chat.templates == tokenizer.chat.templates
    assert again.chat.render(scripts.MESSAGES[1]) == tokenizer.chat.render(scripts.MESSAGES[1])
  chunk = scripts.chunks(name)[1][:50]
  assert _hashes(again, chunk) == _hashes(tokenizer, chunk)


def test_a_tokenizer_of_a_run_is_written_for_others(tmp_path):
  tokenizer = tokenize.make("bpe", scripts.lines()[:200], vocab_size=400)
  pretrained.to_folder(tokenizer, tmp_path)
  again = pretrained.from_folder(tmp_path)
  assert again.roles == {"end": tokenizer.end} and again.end == tokenizer.end
  np.testing.assert_array_equal(again.encode(scripts.SENTENCES[0]).tokens, tokenizer.encode(scripts.SENTENCES[0]).tokens)
  with pytest.raises(UserError, match="tokenizer.json/x: the tokenizer cannot be written .Not a directory.; name another"):
    pretrained.to_folder(tokenizer, tmp_path / "tokenizer.json" / "x")


@pytest.mark.parametrize("name", WITH_CHAT)
def test_chats_are_those_of_transformers(tokenizers, name):
  tokenizer = tokenizers[name]
  *expected, last = PEER[name]["chats"]
  found = []
  for messages in scripts.MESSAGES:
    for tools in (None, scripts.TOOLS):
      for answer in (True, False):
        options = {"tools": tools, "answer": answer}
        found.append([tokenizer.chat.render(messages, **options),
                      scripts.digest(tokenizer.encode_chat(messages, **options).tolist())])
  if last[1]:
    expected.append(last)
  else:
    with pytest.raises(UserError, match=f"the chat template refuses .*{last[0]}"):
      tokenizer.chat.render([{"role": "judge", "content": "x"}])
  assert found == expected


def _render(template, messages=({"role": "user", "content": "x"},), **values):
  return chat.Chat({"default": template}, {"eos_token": "</s>"}).render(messages, **values)


def test_a_template_sees_what_transformers_shows_it():
  assert _render("{{ eos_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}") == "</s>TrueTrueTrue"
  assert _render("{{ messages | tojson }}") == '[{"role": "user", "content": "x"}]'
  assert _render("{{ strftime_now('%Y') | int > 2000 }}") == "True"
  assert _render("{{ wish }}", wish="<b>") == "<b>"
  assert _render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
  message = {"role": "assistant", "content": None, "thinking": "why"}
  assert _render("{{ messages[0].reasoning_content }} {{ 'content' in messages[0] }}", [message]) == "why False"


@pytest.mark.parametrize("template, reason", [
    ("{% if %}", "Expected an expression"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{% set ns = namespace(_x=1) %}", "underscore"),
    ("{% set ns = namespace() %}{% set ns._x = 1 %}", "underscore"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ raise_exception('no\nsystem') }}", "no system"),
    ("{{ 1 / 0 }}", "division"),
    ("{{ nothing.at_all }}", "undefined"),
])
def test_a_template_that_fails_is_one_line(template, reason):
  with pytest.raises(UserError, match=f"the chat template refuses this conversation .*{reason}") as error:
    _render(template)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("messages, line", [
    ([], "needs at least one message"), ([{"content": "x"}], "has no role"), (["x"], "has no role"),
    ([{"role": "user", "content": b"x"}], "not plain text"), ([{"role": "user", "content": float("nan")}], "not plain")])
def test_messages_that_are_none_are_named(messages, line):
  with pytest.raises(UserError, match=line):
    _render("{{ messages }}", messages)


def test_a_tokenizer_without_a_chat_says_so(tokenizers, copy):
  with pytest.raises(UserError, match="has no chat template; take a folder with a chat_template.jinja"):
    tokenizers["gpt2"].encode_chat(scripts.MESSAGES[0])
  folder = copy("gpt2", tokenizer_config__json={"chat_template": [{"name": "a", "template": "x"}]})
  with pytest.raises(UserError, match="of the chat templates a none is called default"):
    pretrained.from_folder(folder).encode_chat(scripts.MESSAGES[0])


def test_templates_in_files_come_before_those_in_the_config(copy):
  folder = copy("llama", chat_template__jinja="A{{ bos_token }}")
  (folder / "additional_chat_templates").mkdir()
  (folder / "additional_chat_templates" / "tool_use.jinja").write_text("B")
  tokenizer = pretrained.from_folder(folder)
  assert tokenizer.chat.render(scripts.MESSAGES[0]) == "A<s>"
  assert tokenizer.chat.render(scripts.MESSAGES[0], tools=scripts.TOOLS) == "B"


def test_what_a_text_spells_is_never_the_end(copy, folders):
  content = json.loads((folders["whole"] / "tokenizer.json").read_text())
  for token in content["added_tokens"]:
    token["special"] = False
  tokenizer = pretrained.from_folder(copy("whole", tokenizer__json=content))
  assert tokenizer.end == 0 and 0 not in tokenizer.encode("a<|endoftext|>b").tokens
  assert 0 in tokenizer.frame("b<|endoftext|>", spelled=True).tokens[1:]
  assert tokenizer.decode([0, *tokenizer.encode("b").tokens]) == "b"


def test_config_json_gives_the_roles_that_no_other_file_mentions(copy):
  folder = copy("qwen", config__json={"sep_token_id": 7, "cls_token_id": 10**9})
  roles = pretrained.from_folder(folder).roles
  assert roles["separator"] == 7 and "class" not in roles
  assert "start" not in roles  # which tokenizer_config.json calls null, and config.json 0


def test_options_of_special_tokens_are_kept(copy):
  mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
  tokenizer = pretrained.from_folder(copy(
      "gpt2", special_tokens_map__json={"mask_token": mask}, config__json={"vocab_size": 1201}))
  assert tokenizer.frame("a <mask>", spelled=True).tokens.tolist() == [*tokenizer.encode("a").tokens, tokenizer.roles["mask"]]


def test_older_folders_have_their_added_tokens_in_a_file_of_their_own(copy):
  folder = copy("gpt2", added_tokens__json={"<b>": 1201, "<a>": 1200}, config__json={"vocab_size": 1202},
                special_tokens_map__json={"pad_token": "<a>"})
  tokenizer = pretrained.from_folder(folder)
  assert [tokenizer.number(name) for name in ("<a>", "<b>")] == [1200, 1201] and tokenizer.roles["pad"] == 1200
  tokens = tokenizer.encode("<a><b>").tokens
  assert 1201 in tokens and 1200 not in tokens  # <b> is an added word, and no special token


@pytest.mark.parametrize("name, files, line", [
    ("gpt2", {"config__json": {"vocab_size": 1199}},
     r"the token '.*' has the number 1,199, but config.json's vocab_size is 1,199, so .*one model"),
    ("gpt2_prefix", {"config__json": {"vocab_size": 1200}}, "the token '<sep>' has the number 1,201, but"),
    ("gpt2", {"config__json": {"eos_token_id": 50256}},
     r"config.json's eos_token_id is 50256, but the tokenizer's eos_token '<\|endoftext\|>' has the number 0; correct"),
    ("bert", {"config__json": {"pad_token_id": 1}}, r"config.json's pad_token_id is 1, but .*pad_token '\[PAD\]' has"),
    ("qwen", {"generation_config__json": {"eos_token_id": [7, 8]}},
     "generation_config.json's eos_token_id is 7, 8, but the tokenizer's eos_token '<|im_end|>' has the number 1201"),
    ("gpt2", {"tokenizer_config__json": {"tokenizer_class": "RobertaTokenizerFast"}},
     "a vocab.json of transformers' RobertaTokenizer cannot be read; let transformers write a tokenizer.json"),
    ("llama", {"tokenizer_config__json": {"tokenizer_class": "GemmaTokenizer"}}, "a tokenizer.model of .* GemmaTokenizer"),
    ("qwen", {"tokenizer_config__json": {"added_tokens_decoder": {"99999": {"content": "<new>", "special": True}}}},
     "gives the token '<new>' the number 99,999, but the vocabulary 1,200; get the folder again"),
    ("qwen", {"tokenizer_config__json": {"added_tokens_decoder": {"x": {}}}}, "the added tokens .* cannot be read"),
    ("gpt2", {"tokenizer_config__json": {"additional_special_tokens": "<a>"}}, "special tokens are no list"),
    ("gpt2", {"special_tokens_map__json": {"additional_special_tokens": [5]}}, "holds no tokenizer that can be read"),
    ("gpt2", {"tokenizer_config__json": {"chat_template": 5}}, "its chat template is no text"),
    ("gpt2", {"tokenizer_config__json": {"chat_template": {"default": 5}}}, "its chat template is no text"),
    ("gpt2", {"added_tokens__json": {"<new>": 7}}, "added_tokens.json gives the token '<new>' the number 7, but"),
    ("gpt2", {"added_tokens__json": {"<new>": "x"}}, "the added tokens .* cannot be read"),
    ("gpt2", {"config__json": "[]"}, "config.json is no JSON object .it is a list.; get the folder again"),
    ("gpt2", {"tokenizer_config__json": "{"}, "tokenizer_config.json is no JSON object"),
    ("gpt2", {"vocab__json": "{"}, "holds no tokenizer that can be read"),
    ("gpt2", {"merges__txt": "never there\n"}, "holds no tokenizer that can be read .*out of vocabulary"),
    ("gpt2", {"merges__txt": None}, "merges.txt cannot be read .No such file"),
    ("bert", {"vocab__txt": "a\nb\n"}, "no file says which token ends a text; give tokenizer_config.json an eos_token"),
    ("bert", {"tokenizer_config__json": {"do_lower_case": "no"}}, "holds no tokenizer that can be read .*"),
    ("llama", {"tokenizer__model": "no model"}, "holds no tokenizer that can be read"),
    ("whole", {"tokenizer__json": "{}"}, "holds no tokenizer that can be read"),
    ("whole", {"tokenizer_config__json": {"chat_template": [{}]}}, "holds no tokenizer that can be read"),
])
def test_what_is_wrong_with_a_folder_is_one_line(copy, name, files, line):
  folder = copy(name, **{file: content or "" for file, content in files.items()})
  for file in (file for file, content in files.items() if content is None):
    (folder / file.replace("__", ".")).unlink()
  with pytest.raises(UserError, match=f"--flag={folder}.*{line}") as error:
    pretrained.from_folder(folder, f"--flag={folder}")
  assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
  with pytest.raises(UserError, match=f"{tmp_path} holds no tokenizer; it needs a tokenizer.json, a vocab.json with a "
                     "merges.txt, a vocab.txt or a tokenizer.model"):
    pretrained.from_folder(tmp_path)


@pytest.mark.parametrize("text, pair, longest", [("a", None, 2), ("a", "b", 4), ("", "", 1)])
def test_no_room_for_a_text_is_named(tokenizers, text, pair, longest):
  with pytest.raises(UserError, match=f"--prompt: {longest} tokens have no room"):
    tokenizers["bert"].frame(text, pair, longest=longest, where="--prompt")


def test_a_text_that_is_no_unicode_is_named(tokenizers):
  with pytest.raises(UserError, match=r"--prompt: position 0 holds no character but U\+DCE9"):
    tokenizers["bert"].frame("ok", "\udce9", where="--prompt")


@pytest.mark.parametrize("change", [
    {"roles": {"start": 10**6}}, {"roles": {"king": 0}}, {"roles": {"start": None}}, {"roles": []}, {"chat": 5},
    {"chat": {"templates": {"default": 5}, "tokens": {}}}, {"chat": {"templates": {}}}])
def test_damaged_roles_and_chats_of_a_run_are_one_line(tokenizers, change):
  with pytest.raises(UserError, match="data/tokenizer.json does not hold a tokenizer .*train again"):
    tokenize.from_json(tokenizers["llama"].to_json() | change)


def _config(text, **fields):
  config = corpus.default_config()
  config.update({"file": str(text), "tokenizer": "file", **fields})
  return config


def test_a_run_reads_text_by_a_folder_and_goes_on_without_it(folders, tmp_path):
  text, folder = tmp_path / "text.txt", tmp_path / "gone"
  text.write_text("\n".join(scripts.lines()[:100]), encoding="utf-8")
  shutil.copytree(folders["qwen"], folder)
  config = _config(text, tokenizer_file=str(folder))
  found, _ = corpus.find(config, 0, ())
  assert found["vocab_size"] == 1300  # the embedding's rows, of which the tokenizer leaves 97 free
  assert "vocab_size" not in corpus.find(config, 0, ["vocab_size"])[0]
  with pytest.raises(UserError, match="--config.data.vocab_size=257: the tokenizer has 1203 tokens; give that number"):
    corpus.TextSet(config).tokenizer()
  config.update(found)
  texts = corpus.TextSet(config)
  first = texts.read("train")[0].tokens
  assets = json.loads(json.dumps(texts.assets()))
  shutil.rmtree(folder)
  again = corpus.TextSet(config)
  again.restore(assets)
  np.testing.assert_array_equal(again.read("train")[0].tokens, first)
  assert again.tokenizer().roles == texts.tokenizer().roles and again.tokenizer().chat == texts.tokenizer().chat


def test_the_number_of_rows_is_the_embeddings_or_the_tokenizers(folders):
  assert {name: pretrained.rows_of(folders[name]) for name in ("gpt2", "gpt2_prefix", "qwen")} == {
      "gpt2": 1200, "gpt2_prefix": 1202, "qwen": 1300}
  with pytest.raises(UserError, match="--init: the token '<think>' has the number 1,202, but the model's vocab_size is 9"):
    pretrained.check_rows(pretrained.from_folder(folders["qwen"]), 9, "--init")
  with pytest.raises(UserError, match="--init: the token has the number 256, but"):
    pretrained.check_rows(tokenize.Bytes(), 256, "--init")
  pretrained.check_rows(tokenize.Bytes(), 257, "--init")
