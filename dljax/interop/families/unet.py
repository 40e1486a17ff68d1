"""U-Net's names.

torch: a `torch.nn.Module` with our layers' names: `down1.conv1`, `down1.norm1`, ..., `bottom`,
`upconv4` (a `torch.nn.ConvTranspose2d`), `up4`, ..., `head`.
"""

from dljax.interop.table import CONV, SAME, Layout, Table, batch_norm, image
from dljax.models import unet

# IOHW <-> HWIO.
UPCONV = Layout(lambda x: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1))


def _torch(model: unet.UNet) -> Table:
  return Table(
      rules=[
          (r"params/(upconv\d)/kernel", r"\1.weight", UPCONV),
          (r"params/(upconv\d|head)/bias", r"\1.bias", SAME),
          ("params/head/kernel", "head.weight", CONV),
          (r"params/(\w+)/(conv\d)/kernel", r"\1.\2.weight", CONV),
          (r"params/(\w+)/(conv\d)/bias", r"\1.\2.bias", SAME),
          *batch_norm(r"(\w+)/(norm\d)", r"\1.\2"),
      ],
      inputs=image(model.smallest, "down1.conv1.weight"),
      no_weight=r".*\.num_batches_tracked",
  )


TABLES = {"torch": {unet.UNet: _torch}}
