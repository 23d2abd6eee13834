"""Grouping of parts and look-up of things against the official functions of DC²."""

import numpy as np

from tests.parity.case import Case
from zoo.agents.dc2 import cluster, retrieve


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from the recorded vectors."""
    settings, given = case.kwargs, case.inputs
    found = retrieve(
        given["query_embedding"], given["object_embeddings"], settings["alpha"], settings["k"]
    )
    return {
        "cluster_labels": cluster(given["patch_features"], settings["theta"]),
        "retrieved": np.array(found, np.int32),
    }
