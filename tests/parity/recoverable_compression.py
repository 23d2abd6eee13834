"""Recoverable Compression against the official function, and its outliers against scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.parts.reduce.outliers import LIMIT, count_outliers, outlier_factors
from zoo.models.parts.reduce.scores import class_attention
from zoo.models.reduction.recoverable_compression import recover


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our functions and the recorded queries, keys and patches."""
    if "scores" in case.inputs:
        return _outliers(case)
    q, k = (jnp.asarray(case.inputs[f"layer23_{name}"]) for name in ("query", "key"))
    attention = class_attention(q[:, :, None], k[:, :, None])
    patches = jnp.asarray(case.inputs["penultimate_hidden"])[0, 1:]
    relevance = jnp.asarray(case.inputs["text_similarity"])[0, 0]
    keep = len(patches) - 1
    found = jax.jit(functools.partial(recover, keep=keep))(
        patches, attention[0], k[0, 1:], relevance
    )
    number = int(found.num_centres)
    centres = np.asarray(found.centres[:number])
    outputs = {
        "tokens": np.asarray(found.tokens)[np.asarray(found.mask)],
        "index_by_vision": np.asarray(found.sight[: int(found.num_sight)]),
        "index_by_text": np.asarray(found.words[: int(found.num_words)]),
        "cluster_center_index_in_leftover": centres,
    }
    # The official list has the other centres first, then what is none, without the centre itself.
    left = int((~np.isin(np.arange(keep + 1), _kept(found))).sum())
    others = np.setdiff1d(np.arange(left), centres)
    for i in range(number):
        listed = [*np.delete(centres, i), *others]
        members = [listed.index(j) for j in np.asarray(found.members[i]).tolist()]
        outputs[f"cluster{i}_members"] = np.array(members)[None]
    return {name: array[None] for name, array in outputs.items()}


def _kept(found) -> np.ndarray:
    """The patches that are kept by sight or by the text."""
    sight, words = found.sight[: int(found.num_sight)], found.words[: int(found.num_words)]
    return np.concatenate([np.asarray(sight), np.asarray(words)])


def _outliers(case: Case) -> dict[str, np.ndarray]:
    scores, k = jnp.asarray(case.inputs["scores"]).reshape(-1), case.kwargs["k"]
    factors = np.asarray(outlier_factors(scores, neighbours=k))
    number = int(count_outliers(scores, neighbours=k))
    return {
        "outlier_ratio": np.float32(number / scores.size),
        "is_outlier": factors > LIMIT,
        "negative_outlier_factor": -factors,
    }
