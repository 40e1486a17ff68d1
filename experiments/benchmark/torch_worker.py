"""The peer's side of the row "models", run by the peer's interpreter, which needs nothing of ours.

  PYTHON torch_worker.py               prints the packages that it finds
  PYTHON torch_worker.py JSON          one side of a case: see `serve.py`

The JSON object: "case" (a key of `NETWORKS`), "batch" and "classes" (those of our side), "layout"
("contiguous" or "channels_last"), "threads", "accelerator" (whether our side has one), "turn_seconds".
"""

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path

PACKAGES = ("torch", "torchvision", "timm")

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


def import_package(name):
  """A package of `PACKAGES`; timm, where it is, imports torchvision itself, which therefore comes first."""
  if name == "torchvision" or name == "timm" and importlib.util.find_spec(name):
    import_torchvision()
  return importlib.import_module(name)


def find_packages():
  """{"found": {package: version}, "missing": {package: why}}."""
  found, missing = {}, {}
  for name in PACKAGES:
    try:
      module = import_package(name)
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


def _vit_ti16(classes):
  return import_package("timm").create_model("vit_tiny_patch16_224", pretrained=False, num_classes=classes)


def _retinanet(classes):
  """torchvision's RetinaNet on a small ResNet of its blocks, with a pyramid and heads of its own."""
  torchvision = import_torchvision()
  from torch import nn
  from torchvision.models.detection import retinanet
  from torchvision.models.detection.anchor_utils import AnchorGenerator
  from torchvision.models.detection.image_list import ImageList
  from torchvision.models.resnet import BasicBlock

  def stage(inside, outside, stride):
    if stride == 1:
      return BasicBlock(inside, outside)
    shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
    return BasicBlock(inside, outside, stride, shortcut)

  class Backbone(nn.Module):
    out_channels = 64

    def __init__(self):
      super().__init__()
      self.stem = nn.Sequential(
          nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), stage(16, 16, 1),
          stage(16, 32, 2))
      self.stages = nn.ModuleList([stage(32, 64, 2), stage(64, 128, 2), stage(128, 256, 2)])
      self.pyramid = torchvision.ops.FeaturePyramidNetwork([64, 128, 256], self.out_channels)

    def forward(self, image):
      levels, x = {}, self.stem(image)
      for i, layer in enumerate(self.stages):
        levels[str(i)] = x = layer(x)
      return self.pyramid(levels)

  class Detector(nn.Module):

    def __init__(self):
      super().__init__()
      sizes = tuple((s, int(s * 2**(1 / 3)), int(s * 2**(2 / 3))) for s in (8, 16, 32))
      anchors = AnchorGenerator(sizes, ((1.25, 2.0),) * 3)
      self.net = retinanet.RetinaNet(Backbone(), classes, anchor_generator=anchors)
      for head in (self.net.head.classification_head, self.net.head.regression_head):
        head.conv = head.conv[:2]

    def forward(self, image):
      return self.net.head(list(self.net.backbone(image).values()))

    def loss(self, batch):
      image = batch["image"]
      levels = list(self.net.backbone(image).values())
      anchors = self.net.anchor_generator(ImageList(image, [image.shape[-2:]] * len(image)), levels)
      targets = [{"boxes": boxes, "labels": labels} for boxes, labels in zip(batch["boxes"], batch["box_label"])]
      return sum(self.net.compute_loss(targets, self.net.head(levels), anchors).values())

  return Detector()


def _language_model(classes, cell, width=256):
  """Two layers, time first, which torch prefers; the state goes on from step to step."""
  from torch import nn

  class LanguageModel(nn.Module):

    def __init__(self):
      super().__init__()
      self.embed = nn.Embedding(classes, width)
      self.rnn = getattr(nn, cell)(width, width, num_layers=2)
      self.head = nn.Linear(width, classes)
      self.carry = None

    def forward(self, tokens):
      return self.head(self.rnn(self.embed(tokens.T))[0])

    def loss(self, batch):
      x, carry = self.rnn(self.embed(batch["tokens"].T), self.carry)
      self.carry = carry.detach() if cell == "GRU" else tuple(state.detach() for state in carry)
      return nn.functional.cross_entropy(self.head(x).flatten(0, 1), batch["targets"].T.flatten())

  return LanguageModel()


def _lstm(classes):
  return _language_model(classes, "LSTM")


def _gru(classes):
  return _language_model(classes, "GRU")


def _deepspeech(classes, channels=16, bands=16, width=128):
  """The small form: two convolutions, two bidirectional GRUs, CTC."""
  import torch
  from torch import nn

  class DeepSpeech(nn.Module):

    def __init__(self):
      super().__init__()
      layers = []
      for inside, kernel in ((1, 11), (channels, 7)):
        layers += [nn.Conv2d(inside, channels, kernel, stride=2, padding=kernel // 2, bias=False),
                   nn.BatchNorm2d(channels), nn.Hardtanh(0, 20, inplace=True)]
      self.convs = nn.Sequential(*layers)
      self.rnn = nn.GRU(channels * bands // 4, width, num_layers=2, bidirectional=True)
      self.head = nn.Linear(2 * width, classes)

    def forward(self, features):
      x = self.convs(features[:, None])  # [B, C, T, F]
      return self.head(self.rnn(x.permute(2, 0, 3, 1).flatten(2))[0])

    def loss(self, batch):
      log_probs = self(batch["features"]).log_softmax(-1)
      frames = torch.full(batch["length"].shape, len(log_probs))
      return nn.functional.ctc_loss(
          log_probs, batch["tokens"], frames, batch["token_length"], reduction="sum") / len(frames)

  return DeepSpeech()


NETWORKS = {  # by the case's name: number of classes -> module
    "mlp": _mlp,
    "lenet": _lenet,
    "lenet_max": _lenet_max,
    "alexnet": _alexnet,
    "vgg11": _vgg11,
    "unet": _unet,
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "retinanet": _retinanet,
    "vit_ti16": _vit_ti16,
    "efficientnet_b0": _efficientnet_b0,
    "lstm": _lstm,
    "gru": _gru,
    "deepspeech": _deepspeech,
}


def _random_batch(shapes, classes):
  """As our side's `random_batch`, with the images' channels first."""
  import torch

  if "image" not in shapes:
    batch = {name: torch.randint(1, classes, shapes[name]) for name in ("tokens", "targets") if name in shapes}
    if "features" in shapes:
      batch["features"] = torch.randn(shapes["features"])
      for name, field in (("length", "features"), ("token_length", "tokens")):
        batch[name] = torch.full(shapes[name], shapes[field][1])
    return batch
  size, height, width, channels = shapes["image"]
  batch = {"image": torch.randn(size, channels, height, width)}
  for name in ("label", "segmentation", "box_label"):
    if name in shapes:
      batch[name] = torch.randint(classes, shapes[name])
  if "boxes" in shapes:
    corner, size = (torch.tensor([width, height]) * (least + extent * torch.rand(*shapes["boxes"][:-1], 2))
                    for least, extent in ((0, 0.6), (0.1, 0.3)))
    batch["boxes"] = torch.cat([corner, corner + size], -1)
  return batch


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
  batch = {name: x.to(device) for name, x in _random_batch(spec["batch"], spec["classes"]).items()}
  if "image" in batch:
    batch["image"] = batch["image"].to(memory_format=layout)
  x, label = batch[serve.input_field(batch)], batch.get("segmentation", batch.get("label"))
  optimizer = torch.optim.SGD(model.parameters(), lr=serve.LEARNING_RATE, momentum=serve.MOMENTUM)

  loss = None

  def train_step():
    nonlocal loss
    optimizer.zero_grad()
    loss = model.loss(batch) if hasattr(model, "loss") else torch.nn.functional.cross_entropy(model(x), label)
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
    return time_each(lambda: model(x), steps)

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
