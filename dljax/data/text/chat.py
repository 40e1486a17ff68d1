"""Chat templates: a conversation as the one text that a model was trained to see.

A template is a program in Jinja's language (https://jinja.palletsprojects.com) that lies beside a
model's weights. It is somebody else's code, and therefore runs in Jinja's sandbox and sees plain
values only. What it finds there (the filter `tojson`, the functions `raise_exception` and
`strftime_now`, the tags `break`, `continue` and `generation`) is what transformers gives it, so
that the text is the same.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dljax.errors import UserError, one_line

_DEFAULT, _WITH_TOOLS = "default", "tool_use"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # a message's field has had these names


@dataclasses.dataclass(frozen=True)
class Chat:
  """The chat templates of a tokenizer.

  Attributes:
    templates: name -> a template's text; most tokenizers have one, which is called "default".
    tokens: name -> text of the special tokens that a template may write, such as "bos_token".
  """

  templates: Mapping[str, str]
  tokens: Mapping[str, str]

  def render(
      self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True,
      tools: Sequence[Mapping[str, Any]] | None = None, **values: Any,
  ) -> str:
    """The text of a conversation.

    Args:
      messages: the messages, each with a "role" ("system", "user", "assistant") and a "content".
      answer: whether the text ends where the assistant's next message begins
        (`add_generation_prompt` in the template).
      tools: the tools that the model may call, each described by a JSON schema.
      **values: whatever else the template asks for.

    Raises:
      UserError: there is no message, a value is not one that JSON can hold, or the template is
        wrong or refuses the messages.
    """
    if not messages:
      raise UserError("a chat needs at least one message")
    template = self._choose(tools)
    seen = {**self.tokens, **values, "tools": tools, "documents": values.get("documents"),
            "messages": [_message(message) for message in messages],
            "add_generation_prompt": answer}
    try:
      seen = json.loads(json.dumps(seen, allow_nan=False))
    except (TypeError, ValueError) as error:
      raise UserError(f"a message of the chat is not plain text, numbers and lists ({error}); "
                      "give a role and a content, both texts") from None
    try:
      return _compiled(template).render(**seen)
    except Exception as error:  # the template is a program, and may raise anything
      raise UserError(f"the chat template refuses this conversation ({one_line(error, 200)}); "
                      "change the messages, or the template") from error

  def _choose(self, tools: Any) -> str:
    """The template for a conversation with these tools."""
    if tools is not None and _WITH_TOOLS in self.templates:
      return self.templates[_WITH_TOOLS]
    if _DEFAULT not in self.templates:
      raise UserError(f"of the chat templates {', '.join(sorted(self.templates))} none is called "
                      f"{_DEFAULT}; name one so in tokenizer_config.json")
    return self.templates[_DEFAULT]


def _message(message: Mapping[str, Any]) -> Mapping[str, Any]:
  """A message without the fields that are None, and with its reasoning under every name."""
  if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
    raise UserError(f"a message of the chat has no role ({message!r:.60}); give a role and a "
                    "content, both texts")
  given = {name: value for name, value in message.items() if value is not None}
  reasoning = next((given[name] for name in _REASONING if name in given), None)
  if reasoning is None:
    return given
  return {"thinking": reasoning, **given, "reasoning_content": reasoning}


@functools.lru_cache(16)
def _compiled(template: str) -> Any:
  """Jinja's template; raises Jinja's error if the text is none."""
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """The tag `generation`, which marks the assistant's words, and changes no text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
      return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> str:
      return caller()

  class Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, in which no name that leads to Python's insides can be set."""

    def __init__(*args: Any, **values: Any):  # a template may set a field called self
      self, *rest = args
      fields = dict(*rest, **values)
      for name in fields:
        _check_name(name)
      jinja2.utils.Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: Any) -> None:
      _check_name(name)
      jinja2.utils.Namespace.__setitem__(self, name, value)

  def refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)

  # Jinja's own filter writes < as \u003c, for web pages.
  def tojson(
      value: Any, ensure_ascii: bool = False, indent: int | None = None,
      separators: tuple[str, str] | None = None, sort_keys: bool = False,
  ) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
  environment.filters["tojson"] = tojson
  environment.globals.update(
      raise_exception=refuse, namespace=Namespace,
      strftime_now=lambda form: datetime.datetime.now().strftime(form))
  return environment.from_string(template)


def _check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise ValueError(f"the name {name!r} begins with an underscore")
