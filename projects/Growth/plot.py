#!/usr/bin/env python
"""
Turn what measure.py measured into the table and the plot of the README.

    python projects/Growth/plot.py projects/Growth/results.json
"""

import json
import sys
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for (axis, part), group in groupby(rows, key=lambda row: (row["axis"], row["part"])):
        points = list(group)
        sizes = [point["size"] for point in points]
        times = [f"{point['seconds']:.2f}" for point in points]
        memory = [f"{point['mib']:.0f}" for point in points]
        growth = points[-1]["seconds"] / points[0]["seconds"]
        print(
            f"| {part} | {' / '.join(map(str, sizes))} {axis} | {' / '.join(times)} | "
            f"{growth:.1f} | {' / '.join(memory)} |"
        )
        multiples = [size / sizes[0] for size in sizes]
        style = "-" if axis == "images" else "--"
        for axe, key in zip(axes, ("seconds", "mib"), strict=True):
            values = [max(point[key], 1e-3) for point in points]
            axe.plot(multiples, values, style, marker="o", label=f"{part}, by {axis}")
    for axe, label in zip(axes, ("CPU seconds", "MiB"), strict=True):
        axe.set(xscale="log", yscale="log", xlabel="times the input", ylabel=label)
        axe.set_xticks(multiples, [f"{multiple:g}x" for multiple in multiples])
        axe.minorticks_off()
    axes[1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
