"""Ridge regression and its cross-validation against the official functions."""

import re

import numpy as np

from tests.parity.case import Case
from zoo.benchmarks.brain_vl_probing import ProbingConfig
from zoo.evaluate.ridge import ridge, with_ones


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output."""
    x, y = case.inputs["X"], case.inputs["y"]
    start, stop, number = map(int, re.findall(r"-?\d+", case.kwargs["alphas"]))
    alphas = tuple(float(alpha) for alpha in np.logspace(start, stop, number))
    probe = ProbingConfig(case.kwargs["n_splits"], alphas, samples=2).build()
    probed = probe(x, y)
    weights = ridge(x, y, [case.kwargs["ridge_alpha"]])[0]
    found = {
        "ridge_w": weights,
        "ridge_pred": with_ones(x) @ weights,
        "best_val": probed.best_validation,
        "best_test": probed.best_test,
        "best_alpha": probed.alpha,
    }
    for row, alpha in enumerate(alphas):
        found[f"val_alpha{alpha:g}"] = probed.validation[row]
        found[f"test_alpha{alpha:g}"] = probed.test[row]
    return {name: found[name] for name in case.outputs}
