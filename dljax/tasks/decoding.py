"""Decoding: how a model that predicts the next token generates a text.

All families that generate tokens share this file. Such a model has

    init_cache(batch, length) -> cache      the memory of `length` tokens, for `batch` rows
    model(tokens, cache=..., length=...)    {"logits": [B, L, V], "cache": ...}
    max_length                              the context: the most tokens that it reads together;
                                            no such attribute means that there is no limit

A cache is a tree of arrays [B, ...]; a recurrent network's is its carry, whatever the length.
`start` reads the prompts (prefill) and `advance` generates; both are pure functions with static
shapes. `start` leaves the last token of each prompt to `advance`, which reads a token of every row
and then chooses the next. Prefill therefore needs no logits, and XLA leaves out the head.

The next token is chosen from the logits in this order, which is that of Hugging Face's
transformers:

1. `repetition_penalty`: tokens of the prompt and of the text lose (Keskar et al. 2019, "CTRL",
   section 4.1);
2. `no_repeat_ngram`: tokens that would complete an n-gram again are banned (Paulus et al. 2017, "A
   Deep Reinforced Model for Abstractive Summarization", section 2.5);
3. `min_new_tokens`: tokens that end the text are banned before;
4. `temperature`;
5. `top_k`: the most probable tokens (Fan et al. 2018, "Hierarchical Neural Story Generation");
6. `top_p`: of these the fewest that hold this much of the probability (Holtzman et al. 2020, "The
   Curious Case of Neural Text Degeneration");
7. `min_p`: of these the tokens that have this part of the greatest probability (Nguyen et al. 2024,
   "Turning Up the Heat").

A text that grows beyond the context goes on: as soon as the context is full, the model reads the
last half of it once more, from position 0, as the beginning of a text. A row does so when its own
context is full, so that it depends on its own prompt alone.

Dimensions: B batch, P tokens of the longest prompt, V vocabulary, N tokens to be generated, T tokens
of prompt and text, K tokens that end a row.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax.errors import UserError
from dljax.tasks.base import Array, Batch, PyTree, Variables, row_keys

CACHE = "cache"
NOTHING = -1  # the token at the places after the end of a row
_LEAST_BUCKET = 16  # tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen, and when a text ends.

  Attributes:
    max_new_tokens: the number of tokens to generate, N, at most.
    min_new_tokens: the number of tokens before which no stop token or stop text ends a text.
    temperature: the logits' divisor; 0 always takes the most probable token.
    top_k: the number of most probable tokens that may be drawn; 0 allows all.
    top_p: the probability that the most probable tokens must reach together; only these may be
      drawn. 1 allows all.
    min_p: the part of the greatest probability that a token needs; others are not drawn. 0 allows
      all.
    repetition_penalty: what divides the positive logits of tokens that have occurred, in the prompt
      or since, and multiplies the negative ones. 1 is off.
    no_repeat_ngram: the length of the n-grams that may occur only once in prompt and text; 0 is
      off.
    stop_tokens: tokens that end a text besides those that the batch names.
    stop_texts: texts that end a text, which then has what comes before them. They are looked for on
      the host, because tokens may hold them in many ways.
    slide: whether of a prompt that is longer than the model's context the last tokens are read;
      otherwise `check_prompt` refuses it.
    scores: whether the logarithm of each token's probability is returned too: that under the model,
      from the logits before step 1 and at temperature 1.
    seed: the seed of the draws; another one gives another text for the same prompt and run.

  Raises:
    UserError: a value is out of range.
  """

  max_new_tokens: int = 400
  min_new_tokens: int = 0
  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  no_repeat_ngram: int = 0
  stop_tokens: tuple[int, ...] = ()
  stop_texts: tuple[str, ...] = ()
  slide: bool = False
  scores: bool = False
  seed: int = 0

  def __post_init__(self):
    for field, valid, mend in (
        ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
        ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens,
         f"must be from 0 to max_new_tokens, {self.max_new_tokens}"),
        ("temperature", 0 <= self.temperature < math.inf,
         "must be at least 0; 0 takes the most probable token"),
        ("top_k", self.top_k >= 0, "must be at least 0; 0 allows all tokens"),
        ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1; 1 allows all tokens"),
        ("min_p", 0 <= self.min_p <= 1, "must be from 0 to 1; 0 allows all tokens"),
        ("repetition_penalty", 0 < self.repetition_penalty < math.inf,
         "must be above 0; above 1 it penalises tokens that have occurred, and 1 is off"),
        ("no_repeat_ngram", 0 <= self.no_repeat_ngram <= _LONGEST_NGRAM,
         f"must be from 0 to {_LONGEST_NGRAM}; 0 is off"),
        ("seed", 0 <= self.seed < 2**32, "must be from 0 to 2^32 - 1")):
      if not valid:
        raise UserError(f"--config.sampling.{field}={getattr(self, field)}: {mend}")
    # The elements of a tuple that is empty by default come from the command line as texts. A list
    # could not be part of a task, which is a static argument where it is compiled.
    object.__setattr__(self, "stop_tokens", tuple(map(_token, self.stop_tokens)))
    object.__setattr__(self, "stop_texts", tuple(self.stop_texts))
    if "" in self.stop_texts:
      raise UserError("--config.sampling.stop_texts: a stop text is empty; drop it")

  def check_vocabulary(self, vocab_size: int) -> None:
    """Raises `UserError` if a model of V tokens has no use for these settings."""
    if self.top_k > vocab_size:
      raise UserError(f"--config.sampling.top_k={self.top_k}: the model has {vocab_size} tokens; "
                      "give at most as many, or 0 for all")
    for token in self.stop_tokens:
      if not 0 <= token < vocab_size:
        raise UserError(f"--config.sampling.stop_tokens={token}: the model's tokens are 0 to "
                        f"{vocab_size - 1}; give one of them")

  def penalize(self, logits: Array, text: PyTree) -> Array:
    """Steps 1 to 3: logits f32[B, V] changed by what each row holds so far; -inf is banned.

    Args:
      logits: f32[B, V], the logits of the next token.
      text: the state of the text, see `start`.
    """
    if self.repetition_penalty != 1:
      less = jnp.where(logits < 0, logits * self.repetition_penalty,
                       logits / self.repetition_penalty)
      logits = jnp.where(text["seen"], less, logits)
    if self.no_repeat_ngram:
      repeats = _repeats(text["history"], text["count"], self.no_repeat_ngram, logits.shape[-1])
      logits = jnp.where(repeats, -jnp.inf, logits)
    if self.min_new_tokens:
      early = text["place"] < self.min_new_tokens
      logits = jnp.where(early[:, None] & _among(text["stop"], logits.shape[-1]), -jnp.inf, logits)
    return logits

  def filter(self, logits: Array) -> Array:
    """Steps 4 to 7: logits [..., V] over the temperature; -inf where a token may not be drawn."""
    logits = logits / self.temperature
    if 0 < self.top_k < logits.shape[-1]:
      least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
      logits = jnp.where(logits < least, -jnp.inf, logits)
    if self.top_p < 1:
      logits = jnp.where(_holds(logits, self.top_p), logits, -jnp.inf)
    if self.min_p > 0:
      least = jnp.max(logits, axis=-1, keepdims=True) + math.log(self.min_p)
      logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits

  def draw(self, logits: Array, rng: Array, rows: Mapping[str, Array]) -> Array:
    """A token for each row, i32[B]; it depends on rng, seed, id, place and its logits alone.

    Args:
      logits: f32[B, V], what `penalize` gives.
      rng: the text's key.
      rows: id i32[B], and place i32[B], the number of tokens generated before.
    """
    if self.temperature == 0:
      return jnp.argmax(logits, axis=-1)
    keys = row_keys(jax.random.fold_in(rng, self.seed), rows)
    keys = jax.vmap(jax.random.fold_in)(keys, rows["place"])
    return jax.vmap(jax.random.categorical)(keys, self.filter(logits))

  def before_stop(self, text: str, least: int = 0) -> str:
    """What of a text comes before the first stop text in it.

    Args:
      text: a generated text.
      least: the number of characters that `min_new_tokens` tokens stand for; a stop text that ends
        among them does not count.
    """
    ends = [text.find(stop, max(least + 1 - len(stop), 0)) for stop in self.stop_texts]
    return text[:min((end for end in ends if end >= 0), default=len(text))]

  def settled(self, text: str) -> str:
    """What of a growing text stays, whatever tokens follow.

    Its end may be half a character, or the beginning of a stop text.
    """
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    begun = max((size for stop in self.stop_texts for size in range(1, len(stop))
                 if text.endswith(stop[:size])), default=0)
    return text[:len(text) - begun]


_LONGEST_NGRAM = 100  # a comparison is traced for each of its tokens


def _token(value: Any) -> int:
  try:
    return int(value)
  except ValueError:
    raise UserError(f"--config.sampling.stop_tokens={value}: must be the number of a token; a text "
                    "belongs into --config.sampling.stop_texts") from None


def bucket(length: int) -> int:
  """The number of tokens that a prompt is padded to, so that few programs serve all lengths.

  A program is compiled for each number. The last token of a prompt is not read with the others, so
  that these are a power of two.
  """
  return 1 if length <= 1 else 1 + max(_LEAST_BUCKET, 1 << (length - 2).bit_length())


def check_prompt(name: str, tokens: Sequence[int], model: nn.Module, sampling: Sampling) -> None:
  """Checks a prompt, on the host, before anything is compiled for it.

  Args:
    name: what the message calls the prompt, such as a flag or a file.
    tokens: i32[n], the prompt.
    model: a model as this file's docstring describes it.
    sampling: the rule by which tokens are chosen.

  Raises:
    UserError: the prompt is empty, or has a token that the model lacks; or it is longer than the
      model's context, and `sampling.slide` is off.
  """
  tokens, context = np.asarray(tokens), getattr(model, "max_length", None)
  if not len(tokens):
    raise UserError(f"{name} has no token; give at least the one that begins a text")
  wrong = np.flatnonzero((tokens < 0) | (tokens >= model.vocab_size))
  if len(wrong):
    raise UserError(f"{name}: token {tokens[wrong[0]]} at place {wrong[0]} is not one of the model's, "
                    f"0 to {model.vocab_size - 1}; encode the prompt by the tokenizer of the run")
  if context is not None and len(tokens) > context and not sampling.slide:
    raise UserError(f"{name} has {len(tokens)} tokens with the one that begins a text, "
                    f"{len(tokens) - context} more than the model's context of {context}; shorten it, "
                    f"or let --config.sampling.slide=true read its last {context}")


def check(batch: Batch, names: Sequence[str], model: nn.Module, sampling: Sampling) -> None:
  """Checks a batch of prompts by `check_prompt`; `UserError` if it has no row, too."""
  if not len(batch["prompt"]):
    raise UserError("there is no prompt; give at least one")
  for name, tokens, length in zip(names, batch["prompt"], batch["length"], strict=True):
    check_prompt(name, tokens[:length], model, sampling)


def start(
    model: nn.Module, variables: Variables, batch: Batch, sampling: Sampling,
) -> PyTree:
  """Reads prompts, but for the last token of each.

  Args:
    model: a model as this file's docstring describes it.
    variables: the model's variables.
    batch: prompt i32[B, P], padded on the right; length i32[B] and id i32[B]; optionally stop
      i32[B, K], tokens that end a row, padded by `NOTHING`; and mask f32[B], 0 where a row is
      padding, for which nothing is generated.
    sampling: the rule by which tokens are chosen.

  Returns:
    The state of the text, which `advance` continues: a tree of arrays [B, ...], among them token
    i32[B], the newest token, which the cache does not hold yet; place i32[B], the number of tokens
    generated; and done bool[B], whether the row has ended.
  """
  prompt, length = batch["prompt"], batch["length"]
  rows, width = prompt.shape
  known = jnp.maximum(length - 1, 0)  # tokens of each row that are read now
  text = {
      "id": batch["id"], "place": jnp.zeros(rows, jnp.int32),
      "token": jnp.take_along_axis(prompt, known[:, None], axis=1)[:, 0],
      "stop": _stops(batch, sampling), "done": jnp.zeros(rows, bool)}
  if "mask" in batch:
    text["done"] = batch["mask"] == 0
  if sampling.repetition_penalty != 1:
    real = jnp.where(jnp.arange(width) < length[:, None], prompt, NOTHING)
    text["seen"] = _among(real, model.vocab_size)
  context = getattr(model, "max_length", None)
  # A row reads at most P + N - 1 tokens, because the last one that it generates is not read.
  slides = context is not None and width + sampling.max_new_tokens - 1 > context
  if slides or sampling.no_repeat_ngram:
    text["history"] = jnp.pad(prompt, ((0, 0), (0, sampling.max_new_tokens)))
    text["count"] = length
  if slides:
    text["begin"] = jnp.maximum(length - context, 0)
    return _read_context(model, variables, sampling, text, min(width, context) - 1)
  cache = model.init_cache(rows, width - 1 + sampling.max_new_tokens)
  return {**text, CACHE: _prefill(model, variables, prompt[:, :-1], known, cache)}


def advance(
    model: nn.Module, variables: Variables, sampling: Sampling, text: PyTree, rng: Array,
    count: int,
) -> tuple[Mapping[str, Array], PyTree]:
  """Generates `count` tokens; two calls for 5 tokens give the same text as one call for 10.

  It ends early if all rows have ended.

  Args:
    model: a model as this file's docstring describes it.
    variables: the model's variables.
    sampling: the rule by which tokens are chosen.
    text: the state from `start`, or from the previous call.
    rng: a key, the same for all calls of a text.
    count: the number of tokens.

  Returns:
    "tokens" i32[B, count], the token that ends a row included, and `NOTHING` after it; with
    `sampling.scores` also "log_p" f32[B, count], the logarithms of their probabilities. And the new
    state of the text.
  """
  rows = text["token"].shape[0]
  out = {"tokens": jnp.full((rows, count), NOTHING, jnp.int32)}
  if sampling.scores:
    out["log_p"] = jnp.zeros((rows, count), jnp.float32)
  slides = "begin" in text

  def wanted(state):
    i, _, text = state
    return (i < count) & ~jnp.all(text["done"])

  def has_room(state):
    return wanted(state) & ~jnp.any(_is_full(model, state[2]))

  def step(state):
    i, out, text = state
    logits, cache = _read(model, variables, text)
    new, text = _choose(sampling, logits, {**text, CACHE: cache}, rng)
    out = {name: jax.lax.dynamic_update_slice_in_dim(out[name], new[name][:, None], i, axis=1)
           for name in out}
    return i + 1, out, text

  def read_again(text):
    text = _with_half(model, text)
    return _read_context(model, variables, sampling, text, model.max_length - 1)

  def fill_context(state):
    i, out, text = state
    text = jax.lax.cond(jnp.any(_is_full(model, text)), read_again, lambda text: text, text)
    return jax.lax.while_loop(has_room, step, (i, out, text))

  # The condition stands outside of the loop over tokens, in which it would copy the cache.
  state = jax.lax.while_loop(wanted, fill_context if slides else step, (0, out, text))
  return state[1:]


def generate(
    model: nn.Module, variables: Variables, batch: Batch, sampling: Sampling, rng: Array,
) -> Mapping[str, Array]:
  """Continues prompts; see `start` for the batch, and `advance` for what is returned, with N tokens."""
  text = start(model, variables, batch, sampling)
  return advance(model, variables, sampling, text, rng, sampling.max_new_tokens)[0]


def _stops(batch: Batch, sampling: Sampling) -> Array:
  """The tokens i32[B, K] that end each row, padded by `NOTHING`."""
  rows = len(batch["prompt"])
  own = jnp.tile(jnp.array(sampling.stop_tokens, jnp.int32), (rows, 1))
  return jnp.concatenate([batch["stop"], own], axis=1) if "stop" in batch else own


def _among(tokens: Array, vocab_size: int) -> Array:
  """Which tokens of the vocabulary a row of i32[B, n] has, bool[B, V]; `NOTHING` is none."""
  rows = jnp.arange(len(tokens))[:, None]
  spare = jnp.where(tokens < 0, vocab_size, tokens)
  return jnp.zeros((len(tokens), vocab_size + 1), bool).at[rows, spare].set(True)[:, :vocab_size]


def _repeats(history: Array, count: Array, n: int, vocab_size: int) -> Array:
  """Which tokens would complete an n-gram that a row has already, bool[B, V].

  Args:
    history: i32[B, T], the tokens of each row.
    count: i32[B], their numbers.
    n: the length of the n-grams.
    vocab_size: V.
  """
  starts = history.shape[1] - n + 1
  if starts < 1:
    return jnp.zeros((len(history), vocab_size), bool)
  places = count[:, None] + jnp.arange(1 - n, 0)
  newest = jnp.take_along_axis(history, jnp.maximum(places, 0), axis=1)  # n - 1 tokens
  same = jnp.arange(starts) + n <= count[:, None]  # n-grams that are complete
  for i in range(n - 1):
    same &= history[:, i:i + starts] == newest[:, i:i + 1]
  return _among(jnp.where(same, history[:, n - 1:], NOTHING), vocab_size)


def _holds(logits: Array, share: float) -> Array:
  """Which of the logits [..., V] are the greatest that together hold `share` of the probability.

  These are the logits above which less than `share` lies. The least of them is found by bisection
  over the bits of float32, because a CPU takes ten times as long to sort 50,000 logits.

  Returns:
    bool[..., V]; the greatest always is among them, and of equal logits all or none.
  """
  p = jax.nn.softmax(logits, axis=-1)
  bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
  keys = jnp.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # ordered as the logits are

  def halve(_, ends):
    low, high = ends
    middle = low + (high - low) // 2
    enough = jnp.sum(jnp.where(keys > middle, p, 0), axis=-1, keepdims=True) < share
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  greatest = jnp.max(keys, axis=-1, keepdims=True)
  _, least = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(greatest), greatest))
  return keys >= least


def _choose(
    sampling: Sampling, logits: Array, text: PyTree, rng: Array,
) -> tuple[dict[str, Array], PyTree]:
  """A token for each row, [B], as `advance` returns them; and the text with these tokens."""
  allowed = sampling.penalize(logits, text)
  token = sampling.draw(allowed, rng, text).astype(jnp.int32)
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)[:, 0]
  done = text["done"]
  if sampling.no_repeat_ngram:  # it can ban all tokens, and nothing is left to be drawn
    done |= ~jnp.any(allowed > -jnp.inf, axis=-1)
  new = {"tokens": jnp.where(done, NOTHING, token), "log_p": jnp.where(done, 0, log_p)}
  place = text["place"] + 1
  ended = jnp.any(token[:, None] == text["stop"], axis=1) | (place >= sampling.max_new_tokens)
  text = {**text, "token": jnp.where(done, 0, token), "place": place, "done": done | ended}
  if "seen" in text:
    text["seen"] |= new["tokens"][:, None] == jnp.arange(logits.shape[-1])
  if "history" in text:
    here = jnp.arange(text["history"].shape[1]) == text["count"][:, None]
    text["history"] = jnp.where(here & ~done[:, None], token[:, None], text["history"])
    text["count"] = text["count"] + ~done
  return new, text


def _read(model: nn.Module, variables: Variables, text: PyTree) -> tuple[Array, PyTree]:
  """The logits f32[B, V] after each row's newest token, and the cache with it."""
  out = model.apply(variables, text["token"][:, None], cache=text[CACHE], train=False)
  return out["logits"][:, 0].astype(jnp.float32), _like(out[CACHE], text[CACHE])


def _prefill(
    model: nn.Module, variables: Variables, tokens: Array, length: Array, cache: PyTree,
) -> PyTree:
  """The cache with the tokens i32[B, L], of which each row has `length`."""
  if not tokens.shape[1]:
    return cache
  out = model.apply(variables, tokens, cache=cache, length=length, train=False)
  return _like(out[CACHE], cache)


def _like(new: PyTree, old: PyTree) -> PyTree:
  """The new cache with the old one's dtypes."""
  return jax.tree.map(lambda new, old: new.astype(old.dtype), new, old)


def _is_full(model: nn.Module, text: PyTree) -> Array:
  """Whether a row's newest token has no place in its context, bool[B]; rows that ended need none."""
  if "begin" not in text:
    return jnp.zeros_like(text["done"])
  return ~text["done"] & (text["count"] - 1 - text["begin"] >= model.max_length)


def _with_half(model: nn.Module, text: PyTree) -> PyTree:
  """The text with a context, in rows whose own is full, of its last tokens: half as many."""
  half = max(model.max_length // 2, 1)
  begin = jnp.where(_is_full(model, text), text["count"] - half, text["begin"])
  return {**text, "begin": begin}


def _read_context(
    model: nn.Module, variables: Variables, sampling: Sampling, text: PyTree, width: int,
) -> PyTree:
  """The text with a new cache, of the tokens in each row's context but for the newest.

  Args:
    model: a model with a context.
    variables: the model's variables.
    sampling: the rule by which tokens are chosen.
    text: the text; its cache, if it has one, is not used.
    width: the greatest number of these tokens in a row.
  """
  history, begin = text["history"], text["begin"]
  places = jnp.minimum(begin[:, None] + jnp.arange(width), history.shape[1] - 1)
  tokens = jnp.take_along_axis(history, places, axis=1)
  length = jnp.clip(text["count"] - 1 - begin, 0, width)
  # A row's context is full before it has read `max_length` more tokens.
  slots = model.max_length - 1 + min(sampling.max_new_tokens, model.max_length)
  cache = model.init_cache(len(history), slots)
  return {**text, CACHE: _prefill(model, variables, tokens, length, cache)}
