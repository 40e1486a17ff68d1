"""Converts weights between other libraries' .safetensors files and ours.

    python -m dljax.interop --source=torchvision --model=resnet50 resnet50.safetensors resnet50/
    python -m dljax.interop --to=torchvision resnet50/ resnet50.safetensors
    python -m dljax.interop --to=torchvision runs/resnet-imagenet2012 resnet50.safetensors
    python -m dljax.interop --source=torchvision --model=resnet18 hub:OWNER/NAME resnet18/

    python -m dljax.interop --source=transformers gpt2-of-the-hub/ gpt2/
    python -m dljax.interop --to=transformers gpt2/ gpt2-for-transformers/

The first command writes a folder, with our names for the tensors, from which any experiment of
that model can start (--config.init.source=resnet50). The input may also be such a folder, the
workdir of a run (of which the best checkpoint is taken), a repository of the Hugging Face Hub, or
a downloaded folder with model.safetensors or its parts. If dljax can read the folder's
config.json, it names the model. The tensors keep the dtype that they have in the input. With --to,
the output is a .safetensors file, or for transformers also a folder, which then holds a config.json
too; a tokenizer is not written. Only safetensors files are read, because a pickle can run any code.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flax import traverse_util

from dljax import errors, interop
from dljax.errors import UserError
from dljax.interop import folder, hub, variants
from dljax.train import pretrained
from dljax.train.workdir import Workdir


def convert(
    source: str, to: str, name: str, settings: Mapping[str, Any], input_: str, output: Path,
) -> str:
  """Converts weights, and returns a line that says what was written.

  Args:
    source: the library whose names the input has: `interop.OURS` or one of
      `interop.all_sources()`.
    to: the library whose names the output gets.
    name: the model's name, a key of a family's VARIANTS; "" if the input names it.
    settings: the model's settings; `num_classes` is read off the weights if it is missing.
    input_: a .safetensors file, hub:OWNER/NAME, a folder of ours or of another library, or a run's
      workdir.
    output: a new folder (for us, and for libraries whose config.json we know) or a new .safetensors
      file.

  Raises:
    UserError: the input is bad; nothing was written.
    RunError: the output could not be written.
  """
  for what, path in ("the input", input_), ("the output", output):
    errors.check_local(what, path)
  for flag, value in ("--source", source), ("--to", to):
    interop.check_source(flag, value)
  whole = to != interop.OURS and output.suffix != ".safetensors"  # a folder for another library
  if to == interop.OURS and output.suffix == ".safetensors":
    raise UserError(f"{output}: what is written for us is a folder; name one, or say for whom by --to")
  folder.check_new(output)
  if source == interop.OURS:
    tensors, name, settings = _ours(input_, name, settings)
    interop.check_finite(tensors)
  else:
    tensors = interop.read(input_)
    if not name and (Path(input_) / folder.CONFIG).is_file():
      found = variants.describe(folder.model_of(Path(input_), source))
      name, settings = found["model"], {**found["settings"], **settings}
  if not name:
    raise UserError("--model=NAME is missing: which model are these weights of, such as resnet50?")
  model = variants.build(name, settings)
  if whole and folder.config_of(model, to) is None:
    raise UserError(f"{output}: what is written for {to} must end in .safetensors")
  if source != interop.OURS:
    model, settings = _with_classes(model, settings, tensors, source)
    tensors = traverse_util.flatten_dict(
        interop.load(model, tensors, source, keep_dtype=True), sep="/")
  if to == interop.OURS:
    folder.write_folder(output, tensors,
                        {**variants.describe(model), "source": f"{source}: {input_}"})
  else:
    theirs = interop.dump(model, traverse_util.unflatten_dict(tensors, sep="/"), to)
    model, _ = _with_classes(model, settings, theirs, to)
    interop.load(model, theirs, to)  # says what is missing or of another shape
    if whole:
      # They write a tensor of two names once.
      second = interop.find_table(model, to).tied
      theirs = {name: tensor for name, tensor in theirs.items() if name not in second}
      folder.write_their_folder(output, theirs, folder.config_of(model, to))
    else:
      folder.write_file(output, theirs)
  return f"{len(tensors)} tensors of {name} written to {output}"


def _ours(
    path: str, name: str, settings: Mapping[str, Any],
) -> tuple[interop.Tensors, str, Mapping[str, Any]]:
  """(tensors, model's name, settings) from our folder or a run; the flags win over both."""
  place = Path(path)
  if not place.is_dir():
    if path.endswith(".safetensors") or path.startswith(hub.PREFIX):
      raise UserError(f"{path}: whose tensors are these? Say it by --source, one of: "
                      f"{', '.join(interop.all_sources())}")
    raise UserError(f"{path}: there is no such folder or .safetensors file")
  if pretrained.is_run(place):
    _, tensors = pretrained.read_run(place)
    found, own = "", {}
    if model := Workdir(place).read_model():
      found, own = model["model"], model["settings"]
  else:
    tensors, model = folder.read_folder(place)
    found, own = model["model"], model["settings"]
  if found and name not in ("", found):
    raise UserError(f"--model={name}: {path} holds a {found}; drop the flag")
  return tensors, found or name, {**own, **settings}


def _with_classes(
    model: Any, settings: Mapping[str, Any], tensors: interop.Tensors, source: str,
) -> tuple[Any, Mapping[str, Any]]:
  """The model and its settings, with the weights' number of classes unless it is set."""
  if not hasattr(model, "num_classes") or "num_classes" in settings:
    return model, settings
  classes = variants.num_classes(model, tensors, source) or model.num_classes
  return model.clone(num_classes=classes), {**settings, "num_classes": classes}


def _setting(text: str) -> tuple[str, Any]:
  """("width", 32) for "width=32"; a value that is not JSON is text."""
  key, equals, value = text.partition("=")
  if not (key and equals):
    raise UserError(f"--set={text}: write --set=FIELD=VALUE, such as --set=num_classes=10")
  try:
    return key, json.loads(value)
  except ValueError:
    return key, value


class _Parser(argparse.ArgumentParser):
  """Raises a `UserError` for bad input, instead of printing the usage and exiting."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit status.

  It is 0 when the output was written, 1 when it could not be, 2 on bad input, 75 after Ctrl-C or
  SIGTERM.
  """
  return errors.exit_status(lambda: _run(argv), "stopped; nothing is written")


def _run(argv: Sequence[str] | None) -> int:
  libraries = [interop.OURS, *interop.all_sources()]
  parser = _Parser(prog="python -m dljax.interop", description=__doc__, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("input", help="a .safetensors file, hub:OWNER/NAME, a folder that dljax or another library "
                      "has written, or a run's workdir")
  parser.add_argument("output", type=Path,
                      help="a new folder or, with --to, a new .safetensors file (or a folder for "
                      "transformers)")
  parser.add_argument("--source", default=interop.OURS,
                      help="the library whose names the input's tensors have, one of "
                      f"{', '.join(libraries)} (default: %(default)s)")
  parser.add_argument("--to", default=interop.OURS,
                      help="the library whose names the output's tensors get, one of the same "
                      "(default: %(default)s)")
  parser.add_argument("--model", default="",
                      help="the variant of a family, such as resnet50; not needed for a run and a "
                      "folder that dljax has written")
  parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                      help="an attribute of the model, such as small_stem=true; num_classes is read off the weights")
  args, rest = parser.parse_known_args(argv)
  if rest and rest[0].startswith("-"):
    raise errors.unknown("the command line", rest[0].partition("=")[0],
                         ["--source", "--to", "--model", "--set", "--help"])
  if rest:
    raise UserError(f"{rest[0]!r} is one name too many; give an input and an output, and see --help")
  settings = dict(map(_setting, args.set))
  print(convert(args.source, args.to, args.model, settings, args.input, args.output.expanduser()))
  return errors.DONE
