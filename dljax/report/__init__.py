"""Pictures of a run: learning curves, confusion matrices, grids of images.

A function that draws a figure returns a `matplotlib.figure.Figure`. It never uses pyplot, as
threads cannot share pyplot's global state. A notebook shows figures after `%matplotlib inline`.
"""

import importlib

# Where each name comes from. No run draws everything, so a file is imported when it is needed.
_HOMES = {name: home for home, names in {
    "classification": ("calibration", "confusion_matrix"),
    "common": ("DPI", "picture", "save", "side_by_side"),
    "curves": ("TITLES", "learning_curves", "read_metrics", "relative_bars", "strengths"),
    "images": ("heat_maps", "image_grid"),
    "inputs": ("seen",),
    "regression": ("numbers",),
    "scenes": ("class_colors", "class_map", "detections", "segmentations"),
    "sequences": ("alignments", "attention", "forecasts", "page", "surprise"),
}.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
  """Imports the file that holds `name`, which is then an attribute as any other."""
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  globals()[name] = value
  return value
