"""Masked autoencoders of human-like video, tuned on few labels, and how accuracy grows with hours,
parameters and pixels.

ViTs with patches of 14 are pre-trained as masked autoencoders that see a fifth of each frame
(`zoo.train.objectives.masked`), without epochs and at a constant learning rate; then all weights
are tuned on one or two per cent of ImageNet behind a norm of the class token.

Follows: arXiv:2308.03712.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np

from zoo.models.base.timm_vit import tower_table
from zoo.models.core.card import Card
from zoo.models.core.errors import UsageError
from zoo.models.core.keytable import Ignored, Row, Table, norm_rows, weight_rows
from zoo.models.core.registry import register
from zoo.models.core.types import Array
from zoo.models.parts.assemblies.classifier import Classifier, ClassifierConfig
from zoo.models.parts.assemblies.masked import MaskedConfig
from zoo.models.parts.layers.linear import Proj
from zoo.models.parts.layers.norms import BatchNorm
from zoo.models.parts.towers.vit import TIMM_LAYER, ViTConfig, layer_rows, ones
from zoo.train.optim import OptimConfig

CARD = Card(
    slug="mae_human_scaling",
    paper="arXiv:2308.03712",
    code="https://github.com/eminorhan/humanlike-vits",
    differs=(
        "The accuracy is fitted by a plane over logarithms of hours, parameters and pixels; the "
        "exact form of the paper's regression was not released.",
        "In training, batch statistics of the tuning head are those of the whole batch.",
    ),
)

PRETRAIN = OptimConfig(lr=3e-4, schedule="constant", warmup=0, b1=0.9, b2=0.95, weight_decay=0.0)
"""The published pre-training of the sizes S, B and L; H has a learning rate of 1e-4."""

TUNE = OptimConfig(lr=1e-4, schedule="constant", warmup=0, weight_decay=0.05)
"""The published tuning; H at 448 and 476 pixels has a learning rate of 5e-5."""


@dataclass(frozen=True)
class FewShotConfig(ClassifierConfig):
    """A classifier whose head norms the pooled vector over the batch, without scale and bias."""

    def build(self) -> "FewShotClassifier":
        """The module."""
        return FewShotClassifier(self)


class FewShotClassifier(Classifier):
    """Tower, class token, batch norm, linear head."""

    config: FewShotConfig

    def setup_head(self) -> None:
        shape = (self.config.pooled_width, self.config.num_classes)
        self.pooled_norm = BatchNorm(eps=1e-6, affine=False)
        init = nn.initializers.truncated_normal(0.01)
        self.head = Proj("...d,dk->...k", shape, ("embed", "classes"), bias=True, init=init)

    def judge(self, pooled: Array, *, train: bool) -> Array:
        return self.head(self.pooled_norm(pooled, train=train))


@dataclass(frozen=True)
class AccuracyPlane:
    """`intercept + slopes · log10(factors)`, as `fit_accuracy` finds it.

    Attributes:
      intercept: where all factors are 1.
      slopes: points that ten times as much of each factor brings.
      r2: the share of the variance that it explains.
    """

    intercept: float
    slopes: tuple[float, ...]
    r2: float

    def __call__(self, *factors: float) -> float:
        """The accuracy that the plane says of these factors, which may lie beyond the data.

        Raises:
          UsageError: another number of factors, or one that is not above 0.
        """
        if len(factors) != len(self.slopes) or min(factors) <= 0:
            raise UsageError(f"factors {factors}: want {len(self.slopes)} numbers above 0")
        return self.intercept + float(np.dot(self.slopes, np.log10(factors)))


def fit_accuracy(factors: Sequence[Sequence[float]], accuracy: Sequence[float]) -> AccuracyPlane:
    """Least squares of accuracies over logarithms of what they depend on.

    Args:
      factors: one row for each run, such as (hours of video, parameters, pixels of a side).
      accuracy: of each run, in per cent.

    Raises:
      UsageError: factors that are not above 0, or too few different runs to say anything.
    """
    rows, wanted = np.asarray(factors, np.float64), np.asarray(accuracy, np.float64)
    if rows.ndim != 2 or rows.shape[0] != wanted.size or not (rows > 0).all():
        raise UsageError(
            f"factors: got {rows.shape} for {wanted.size} runs, want one row of numbers above 0 "
            "for each"
        )
    design = np.column_stack([np.ones(len(rows)), np.log10(rows)])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise UsageError(
            f"factors: {len(rows)} runs do not tell {rows.shape[1]} factors apart; want runs in "
            "which each varies by itself"
        )
    found = np.linalg.lstsq(design, wanted, rcond=None)[0]
    left = np.square(wanted - design @ found).sum()
    r2 = 1 - left / np.square(wanted - wanted.mean()).sum()
    return AccuracyPlane(float(found[0]), tuple(float(slope) for slope in found[1:]), float(r2))


def table(config: MaskedConfig | FewShotConfig) -> Table:
    """Keys of the official files, whose tensors are below `model`: of pre-training or of tuning."""
    tower = tower_table(config.tower).under("tower")
    if isinstance(config, FewShotConfig):
        head = (
            *weight_rows("head", "head.1"),
            Row("stats/pooled_norm/mean", "head.0.running_mean"),
            Row("stats/pooled_norm/var", "head.0.running_var"),
            Ignored(r"head\.0\.num_batches_tracked"),
        )
        return (tower + Table(head)).with_stats()
    decoder = [
        Row("mask_token", "mask_token", ones(2)),
        Row("position", "decoder_pos_embed", ones(1)),
        *norm_rows("final_norm", "decoder_norm"),
        *weight_rows("embed", "decoder_embed"),
        *weight_rows("head", "decoder_pred"),
        *layer_rows(config.decoder, "decoder_blocks.{}.", TIMM_LAYER),
    ]
    return tower + Table(tuple(decoder)).under("decoder")


def vit(**sizes: Any) -> ViTConfig:
    """The vision transformer of encoder and decoder."""
    return ViTConfig(
        activation="gelu",
        norm_eps=1e-6,
        input_norm=False,
        fixed_positions=True,
        position_resize="bicubic",
        **sizes,
    )


def _encoder(width: int, depth: int, num_heads: int, image_size: int = 224) -> ViTConfig:
    return vit(
        image_size=image_size,
        patch_size=14,
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=4 * width,
    )


def _masked(tower: ViTConfig) -> MaskedConfig:
    sizes = {"image_size": tower.image_size, "patch_size": tower.patch_size}
    decoder = vit(width=512, depth=8, num_heads=16, mlp_dim=2048, **sizes)
    return MaskedConfig(tower, decoder, mask_ratio=0.8)


_H = (1280, 32, 16)
_ENCODERS = {
    "s14": _encoder(384, 12, 6),
    "b14": _encoder(768, 12, 12),
    "l14": _encoder(1024, 24, 16),
    "h14": _encoder(*_H),
    "h14.448": _encoder(*_H, 448),
    "h14.476": _encoder(*_H, 476),
}
_SMALL = {"image_size": 16, "patch_size": 4, "depth": 2, "num_heads": 2}

VARIANTS = {
    **{f"mae_human_scaling_{size}": _masked(tower) for size, tower in _ENCODERS.items()},
    **{
        f"mae_human_scaling_{size}{'_' if '.' in size else '.'}tuned": FewShotConfig(
            tower, num_classes=1000
        )
        for size, tower in _ENCODERS.items()
    },
    # Ours, for the packaged digit scans enlarged to 32 x 32 pixels.
    "mae_human_scaling_digits": MaskedConfig(
        vit(image_size=32, patch_size=4, width=64, depth=4, num_heads=4, mlp_dim=128),
        vit(image_size=32, patch_size=4, width=48, depth=2, num_heads=4, mlp_dim=96),
        mask_ratio=0.75,
    ),
    "mae_human_scaling_tiny": MaskedConfig(
        vit(width=16, mlp_dim=32, **_SMALL), vit(width=24, mlp_dim=40, **_SMALL), mask_ratio=0.8
    ),
}


register(CARD, VARIANTS, table=table)
