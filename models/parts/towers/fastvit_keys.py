"""Keys of the `fastvit` tower, in the layouts of its official code and of timm.

A norm behind a convolution is loaded as it is, or folded into the convolution: by the tower's form.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.models.core.keytable import (
    AnyRow,
    Ignored,
    Row,
    Table,
    Transform,
    conv,
    linear,
    norm_rows,
    pointwise,
    split,
    weight_rows,
)
from zoo.models.parts.layers.branched import NORM_EPS, BranchedConv
from zoo.models.parts.towers.fastvit import FastViTConfig


@dataclass(frozen=True)
class Keys:
    """What a layout calls the parts of the tower.

    Attributes:
      wide, narrow, skip: the branches of a convolution.
      large, large_one: the first branch of those between stages, and all of them folded.
      mixer_norm: of the mixer, beside its branches.
      around: the filters of the positions.
      gain: what follows the name of a gain.
      mlp: the MLP of a layer.
      expand: the last convolution.
      excite: the two maps of its channel attention.
    """

    wide: str
    narrow: str
    skip: str
    large: str
    large_one: str
    mixer_norm: str
    around: str
    gain: str
    mlp: str
    expand: str
    excite: tuple[str, str]


OFFICIAL = Keys(
    wide="rbr_conv.0",
    narrow="rbr_scale",
    skip="rbr_skip",
    large="lkb_origin",
    large_one="lkb_reparam",
    mixer_norm="norm.rbr_skip",
    around="pe",
    gain="",
    mlp="convffn",
    expand="conv_exp",
    excite=("reduce", "expand"),
)
TIMM = Keys(
    wide="conv_kxk.0",
    narrow="conv_scale",
    skip="identity",
    large="large_conv",
    large_one="reparam_conv",
    mixer_norm="norm.identity",
    around="pos_enc",
    gain=".gamma",
    mlp="mlp",
    expand="final_conv",
    excite=("fc1", "fc2"),
)

_column = Transform(
    "column",
    lambda theirs, shapes: [theirs[0].reshape(shapes[0])],
    lambda ours: [ours[0][:, None, None]],
)
"""Theirs [C, 1, 1], ours [C]."""


def _fold(theirs: Any, shapes: Any) -> list[np.ndarray]:
    del shapes
    kernel, scale, bias, mean, var = (np.asarray(each, np.float64) for each in theirs)
    gain = scale / np.sqrt(var + NORM_EPS)
    kernel = np.moveaxis(kernel * gain[:, None, None, None], (1, 0), (-2, -1))
    dtype = theirs[0].dtype
    return [kernel.astype(dtype), (bias - mean * gain).astype(dtype)]


def _unfold(ours: Any) -> list[np.ndarray]:
    (kernel,), ones = conv.save(ours[:1]), np.ones_like(ours[1])
    return [kernel, ones, ours[1], 0 * ones, (ones - NORM_EPS).astype(ones.dtype)]


_folding = Transform("folding", _fold, _unfold)
"""Their convolution and the norm after it, our convolution; written with a norm of no effect."""


def _conv_rows(
    ours: str,
    theirs: str,
    keys: Keys,
    part: BranchedConv,
    *,
    steps: Any = None,
    large: bool = False,
) -> list[AnyRow]:
    """Rows of a sum of branches, or of what they are folded into."""
    if part.one:
        key = keys.large_one if large else "reparam_conv"
        return [*weight_rows(f"{ours}/conv", f"{theirs}.{key}", conv, steps=steps)]
    branches = {"wide": keys.large if large else keys.wide}
    if part.small:
        branches["narrow"] = "small_conv" if large else keys.narrow
    rows: list[AnyRow] = []
    for name, key in branches.items():
        at = f"{theirs}.{key}"
        rows += weight_rows(f"{ours}/{name}/conv", f"{at}.conv", conv, steps=steps, bias=False)
        rows += norm_rows(f"{ours}/{name}/norm", f"{at}.bn", steps=steps, stats=True)
    if part.keeps_shape:
        rows += norm_rows(f"{ours}/skip", f"{theirs}.{keys.skip}", steps=steps, stats=True)
    return rows


def _layer_rows(config: FastViTConfig, keys: Keys, stage: int, theirs: str) -> list[AnyRow]:
    """Rows of the layers of a stage; `theirs` has `{}` for their number."""
    ours, steps = f"stages_{stage}/layers/", tuple(range(config.depths[stage]))
    width, one = config.widths[stage], config.form != "branches"
    mixer, rows, gains = f"{theirs}.token_mixer", [], {"mlp_gain": "layer_scale"}
    if stage >= config.attention_from:
        kernels = tuple(f"{ours}{name}/kernel" for name in "qkv")
        rows += norm_rows(f"{ours}attn_norm", f"{theirs}.norm", steps=steps)
        rows.append(Row(kernels, f"{mixer}.qkv.weight", split(3, linear()), steps))
        rows += weight_rows(f"{ours}out", f"{mixer}.proj", steps=steps)
        gains = {"attn_gain": "layer_scale_1", "mlp_gain": "layer_scale_2"}
    elif one:
        rows += weight_rows(f"{ours}mixer/conv", f"{mixer}.reparam_conv", conv, steps=steps)
    else:
        part = BranchedConv(width, width, 3, groups=width, small=1)
        rows += _conv_rows(f"{ours}mixer/branched", f"{mixer}.mixer", keys, part, steps=steps)
        rows += norm_rows(
            f"{ours}mixer/norm", f"{mixer}.{keys.mixer_norm}", steps=steps, stats=True
        )
        gains["mixer/gain"] = "token_mixer.layer_scale"
    for name, key in gains.items():
        rows.append(Row(f"{ours}{name}/scale", f"{theirs}.{key}{keys.gain}", _column, steps))
    at, local = f"{theirs}.{keys.mlp}.", f"{ours}mlp/local"
    norm = norm_rows(f"{local}/norm", f"{at}conv.bn", steps=steps, stats=True)
    if config.form == "folded":
        leaves = ("weight", "bias", "running_mean", "running_var")
        theirs_all = (f"{at}conv.conv.weight", *(f"{at}conv.bn.{leaf}" for leaf in leaves))
        rows.append(Row((f"{local}/kernel", f"{local}/bias"), theirs_all, _folding, steps))
        rows += [row for row in norm if isinstance(row, Ignored)]
    else:
        key = f"{at}conv.conv"
        rows += weight_rows(f"{local}/conv", key, conv, steps=steps, bias=False) + norm
    for name, key in (("up", "fc1"), ("down", "fc2")):
        rows += weight_rows(f"{ours}mlp/{name}", f"{at}{key}", pointwise, steps=steps)
    return rows


def tower_table(config: FastViTConfig, keys: Keys = OFFICIAL) -> Table:
    """Keys of the tower in the official layout, or in timm's; running statistics stand below
    `stats/`, beside the parameters.
    """
    official, one = keys is OFFICIAL, config.form != "branches"
    rows: list[AnyRow] = []
    c, first, last = config, config.widths[0], config.widths[-1]
    stem = (
        BranchedConv(c.channels, first, 3, 2, one=one),
        BranchedConv(first, first, 3, 2, one=one),
        BranchedConv(first, first, one=one),
    )
    for i, part in enumerate(stem):
        key = f"patch_embed.{i}" if official else f"stem.{i}"
        rows += _conv_rows(f"stem_{i}", key, keys, part)
    place = 0  # among the official modules, which are numbered throughout
    for stage, width in enumerate(c.widths):
        at = f"stages.{stage}."
        if stage:
            down = f"network.{place}." if official else f"{at}downsample."
            place += 1
            halve = BranchedConv(c.widths[stage - 1], width, 7, 2, small=3, one=one)
            mix = BranchedConv(width, width, one=one)
            rows += _conv_rows(f"halve_{stage - 1}", f"{down}proj.0", keys, halve, large=True)
            rows += _conv_rows(f"mix_{stage - 1}", f"{down}proj.1", keys, mix)
        if stage >= c.attention_from:
            theirs = f"network.{place}." if official else f"{at}pos_emb."
            place += 1
            name, key = ("conv", "reparam_conv") if one else ("around", keys.around)
            ours = f"positions_{stage - c.attention_from}/{name}"
            rows += weight_rows(ours, f"{theirs}{key}", conv)
        theirs = f"network.{place}.{{}}" if official else f"{at}blocks.{{}}"
        place += 1
        rows += _layer_rows(c, keys, stage, theirs)
    part = BranchedConv(last, c.width, 3, small=1, one=one)
    rows += _conv_rows("expand", keys.expand, keys, part)
    for name, key in zip(("reduce", "expand"), keys.excite, strict=True):
        rows += weight_rows(f"excite/{name}", f"{keys.expand}.se.{key}", pointwise)
    if c.head_width:
        rows.append(Row("head/kernel", "head.proj"))
    return Table(tuple(rows))
