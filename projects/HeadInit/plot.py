#!/usr/bin/env python
"""
Turn the results of measure.py into the table and the plot of the README.

    python projects/HeadInit/plot.py projects/HeadInit/results.json
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(path: Path) -> None:
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in json.loads(path.read_text()):
        values[row["curve"]][row["iterations"]].append(row["segm"])
    budgets = sorted({budget for curve in values.values() for budget in curve})
    print("| heads | " + " | ".join(map(str, budgets)) + " |")
    print("| --- |" + " ---: |" * len(budgets))
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for name, curve in values.items():
        cells = (
            f"{statistics.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" if len(v) > 1
            else f"{v[0]:.1f}" if v else "-"
            for v in (curve.get(budget, []) for budget in budgets)
        )  # fmt: skip
        print(f"| {name} | " + " | ".join(cells) + " |")
        if len(curve) < 3:
            continue  # a trial of one budget is for the table alone
        xs = [budget for budget in budgets if budget in curve]
        axes.plot(xs, [statistics.median(curve[x]) for x in xs], marker="o", label=name)
        axes.fill_between(xs, [min(curve[x]) for x in xs], [max(curve[x]) for x in xs], alpha=0.2)
    axes.set_xscale("symlog", linthresh=50)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set_xlabel("iterations, each with a whole schedule")
    axes.set_ylabel("mask AP")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
