"""The registry of TFDS builders that need no TensorFlow.

A builder's module is imported when its set is prepared.
"""

import functools
import importlib
from collections.abc import Callable, Mapping


def _builder(module: str, name: str) -> type:
  return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _builders(**places: tuple[str, str]) -> Mapping[str, Callable[[], type]]:
  return {name: functools.partial(_builder, *place) for name, place in places.items()}


# Set -> () -> its builder. These sets ship with Python or a dependency, and are prepared when they
# are opened.
EMBEDDED = _builders(
    digits=("digits", "Digits"),
    digit_scenes=("digit_scenes", "DigitScenes"),
    pydoc=("pydoc", "Pydoc"),
    pydoc_paragraphs=("pydoc", "PydocParagraphs"),
    temperatures=("series", "Temperatures"),
    morse=("morse", "Morse"))

# These sets are made of files that `python -m dljax.data.prepare` downloads.
DOWNLOADED = _builders(
    mnist=("stock", "Mnist"),
    fashion_mnist=("stock", "FashionMnist"),
    cifar10=("stock", "Cifar10"),
    cifar100=("stock", "Cifar100"),
    tiny_shakespeare=("stock", "TinyShakespeare"),
    etth1=("series", "Etth1"),
    emoji=("emoji", "Emojis"),
    emoji_scenes=("emoji_scenes", "EmojiScenes"),
    telephone_prompts=("telephone_prompts", "TelephonePrompts"),
    wordnet=("wordnet", "Wordnet"))
