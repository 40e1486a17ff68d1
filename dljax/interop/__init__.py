"""Weights to and from other implementations.

    variables = interop.load(resnet.VARIANTS["resnet50"](num_classes=1000),
                             interop.read("resnet50.safetensors"), "torchvision")
    tensors = interop.dump(model, variables, "torchvision")
    model, variables = interop.from_folder("vit_tiny_patch16_224/", "timm")  # sizes from its config.json

A family's names in every source are in one file, `interop/families/x.py`: for each of our
parameter paths the source's name, and how the array is laid out there. A model's family is found
by the module that its class is from, and only that family is imported. Checkpoints are read from
safetensors files only: a pickle can run any code.
"""

from dljax.interop.files import read
from dljax.interop.folder import from_folder
from dljax.interop.weights import (
    OURS, Specs, Tensors, all_sources, check_source, dump, find_table, load, recognise, sources)

__all__ = ["OURS", "Specs", "Tensors", "all_sources", "check_source", "dump", "find_table", "from_folder", "load",
           "read", "recognise", "sources"]
