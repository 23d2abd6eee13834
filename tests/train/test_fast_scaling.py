"""Fast compound scaling against the official scaler, and RegNets."""

import json
import math
from dataclasses import replace

import pytest

from tests.conftest import REPO
from zoo.cli import count_parameters
from zoo.configs.fast_scaling_digits import SCALE, SMALL
from zoo.configs.fast_scaling_digits import config as recipe
from zoo.models.core.registry import config, create
from zoo.models.parts.towers.regnet import RegNetConfig
from zoo.train.recipes.fast_scaling import (
    NETWORKS,
    Factors,
    complexity,
    factors,
    scaled,
    scaled_resolution,
    stages,
)

RECORD = json.loads((REPO / "tests/goldens/fast_scaling/scaling.json").read_text("utf-8"))
BASES = {
    "EN-B0": "efficientnet_b0",
    "RegNetX-3.2GF": "regnetx_3_2gf",
    "RegNetY-400MF": "regnety_400mf",
    "RegNetY-4.0GF": "regnety_4gf",
    "RegNetZ-500MF": "regnetz_500mf",
    "RegNetZ-4GF": "regnetz_4gf",
}


def described(network, test_size):
    """A network in the words of the record."""
    facts = {
        "depths": list(network.depths),
        "widths": list(network.widths),
        "train_size": network.image_size,
        "test_size": test_size,
    }
    if isinstance(network, RegNetConfig):
        ratio = [network.bottleneck] * len(network.depths)
        return {**facts, "bot": ratio, "group_ws": list(network.group_widths)}
    return {
        **facts,
        "exp": list(network.expansions),
        "stem_w": network.stem_width,
        "head_w": network.head_width,
    }


@pytest.mark.parametrize(
    "row", RECORD["rows"], ids=lambda row: f"{row['base']}-{row['scale_type']}-{row['scale']:g}"
)
def test_the_official_scaler(row):
    base = NETWORKS[BASES[row["base"]]]
    found = factors(row["scale"], row["scale_type"])
    assert [found.depth, found.width, found.group, found.resolution] == pytest.approx(
        row["factors_d_w_g_r"]
    )
    assert vars(complexity(base)) == row["before_cx"]
    assert described(base, 256) == row["before"]
    network = scaled(base, row["scale"], row["scale_type"])
    assert described(network, scaled_resolution(256, found)) == row["after"]
    assert vars(complexity(network)) == row["after_cx"]


@pytest.mark.parametrize("row", RECORD["generate_regnet"], ids=lambda row: f"d{row['d']}")
def test_the_official_generator(row):
    widths, depths = stages(row["w_a"], row["w_0"], row["w_m"], row["d"])
    assert (list(widths), list(depths)) == (row["widths"], row["depths"])


@pytest.mark.parametrize(
    ("name", "count"), [("regnetz_500mf", 7_122_742), ("regnetz_4gf", 27_116_800)]
)
def test_parameters(name, count):
    assert count_parameters(config(name))["total"] == count


@pytest.mark.parametrize("name", ["regnety_400mf", "regnetz_500mf"])
def test_what_is_counted_is_what_is_built(name):
    bigger = create("fast_scaling")(config(name), 2.0)
    assert count_parameters(bigger)["total"] == complexity(bigger.tower).params


def test_activations_grow_with_the_root():
    """Four times the FLOPs: about twice the activations, and more than three times by the uniform
    rule.
    """
    base = NETWORKS["efficientnet_b0"]
    before = complexity(base)
    for rule, flops, acts in (("fast_scaling", 3.58, 1.98), ("fast_scaling.uniform", 4.40, 3.19)):
        after = complexity(create(rule)(base, 4.0))
        assert after.flops / before.flops == pytest.approx(flops, abs=0.005)
        assert after.acts / before.acts == pytest.approx(acts, abs=0.01)


@pytest.mark.parametrize("scale", [1.0, 3.0, 16.0])
@pytest.mark.parametrize("rule", ["d1_w8_g8_r1", "dwr", "d", "w", "r", "d2_w1.5_r1"])
def test_the_factors_multiply_to_the_scale(scale, rule):
    f = factors(scale, rule)
    assert f.depth * f.width**2 * f.resolution**2 == pytest.approx(scale)


def test_the_recipe_trains_a_scaled_network():
    """About as many FLOPs as asked for: small widths are rounded by much."""
    before, after = complexity(SMALL), complexity(recipe().model.tower)
    assert 0.6 * SCALE < after.flops / before.flops < 1.6 * SCALE
    assert after.acts / before.acts < 0.7 * SCALE


def test_groups_alone():
    assert factors(4.0, "g") == Factors(1.0, 1.0, 4.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4.0, "x1_w2"), "want letters of dwgr"), ((0.0,), "want more than 0")],
)
def test_wrong_rules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        factors(*arguments)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="group width 24 does not divide 104"):
        replace(NETWORKS["regnety_400mf"], group_widths=(8, 24, 8, 8))
    with pytest.raises(ValueError, match="want one of each per stage"):
        RegNetConfig(depths=(1, 2))


def test_a_scale_of_one_changes_nothing():
    for network in NETWORKS.values():
        assert scaled(network, 1.0) == network
    assert math.isclose(factors(1.0).width, 1.0)
