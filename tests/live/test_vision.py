"""Image classifiers against timm's: logits, training mode, gradients; shapes at full size.

A new system needs one line in `CASES` and one for each name of timm in `SIZES`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.live.reference import close, redraw, state_of, timm, torch
from zoo.models.core import registry
from zoo.models.core.config import ModelConfig
from zoo.models.core.keytable import Table
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.towers.fastvit import FastViTConfig
from zoo.models.parts.towers.swin import SwinConfig
from zoo.models.vision import crossvit, inceptionnext, swin, vitamin
from zoo.models.vlm import fastvlm
from zoo.train.recipes import fast_scaling

Tables = Callable[[Any], Table]


class Tiny(NamedTuple):
    """A small model of timm's, and ours.

    Attributes:
      original: timm's name.
      sizes: what `timm.create_model` is told.
      config: ours.
      table: timm's keys.
      shape: height and width of the images; None for those that the configuration names.
      noise: gradients below this share of the largest are not compared. Depthwise kernels of a
        single place before a norm have none in training but for the norm's epsilon.
    """

    original: str
    sizes: Mapping[str, Any]
    config: ModelConfig
    table: Tables
    shape: tuple[int, int] | None = None
    noise: float = 1e-4


SWIN = {"img_size": 40, "patch_size": 2, "embed_dim": 8, "depths": (3, 2), "num_heads": (2, 4)}
SWIN_TOWER = SwinConfig(
    image_size=40, patch_size=2, first_width=8, depths=(3, 2), num_heads=(2, 4), window=6
)

CASES = {
    "swin": Tiny(
        "swin_tiny_patch4_window7_224",
        {**SWIN, "window_size": 6},
        ClassifierConfig(SWIN_TOWER, "mean", num_classes=5),
        swin.timm_table,
    ),
    "inceptionnext": Tiny(
        "inception_next_tiny",
        {"depths": (1, 2, 6, 1), "dims": (16, 16, 24, 32)},
        inceptionnext.InceptionNeXtClassifierConfig(
            inceptionnext.InceptionNeXtConfig(
                image_size=64, depths=(1, 2, 6, 1), widths=(16, 16, 24, 32)
            ),
            "mean",
            num_classes=5,
        ),
        inceptionnext.table,
        (72, 64),
    ),
    "crossvit": Tiny(
        "crossvit_9_dagger_240",
        {
            "img_size": 48,
            "img_scale": (1.0, 2 / 3),
            "embed_dim": (8, 16),
            "depth": ((1, 2, 0), (1, 1, 0)),
            "num_heads": (2, 4),
            "mlp_ratio": (2.0, 3.0, 1.0),
        },
        crossvit.CrossViTClassifierConfig(
            crossvit.CrossViTConfig(
                image_sizes=(48, 32),
                widths=(8, 16),
                depths=((1, 2), (1, 1)),
                num_heads=(2, 4),
                mlp_ratios=(2, 3),
                stem=True,
            ),
            num_classes=5,
        ),
        crossvit.timm_table,
        (40, 52),
    ),
    "vitamin": Tiny(
        "vitamin_small_224",
        {
            "img_size": 32,
            "embed_cfg": timm.models.vitamin.VitCfg(
                embed_dim=(8, 12, 16),
                depths=(2, 1, 1),
                stem_width=8,
                conv_cfg=timm.models.vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
                head_type="1d",
            ),
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "dynamic_img_size": True,
        },
        ClassifierConfig(
            vitamin.ViTaminConfig(
                image_size=32,
                stem_width=8,
                stage_widths=(8, 12),
                stage_depths=(2, 1),
                width=16,
                depth=2,
                num_heads=2,
                mlp_dim=32,
            ),
            "mean",
            num_classes=5,
            head_norm="layer",
        ),
        vitamin.table,
        (48, 32),
    ),
    "fastvlm": Tiny(
        "fastvit_mci3",
        {
            "layers": (1, 1, 2, 1, 1),
            "embed_dims": (8, 8, 16, 32, 32),
            "mlp_ratios": (2, 2, 2, 2, 2),
        },
        ClassifierConfig(
            FastViTConfig(
                image_size=64,
                depths=(1, 1, 2, 1, 1),
                widths=(8, 8, 16, 32, 32),
                mlp_ratios=(2, 2, 2, 2, 2),
                form="branches",
            ),
            "mean",
            num_classes=5,
        ),
        fastvlm.timm_table,
        (72, 130),
        2e-3,
    ),
    "regnet": Tiny(
        "regnetz_005",
        {
            "depth": 8,
            "w0": 8,
            "wa": 8.0,
            "wm": 2.0,
            "group_size": 4,
            "stem_width": 8,
            "num_features": 24,
        },
        ClassifierConfig(
            fast_scaling.regnet(
                8.0,
                8,
                2.0,
                8,
                4,
                bottleneck=4.0,
                inverted=True,
                head_width=24,
                stem_width=8,
                image_size=64,
            ),
            "mean",
            num_classes=5,
        ),
        fast_scaling.timm_table,
        (96, 64),
        2e-3,
    ),
}

# {timm's name: (ours, table)}
SIZES = {
    "swin_tiny_patch4_window7_224": ("swin_t", swin.timm_table),
    "swin_small_patch4_window7_224": ("swin_s", swin.timm_table),
    "swin_base_patch4_window7_224": ("swin_b", swin.timm_table),
    "swin_base_patch4_window12_384": ("swin_b.384", swin.timm_table),
    "swin_large_patch4_window7_224": ("swin_l", swin.timm_table),
    "swin_large_patch4_window12_384": ("swin_l.384", swin.timm_table),
    "inception_next_atto": ("inceptionnext_atto", inceptionnext.table),
    "inception_next_tiny": ("inceptionnext_t", inceptionnext.table),
    "inception_next_small": ("inceptionnext_s", inceptionnext.table),
    "inception_next_base": ("inceptionnext_b", inceptionnext.table),
    "vitamin_small_224": ("vitamin_s", vitamin.table),
    "vitamin_base_224": ("vitamin_b", vitamin.table),
    "vitamin_large_224": ("vitamin_l", vitamin.table),
    "vitamin_large2_224": ("vitamin_l2", vitamin.table),
    **{f"vitamin_large_{side}": (f"vitamin_l.{side}", vitamin.table) for side in (256, 336, 384)},
    **{f"vitamin_large2_{side}": (f"vitamin_l2.{side}", vitamin.table) for side in (256, 336, 384)},
    **{f"vitamin_xlarge_{side}": (f"vitamin_xl.{side}", vitamin.table) for side in (256, 336, 384)},
    "fastvit_mci3": ("fastvlm_encoder.branches", fastvlm.timm_table),
    **{
        name: (name, crossvit.timm_table)
        for name in crossvit.VARIANTS
        if name.endswith(("_240", "_408"))
    },
}


def variables_of(config: ModelConfig) -> dict[str, Any]:
    """Shapes of what a key table speaks of: parameters, or these with statistics."""
    made = nn.unbox(jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1)))
    return dict(made) if "stats" in made else made["params"]


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """`redraw`, and running statistics drawn too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, leaf in redraw(module).named_buffers():
            if name.endswith("running_mean"):
                leaf.copy_(0.1 * torch.randn(leaf.shape, generator=generator))
            elif name.endswith("running_var"):
                leaf.copy_(0.5 + torch.rand(leaf.shape, generator=generator))
    return module


def meaningful(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without counts of batches."""
    return {key: leaf for key, leaf in state.items() if not key.endswith("num_batches_tracked")}


def assert_same(
    theirs: torch.nn.Module,
    config: ModelConfig,
    table: Table,
    shape: tuple[int, int],
    noise: float = 1e-4,
) -> None:
    """Logits in evaluation and in training, gradients in both, statistics after a step of training,
    and the checkpoint there and back.
    """
    channels = config.inputs(1)["pixels"].shape[-1]
    size = (4, *shape, channels)
    pixels = np.random.default_rng(0).normal(size=size).astype(np.float32)
    image = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    shapes, state = variables_of(config), state_of(theirs)
    loaded = table.load(state, shapes)
    back = table.save(loaded)
    assert set(back) == set(meaningful(state))
    assert all(np.array_equal(back[key], state[key]) for key in back)
    has_stats = "stats" in shapes
    variables = loaded if has_stats else {"params": loaded}
    model = config.build()

    @jax.jit
    def ours(variables):
        def run(params, train):
            out, changed = model.apply(
                {**variables, "params": params}, {"pixels": pixels}, train=train, mutable=["stats"]
            )
            return (out.logits**2).mean(), (out.logits, changed.get("stats", {}))

        value = jax.grad(run, has_aux=True)
        return value(variables["params"], False), value(variables["params"], True)

    for got, train in zip(ours(variables), (False, True), strict=True):
        what = "training" if train else "evaluation"
        theirs.train(train)
        theirs.zero_grad()
        logits = theirs(image)
        (logits**2).mean().backward()
        grads, (out, stats) = got
        close(out, logits, what=f"logits in {what}")
        tree = {"params": grads, "stats": variables["stats"]} if has_stats else grads
        want = {
            name: np.zeros(leaf.shape, np.float32) if leaf.grad is None else leaf.grad.numpy()
            for name, leaf in theirs.named_parameters()
        }
        close_all(table.save(tree), want, what, noise)
        if has_stats and train:
            after = table.save({"params": loaded["params"], "stats": stats})
            for name, leaf in theirs.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    close(after[name], leaf, what=name)


def close_all(
    got: Mapping[str, Any], want: Mapping[str, Any], what: str, noise: float = 1e-4
) -> None:
    """As `close`, of gradients; those that are zero in exact arithmetic are noise."""
    noise *= max(np.abs(leaf).max() for leaf in want.values())
    for key in want:
        if np.abs(want[key]).max() > noise or np.abs(got[key]).max() > noise:
            close(got[key], want[key], 2e-4, what=f"gradient of {key} in {what}")


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_timm(name):
    case = CASES[name]
    theirs = timm.create_model(
        case.original, num_classes=5, drop_path_rate=0.0, pretrained=False, **case.sizes
    )
    side = case.config.inputs(1)["pixels"].shape[1:3]
    shape = case.shape or side
    assert_same(drawn(theirs), case.config, case.table(case.config), shape, case.noise)


FIRST = {
    ours.split("_")[0]: original
    for original, (ours, _) in reversed(SIZES.items())
    if original != "fastvit_mci3"  # it has many parts, and takes long
}
"""One of each system; the other sizes are `thorough`."""


@pytest.mark.parametrize(
    "original",
    [pytest.param(n, marks=() if n in FIRST.values() else pytest.mark.thorough) for n in SIZES],
)
def test_sizes_of_timm(original):
    """Every tensor of the full size as timm names and shapes it."""
    name, table = SIZES[original]
    config = registry.config(name)
    bare = {} if config.num_classes else {"num_classes": 0}
    with torch.device("meta"):
        theirs = timm.create_model(original, pretrained=False, **bare)
    want = {key: tuple(leaf.shape) for key, leaf in meaningful(theirs.state_dict()).items()}
    assert table(config).shapes(variables_of(config)) == want
