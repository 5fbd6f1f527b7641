"""Compress an image classifier on a folder of images, and count what it still gets right.

    python examples/compress_vit.py ./my-vit --images photos --labelled val --out small
    python examples/compress_vit.py timm:deit_small_patch16_224 --weights deit.pth --images photos --out small

Images calibrate without labels. `--labelled` holds one folder for each class.
"""

import argparse
from pathlib import Path

import fips_ext
from fips_ext.classification import accuracy
from fips_ext.integrations.images import calibration_images
from fips_ext.models import load_image_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a transformers folder with its image processor, or timm:NAME")
    parser.add_argument("--weights", type=Path, help="of timm:NAME")
    parser.add_argument("--images", type=Path, required=True, help="folder to calibrate on")
    parser.add_argument("--labelled", type=Path, help="folder to score, one folder for each class")
    parser.add_argument("--ratio", type=float, default=0.6, help="MLP bytes to keep")
    parser.add_argument("--tokens", type=int, default=32768, help="to calibrate on: patches of the images")
    parser.add_argument("--out", default="small", help="folder for the checkpoint")
    arguments = parser.parse_args()

    model, transform = load_image_model(arguments.model, arguments.weights)
    before = arguments.labelled and accuracy(model, arguments.labelled, transform)

    recipe = fips_ext.Recipe(ratio=arguments.ratio, calibration_tokens=arguments.tokens)
    data = calibration_images(arguments.images, transform, next(model.parameters()).dtype)
    report = fips_ext.compress(model, recipe, data)  # in place
    processor = transform if hasattr(transform, "save_pretrained") else None
    fips_ext.save_pretrained(model, arguments.out, recipe=recipe, report=report, tokenizer=processor)
    print(report.to_markdown())

    if arguments.labelled:
        model, transform = load_image_model(arguments.out)
        after = accuracy(model, arguments.labelled, transform)
        print(f"top-1 on {after.images} images: {before.top1:.2%} before, {after.top1:.2%} after")


if __name__ == "__main__":
    main()
