"""The peer's side of the row "models", run by the peer's interpreter, which needs nothing of ours.

  PYTHON torch_worker.py               prints the packages that it finds
  PYTHON torch_worker.py JSON          one side of a case: see `serve.py`

The JSON object: "case" (a key of `NETWORKS`), "batch" and "classes" (those of our side), "layout"
("contiguous" or "channels_last"), "threads", "accelerator" (whether our side has one), "turn_seconds".
"""

import importlib
import json
import sys
import time
from pathlib import Path

PACKAGES = ("torch", "torchvision")

if __name__ == "__main__":
  # In place of this folder, whose files have names like those of other packages' parts; and for no longer, as our
  # packages may be for another Python.
  sys.path[0] = str(Path(__file__).resolve().parents[2])
  from experiments.benchmark import serve
  del sys.path[0]


def import_torchvision():
  """torchvision, also where its compiled operators are for another torch: no network here needs them."""
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


def find_packages():
  """{"found": {package: version}, "missing": {package: why}}."""
  found, missing = {}, {}
  for name in PACKAGES:
    try:
      module = import_torchvision() if name == "torchvision" else importlib.import_module(name)
      found[name] = module.__version__
    except Exception as error:  # a package that is broken is as good as none
      missing[name] = " ".join(f"{error}".split()) or type(error).__name__
  return {"found": found, "missing": missing}


def _mlp(classes):
  from torch import nn
  return nn.Sequential(
      nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, classes))


def _lenet(classes, pool="AvgPool2d"):
  from torch import nn
  pool = getattr(nn, pool)
  return nn.Sequential(
      nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), pool(2), nn.Conv2d(6, 16, 5), nn.Tanh(), pool(2), nn.Flatten(),
      nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, classes))


def _lenet_max(classes):
  return _lenet(classes, "MaxPool2d")


def _alexnet(classes):
  """torchvision's with a stem and a head for small images."""
  from torch import nn
  layers, channels = [], 3
  for width, kernel, pool in ((64, 5, True), (192, 5, True), (384, 3, False), (256, 3, False), (256, 3, True)):
    layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(3, 2)] if pool else []
    channels = width
  return nn.Sequential(
      *layers, nn.Flatten(), nn.Linear(3 * 3 * 256, 1024), nn.ReLU(inplace=True), nn.Linear(1024, 1024),
      nn.ReLU(inplace=True), nn.Linear(1024, classes))


def _vgg11(classes):
  """torchvision's with a head for small images."""
  from torch import nn
  layers, channels = [], 3
  for stage, size in zip((64, 128, 256, 512, 512), (1, 1, 2, 2, 2)):
    for _ in range(size):
      layers += [nn.Conv2d(channels, stage, 3, padding=1), nn.ReLU(inplace=True)]
      channels = stage
    layers.append(nn.MaxPool2d(2))
  return nn.Sequential(
      *layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Linear(512, 512), nn.ReLU(inplace=True),
      nn.Linear(512, classes))


def _unet(classes, width=16, pools=3):
  """With padding and batch normalisation, for images of one channel."""
  import torch
  from torch import nn

  def block(channels, width):
    layers = []
    for channels in (channels, width):
      layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)

  class UNet(nn.Module):

    def __init__(self):
      super().__init__()
      widths = [width * 2**i for i in range(pools + 1)]
      self.down = nn.ModuleList(map(block, [1, *widths], widths))
      self.up_convs = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:-1])
      self.up = nn.ModuleList(block(2 * w, w) for w in widths[:-1])
      self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(width, classes, 1)

    def forward(self, x):
      skips = []
      for down in self.down[:-1]:
        skips.append(down(x))
        x = self.pool(skips[-1])
      x = self.down[-1](x)
      for skip, up_conv, up in reversed(list(zip(skips, self.up_convs, self.up))):
        x = up(torch.cat([skip, up_conv(x)], dim=1))
      return self.head(x)

  return UNet()


def _resnet18(classes):
  """With the stem for small images."""
  from torch import nn
  model = import_torchvision().models.resnet18(num_classes=classes)
  model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
  return model


def _resnet50(classes):
  return import_torchvision().models.resnet50(num_classes=classes)


def _efficientnet_b0(classes):
  return import_torchvision().models.efficientnet_b0(num_classes=classes, stochastic_depth_prob=0.0, dropout=0.0)


NETWORKS = {  # by the case's name: number of classes -> module
    "mlp": _mlp,
    "lenet": _lenet,
    "lenet_max": _lenet_max,
    "alexnet": _alexnet,
    "vgg11": _vgg11,
    "unet": _unet,
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "efficientnet_b0": _efficientnet_b0,
}


def _build(spec):
  import torch

  torch.set_num_threads(spec["threads"])
  torch.set_num_interop_threads(1)
  # JAX multiplies float32 in TF32 where a GPU has it.
  torch.set_float32_matmul_precision("high")
  cuda = spec["accelerator"] and torch.cuda.is_available()
  device = torch.device("cuda" if cuda else "cpu")
  wait = torch.cuda.synchronize if cuda else lambda: None
  torch.manual_seed(0)

  layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[spec["layout"]]
  model = NETWORKS[spec["case"]](spec["classes"]).to(device, memory_format=layout)
  size, height, width, channels = spec["batch"]["image"]
  image = torch.randn(size, channels, height, width).to(device, memory_format=layout)
  label = torch.randint(spec["classes"], spec["batch"]["label"]).to(device)
  optimizer = torch.optim.SGD(model.parameters(), lr=serve.LEARNING_RATE, momentum=serve.MOMENTUM)

  loss = None

  def train_step():
    nonlocal loss
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(image), label)
    loss.backward()
    optimizer.step()

  def train(steps):
    model.train()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
      train_step()
    wait()
    seconds = (time.perf_counter() - start) / steps
    if not loss.isfinite():
      raise FloatingPointError("the loss is not finite")
    return seconds

  @torch.inference_mode()
  def time_each(f, steps):
    f()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
      f()
      wait()
    return (time.perf_counter() - start) / steps

  def inference(steps):
    model.eval()
    return time_each(lambda: model(image), steps)

  def product(steps):
    x = torch.ones(serve.PRODUCT, serve.PRODUCT, device=device)
    return time_each(lambda: torch.mm(x, x), steps)

  def describe():
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "platform": device.type,
        "parameters": sum(p.numel() for p in model.parameters()),
    }

  return describe, {"train": train, "inference": inference, "product": product}


def _device_peak():
  import torch
  return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


if __name__ == "__main__":
  if len(sys.argv) == 1:
    print(json.dumps(find_packages()))
  else:
    packages = find_packages()  # imported before the clock starts
    serve.serve(_build, _device_peak)
