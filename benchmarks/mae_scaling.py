"""Fit the accuracies that were published with `mae_human_scaling` by hours, parameters and pixels.

    python benchmarks/mae_scaling.py FOLDER

FOLDER has `finetune_permissive.csv`: a row for each tuned model with its size (`arch`), the share
of the video that it was trained on and the best top-1 accuracy, as in the official logs.
"""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from zoo.train.recipes.mae_human_scaling import fit_accuracy

HOURS = 5000
"""Of all the video, about."""


def main(folder: Path) -> dict[str, object]:
    """Slopes per factor of ten, and the mean accuracies of each size."""
    factors, accuracy, by_size = [], [], defaultdict(lambda: defaultdict(list))
    with open(folder / "finetune_permissive.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            share, top1 = float(row["data_fraction"]), float(row["best_acc1"])
            side = float(row["arch"].partition("@")[2] or 224)
            factors.append((HOURS * share, float(row["n_parameters"]), side))
            accuracy.append(top1)
            by_size[row["arch"]][share].append(top1)
    plane = fit_accuracy(factors, accuracy)
    means = {
        size: {f"{share:g}": round(float(np.mean(found)), 2) for share, found in sorted(of.items())}
        for size, of in by_size.items()
    }
    return {
        "runs": len(accuracy),
        "intercept": plane.intercept,
        "points_per_tenfold": dict(zip(("hours", "parameters", "side"), plane.slopes, strict=True)),
        "r2": plane.r2,
        "at_20000_hours_2.5e9_parameters_952_pixels": plane(20_000, 2.5e9, 952),
        "means": means,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
