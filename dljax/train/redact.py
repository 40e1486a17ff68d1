"""Passwords and tokens in what a run would write down."""

import re
from collections.abc import Sequence

_HIDDEN = "***"
# https://user:password@host, and the forms of tokens that are used widely.
_SECRET = re.compile(
    r"(?<=://)[^/\s@]+(?=@)"
    r"|\b(?:hf_|api_org_)[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\b(?:gh[a-z]_|github_pat_|glpat-)[A-Za-z0-9_-]{20,}"  # GitHub, GitLab
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bwandb_v1_[A-Za-z0-9_-]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # Amazon
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*")  # JSON web tokens
# A name that ends so, and what is assigned to it: api_key=..., --hf-token=..., ?sig=...
_NAME = r"(?:token|secret|passw(?:or)?d|passwd|api[_-]?key|access[_-]?key|credentials?|auth|sig)"
_ASSIGNED = re.compile(rf"((?:^|[^A-Za-z]|[_-]){_NAME}\s*[=:]\s*)[^\s&,;]+", re.IGNORECASE)
_FLAG = re.compile(rf"-{{1,2}}(?:[A-Za-z0-9._-]+[._-])?{_NAME}", re.IGNORECASE)


def holds_secret(text: str) -> bool:
  """Says whether a text has the form of a password in an address, or of a token."""
  return bool(_SECRET.search(text))


def hide(text: str) -> str:
  """Returns a text with "***" in place of passwords and tokens."""
  return _ASSIGNED.sub(rf"\1{_HIDDEN}", _SECRET.sub(_HIDDEN, text))


def hide_in_command(arguments: Sequence[str]) -> list[str]:
  """Returns a command line with "***" in place of passwords and tokens.

  The argument after a flag without "=", such as --hf-token, counts as the flag's value.
  """
  shown = [hide(argument) for argument in arguments]
  for i, argument in enumerate(arguments[:-1], 1):
    if _FLAG.fullmatch(argument):
      shown[i] = _HIDDEN
  return shown
