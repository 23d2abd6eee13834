"""The plain vision transformer of CLIP, SigLIP, DINOv2, MAE, InternVL and supervised training.

Follows: arXiv:2010.11929; with an input norm arXiv:2103.00020, an attention pooling head
arXiv:2303.15343, layer scale arXiv:2103.17239, registers arXiv:2309.16588, kept patches
arXiv:2111.06377, norms of whole queries and keys arXiv:2312.14238.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.keytable import (
    AnyRow,
    Row,
    Table,
    Transform,
    conv,
    flat,
    linear,
    norm_rows,
    split,
    weight_rows,
)
from zoo.models.core.types import Array, Aux, Features, Memory, Stream, Tokens, take
from zoo.models.parts.decoders.composition import compose
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.attention import everything
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.embed import PatchEmbed, check_pixels
from zoo.models.parts.layers.gates import DROP_KEY, stochastic_depth
from zoo.models.parts.layers.linear import Proj, dense, table_init
from zoo.models.parts.layers.norms import LayerNorm, NormKind, RMSNorm
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.positions import sincos_2d
from zoo.models.parts.layers.resize import resize_bicubic
from zoo.models.parts.layers.stack import Remat, Stack

PositionResize = Literal["bicubic", "bicubic_antialias"]
"""How the position table meets another grid; both as `torch.nn.functional.interpolate` does."""


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer. The defaults are CLIP ViT-L/14 at 336 pixels.

    Attributes:
      image_size: side in pixels of the square images that the positions were made for, a multiple
        of `patch_size`.
      patch_size: side of a patch in pixels.
      width: D.
      depth: number of layers.
      num_heads: attention heads.
      mlp_dim: hidden width of the MLP.
      activation: of the MLP.
      norm: of the layers; the final norm and the input norm are LayerNorms.
      norm_eps: epsilon of the norms.
      class_token: whether a learned token precedes the patches.
      registers: learned tokens between the class token and the patches, without positions.
      mask_token: a learned vector that stood for hidden patches in pre-training; no forward pass
        reads it, checkpoints carry it.
      input_norm: a LayerNorm before the first layer; the patch embedding then has no bias (CLIP).
      final_norm: whether there is a LayerNorm after the last layer.
      qkv_bias: biases on the query, key and value projections.
      qk_norm: RMS norms of queries and keys over all heads at once, epsilon 1e-6.
      layer_scale: first value of a learned gain on each branch of a layer; None for no gains.
      gated: a gated MLP, `down(activation(gate(x)) * up(x))`.
      fixed_positions: the positions are sines and cosines that no gradient changes (MAE).
      position_resize: how positions are made for images of other sizes; None refuses these.
      attention_pool: a head in which one learned query attends to all tokens (SigLIP); what it
        returns is `Features.cls`.
      trim: `image_size` may be no multiple of `patch_size`; the rest at the right and the bottom is
        not seen (SigLIP with 384 pixels and patches of 14).
      drop_path: in training, the share of examples for which a half of the last layer is left out;
        it rises evenly from 0 in the first.
      channels: of the images.
      policies: applied to the plan in this order, as those of a decoder are; the first is
        innermost.
      dtype: in which activations are computed.
      remat: what layers keep for the gradient, as in `Stack`.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    activation: str = "quick_gelu"
    norm: NormKind = "layer"
    norm_eps: float = 1e-5
    class_token: bool = True
    registers: int = 0
    mask_token: bool = False
    input_norm: bool = True
    final_norm: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    gated: bool = False
    fixed_positions: bool = False
    position_resize: PositionResize | None = None
    attention_pool: bool = False
    trim: bool = False
    drop_path: float = 0.0
    channels: int = 3
    policies: tuple[Any, ...] = ()
    dtype: str = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size or (
            self.image_size % self.patch_size and not self.trim
        ):
            raise ValueError(
                f"image_size = {self.image_size}: want a multiple of patch_size = {self.patch_size}"
            )
        allowed = (None, *PositionResize.__args__)
        if self.position_resize not in allowed:
            raise ValueError(f"position_resize = {self.position_resize!r}: want one of {allowed}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row of an image of `image_size`."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return int(self.class_token) + self.registers

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that no gradient reaches: checkpoints carry them, or they are fixed."""
        return ("mask_token",) * self.mask_token + ("position",) * self.fixed_positions

    def block_type(self) -> "type[ViTBlock]":
        """The class of the layers."""
        return ViTBlock

    def plan(self) -> tuple[Step, ...]:
        """The layers, all alike, in their policies."""
        block = self.block_type()(
            width=self.width,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            norm=self.norm,
            norm_eps=self.norm_eps,
            activation=self.activation,
            gated=self.gated,
            qkv_bias=self.qkv_bias,
            out_bias=True,
            mlp_bias=True,
            rope=None,
            rule=everything,
            layer_scale=self.layer_scale,
            wide_qk_norm=self.qk_norm,
            parent=None,
        )
        depths = stochastic_depth(self.depth, self.drop_path)
        plan = tuple(Step(block, policies) for policies in depths)
        return compose(plan, self.policies, slots=self.grid[0] * self.grid[1])

    def build(self) -> "ViT":
        """The module."""
        return ViT(self)


class ViTBlock(Block):
    """The pre-norm layer with gains on its branches and norms of whole queries and keys.

    Attributes:
      layer_scale: first value of the gains; None for none.
      wide_qk_norm: RMS norms of queries and keys over all heads at once.
    """

    layer_scale: float | None = None
    wide_qk_norm: bool = False

    def setup(self) -> None:
        super().setup()
        if self.layer_scale is not None:
            init = nn.initializers.constant(self.layer_scale)
            init = nn.with_logical_partitioning(init, ("norm",))
            self.attn_gain = self.param("attn_gain", init, (self.width,))
            self.mlp_gain = self.param("mlp_gain", init, (self.width,))
        if self.wide_qk_norm:
            self.q_norm, self.k_norm = RMSNorm(), RMSNorm()

    def project(self, name: str, x: Array, tokens: Tokens, memory: Memory) -> Array:
        """The linear map `name` with what follows it."""
        y = super().project(name, x, tokens, memory)
        if self.wide_qk_norm and name in ("q", "k"):
            norm = self.q_norm if name == "q" else self.k_norm
            return norm(y.reshape(*y.shape[:-2], -1)).reshape(y.shape)
        if self.layer_scale is not None and name in ("out", "down"):
            gain = self.attn_gain if name == "out" else self.mlp_gain
            return y * gain.astype(y.dtype)
        return y


class AttentionPool(nn.Module):
    """One learned query attends to all tokens; an MLP with a residual follows.

    Follows: arXiv:2303.15343 (the MAP head of arXiv:2106.04560).
    """

    config: ViTConfig

    def setup(self) -> None:
        c = self.config
        d, h, e = c.width, c.num_heads, c.width // c.num_heads
        vector = nn.with_logical_partitioning(table_init(d), ("norm",))
        self.query = self.param("query", vector, (d,))
        heads, out = ("embed", "heads", "head_dim"), ("heads", "head_dim", "embed")
        self.q = Proj("...d,dhe->...he", (d, h, e), heads, bias=True)
        self.k = Proj("...d,dhe->...he", (d, h, e), heads, bias=True)
        self.v = Proj("...d,dhe->...he", (d, h, e), heads, bias=True)
        self.out = Proj("...he,hed->...d", (h, e, d), out, num_in=2, bias=True)
        self.mlp_norm = LayerNorm(c.norm_eps)
        self.up = dense(d, c.mlp_dim, bias=True)
        self.down = dense(c.mlp_dim, d, bias=True, axes=("mlp", "embed"))

    def __call__(self, tokens: Array) -> Array:
        """[B, N, D] to [B, D]."""
        shape = (tokens.shape[0], 1, self.query.size)
        query = jnp.broadcast_to(self.query.astype(tokens.dtype), shape)
        y = jax.nn.dot_product_attention(self.q(query), self.k(tokens), self.v(tokens))
        y = self.out(y)[:, 0]
        return y + self.down(ACTIVATIONS[self.config.activation](self.up(self.mlp_norm(y))))


class ViT(nn.Module):
    """Patches, positions, pre-norm layers.

    Layers are numbered from 1: `features.taps[k]` is the residual stream after k of them (0 is the
    input of the first) with the tokens before the patches first, `features.qk[k]` are queries and
    keys of layer k. `features.tokens` are the patch tokens after the final norm; `features.cls` is
    what the pooling head makes of all tokens, or else the class token after the final norm.
    Policies may change how many tokens there are, but not those before the patches.
    """

    config: ViTConfig

    def setup(self) -> None:
        c = self.config
        self.patch = self.make_patch()
        table = nn.with_logical_partitioning(self._first_positions, ("positions", "embed"))
        self.position = self.param("position", table)
        vector = nn.with_logical_partitioning(table_init(c.width), ("norm",))
        if c.class_token:
            self.cls = self.param("cls", vector, (c.width,))
        if c.registers:
            rows = nn.with_logical_partitioning(table_init(c.width), ("queries", "embed"))
            self.registers = self.param("registers", rows, (c.registers, c.width))
        if c.mask_token:
            self.mask_token = self.param("mask_token", vector, (c.width,))
        if c.input_norm:
            self.input_norm = LayerNorm(c.norm_eps)
        self.stack = Stack(c.plan(), remat=c.remat)
        if c.final_norm:
            self.final_norm = LayerNorm(c.norm_eps)
        if c.attention_pool:
            self.pool = AttentionPool(c)

    def make_patch(self) -> nn.Module:
        """Hook: what `cut` uses."""
        c = self.config
        return PatchEmbed(c.patch_size, c.width, c.channels, bias=not c.input_norm)

    def cut(self, pixels: Array, *, train: bool) -> Array:
        """Hook: pixels [B, H, W, C] to tokens [B, N, D], one for each patch."""
        del train
        return self.patch(pixels)

    def _first_positions(self, key: Array) -> Array:
        """Learned positions start from sines and cosines too, so that near is alike."""
        del key
        c = self.config
        table = sincos_2d(*c.grid, c.width, before=int(c.class_token))
        return jnp.asarray((1.0 if c.fixed_positions else 0.3) * table)

    def __call__(
        self,
        pixels: Array,
        *,
        train: bool = False,
        taps: tuple[int, ...] = (),
        qk: tuple[int, ...] = (),
        keep: Array | None = None,
        insert: Array | None = None,
        stop_after: int | None = None,
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, 3], normalised; H and W are both `image_size` or, where the
            configuration has a `position_resize`, any multiples of `patch_size`. Leading axes are
            free.
          train: whether paths are dropped, by the random stream "dropout".
          taps: depths at which to return the residual stream, 0 to `depth`.
          qk: layers whose queries and keys to return, 1 to `depth`.
          keep: int [..., K], the patches to encode, in this order; the others are dropped after
            the positions are added. `Features.tokens` has only these, `Features.grid` stays that
            of the image.
          insert: [..., S, D], tokens to put before the patches, without positions.
          stop_after: run only so many layers and no final norm; all of them by default.

        Raises:
          ValueError: another image size, or a layer that the tower does not have.
        """
        c, lead = self.config, pixels.shape[:-3]
        last = c.depth if stop_after is None else stop_after
        self._check(pixels, taps, qk, last)
        hidden, grid = self._embed(
            pixels.reshape(-1, *pixels.shape[-3:]), keep, insert, train=train
        )
        stream = Stream(hidden, Tokens.sequence(jnp.ones(hidden.shape[:2], bool)))
        memory = {DROP_KEY: self.make_rng("dropout")} if train and c.drop_path else None

        def free(x: Array) -> Array:
            """[B, ...] with the leading axes of the images again."""
            return x.reshape(*lead, *x.shape[1:])

        prefix = hidden.shape[1] - (grid[0] * grid[1] if keep is None else keep.shape[-1])
        found, pairs, done = {}, {}, 0
        aux: tuple[Aux, ...] = ()
        for mark in sorted({*taps, *(layer - 1 for layer in qk), last}):
            if mark > done:
                stream, _, more = self.stack(stream, memory=memory, start=done, stop=mark)
                aux, done = (*aux, *more), mark
            if mark in taps:
                found[mark] = free(stream.hidden)
            if mark + 1 in qk:
                q, k = self._queries_and_keys(mark, stream)
                pairs[mark + 1] = (free(q), free(k))

        whole = c.final_norm and stop_after is None
        y = self.final_norm(stream.hidden) if whole else stream.hidden  # [B, P + N, D]
        cls = free(y[:, 0]) if c.class_token else None
        if c.attention_pool and stop_after is None:
            cls = free(self.pool(y))
        aux = jax.tree.map(free, aux) if c.policies else ()
        return Features(free(y[:, prefix:]), grid, cls=cls, taps=found, qk=pairs, aux=aux)

    def _check(self, pixels: Array, taps: tuple[int, ...], qk: tuple[int, ...], last: int) -> None:
        c = self.config
        side = c.image_size if c.position_resize is None else None
        check_pixels(pixels, channels=c.channels, side=side)
        if not 0 <= last <= c.depth:
            raise ValueError(f"stop_after = {last}: the tower has layers 1 to {c.depth}")
        if bad := [tap for tap in taps if not 0 <= tap <= last]:
            raise ValueError(f"taps {bad}: want 0 to {last}, the last layer that is run")
        if bad := [layer for layer in qk if not 1 <= layer <= last]:
            raise ValueError(f"qk {bad}: want 1 to {last}, the last layer that is run")

    def _embed(
        self, pixels: Array, keep: Array | None, insert: Array | None, *, train: bool = False
    ) -> tuple[Array, tuple[int, int]]:
        """The input of the first layer [B, P + N, D], and the grid of the patches."""
        c = self.config
        if c.trim and pixels.shape[1:3] == (c.image_size,) * 2:
            pixels = pixels[:, : c.grid[0] * c.patch_size, : c.grid[1] * c.patch_size]
        x = self.cut(pixels.astype(c.dtype), train=train)  # [B, N, D]
        grid = (pixels.shape[1] // c.patch_size, pixels.shape[2] // c.patch_size)
        table = self.position.astype(jnp.float32)
        table = jax.lax.stop_gradient(table) if c.fixed_positions else table
        first, table = table[: int(c.class_token)], table[int(c.class_token) :]
        if grid != c.grid:
            antialias = c.position_resize == "bicubic_antialias"
            table = resize_bicubic(table.reshape(*c.grid, -1), *grid, antialias=antialias)
            table = table.reshape(-1, c.width)
        x = x + table.astype(x.dtype)
        if keep is not None:
            x = take(x, keep.reshape(-1, keep.shape[-1]))
        before = []
        if c.class_token:
            before.append((self.cls + first).astype(x.dtype))
        if c.registers:
            before.append(self.registers.astype(x.dtype))
        parts = [jnp.broadcast_to(rows, (x.shape[0], *rows.shape)) for rows in before]
        if insert is not None:
            parts.append(insert.reshape(-1, *insert.shape[-2:]).astype(x.dtype))
        x = jnp.concatenate([*parts, x], 1)
        return self.input_norm(x) if c.input_norm else x, grid

    def _queries_and_keys(self, index: int, stream: Stream) -> tuple[Array, Array]:
        """Queries and keys [B, P + N, H, E] of the layer `index` (from 0) that `stream` enters."""
        q, k, _ = self.stack.layer(index).qkv(stream, {})
        return q, k


def ones(axes: int) -> Transform:
    """Theirs is our array with so many leading axes of length 1."""
    return Transform(
        f"ones({axes})",
        lambda theirs, shapes: [theirs[0].reshape(shapes[0])],
        lambda ours: [ours[0].reshape((1,) * axes + ours[0].shape)],
    )


Names = Mapping[str | tuple[str, ...], str]
"""Parts of a layer and their keys; several parts are fused in one tensor of theirs, in order."""

_OPTIONAL = {
    "gate": "gated",
    "attn_gain": "layer_scale",
    "mlp_gain": "layer_scale",
    "q_norm": "qk_norm",
    "k_norm": "qk_norm",
}


def layer_rows(
    config: ViTConfig,
    prefix: str,
    names: Names,
    *,
    stack: str = "stack/layers",
    steps: tuple[int | str, ...] | None = None,
) -> list[Row]:
    """Rows of the layers.

    Args:
      config: says which parts there are; names of others are passed over.
      prefix: of the keys of a layer, with `{}` for its number.
      names: {"attn_norm": "layer_norm1", ("q", "k", "v"): "attn.qkv", ...}.
      stack: where the layers' parameters are.
      steps: what the keys have in the place of numbers; 0, 1, ... by default.
    """
    rows: list[Row] = []
    steps = tuple(range(config.depth)) if steps is None else steps
    for parts, key in names.items():
        parts = (parts,) if isinstance(parts, str) else parts
        field = _OPTIONAL.get(parts[0])
        if field is not None and getattr(config, field) in (None, False):
            continue
        paths, key = [f"{stack}/{part}" for part in parts], prefix + key
        if parts[0].endswith("_gain"):
            rows.append(Row(paths[0], key, steps=steps))
        elif parts[0].endswith("_norm"):
            rows.append(Row(f"{paths[0]}/scale", f"{key}.weight", steps=steps))
            if config.norm == "layer" and not parts[0].startswith(("q_", "k_")):
                rows.append(Row(f"{paths[0]}/bias", f"{key}.bias", steps=steps))
        else:
            matrix, vector = linear(2 if parts[0] == "out" else 1), flat
            if len(parts) > 1:
                matrix, vector = split(len(parts), matrix), split(len(parts), vector)
            kernels = tuple(f"{path}/kernel" for path in paths)
            rows.append(Row(kernels, f"{key}.weight", matrix, steps))
            if config.qkv_bias or parts[0] not in ("q", "k", "v"):
                biases = tuple(f"{path}/bias" for path in paths)
                rows.append(Row(biases, f"{key}.bias", vector, steps))
    return rows


def fused_layer_rows(stack: str, prefix: str, depth: int) -> list[AnyRow]:
    """Rows of layers in the layout of OpenAI's CLIP and OpenCLIP, whose attention is torch's
    `MultiheadAttention`.

    Args:
      stack: where the layers' parameters are.
      prefix: of the keys of a layer, with `{}` for its number.
      depth: number of layers.
    """
    steps = tuple(range(depth))
    rows: list[AnyRow] = [
        *norm_rows(f"{stack}/attn_norm", f"{prefix}ln_1", steps=steps),
        *norm_rows(f"{stack}/mlp_norm", f"{prefix}ln_2", steps=steps),
        *weight_rows(f"{stack}/out", f"{prefix}attn.out_proj", linear(2), steps=steps),
        *weight_rows(f"{stack}/up", f"{prefix}mlp.c_fc", steps=steps),
        *weight_rows(f"{stack}/down", f"{prefix}mlp.c_proj", steps=steps),
    ]
    for leaf, key, each in (("kernel", "weight", linear()), ("bias", "bias", flat)):
        paths = tuple(f"{stack}/{name}/{leaf}" for name in "qkv")
        rows.append(Row(paths, f"{prefix}attn.in_proj_{key}", split(3, each), steps))
    return rows


CLIP_LAYER: Names = {
    "attn_norm": "layer_norm1",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


TIMM_LAYER: Names = {
    "attn_norm": "norm1",
    ("q", "k", "v"): "attn.qkv",
    "out": "attn.proj",
    "mlp_norm": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


HF_LAYER: Names = {
    "attn_norm": "layernorm_before",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def clip_table(config: ViTConfig) -> Table:
    """Keys of `vision_model` in Hugging Face CLIP checkpoints (which spell `pre_layrnorm` so) and,
    without a class token and with a pooling head, SigLIP checkpoints.
    """
    rows = [
        Row("patch/kernel", "embeddings.patch_embedding.weight", conv),
        Row("position", "embeddings.position_embedding.weight"),
        *norm_rows("final_norm", "post_layernorm"),
        *layer_rows(config, "encoder.layers.{}.", CLIP_LAYER),
    ]
    if config.class_token:
        rows.append(Row("cls", "embeddings.class_embedding"))
    if config.input_norm:
        rows += norm_rows("input_norm", "pre_layrnorm")
    else:
        rows.append(Row("patch/bias", "embeddings.patch_embedding.bias"))
    if config.attention_pool:
        rows += _pool_rows()
    return Table(tuple(rows))


def _pool_rows() -> list[Row]:
    """Rows of the pooling head in the layout of torch's `MultiheadAttention`."""
    kernels, biases = (tuple(f"pool/{n}/{leaf}" for n in "qkv") for leaf in ("kernel", "bias"))
    rows = [
        Row("pool/query", "head.probe", ones(2)),
        Row(kernels, "head.attention.in_proj_weight", split(3, linear())),
        Row(biases, "head.attention.in_proj_bias", split(3, flat)),
        *norm_rows("pool/mlp_norm", "head.layernorm"),
    ]
    for name, key, num_in in (
        ("out", "attention.out_proj", 2),
        ("up", "mlp.fc1", 1),
        ("down", "mlp.fc2", 1),
    ):
        rows.append(Row(f"pool/{name}/kernel", f"head.{key}.weight", linear(num_in)))
        rows.append(Row(f"pool/{name}/bias", f"head.{key}.bias"))
    return rows


def embeddings_table(config: ViTConfig, names: Names, *, mask_axes: int = 2) -> Table:
    """Keys of the Hugging Face ViTs that descend from BEiT (`embeddings.`, `encoder.layer.`).

    Args:
      config: of the tower.
      names: keys of the parts of a layer, which differ from one to the other.
      mask_axes: leading axes of length 1 of the mask token.
    """
    rows = [
        Row("patch/kernel", "embeddings.patch_embeddings.projection.weight", conv),
        Row("patch/bias", "embeddings.patch_embeddings.projection.bias"),
        Row("position", "embeddings.position_embeddings", ones(1)),
        Row("cls", "embeddings.cls_token", ones(2)),
        *layer_rows(config, "encoder.layer.{}.", names),
    ]
    if config.registers:
        rows.append(Row("registers", "embeddings.register_tokens", ones(1)))
    if config.mask_token:
        rows.append(Row("mask_token", "embeddings.mask_token", ones(mask_axes)))
    if config.final_norm:
        rows += norm_rows("final_norm", "layernorm")
    return Table(tuple(rows))
