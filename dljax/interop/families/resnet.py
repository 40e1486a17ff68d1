"""ResNet's names.

torchvision: torchvision/models/resnet.py; of ours, the ImageNet forms. Blocks count from 0 in
both.
"""

from dljax.interop.table import CONV, LINEAR, Table, batch_norm, image, layer
from dljax.models import resnet

TORCHVISION = Table(rules=[("params/stem_conv/kernel", "conv1.weight", CONV),
                           *batch_norm("stem_norm", "bn1"),
                           (r"params/stage(\d)_block(\d+)/conv(\d)/kernel",
                            r"layer\1.\2.conv\3.weight", CONV),
                           *batch_norm(r"stage(\d)_block(\d+)/norm(\d)", r"layer\1.\2.bn\3"),
                           (r"params/stage(\d)_block(\d+)/shortcut_conv/kernel",
                            r"layer\1.\2.downsample.0.weight", CONV),
                           *batch_norm(r"stage(\d)_block(\d+)/shortcut_norm",
                                       r"layer\1.\2.downsample.1"), *layer("head", "fc", LINEAR),],
                    inputs=image(64, "conv1.weight"), no_weight=r".*\.num_batches_tracked",)

TABLES = {"torchvision": {resnet.ResNet: TORCHVISION}}
