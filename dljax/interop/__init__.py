"""Weights to and from other implementations.

    variables = interop.load(resnet.VARIANTS["resnet50"](num_classes=1000),
                             interop.read("resnet50.safetensors"), "torchvision")
    tensors = interop.dump(model, variables, "torchvision")
    # The folder's config.json gives the sizes.
    model, variables = interop.from_folder("vit_tiny_patch16_224/", "timm")

The file `interop/families/x.py` holds a family's names in every source: for each of our parameter
paths the source's name, and the array's layout in the source. The module of a model's class says
its family, and only that family is imported. Weights are read from safetensors files only, because
a pickle can run any code.
"""

import importlib

# Where each name comes from. Training needs hardly any of them, so a file is imported when it is
# needed.
_HOMES = {name: home for home, names in {
    "files": ("read",),
    "folder": ("from_folder",),
    "generation": ("generation",),
    "weights": ("OURS", "Specs", "Tensors", "all_sources", "check_finite", "check_source", "dump",
                "find_table", "load", "recognise", "sources"),
}.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
  """Imports the file that holds `name`, which is then an attribute as any other."""
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  globals()[name] = value
  return value
