"""What nested embeddings of scans are worth: `python benchmarks/mrl_digits.py RUN [--out FILE]`.

RUN is the folder of `zoo train mrl_digits --out RUN`. On the held-out scans: how often the head
of every prefix is right, and nearest neighbours among the training scans, by every prefix and by a
funnel over them; and what a cascade of the heads gains, its thresholds learned on the half of
the held-out scans that it is not judged on.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import report_run
from zoo.evaluate.retrieval import Stage, funnel, judge, search_flops
from zoo.loaded import Loaded
from zoo.train.data.classes import DigitsClassify
from zoo.train.recipes.mrl import cascade, cascade_thresholds

SHORTLIST, ANSWERS = 200, 10


def encoded(loaded: Loaded, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings [N, D], logits of all prefixes [N, G, K], and classes [N]."""
    source = DigitsClassify().source(split, "")
    examples = [loaded.processor.encode(source[i]) for i in range(len(source))]
    pixels = np.stack([example["pixels"] for example in examples])
    out = jax.jit(loaded.model.apply)(loaded.variables, {"pixels": pixels})
    classes = np.array([int(example["classes"]) for example in examples])
    return np.asarray(out.pooled), np.asarray(out.nested), classes


def measure(loaded: Loaded) -> dict[str, Any]:
    """All figures, shares from 0 to 1."""
    sizes = loaded.config.head.sizes
    database, _, known = encoded(loaded, "train")
    queries, logits, wanted = encoded(loaded, "validation")
    right = (logits.argmax(-1) == wanted[:, None]).mean(0)
    plans = {str(size): (Stage(size, ANSWERS),) for size in sizes}
    short = sizes[1]
    plans[f"{short} then {sizes[-1]}"] = (Stage(short, SHORTLIST), Stage(sizes[-1], ANSWERS))
    found = {}
    for name, plan in plans.items():
        ranking = judge(funnel(queries, database, plan), wanted, known)
        found[name] = {
            "top1": ranking.top1,
            "map_at_10": ranking.mean_average_precision,
            "multiply_adds": search_flops(len(database), plan),
        }
    half = len(wanted) // 2
    chosen = cascade(logits[half:], sizes, cascade_thresholds(logits[:half], wanted[:half]))
    return {
        "accuracy": {str(size): float(share) for size, share in zip(sizes, right, strict=True)},
        "neighbours": found,
        "cascade": {
            "accuracy": float((chosen.classes == wanted[half:]).mean()),
            "whole_embedding": float((logits[half:, -1].argmax(-1) == wanted[half:]).mean()),
            "mean_size": chosen.mean_size,
        },
    }


if __name__ == "__main__":
    sys.exit(report_run("mrl_digits", measure, __doc__))
