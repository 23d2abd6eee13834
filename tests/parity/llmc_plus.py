"""The selections of the LLMC+ toolkit against its own functions."""

import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.parts.reduce.choose import top
from zoo.models.parts.reduce.cluster import density_peaks
from zoo.models.parts.reduce.merge import match, mean_by_group
from zoo.models.reduction.llmc_plus import video
from zoo.models.reduction.llmc_plus.baselines import divprune
from zoo.models.reduction.llmc_plus.decoder import unlike
from zoo.models.reduction.llmc_plus.sparsevlm import rated
from zoo.models.reduction.llmc_plus.tower import mustdrop, visionzip, vispruner

# What SparseVLM keeps after its stages, by the budget.
SPARSE = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
STAGE = {2: 0, 6: 1, 15: 2}


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, by our functions."""
    form = next(name for name in FORMS if case.name == name or case.name.startswith(f"{name}_"))
    inputs = {name: jnp.asarray(array) for name, array in case.inputs.items()}
    return {name: np.asarray(array) for name, array in FORMS[form](case.kwargs, **inputs).items()}


def _dart(kwargs, normed_hidden, key_cache, pivot_visit_order):
    start, count = kwargs["vision_token_start_index"], kwargs["vision_token_length"]
    own, asked = kwargs["pivot_image_token"], kwargs["pivot_text_token"]
    norm = jnp.abs(key_cache[0]).sum((0, -1))
    image = start + top(norm[start : start + count], own)
    text = start + count + top(norm[start + count :], asked)
    pivots = np.concatenate([image, text])
    # Which pivot comes first is the order of a set in CPython.
    visits = [int(pivot) for pivot in pivot_visit_order if int(pivot) in pivots]
    each = int(count * (1 - kwargs["reduction_ratio"]) / (own + asked))
    place = jnp.arange(normed_hidden.shape[1])
    candidate = ((place >= start) & (place < start + count)).at[image].set(False)
    chosen = unlike(normed_hidden[0], jnp.array(visits), candidate, (each,) * len(pivots))
    return {"retained_sorted": np.sort(np.concatenate([image, chosen])).astype(np.int32)}


def _divprune(kwargs, x):
    chosen = divprune(x, round(kwargs["threshold_ratio"] * len(x)))
    return {"selected_in_order": chosen}


def _dpc_knn(kwargs, x):
    number = kwargs["cluster_num"]
    _, cluster = density_peaks(x, number, neighbours=kwargs["k"])
    return {"cluster_of_token": cluster, "cluster_mean": mean_by_group(x, cluster, number)}


def _dycoke(kwargs, x):
    kept = video.dycoke(x, kwargs["merging_ratio"])
    rows = [np.asarray(frame)[index] for frame, index in zip(x, kept)]
    return {"x": np.concatenate(rows)[None]}


def _fastv(kwargs, attention_previous_layer, hidden):
    start, count = kwargs["vision_token_start_index"], kwargs["vision_token_length"]
    score = attention_previous_layer.mean(1)[:, -1, start : start + count]
    best = start + top(score, round(count * (1 - kwargs["rate"])))[0]
    place = np.arange(hidden.shape[1])
    text = (place < start) | (place >= start + count)
    kept = np.sort(np.concatenate([place[text], best])).astype(np.int32)
    return {"hidden": hidden[:, kept], "kept_position_ids": kept[None]}


def _fastvid(kwargs, hidden, frame_global, frame_token_attention):
    start, frames = kwargs["image_token_start_index"], len(frame_global)
    count, width = len(frame_token_attention), hidden.shape[-1]
    found = video.fastvid(
        hidden[0, start : start + count].reshape(frames, -1, width),
        frame_global,
        frame_token_attention.reshape(frames, -1),
        keep=kwargs["retention_ratio"],
        segments=kwargs["DySeg_c"],
        threshold=kwargs["DySeg_tau"],
        context=kwargs["STPrune_d"],
        every=kwargs["DTM_p"],
        alpha=kwargs["DTM_alpha"],
    )
    place = np.arange(hidden.shape[1])
    parts = [place[:start], start + found.place, place[start + count :]]
    rows = [hidden[0, :start], found.tokens, hidden[0, start + count :]]
    return {
        "hidden": np.concatenate(rows)[None],
        "kept_position_ids": np.concatenate(parts).astype(np.int32)[None],
    }


def _holitom(kwargs, features, attention, frame_similarity):
    best = video.by_attention(features, attention, kwargs["retain_ratio"])
    dense = video.by_density(
        features, kwargs["retain_ratio"], beta=kwargs["Beta"], neighbours=kwargs["K"]
    )
    windows, saved = video.static_windows(
        frame_similarity, threshold=kwargs["tau"], longest=kwargs["max_window_size"]
    )
    return {
        "attention_density_tokens": best.tokens,
        "attention_density_pos": best.place.astype(np.float32),
        "density_tokens": dense.tokens,
        "density_pos": dense.place.astype(np.int32),
        "static_windows": np.array(windows, np.int32),
        "total_reduced": np.float32(saved),
    }


def _mustdrop(kwargs, x):
    window, count = tuple(kwargs["window_size"]), x.shape[1]
    number = (count - kwargs["retained_tokens"]) // (window[0] * window[1] - 1)
    kept = mustdrop(x[:, 1:], round((count - 1) ** 0.5), window, number)
    return {"x": np.concatenate([x[:, :1], kept.tokens], 1)}


def _prunevid(kwargs, frames):
    found = video.prunevid(
        frames,
        threshold=kwargs["taus"],
        segments=kwargs["temporal_segment_ratios"],
        ratio=kwargs["cluster_ratios"],
    )
    return {"tokens": found[None]}


def _sparsevlm_cluster(kwargs, x):
    number = kwargs["cluster_num"]
    centres, cluster = density_peaks(x, number, neighbours=number)
    return {"merged": mean_by_group(x, cluster, number), "center_index": centres}


def _sparsevlm_score(kwargs, text_rows_attention, rater_text_index):
    start, count = kwargs["v_token_start"], kwargs["v_token_num"]
    chosen = jnp.zeros(len(text_rows_attention), bool).at[rater_text_index].set(True)
    relation = rated(text_rows_attention[None], chosen[None])[:, start : start + count]
    number = SPARSE[kwargs["retained_tokens"]][STAGE[kwargs["layer_idx"]]]
    mask = np.zeros(relation.shape, bool)
    np.put_along_axis(mask, np.asarray(top(relation, min(number, count - 1))), True, 1)
    return {"keep_mask": mask, "relation": relation}


def _tome(kwargs, metric, x):
    first = kwargs["class_token"]
    found = match(metric, kwargs["r"], protect=int(first), by_place=first)
    number = found.index.shape[-1]
    size = (found.groups[..., None] == jnp.arange(number)).sum(-2)
    return {
        "x": mean_by_group(x, found.groups, number),
        "size": size[..., None].astype(jnp.float32),
    }


def _visionzip(kwargs, cls_attention, hidden, key_head_mean):
    score = cls_attention.sum(1)[:, 1:]
    found = visionzip(
        hidden[:, 1:], score, key_head_mean[:, 1:], kwargs["dominant"], kwargs["contextual"]
    )
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, np.asarray(found.index), True, 1)
    tokens = np.concatenate([hidden[:, :1], found.tokens], 1)
    return {"tokens_with_cls_first": tokens, "index_mask_no_cls": mask}


def _vispruner(kwargs, cls_attention_per_head, features):
    keep = round(features.shape[1] * (1 - kwargs["prune_ratio"]))
    important = int(keep * kwargs["important_ratio"])
    return {"keep_mask": vispruner(features, cls_attention_per_head.mean(1), keep, important)}


FORMS = {
    "dart": _dart,
    "divprune": _divprune,
    "dpc_knn": _dpc_knn,
    "dycoke": _dycoke,
    "fastvid": _fastvid,
    "fastv": _fastv,
    "holitom": _holitom,
    "mustdrop": _mustdrop,
    "prunevid": _prunevid,
    "sparsevlm_cluster": _sparsevlm_cluster,
    "sparsevlm_score": _sparsevlm_score,
    "tome": _tome,
    "visionzip": _visionzip,
    "vispruner": _vispruner,
}
