"""ViT-ResNAS: vision transformers of three stages, found by evolution in the weights of one large
network that trains all of them at once.

Between stages the grid is halved twice over: by a strided convolution of the normed tokens, and by
the mean of the tokens as they are, filled up with zeros to the next width (residual spatial
reduction). What a network may be like is in `nets`, sub-networks of a larger one in `supernet`, the
evolution in `search`, the network itself in `tower`.

Follows: arXiv:2109.00642.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import struct

from zoo.models.core.card import Card
from zoo.models.core.keytable import (
    AnyRow,
    Ignored,
    Row,
    Table,
    conv,
    flat,
    linear,
    norm_rows,
    split,
    weight_rows,
)
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Batch
from zoo.models.parts.assemblies.classifier import (
    Classified,
    Classifier,
    ClassifierConfig,
    head_table,
)
from zoo.models.parts.layers.linear import Proj
from zoo.models.parts.towers.vit import ones
from zoo.models.vision.vit_resnas.nets import (
    BUDGETS,
    NETS,
    SPACES,
    Layer,
    Space,
    Stage,
    StageSpace,
    largest,
)
from zoo.models.vision.vit_resnas.search import SearchConfig
from zoo.models.vision.vit_resnas.supernet import Kept, draw_kept
from zoo.models.vision.vit_resnas.tower import ResNASConfig

CARD = Card(
    slug="vit_resnas",
    paper="arXiv:2109.00642",
    code="https://github.com/yilunliao/vit-search",
    differs=(
        "Images of other sizes resize the position tables in every call; the official code does so "
        "once, when a checkpoint is loaded for another size.",
        "The norm of a sub-network takes its variance around the mean; the official one subtracts "
        "squares, which can fall below 0 in low precision.",
        "Sub-networks come into use with every step of the warm-up, not with every epoch.",
        "Boxes of mixed cells can reach the far edges of the image.",
    ),
)


@dataclass(frozen=True)
class ResNASClassifierConfig(ClassifierConfig):
    """A network with its heads.

    Attributes:
      patch_head: classes of every patch too, which training reads.
      space: of the sub-networks, of which the tower is the largest; None for a network that has
        none.
    """

    patch_head: bool = False
    space: Space | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space is not None and self.tower.net != largest(self.space):
            raise ValueError("tower: want the largest network of the space, `largest(space)`")

    def draw_kept(
        self, key: Array, batch_size: int, examples: int, step: Array | int = 0, warmup: int = 0
    ) -> Kept:
        """Sub-networks for a batch, as `zoo.models.vision.vit_resnas.supernet.draw_kept` does.

        Raises:
          ValueError: there is no space, or the batch cannot be divided so.
        """
        if self.space is None:
            raise ValueError("space = None: want the configuration of a super-network")
        return draw_kept(key, self.space, batch_size, examples, step, warmup)

    def build(self) -> "ResNASClassifier":
        """The module."""
        return ResNASClassifier(self)


@struct.dataclass
class Judged(Classified):
    """What a network with its heads returns.

    Attributes:
      patch_logits: float32 [..., N, K], of the patches of the last stage; None without their head.
      distill_logits: float32 [..., K], of the token for the teacher; None without it.
    """

    patch_logits: Array | None = None
    distill_logits: Array | None = None


class ResNASClassifier(Classifier):
    """A tower, the head of its class token, and those of its other tokens."""

    config: ResNASClassifierConfig

    def setup_head(self) -> None:
        """The parts of all heads."""
        super().setup_head()
        c = self.config
        shape, axes = (c.pooled_width, c.num_classes), ("embed", "classes")
        if c.patch_head:
            self.patch_head = Proj("...d,dk->...k", shape, axes, bias=True)
        if c.tower.distill_token:
            self.distill_head = Proj("...d,dk->...k", shape, axes, bias=True)

    def __call__(self, batch: Batch, *, train: bool = False, taps: tuple[int, ...] = ()) -> Judged:
        """Encode and, with classes, judge images.

        Args:
          batch: `pixels` [..., H, W, C], and perhaps `kept`, the sub-network of each of them.
          train: as of the tower.
          taps: likewise.
        """
        c = self.config
        out = super().__call__(batch, train=train, taps=taps, kept=batch.get("kept"))
        patches = distilled = None
        if c.num_classes and c.patch_head:
            patches = self.patch_head(out.features.tokens).astype(jnp.float32)
        if c.num_classes and c.tower.distill_token:
            distilled = self.distill_head(out.features.distill).astype(jnp.float32)
        parts = (out.features, out.pooled, out.logits)
        return Judged(*parts, patch_logits=patches, distill_logits=distilled)


_DIGITS = tuple(
    StageSpace(
        (width, width * 3 // 4, width // 2),
        (4, 3, 2),
        8,
        (width * 2, width * 3 // 2, width),
        (False, True, True),
    )
    for width in (48, 96)
)

_SMALL = (
    Stage(36, (Layer(3, 8, 72), Layer(3, 8, 72))),
    Stage(72, (Layer(3, 8, 144), Layer(3, 8, 144))),
)


def supernet(space: Space, num_classes: int = 1000, **sizes: Any) -> ResNASClassifierConfig:
    """The super-network of a space, with the head of patches that its training reads.

    Args:
      space: one of `SPACES`, or another.
      num_classes: of its heads.
      **sizes: what else `ResNASConfig` has.
    """
    tower = ResNASConfig(largest(space), **sizes)
    return ResNASClassifierConfig(tower, num_classes=num_classes, patch_head=True, space=space)


VARIANTS = {
    **{
        f"vit_resnas_{name}": ResNASClassifierConfig(ResNASConfig(net), num_classes=1000)
        for name, net in NETS.items()
    },
    **{
        f"vit_resnas_search_{name}": SearchConfig(SPACES[space], budget)
        for name, (space, budget) in BUDGETS.items()
    },
    # Ours, for the packaged digit scans enlarged to 56 x 56 pixels.
    "vit_resnas_supernet_digits": supernet(_DIGITS, 10, image_size=56, stem=8),
    "vit_resnas_digits": ResNASClassifierConfig(
        ResNASConfig(_SMALL, image_size=56, stem=8), num_classes=10
    ),
    "vit_resnas_search_digits": SearchConfig(
        _DIGITS,
        2_200_000,
        image_size=56,
        stem=8,
        num_classes=10,
        first=40,
        rounds=4,
        parents=10,
        children=10,
    ),
    "vit_resnas_tiny": ResNASClassifierConfig(
        ResNASConfig(
            (Stage(8, (Layer(2, 4, 16),)), Stage(12, (Layer(3, 4, 24),))), image_size=28, stem=4
        ),
        num_classes=5,
        patch_head=True,
    ),
}


def layer_rows(ours: str, theirs: str) -> list[AnyRow]:
    """Rows of a layer."""
    rows: list[AnyRow] = [
        *norm_rows(f"{ours}attn_norm", f"{theirs}norm1"),
        *norm_rows(f"{ours}mlp_norm", f"{theirs}norm2"),
        *weight_rows(f"{ours}out", f"{theirs}attn.proj", linear(2)),
        *weight_rows(f"{ours}up", f"{theirs}mlp.fc1"),
        *weight_rows(f"{ours}down", f"{theirs}mlp.fc2"),
    ]
    for leaf, key, each in (("kernel", "weight", linear()), ("bias", "bias", flat)):
        paths = tuple(f"{ours}{name}/{leaf}" for name in "qkv")
        rows.append(Row(paths, f"{theirs}attn.qkv.{key}", split(3, each)))
    return rows


def table(config: ResNASClassifierConfig) -> Table:
    """Keys of the official checkpoints, where layers and reductions are counted through; a head of
    patches that the model lacks is passed over.
    """
    tower, number = config.tower, 0
    rows: list[AnyRow] = [
        Row("tokens", "tokens", ones(1)),
        Row("position", "pos_embed", ones(1)),
        *norm_rows("norm", "norm"),
    ]
    if tower.stem:
        rows += weight_rows("patch/proj", "patch_embed.conv_proj", conv)
        for i in range(3):
            ours, theirs = f"patch/convs_{i}", f"patch_embed.conv{i + 1}"
            rows += weight_rows(f"{ours}/conv", f"{theirs}.conv", conv, bias=False)
            rows += norm_rows(f"{ours}/norm", f"{theirs}.bn", stats=True)
    else:
        rows += weight_rows("patch", "patch_embed.proj", conv)
    for stage, each in enumerate(tower.net):
        if stage:
            ours, theirs = f"reductions_{stage - 1}", f"blocks.{number}"
            rows.append(Row(f"{ours}/position", f"{theirs}.pos_embed", ones(1)))
            rows += norm_rows(f"{ours}/norm", f"{theirs}.norm")
            rows += weight_rows(f"{ours}/conv", f"{theirs}.patch_reduce", conv)
            rows += weight_rows(f"{ours}/token", f"{theirs}.token_transform")
            number += 1
        for i, layer in enumerate(each.layers):
            if layer.present:
                rows += layer_rows(f"layers_{stage}_{i}/", f"blocks.{number}.")
            number += 1
    found = Table(tuple(rows)).under("tower") + head_table(config, head="cls_head")
    heads: list[AnyRow] = [] if config.patch_head else [Ignored(r"patch_head\..*")]
    if config.num_classes and config.patch_head:
        heads += weight_rows("patch_head", "patch_head")
    if config.num_classes and tower.distill_token:
        heads += weight_rows("distill_head", "dst_head")
    found += Table(tuple(heads))
    return found.with_stats() if tower.stem else found


register(CARD, VARIANTS, table=table)
