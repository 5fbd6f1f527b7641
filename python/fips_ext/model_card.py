"""The README.md beside a checkpoint: what the model is, how small, how it was made, how to load it."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]


def model_card(document: Json, ratios: dict[str, float], library: str | None) -> str:
    """Markdown with the metadata block that model hubs read.

    Args:
        document: what ``fips.json`` holds.
        ratios: of ``mlp``, ``block`` and ``model`` bytes over dense, see :func:`fips_ext.info`.
        library: ``transformers`` or ``timm``, if it has the class; None for any other model.
    """
    name = document["model_class"].rpartition(".")[2]
    lines = [
        "---",
        f"library_name: {'transformers' if library == 'transformers' else 'fips_ext'}",
        f"tags: [fips, compressed{', timm' if library == 'timm' else ''}]",
        "---",
        "",
        f"# {name}, compressed with fips_ext {document['fips_ext']}",
        "",
        "The MLP weights of groups of blocks are one shared base times sparse factors, `W ≈ U · V`.",
        "",
        "| bytes over dense | |",
        "|---|---|",
        f"| MLPs | {ratios['mlp']:.4f} |",
        f"| linear maps of the blocks | {ratios['block']:.4f} |",
        f"| whole model | {ratios['model']:.4f} |",
        "",
        "## Loading",
        "",
        "```python",
        *_loading(library, name),
        "```",
        "",
    ]
    if document["recipe"] is not None:
        recipe = json.dumps(document["recipe"], indent=1)
        lines += ["## Recipe", "", "```json", recipe, "```", ""]
    return "\n".join(lines)


def _loading(library: str | None, name: str) -> list[str]:
    if library == "transformers":
        return [
            "import fips_ext  # lets transformers know the format",
            f"from transformers import {name}",
            "",
            f'model = {name}.from_pretrained("path/to/this/folder")',
        ]
    dense = "" if library else ", model=freshly_built_dense_model"
    return ["import fips_ext", "", f'model = fips_ext.from_pretrained("path/to/this/folder"{dense})']
