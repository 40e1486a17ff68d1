"""Pictures of a run: learning curves, confusion matrices, grids of images.

A function that draws a figure returns a `matplotlib.figure.Figure`. It never uses pyplot, as
threads cannot share pyplot's global state. A notebook shows figures after `%matplotlib inline`.
"""

from dljax.report.classification import calibration, confusion_matrix
from dljax.report.common import DPI, picture, save, side_by_side
from dljax.report.curves import TITLES, learning_curves, read_metrics, relative_bars, strengths
from dljax.report.images import heat_maps, image_grid
from dljax.report.scenes import class_colors, class_map, detections, segmentations
from dljax.report.seen import seen
from dljax.report.sequences import alignments, forecasts, page, surprise

__all__ = [
    "DPI", "TITLES", "alignments", "calibration", "class_colors", "class_map", "confusion_matrix",
    "detections", "forecasts", "heat_maps", "image_grid", "learning_curves", "page", "picture",
    "read_metrics", "relative_bars", "save", "seen", "segmentations", "side_by_side", "strengths",
    "surprise",
]
