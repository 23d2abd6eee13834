"""SimVLG: a picture's tokens are merged in every layer of a BERT between the tower and the decoder.

TomeFormer is an encoder whose layers merge tokens that are alike, between attention and MLP: 257
tokens become 29. Of a video, frames attend to each other in every layer of the tower, patch by
patch, weighted by a learned number that starts at zero, and their mean is what TomeFormer reads.

Follows: arXiv:2310.03291.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.base import llama, opt
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
    same,
    split,
)
from zoo.models.core.registry import register
from zoo.models.core.types import (
    Array,
    Aux,
    Batch,
    Features,
    Memory,
    Stream,
    Tokens,
    TokenSet,
    Visual,
)
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.decoders.gqa import decoder_table
from zoo.models.parts.layers.attention import everything
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.linear import Proj, dense, table_init
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.plan import LayerPolicy, Run, Step, layers
from zoo.models.parts.layers.stack import Stack
from zoo.models.parts.reduce.merge import match, mean_by_group
from zoo.models.parts.text.bert import BertConfig, encoder_table
from zoo.models.parts.towers.vit import TIMM_LAYER, Names, ViT, ViTConfig, layer_rows, ones

CARD = Card(
    slug="simvlg",
    paper="arXiv:2310.03291",
    code="https://github.com/yiren-jian/EVLGen",
    differs=(
        "The contrastive term, whose weight is 0 in all released recipes, is left out.",
        "Decoder, tower and connector compute in one dtype; the official tower is in half "
        "precision.",
        "The pooler that checkpoints carry, and nothing reads, is passed over.",
    ),
)


# ------------------------------------------------------------------ the tower


@dataclass(frozen=True)
class EvaConfig(ViTConfig):
    """EVA-CLIP's ViT without its last layer and its last norm. The defaults are those of BLIP-2.

    Attributes:
      frames: how many follow one another in the batch and attend to each other; 1 for pictures.
      merge_width: width of the queries and keys of frames.
      merge_heads: their heads.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    num_heads: int = 16
    mlp_dim: int = 6144
    activation: str = "gelu"
    norm_eps: float = 1e-6
    input_norm: bool = False
    final_norm: bool = False
    frames: int = 1
    merge_width: int = 256
    merge_heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.merge_heads
        if self.frames < 1 or self.merge_width % heads or self.width % heads:
            raise ValueError(
                f"frames = {self.frames}, merge_width = {self.merge_width}: want 1 frame or more, "
                f"and widths of tower and queries that {heads} heads divide"
            )

    def plan(self) -> tuple[Step, ...]:
        """The layers: queries and values have biases, keys have none."""
        sizes = self.frames, self.merge_width, self.merge_heads
        merge = (FrameMerge(*sizes),) if self.frames > 1 else ()
        return tuple(
            replace(step, block=step.block.clone(key_bias=False), policies=(*step.policies, *merge))
            for step in super().plan()
        )

    def build(self) -> "EvaViT":
        """The module."""
        return EvaViT(self)


class EvaViT(ViT):
    """The tower."""

    def __call__(self, pixels: Array, **options: Any) -> Features:
        """See `ViT`; of videos, pixels [..., M T, H, W, 3] of T frames each.

        Raises:
          ValueError: surplus frames.
        """
        frames = self.config.frames  # type: ignore[attr-defined]
        if frames > 1:
            _check_frames(pixels.shape[-4], frames)
        return super().__call__(pixels, **options)


def _check_frames(pictures: int, frames: int) -> None:
    """Raise ValueError unless so many pictures are whole videos."""
    if pictures % frames:
        raise ValueError(f"{pictures} pictures: want {frames} frames of every video")


class FrameAttention(nn.Module):
    """`x + alpha attention(x)` over the frames at every place of the picture.

    Attributes:
      width: of all queries together; logits are divided by its square root, not by that of a head.
      num_heads: they share the input out, which is the values as it is.
    """

    width: int
    num_heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Tokens [..., T, N, D] of T frames to the same."""
        d, h = x.shape[-1], self.num_heads
        shape, axes = (d, h, self.width // h), ("embed", "heads", "head_dim")
        q = Proj("...d,dhe->...he", shape, axes, bias=True, name="q")(x)
        k = Proj("...d,dhe->...he", shape, axes, bias=True, name="k")(x)
        alpha = self.param("alpha", nn.with_logical_partitioning(nn.initializers.zeros, ()), ())
        exact = {"preferred_element_type": jnp.float32}
        logits = jnp.einsum("...tnhe,...snhe->...nhts", q, k, **exact) * self.width**-0.5
        v = x.reshape(*x.shape[:-1], h, d // h)
        weights = jax.nn.softmax(logits, -1).astype(x.dtype)
        y = jnp.einsum("...nhts,...snhc->...tnhc", weights, v)
        return x + alpha.astype(x.dtype) * y.reshape(x.shape)


@struct.dataclass
class FrameMerge(LayerPolicy):
    """Frames attend to each other between the halves of the layer. See `EvaConfig`."""

    name: ClassVar[str] = "temporal_merge"
    splits: ClassVar[bool] = True

    frames: int = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)
    num_heads: int = struct.field(pytree_node=False)

    def module(self, block: nn.Module) -> nn.Module:
        """Queries, keys and the gain of this layer."""
        del block
        return FrameAttention(self.width, self.num_heads, parent=None)

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del run
        assert own is not None
        stream, state, _ = layer.attention(stream, state, memory)
        shape = stream.hidden.shape
        x = own(stream.hidden.reshape(-1, self.frames, *shape[1:])).reshape(shape)
        stream = stream.replace(hidden=x)
        return stream.replace(hidden=x + layer.feed_forward(stream, memory)), state, {}


# ------------------------------------------------------------------ the connector


@dataclass(frozen=True)
class TomeFormer:
    """The connector. It reads the class token and the patches.

    Attributes:
      width: of the encoder.
      depth: its layers.
      num_heads: its attention heads.
      mlp_dim: hidden width of its MLPs.
      r: tokens that are merged into others in every layer.
      max_length: rows of its table of positions.
      norm_eps: epsilon of its norms.
      frames: whose mean is read; 1 for pictures.
    """

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    r: int = 19
    max_length: int = 512
    norm_eps: float = 1e-12
    frames: int = 1

    def __post_init__(self) -> None:
        if self.r < 0 or self.frames < 1:
            raise ValueError(
                f"r = {self.r}, frames = {self.frames}: want 0 tokens or more to merge, and 1 "
                "frame or more"
            )

    def lengths(self, tokens: int) -> tuple[int, ...]:
        """How many of so many tokens each layer gets, and at last how many remain."""
        found = [tokens]
        for _ in range(self.depth):
            found.append(found[-1] - merged_at(self.r, found[-1]))
        return tuple(found)

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens of a picture beside that of the class, which the assembly counts."""
        return self.lengths(1 + grid[0] * grid[1])[-1] - 1

    def build(self, vision_width: int, width: int, grid: tuple[int, int]) -> nn.Module:
        """The module from tower width to decoder width."""
        del grid
        return TomeConnector(self, vision_width, width)

    @property
    def bert(self) -> BertConfig:
        """The plain encoder of these sizes."""
        return BertConfig(
            max_length=self.max_length,
            width=self.width,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            norm_eps=self.norm_eps,
            pooler=False,
            lm_head=False,
            match_head=False,
        )


def merged_at(r: int, tokens: int) -> int:
    """How many of so many tokens a layer merges into others; the first one stays."""
    return min(r, (tokens - 1) // 2)


class MergeBlock(Block):
    """A layer that merges tokens between its halves.

    Even tokens but the first are sources, odd ones destinations; by the cosine of their keys, the
    mean of the heads, the `r` sources most like a destination become a part of it. What remains are
    the other sources, then all destinations. A token is the mean of its parts in this layer,
    however many these stood for.

    Attributes:
      r: how many; see `merged_at`.
    """

    r: int = 0

    def __call__(self, stream: Stream, state: Any, memory: Memory) -> tuple[Stream, Any, Aux]:
        """See `Block`."""
        stream, state, own = self.attention(stream, state, memory)
        batch, length, _ = stream.hidden.shape
        if r := merged_at(self.r, length):
            found = match(own.k.mean(-2), r, protect=1, by_place=True)
            hidden = mean_by_group(stream.hidden, found.groups, length - r)
            stream = Stream(hidden, Tokens.sequence(jnp.ones((batch, length - r), bool)))
        hidden = self.mlp_norm(stream.hidden + self.feed_forward(stream, memory))
        return stream.replace(hidden=hidden), state, {}


class MergeEncoder(nn.Module):
    """Positions, a token type, a norm, and the layers that merge."""

    config: TomeFormer

    def setup(self) -> None:
        c, bert = self.config, self.config.bert
        table = nn.with_logical_partitioning(table_init(c.width), ("positions", "embed"))
        self.position = self.param("position", table, (c.max_length, c.width))
        self.token_type = self.param("token_type", table, (bert.num_types, c.width))
        self.input_norm = LayerNorm(c.norm_eps)
        block = bert.block(MergeBlock, rule=everything, r=c.r)
        self.stack = Stack(layers(block, c.depth), scan=False)  # shapes differ

    def __call__(self, x: Array) -> tuple[Array, ...]:
        """Tokens [B, N, D] to the input of the first layer, and the output of each.

        Raises:
          ValueError: more tokens than there are positions.
        """
        batch, length, _ = x.shape
        if length > self.config.max_length:
            raise ValueError(f"{length} tokens: want at most max_length = {self.config.max_length}")
        x = self.input_norm(x + self.token_type[0] + self.position[:length])
        stream, found = Stream(x, Tokens.sequence(jnp.ones((batch, length), bool))), [x]
        for layer in range(self.config.depth):
            stream, _, _ = self.stack(stream, None, {}, start=layer, stop=layer + 1)
            found.append(stream.hidden)
        return tuple(found)


class TomeConnector(nn.Module):
    """`out(encoder(proj(norm(x))))` of the mean of frames."""

    config: TomeFormer
    vision_width: int
    width: int

    def setup(self) -> None:
        c = self.config
        self.vision_norm = LayerNorm(1e-5)
        self.proj = dense(self.vision_width, c.width, bias=True)
        self.encoder = MergeEncoder(c)
        self.out = dense(c.width, self.width, bias=True)

    def __call__(self, vision: Features, *, budget: int | Array | None = None) -> Visual:
        """Features [B, M T, N, C] of T frames each to M pictures' tokens [B, M, Q, D].

        Raises:
          ValueError: a budget, which this connector does not take, or surplus frames.
        """
        x, frames = vision.tokens, self.config.frames
        if budget is not None:
            raise ValueError(f"budget = {budget}: what this connector keeps is set by r")
        _check_frames(x.shape[1], frames)
        x = x.reshape(x.shape[0], -1, frames, *x.shape[2:]).mean(2)
        lead, x = x.shape[:2], self.proj(self.vision_norm(x))
        x = self.encoder(x.reshape(-1, *x.shape[2:]))[-1]
        return Visual(TokenSet(self.out(x.reshape(*lead, *x.shape[1:]))))


# ------------------------------------------------------------------ the model


@dataclass(frozen=True)
class SimVLGConfig(LlavaConfig):
    """The model: a LLaVA that reads the class token too, with this tower and connector.

    The frames of a video stand one after the other in `pixels` and have one placeholder together.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        frames = getattr(self.tower, "frames", 1), getattr(self.connector, "frames", 1)
        if not self.keep_class or len(set(frames)) > 1:
            raise ValueError(
                f"keep_class = {self.keep_class}, frames of tower and connector {frames}: want the "
                "class token, and equal frames"
            )

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a training batch."""
        batch = dict(super().inputs(batch_size))
        rows, pictures, *rest = batch["pixels"].shape
        shape = (rows, pictures * self.connector.frames, *rest)
        batch["pixels"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return batch


def with_frames(config: SimVLGConfig, frames: int) -> SimVLGConfig:
    """The model for videos of so many frames."""
    return replace(
        config,
        tower=replace(config.tower, frames=frames),  # type: ignore[call-arg]
        connector=replace(config.connector, frames=frames),
    )


def _model(decoder: Any, image_id: int) -> SimVLGConfig:
    return SimVLGConfig(
        tower=EvaConfig(),
        connector=TomeFormer(),
        decoder=decoder,
        vision_layer=-1,
        keep_class=True,
        image_id=image_id,
        text_tokens=33,
    )


_OPT = _model(opt.VARIANTS["opt_2_7b"].decoder, 50_265)
_TINY = SimVLGConfig(
    tower=EvaConfig(
        image_size=16,
        patch_size=4,
        width=16,
        depth=2,
        num_heads=2,
        mlp_dim=24,
        merge_width=8,
        merge_heads=2,
    ),
    connector=TomeFormer(width=24, depth=2, num_heads=3, mlp_dim=32, r=3, max_length=24),
    decoder=opt.VARIANTS["opt_tiny"].decoder,
    vision_layer=-1,
    keep_class=True,
    image_id=3,
    text_tokens=12,
)

VARIANTS = {
    # The official recipes: 29 tokens, OPT-2.7B or Vicuna-7B v1.3; and videos of 4 frames.
    "simvlg_opt_2_7b": _OPT,
    "simvlg_vicuna_7b": _model(llama.VARIANTS["llama_1_7b"].decoder, 32_000),
    "simvlg_opt_2_7b.video": with_frames(_OPT, 4),
    "simvlg_tiny": _TINY,
    "simvlg_video_tiny": with_frames(_TINY, 3),
}


def encoder_rows(config: TomeFormer) -> Table:
    """Keys of the encoder, without their prefix: those of BERT without its words."""
    rows = encoder_table(config.bert).rows
    words = "token/embedding"
    return Table(tuple(row for row in rows if not isinstance(row, Row) or row.paths != words))


FRAME_ROWS = (
    Row("q/kernel", "query.weight", linear()),
    Row("q/bias", "query.bias", flat),
    Row("k/kernel", "key.weight", linear()),
    Row("k/bias", "key.bias", flat),
    Row("alpha", "alpha", same),
)
"""Keys of `FrameAttention`."""


def tower_rows(config: EvaConfig) -> Table:
    """Keys of the tower, without their prefix."""
    steps, layer, at = tuple(range(config.depth)), "blocks.{}.", "stack/layers/"
    names: Names = {part: key for part, key in TIMM_LAYER.items() if isinstance(part, str)}
    qkv = tuple(f"{at}{name}/kernel" for name in ("q", "k", "v"))
    rows: list[AnyRow] = [
        Row("patch/kernel", "patch_embed.proj.weight", conv),
        Row("patch/bias", "patch_embed.proj.bias"),
        Row("position", "pos_embed", ones(1)),
        Row("cls", "cls_token", ones(2)),
        *layer_rows(config, layer, names),
        Row(qkv, f"{layer}attn.qkv.weight", split(3, linear()), steps),
        Row(f"{at}q/bias", f"{layer}attn.q_bias", flat, steps),
        Row(f"{at}v/bias", f"{layer}attn.v_bias", flat, steps),
    ]
    if config.frames > 1:
        ours, theirs = f"{at}temporal_merge/", f"{layer}temporal_merge."
        rows += [
            replace(row, paths=f"{ours}{row.paths}", keys=f"{theirs}{row.keys}", steps=steps)
            for row in FRAME_ROWS
        ]
    return Table(tuple(rows))


def table(config: SimVLGConfig) -> Table:
    """Keys of the official model, its language model included."""
    name = "llm" if config.decoder.rope is not None else "opt"
    decoder = decoder_table if config.decoder.rope is not None else opt.decoder_rows
    own = [
        *norm_rows("connector/vision_norm", "ln_vision"),
        Row("connector/proj/kernel", "VL_proj.weight", linear()),
        Row("connector/proj/bias", "VL_proj.bias"),
        Row("connector/out/kernel", f"{name}_proj.weight", linear()),
        Row("connector/out/bias", f"{name}_proj.bias"),
        Ignored(r"VLconnector\.(pooler\..*|embeddings\.position_ids)"),
    ]
    return (
        Table(tuple(own))
        + tower_rows(config.tower).under("tower", "visual_encoder.")  # type: ignore[arg-type]
        + encoder_rows(config.connector).under("connector/encoder", "VLconnector.")
        + decoder(config.decoder).under("decoder", f"{name}_model.")
    )


register(CARD, VARIANTS, table=table)
