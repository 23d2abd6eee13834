"""A frozen layer of a language model as the last layer of a vision transformer.

After the last layer of a ViT all tokens are mapped to the width of a LLaMA, go through its last
layer without mask and positions, and are mapped back. The borrowed layer never trains; all else
does.

Follows: arXiv:2310.12973.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from zoo.models.core.card import Card
from zoo.models.core.errors import UsageError
from zoo.models.core.keytable import AnyRow, Row, Table, conv, linear, norm_rows, weight_rows
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Features, Stream, Tokens
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.layers.attention import everything
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.linear import Proj
from zoo.models.parts.layers.norms import LayerNorm, RMSNorm
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.stack import Stack
from zoo.models.parts.towers.vit import TIMM_LAYER, ViTConfig, layer_rows, ones

CARD = Card(
    slug="lm4visual",
    paper="arXiv:2310.12973",
    code="https://github.com/ziqipang/LM4VisualEncoding",
    differs=(
        "Images of other sizes resize the position table; the official code takes one size.",
        "The insert for point clouds is the module `FrozenLayers`, without an encoder of points.",
    ),
)

FROZEN = ("tower/insert/llm/.*", "tower/insert/norm/.*")
"""Patterns of the parameters that training leaves as they are, see `zoo.train.parts.Part`."""


@dataclass(frozen=True)
class BorrowedConfig:
    """Layers of a language model. The defaults are the last layer of LLaMA-1 7B.

    Attributes:
      width: of the language model.
      num_heads: its attention heads.
      mlp_dim: hidden width of its gated MLP.
      first_layer: number of the first layer that is borrowed.
      num_layers: of the language model; all from `first_layer` on are borrowed.
      norm_eps: epsilon of its norms.
    """

    width: int = 4096
    num_heads: int = 32
    mlp_dim: int = 11008
    first_layer: int = 31
    num_layers: int = 32
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer < self.num_layers:
            raise ValueError(
                f"first_layer = {self.first_layer}: want 0 to {self.num_layers - 1}, a layer of "
                "the language model"
            )
        if self.width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads}: want a divisor of {self.width}")

    @property
    def depth(self) -> int:
        """How many layers are borrowed."""
        return self.num_layers - self.first_layer

    def plan(self) -> tuple[Step, ...]:
        """The layers: all tokens see all, and have no positions."""
        block = Block(
            width=self.width,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            norm_eps=self.norm_eps,
            rope=None,
            rule=everything,
            parent=None,
        )
        return (Step(block),) * self.depth


class FrozenLayers(nn.Module):
    """Into the width of a language model, through some of its layers and its last norm, and back:
    [B, L, D] -> [B, L, D]. There is no residual around it.

    Attributes:
      config: of the layers.
      width: D.
    """

    config: BorrowedConfig
    width: int

    def setup(self) -> None:
        init, d, e = nn.initializers.truncated_normal(0.02), self.width, self.config.width
        self.into = Proj("...d,df->...f", (d, e), ("embed", "mlp"), init=init)
        self.llm = Stack(self.config.plan())
        self.norm = RMSNorm(self.config.norm_eps)
        self.back = Proj("...d,df->...f", (e, d), ("mlp", "embed"), init=init)

    def __call__(self, x: Array) -> Array:
        return self.back(self.norm(self.through(self.into(x))))

    def through(self, x: Array, *, stop: int | None = None) -> Array:
        """The borrowed layers [B, L, E] -> [B, L, E], or the first `stop` of them."""
        stream = Stream(x, Tokens.sequence(jnp.ones(x.shape[:2], bool)))
        return self.llm(stream, stop=stop)[0].hidden


@dataclass(frozen=True)
class LM4VisualConfig:
    """Sizes of the tower.

    Attributes:
      vit: the vision transformer, with a class token and without a final norm, which comes after
        the insert.
      llm: the layers that are borrowed.
    """

    vit: ViTConfig = field(default_factory=ViTConfig)
    llm: BorrowedConfig = BorrowedConfig()

    class_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.vit.final_norm or self.vit.prefix != 1 or self.vit.attention_pool:
            raise ValueError(
                f"vit with final_norm = {self.vit.final_norm} and {self.vit.prefix} tokens before "
                "the patches: want no final norm, a class token alone and no pooling head"
            )

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the positions were made for."""
        return self.vit.image_size

    @property
    def width(self) -> int:
        """D of the tokens."""
        return self.vit.width

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.vit.channels

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row of an image of `image_size`."""
        return self.vit.grid

    def build(self) -> "LM4Visual":
        """The module."""
        return LM4Visual(self)


class LM4Visual(nn.Module):
    """A ViT, the insert, a norm. `features.taps` are those of the ViT: `taps[depth]` is what the
    insert takes, the class token first.
    """

    config: LM4VisualConfig

    def setup(self) -> None:
        c = self.config
        self.vit = c.vit.build()
        self.insert = FrozenLayers(c.llm, c.vit.width)
        self.final_norm = LayerNorm(c.vit.norm_eps)

    def __call__(
        self, pixels: Array, *, train: bool = False, taps: tuple[int, ...] = ()
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, C], normalised; sides are multiples of the patch size.
          train: whether paths are dropped, by the random stream "dropout".
          taps: layers of the ViT whose output to return, 0 to its depth.
        """
        found = self.vit(pixels, train=train, taps=taps)
        x = jnp.concatenate([found.cls[..., None, :], found.tokens], -2)
        y = self.insert(x.reshape(-1, *x.shape[-2:])).astype(jnp.float32)
        y = self.final_norm(y).astype(x.dtype).reshape(x.shape)
        return found.replace(tokens=y[..., 1:, :], cls=y[..., 0, :])


_META = {
    "attn_norm": "attention_norm",
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "out": "attention.wo",
    "mlp_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
_HUB = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

Layout = Literal["meta", "hub"]
"""Of a language model's checkpoint: Meta's (`layers.0.attention.wq`), or the hub's. The latter has
queries and keys in another order inside of each head, the same in both, which attention without
rotary positions does not see."""


_NAMES = {"meta": _META, "hub": _HUB}


def layers_table(prefix: str, layout: Layout, steps: range) -> Table:
    """Keys of the borrowed layers, `prefix` with `{}` for their numbers `steps`."""
    rows = []
    for part, key in _NAMES[layout].items():
        theirs = f"{prefix}{key}.weight"
        if part.endswith("_norm"):
            rows.append(Row(f"layers/{part}/scale", theirs, steps=tuple(steps)))
        else:
            how = linear(2 if part == "out" else 1)
            rows.append(Row(f"layers/{part}/kernel", theirs, how, tuple(steps)))
    return Table(tuple(rows))


def table(config: ClassifierConfig) -> Table:
    """Keys of the official files."""
    tower = config.tower
    rows: list[AnyRow] = [
        *weight_rows("patch", "patch_embed.proj", conv),
        Row("position", "pos_embed", ones(1)),
        Row("cls", "cls_token", ones(2)),
        *layer_rows(tower.vit, "blocks.{}.", TIMM_LAYER),
    ]
    insert = Table(
        (
            *weight_rows("into", "llama_dim_mapper1", bias=False),
            *weight_rows("back", "llama_dim_mapper2", bias=False),
            Row("norm/scale", "llama.norm.weight"),
        )
    )
    llm = layers_table("llama.layers.{}.", "meta", range(tower.llm.depth)).under("llm")
    return (
        (Table(tuple(rows)).under("vit") + (insert + llm).under("insert")).under("tower")
        + Table(tuple(norm_rows("final_norm", "norm"))).under("tower")
        + head_table(config, head="head")
    )


def borrow(
    params: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    config: ClassifierConfig,
    layout: Layout = "meta",
) -> dict[str, Any]:
    """Parameters whose borrowed layers are those of a language model.

    As in the official code its last norm is not copied: the scale is 1.

    Args:
      params: of a model of `config`, not boxed.
      checkpoint: tensors of the language model, of which only the borrowed layers are read.
      config: of the model.
      layout: of the checkpoint.

    Raises:
      UsageError: an unknown layout.
      ZooError: layers that are not there, or of other sizes.
    """
    if layout not in get_args(Layout):
        raise UsageError(f"layout is {layout!r}: want one of {', '.join(get_args(Layout))}")
    llm = config.tower.llm
    prefix = "layers.{}." if layout == "meta" else "model.layers.{}."
    rows = layers_table(prefix, layout, range(llm.first_layer, llm.num_layers))
    insert = params["tower"]["insert"]
    wanted = rows.shapes(insert["llm"])
    own = {key: checkpoint[key] for key in wanted if key in checkpoint}
    scale = np.ones_like(np.asarray(insert["norm"]["scale"]))
    insert = {**insert, "llm": rows.load(own, insert["llm"]), "norm": {"scale": scale}}
    return {**params, "tower": {**params["tower"], "insert": insert}}


def vit(**sizes: Any) -> ViTConfig:
    """The vision transformer before the insert."""
    return ViTConfig(
        activation="gelu",
        norm_eps=1e-6,
        input_norm=False,
        final_norm=False,
        position_resize="bicubic",
        **sizes,
    )


def _size(width: int, num_heads: int) -> ClassifierConfig:
    tower = vit(
        image_size=224,
        patch_size=16,
        width=width,
        depth=12,
        num_heads=num_heads,
        mlp_dim=4 * width,
    )
    return ClassifierConfig(LM4VisualConfig(tower), num_classes=1000)


_TINY = vit(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32)

VARIANTS = {
    "lm4visual_s16": _size(384, 6),
    "lm4visual_ti16": _size(192, 3),
    "lm4visual_b16": _size(768, 12),
    "lm4visual_tiny": ClassifierConfig(
        LM4VisualConfig(_TINY, BorrowedConfig(24, 2, 40, first_layer=2, num_layers=3)),
        num_classes=5,
    ),
}


register(CARD, VARIANTS, table=table)
