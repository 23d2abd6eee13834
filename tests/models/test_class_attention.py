"""FasterVLM, FoPru and HiRED: what the papers' figures are, and what is kept of what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import REPO
from tests.parity.case import load_case
from zoo.models.core import registry
from zoo.models.core.types import Features
from zoo.models.parts.reduce.base import Seen
from zoo.models.parts.reduce.choose import choose
from zoo.models.parts.reduce.report import kept_of, vision_flops
from zoo.models.reduction.fopru import FoPru, row_scores
from zoo.models.reduction.hired import HiRED


@pytest.mark.parametrize(("kept", "tera"), [(576, 3.817), (288, 1.887), (144, 0.938), (58, 0.376)])
def test_flops_of_fastervlm(kept, tera):
    assert round(vision_flops([kept] * 32, width=4096, mlp_dim=11_008) / 1e12, 3) == tera


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("fastervlm_llava_1_5_7b", 144),
        ("fastervlm_llava_1_5_7b.29", 29),
        ("fastervlm_llava_next_7b", 145),
        ("fopru_llava_1_5_7b", 288),
        ("fopru_llava_1_5_7b.row", 288),
        ("hired_llava_next_7b", 576),
        ("hired_llava_1_5_7b", 115),
    ],
)
def test_slots_at_full_size(name, slots):
    config = registry.config(name)
    assert config.slots == slots
    model, batch = config.build(), config.inputs(1)
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    stream, _ = jax.eval_shape(
        lambda v, b: model.apply(v, b, None, method="stream"), variables, batch
    )
    assert stream.slots == slots
    names = sorted(variables["params"])
    assert names == sorted(["connector", "decoder", "tower"] + ["newline"] * config.newline)


def seen_of(score, grid, **facts):
    tokens = jnp.zeros((*score.shape, 1))
    return Seen(tokens, Features(tokens, grid), grid=grid, **facts)


@pytest.mark.parametrize("name", ["a", "b"])
def test_fopru_by_the_class_token_is_fastervlm(name):
    """Rank selects what the official FasterVLM does, from its own recorded attention."""
    case = load_case(REPO / f"tests/goldens/fastervlm/{name}.npz")
    score = jnp.asarray(case.outputs["cls_attention_per_head"]).mean(1)[:, None]
    keep = FoPru(case.kwargs["visual_token_num"], score="cls").num_kept(score.shape[-1])
    kept = choose(seen_of(score, (1, score.shape[-1])), score, keep)
    np.testing.assert_array_equal(kept_of(kept, score.shape[-1])[:, 0], case.outputs["keep_mask"])


def test_fopru_keeps_whole_rows():
    score = jnp.asarray(np.random.default_rng(0).random((2, 3, 24)), jnp.float32)
    reducer = FoPru(0.5, strategy="row")
    keep = reducer.num_kept(36)
    assert keep == 18 and FoPru(13, strategy="row").num_kept(36) == 12
    kept = choose(seen_of(score, (4, 6)), row_scores(score, (4, 6)), 12)
    rows = kept_of(kept, 24).reshape(2, 3, 4, 6)
    assert (rows.all(-1) == rows.any(-1)).all() and (rows.all(-1).sum(-1) == 2).all()
    sums = score.reshape(2, 3, 4, 6).sum(-1)
    assert (
        np.where(rows.any(-1), sums, np.inf).min(-1) >= np.where(rows.any(-1), 0, sums).max(-1)
    ).all()
    with pytest.raises(ValueError, match="no square"):
        reducer.num_kept(24)
    with pytest.raises(ValueError, match="strategy"):
        FoPru(strategy="column")


@pytest.mark.parametrize("allocation", ["bands", "regions"])
@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (3, 1)])
def test_budgets_of_hired(allocation, grid):
    """Tiles share the rest; each keeps exactly its budget; regions follow where attention is."""
    tiles, side = 1 + grid[0] * grid[1], 12
    reducer = HiRED(0.2, allocation=allocation)
    score = np.random.default_rng(1).random((1, tiles, side**2)).astype(np.float32)
    score[0, 0] = 0
    score[0, 0, : side * side // 2] = 1  # the upper half of the picture
    cut = jnp.array([[[tiles, *grid]]])
    budget = np.asarray(reducer.budgets(jnp.asarray(score), cut, (side, side)))[0]
    total = int(tiles * side**2 * 0.2)
    assert budget[0] == int(total * 0.5) and budget.sum() <= total
    kept = choose(
        seen_of(jnp.asarray(score), (side, side)),
        jnp.asarray(score),
        reducer.capacity(tiles, side**2),
        count=jnp.asarray(budget)[None],
    )
    np.testing.assert_array_equal(kept_of(kept, side**2)[0].sum(-1), budget)
    if allocation == "regions":
        shares = budget[1:].reshape(grid)
        assert (shares[0] > 0).all() and (shares == shares[:, :1]).all()
        if grid[0] == 2:
            assert (shares[1] == 0).all()


def test_what_hired_refuses():
    with pytest.raises(ValueError, match="alpha"):
        HiRED(0.2, alpha=1.0)
    with pytest.raises(ValueError, match="allocation"):
        HiRED(0.2, allocation="quadrants")
