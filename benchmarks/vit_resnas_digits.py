"""A search in the weights of a trained super-network: `python benchmarks/vit_resnas_digits.py RUN
[--out FILE]`.

RUN is the folder of `zoo train vit_resnas_supernet_digits --out RUN`. The oracle of the search is
the accuracy of a sub-network, as it is cut out, on one half of the held-out scans; the figures are
those on the other half.
"""

import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import report_run
from zoo.loaded import Loaded
from zoo.models.core import registry
from zoo.models.vision.vit_resnas.nets import largest
from zoo.models.vision.vit_resnas.search import distinct, drawn
from zoo.models.vision.vit_resnas.supernet import accuracy_of
from zoo.train.data.classes import DigitsClassify

RANDOM = 40
"""Networks of the space that are drawn within the budget, to compare with."""


def halves(loaded: Loaded) -> list[dict[str, np.ndarray]]:
    """The held-out scans, every other one in each half."""
    source = DigitsClassify().source("validation", "")
    examples = [loaded.processor.encode(source[i]) for i in range(len(source))]
    pixels = np.stack([example["pixels"] for example in examples])
    classes = np.array([int(example["classes"]) for example in examples])
    return [{"pixels": pixels[i::2], "classes": classes[i::2]} for i in range(2)]


def measure(loaded: Loaded) -> dict[str, Any]:
    """All figures; accuracies are shares from 0 to 1."""
    config = registry.config("vit_resnas_search_digits")
    asked, unseen = halves(loaded)
    oracle = accuracy_of(loaded.model, loaded.variables, asked)
    judge = accuracy_of(loaded.model, loaded.variables, unseen)
    found = config.build()(oracle)
    draw = random.Random(config.seed + 1)
    others = distinct(lambda: drawn(config, draw), config.fits, RANDOM, ())
    whole = largest(config.space)
    return {
        "budget": config.budget,
        "macs": found.macs,
        "tried": found.tried,
        "best_of_the_oracle": found.best,
        "accuracy": judge(found.net),
        "accuracy_of_random_networks": float(np.mean([judge(net) for net in others])),
        "accuracy_of_the_whole_network": judge(whole),
        "macs_of_the_whole_network": config.macs(whole),
        "net": [asdict(stage) for stage in found.net],
    }


if __name__ == "__main__":
    sys.exit(report_run("vit_resnas_supernet_digits", measure, __doc__))
