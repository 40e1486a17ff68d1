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

from dljax.interop.files import read
from dljax.interop.folder import from_folder
from dljax.interop.weights import (
    OURS, Specs, Tensors, all_sources, check_finite, check_source, dump, find_table, load, recognise,
    sources)

__all__ = ["OURS", "Specs", "Tensors", "all_sources", "check_finite", "check_source", "dump", "find_table",
           "from_folder", "load", "read", "recognise", "sources"]
