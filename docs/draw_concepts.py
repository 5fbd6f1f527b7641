"""Draw the pictures of concepts.md.

python docs/draw_concepts.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent / "images"
BASE, VALUE, EMPTY, INK = "#c2571a", "#2f6db5", "#eef1f5", "#333333"
STAGES = ("calibrate", "divide\nthe bytes", "closed\nform", "train\ngroups", "distil", "round\nand save")


def panel(width: float, height: float):
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.set_aspect("equal")
    axis.axis("off")
    return figure, axis


def grid(axis, x: float, y: float, kept: np.ndarray, cell: float, colour: str) -> None:
    """``kept``, upper left corner at ``(x, y)``; an image, because a path for each cell is a large file."""
    rows, columns = kept.shape
    shades = ListedColormap([EMPTY, colour])
    extent = (x, x + columns * cell, y - rows * cell, y)
    axis.imshow(kept, cmap=shades, vmin=0, vmax=1, extent=extent, interpolation="none", zorder=1)
    frame = (x, y - rows * cell), columns * cell, rows * cell
    axis.add_patch(Rectangle(*frame, fill=False, edgecolor=INK, linewidth=0.8, zorder=2))


def shared_base() -> None:
    random = np.random.default_rng(0)
    figure, axis = panel(8, 3.4)
    axis.text(0.6, 2.5, "U", ha="center", fontsize=13, color=BASE)
    axis.text(0.6, -2.5, "dense, stored once", ha="center", fontsize=9, color=INK)
    grid(axis, 0, 2.2, np.ones((44, 12), bool), 0.1, BASE)
    for layer in range(4):
        top = 2.2 - 1.2 * layer
        axis.text(1.55, top - 0.5, "×", fontsize=12, color=INK, va="center", ha="center")
        grid(axis, 1.9, top, random.random((8, 36)) < 0.4, 0.1, VALUE)
        axis.text(5.65, top - 0.4, f"V of layer {layer + 1}", fontsize=9, color=INK, va="center")
        axis.text(7.35, top - 0.4, f"≈ W of layer {layer + 1}", fontsize=9, color=INK, va="center")
    axis.text(3.7, -2.5, "sparse, one for each matrix", ha="center", fontsize=9, color=INK)
    axis.set_xlim(-0.3, 9.2)
    axis.set_ylim(-2.8, 2.9)
    save(figure, "shared_base")


def patterns() -> None:
    random = np.random.default_rng(1)
    figure, axis = panel(8, 2.4)
    shape = (24, 32)
    blocks = random.random((6, 8)) < 0.5
    dense = np.zeros(shape, bool)
    dense[:12] = True
    kinds = (
        ("bitmap", random.random(shape) < 0.5),
        ("block", np.kron(blocks, np.ones((4, 4), bool))),
        ("dense, of half the rank", dense),
    )
    for number, (name, kept) in enumerate(kinds):
        grid(axis, 3.6 * number, 2.2, kept, 0.1, VALUE)
        axis.text(3.6 * number + 1.6, -0.55, name, ha="center", fontsize=10, color=INK)
    axis.set_xlim(-0.2, 10.7)
    axis.set_ylim(-0.8, 2.4)
    save(figure, "patterns")


def stages() -> None:
    figure, axis = panel(9, 1.3)
    for number, name in enumerate(STAGES):
        x = 1.9 * number
        optional = name == "distil"
        box = FancyBboxPatch(
            (x, 0),
            1.35,
            0.8,
            boxstyle="round,pad=0.04,rounding_size=0.12",
            facecolor=EMPTY,
            edgecolor=VALUE,
            linestyle="--" if optional else "-",
        )
        axis.add_patch(box)
        axis.text(x + 0.675, 0.4, name, ha="center", va="center", fontsize=9, color=INK)
        if number:
            axis.add_patch(
                FancyArrowPatch(
                    (x - 0.48, 0.4), (x - 0.06, 0.4), arrowstyle="->", mutation_scale=9, color=INK
                )
            )
    axis.set_xlim(-0.2, 11.1)
    axis.set_ylim(-0.15, 0.95)
    save(figure, "stages")


def save(figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    # A white ground: dark pages show it, too. No date: the same script writes the same file.
    figure.savefig(FOLDER / f"{name}.svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "fips"
    shared_base()
    patterns()
    stages()
