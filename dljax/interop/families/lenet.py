"""LeNet-5's names.

torch: a `torch.nn.Module` with the attributes `c1`, `c3` (`Conv2d`), `c5`, a `Linear(400, 120)`
over `torch.flatten(x, 1)`, `f6` and `head` (`Linear`).
"""

from dljax.interop.table import CONV, LINEAR, SAME, Table, flattened, image
from dljax.models import lenet

TORCH = Table(
    rules=[
        (r"params/(c1|c3)/kernel", r"\1.weight", CONV),
        ("params/c5/kernel", "c5.weight", flattened(16, 5, 5)),
        (r"params/(f6|head)/kernel", r"\1.weight", LINEAR),
        (r"params/(\w+)/bias", r"\1.bias", SAME),
    ],
    inputs=image(32, "c1.weight"),
)

TABLES = {"torch": {lenet.LeNet5: TORCH}}
