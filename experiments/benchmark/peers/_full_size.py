"""Equality with transformers at full size, both ways.

    python -m experiments.benchmark.peers._full_size PEER_PYTHON CLASS [JSON] [--float64] [--bfloat16]

PEER_PYTHON is the Python that has torch and transformers, CLASS a class such as BertForPreTraining,
and JSON what its config has other than the default. The peer fills every tensor at random and
writes a folder in shards; we read it, and compare logits and last hidden states in rows of unequal
lengths. With --bfloat16, the weights in the files have that dtype. The folder that we write then
goes back: the peer has to load it without a warning, and to find every tensor as it was, bit for
bit.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTHS = (48, 33, 17)  # of the rows, padded on the right
OUTPUTS = "outputs.npz"


def _transformers():
  """The package, which warns of nothing but what matters."""
  from experiments.benchmark.peers import import_package
  transformers = import_package("transformers")
  transformers.utils.logging.disable_progress_bar()
  return transformers


def _write(folder: str, name: str, settings: str, double: str, stored: str) -> None:
  """Writes the peer's folder and outputs; the peer's interpreter runs this."""
  import numpy as np
  import torch

  kind = getattr(_transformers(), name)
  torch.manual_seed(0)
  model = kind(kind.config_class(**json.loads(settings)))
  with torch.no_grad():
    for key, x in model.named_parameters():
      if x.ndim > 1:
        x.normal_(0, (2 / x.shape[1])**0.5)
      else:
        x.normal_(float(key.endswith("weight")), 0.2)
      x.copy_(x.to(getattr(torch, stored)))
    # A copy, because buffers that are no weights would be rounded too.
    copy.deepcopy(model).to(getattr(torch, stored)).save_pretrained(folder, max_shard_size="200MB")
    tokens = torch.randint(1, model.config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    model = model.double() if double == "float64" else model
    outputs = model.eval()(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True)
  found = {"hidden": outputs.hidden_states[-1]}
  for key in ("logits", "prediction_logits"):
    if key in outputs:
      found["logits"] = outputs[key]
  np.savez(Path(folder) / OUTPUTS, tokens=tokens.numpy().astype(np.int32),
           **{key: x.numpy() for key, x in found.items()})


def _check(folder: str, dumped: str, name: str) -> None:
  """Loads both folders, and compares them; the peer's interpreter runs this."""
  import logging

  import torch

  kind, lines = getattr(_transformers(), name), []

  class Complaints(logging.Handler):

    def emit(self, record):
      lines.append(record.getMessage())

  logging.getLogger("transformers").addHandler(Complaints(logging.WARNING))
  model, info = kind.from_pretrained(dumped, output_loading_info=True)
  theirs = kind.from_pretrained(folder).state_dict()
  ours = model.state_dict()
  assert not lines and not any(info.values()), (lines, info)
  assert ours.keys() == theirs.keys()
  assert all(x.dtype == theirs[key].dtype and torch.equal(x, theirs[key])
             for key, x in ours.items())
  print(f"{name}: the peer loads our dump of {len(ours)} tensors without a warning, bit for bit")


def _compare(folder: Path, dumped: Path, name: str, double: bool) -> None:
  """Compares our outputs with the peer's, and dumps the weights."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from dljax import interop
  from dljax.interop.folder import config_of, write_their_folder

  model, variables = interop.from_folder(folder, "transformers")
  stored = interop.load(model, interop.read(folder), "transformers", keep_dtype=True)
  write_their_folder(dumped, interop.dump(model, stored, "transformers"),
                     config_of(model, "transformers"))
  dtype = jnp.float64 if double else jnp.float32
  with np.load(folder / OUTPUTS) as file, jax.enable_x64(double):
    # The parameters stay float32 in both, whose numbers float64 holds exactly.
    inputs = {"tokens": file["tokens"], "length": np.array(LENGTHS, np.int32)}
    ours = model.clone(dtype=dtype).apply(variables, **inputs)
    if "hidden" not in ours:  # decoders end with a norm
      _, state = model.clone(dtype=dtype).apply(
          variables, **inputs, mutable=["intermediates"],
          capture_intermediates=lambda module, _: module.name == "norm")
      ours["hidden"] = state["intermediates"]["norm"]["__call__"][0]
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    shards = len(list(folder.glob("*.safetensors")))
    print(f"{name}: {count:,} parameters from {shards} files")
    for key in ("hidden", "logits"):
      if key in ours and key in file:
        theirs, real = file[key], np.ones(len(LENGTHS), bool)
        if theirs.ndim == 3:  # a result for every token, of which padding does not count
          real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
        difference = np.abs(theirs[0] - theirs[1])[real[1]].max()
        error = np.abs(np.asarray(ours[key]) - theirs)[real].max() / difference
        print(f"{name}: {key}, {dtype.__name__}: off by {error:.1e} of the difference between "
              "two inputs")
        assert error < (1e-9 if double else 1e-4)


def main() -> None:
  """Runs both sides, one after the other."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("peer_python")
  parser.add_argument("kind")
  parser.add_argument("settings", nargs="?", default="{}")
  parser.add_argument("--float64", action="store_true")
  parser.add_argument("--bfloat16", action="store_true")
  flags = parser.parse_args()

  def peer(step: str, *arguments: str) -> None:
    subprocess.run([flags.peer_python, "-m", "experiments.benchmark.peers._full_size", step,
                    *map(str, arguments)], check=True)

  with tempfile.TemporaryDirectory() as place:
    folder, dumped = Path(place) / "theirs", Path(place) / "ours"
    peer("_write", folder, flags.kind, flags.settings, "float64" if flags.float64 else "float32",
         "bfloat16" if flags.bfloat16 else "float32")
    _compare(folder, dumped, flags.kind, flags.float64)
    peer("_check", folder, dumped, flags.kind)


if __name__ == "__main__":
  if len(sys.argv) > 1 and sys.argv[1] in ("_write", "_check"):
    {"_write": _write, "_check": _check}[sys.argv[1]](*sys.argv[2:])
  else:
    main()
