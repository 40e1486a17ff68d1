"""The PyTorch networks that the row "models" compares ours with, and the packages that they need.

Each family has a file, named as ours, with a table NETWORKS: a case's name -> (number of classes
-> module). The peer's interpreter imports the file of one case's family, without our packages. A
module may have a method `loss(batch)`; otherwise its loss is the cross-entropy of its output.
"""

import importlib
import importlib.util
import sys

PACKAGES = ("torch", "torchvision", "timm", "transformers")


def import_torchvision():
  """torchvision, even if its compiled operators are for another torch: no network needs them."""
  try:
    return importlib.import_module("torchvision")
  except RuntimeError as error:
    if "operator torchvision::" not in str(error):
      raise
  import torch

  # Its import asks for these two by name.
  global _library  # the names live as long as it does
  _library = torch.library.Library("torchvision", "DEF")
  for name in ("nms", "qnms"):
    _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
    del sys.modules[name]  # of the import that failed
  return importlib.import_module("torchvision")


def import_package(name):
  """A package of `PACKAGES`; timm and transformers import torchvision themselves, which therefore
  comes first, where it is.
  """
  if name != "torch" and importlib.util.find_spec(name) and importlib.util.find_spec("torchvision"):
    import_torchvision()
  return importlib.import_module(name)


def find_packages():
  """{"found": {package: version}, "missing": {package: why}}."""
  found, missing = {}, {}
  for name in PACKAGES:
    try:
      module = import_package(name)
      found[name] = module.__version__
    except Exception as error:  # a broken package counts as missing
      missing[name] = " ".join(f"{error}".split()) or type(error).__name__
  return {"found": found, "missing": missing}
