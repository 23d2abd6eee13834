"""The vision transformer of Qwen-VL: pictures in their native resolution, any number in a row.

Follows: arXiv:2409.12191 (Qwen2-VL), arXiv:2502.13923 (Qwen2.5-VL: windows), arXiv:2511.21631
(Qwen3-VL: learned positions beside the rotary ones).

It reads these names of a batch, which `zoo.processors.native.NativeSpec.pack` makes:

    patches        [B, P, C'] float32, the flattened patches of all pictures of a row, in blocks of
                   `merge_size` x `merge_size`
    patch_grid     [B, P, 2] int32, (row, column) of every patch in its frame
    patch_segment  [B, P] int32, the number of its frame in the row, from 1 on; 0 on padding
    patch_frame    [B, G, K] int32, which patches stand in each of G groups of whole frames, -1 on
                   padding: full attention runs inside a group, between patches of one frame
    patch_window   [B, W, K'] int32, the same for attention windows, one in each group

Attention runs on groups that are gathered from the row, so that a video of t frames costs t times
one frame, and windows are a batch of small attentions; no mask is larger than a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.keytable import Row, Table, Transform, flat, linear, split
from zoo.models.core.tree import check_shape
from zoo.models.core.types import Array, Features, Memory, Stream, Tokens, take
from zoo.models.parts.layers.block import QKV, Block
from zoo.models.parts.layers.linear import Proj, dense, table_init
from zoo.models.parts.layers.norms import NormKind, make_norm
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.rope import rope_frequencies, rotate
from zoo.models.parts.layers.stack import Stack


@dataclass(frozen=True)
class QwenViTConfig:
    """Sizes of the tower. The defaults are Qwen2-VL's, which is the same for all of its sizes.

    Attributes:
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames in a patch.
      channels: of the pixels.
      merge_size: side of the block of patches that becomes one token of the language model.
      patch_bias: a bias on the patch embedding.
      table_side: side of a square table of learned positions, which is stretched over every frame;
        0 for none.
      width: D.
      depth: number of layers.
      num_heads: attention heads.
      mlp_dim: hidden width of the MLP.
      activation: of the MLP.
      gated: whether the MLP is gated.
      norm: "layer" or "rms".
      norm_eps: epsilon of all norms.
      rope_theta: base of the rotary embedding of rows and columns.
      window_size: side of an attention window in pixels; None where all layers see whole frames.
      full_layers: with windows, the layers that see whole frames all the same.
      dtype: in which activations are computed.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    channels: int = 3
    merge_size: int = 2
    patch_bias: bool = False
    table_side: int = 0
    width: int = 1280
    depth: int = 32
    num_heads: int = 16
    mlp_dim: int = 5120
    activation: str = "quick_gelu"
    gated: bool = False
    norm: NormKind = "layer"
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    window_size: int | None = None
    full_layers: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width = {self.width}: want a multiple of 4 x num_heads = {4 * self.num_heads}, "
                "for rotary embeddings of rows and columns"
            )
        if self.window_size is not None and self.window_size % (self.patch_size * self.merge_size):
            raise ValueError(
                f"window_size = {self.window_size}: want a multiple of patch_size x merge_size = "
                f"{self.patch_size * self.merge_size}"
            )

    @property
    def patch_dim(self) -> int:
        """C': numbers in a flattened patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def block(self) -> int:
        """Patches per token of the language model."""
        return self.merge_size**2

    @property
    def window_patches(self) -> int:
        """K': patches in a full window. Only for a tower with windows."""
        return ((self.window_size or 0) // self.patch_size) ** 2

    def plan(self) -> tuple[Step, ...]:
        """One step a layer: most look at windows where there are any."""

        def reach(layer: int) -> str:
            whole = self.window_size is None or layer in self.full_layers
            return "frame" if whole else "window"

        return tuple(
            Step(
                NativeBlock(
                    width=self.width,
                    num_heads=self.num_heads,
                    mlp_dim=self.mlp_dim,
                    norm=self.norm,
                    norm_eps=self.norm_eps,
                    activation=self.activation,
                    gated=self.gated,
                    qkv_bias=True,
                    out_bias=True,
                    mlp_bias=True,
                    rope=None,
                    rule=same_segment,
                    reach=reach(layer),
                    parent=None,
                )
            )
            for layer in range(self.depth)
        )

    def build(self) -> "QwenViT":
        """The module."""
        return QwenViT(self)


def same_segment(query: Tokens, key: Tokens) -> Array:
    """A token sees the valid tokens of its own segment."""
    own = query.tags["segment"][:, :, None] == key.tags["segment"][:, None, :]
    return own & key.valid[:, None, :]


@struct.dataclass
class Groups:
    """A regrouping of the tokens of a row: every token stands in exactly one group.

    Attributes:
      index: int32 [B, G, K], the token at each place; 0 on padding.
      inverse: int32 [B, P], where in the G K places each token stands.
      tokens: facts about the tokens in the groups, leaves [B G, K, ...]; padding is not valid.
    """

    index: Array
    inverse: Array
    tokens: Tokens

    @classmethod
    def of(cls, index: Array, tokens: Tokens) -> "Groups":
        """The groups of `index` [B, G, K], -1 on padding, of `tokens` with leaves [B, P, ...]."""
        batch, count, size = index.shape
        length = tokens.valid.shape[1]
        places = jnp.arange(count * size, dtype=jnp.int32)
        flat_index = index.reshape(batch, -1)  # [B, G K]
        home = jnp.where(flat_index < 0, length, flat_index)
        inverse = jax.vmap(lambda at: jnp.zeros(length, jnp.int32).at[at].set(places, mode="drop"))
        index = jnp.maximum(index, 0)
        groups = cls(index, inverse(home), tokens)
        inside = jax.tree.map(groups.gather, tokens)
        valid = inside.valid & (flat_index >= 0).reshape(-1, size)
        return groups.replace(tokens=inside.replace(valid=valid))

    def gather(self, x: Array) -> Array:
        """[B, P, ...] -> [B G, K, ...]."""
        batch, count, size = self.index.shape
        y = take(x, self.index.reshape(batch, -1))
        return y.reshape(batch * count, size, *x.shape[2:])

    def scatter(self, y: Array) -> Array:
        """[B G, K, ...] -> [B, P, ...]: the inverse of `gather`."""
        batch = self.index.shape[0]
        return take(y.reshape(batch, -1, *y.shape[2:]), self.inverse)


class NativeBlock(Block):
    """A layer whose attention runs inside groups of the row, with rotary rows and columns.

    It reads `memory`: `angle` [B, P, E / 2] and the `Groups` called `reach`.

    Attributes:
      reach: "frame" or "window".
    """

    reach: str = "frame"

    def qkv(self, stream: Stream, memory: Memory) -> QKV:
        """Normed, projected, rotated by `memory["angle"]`."""
        own = super().qkv(stream, memory)
        return own._replace(q=rotate(own.q, memory["angle"]), k=rotate(own.k, memory["angle"]))

    def mix(
        self, stream: Stream, q: Array, k: Array, v: Array, key: Tokens, memory: Memory
    ) -> Array:
        """Attention inside the groups; returns [B, P, H, E]."""
        del key
        groups: Groups = memory[self.reach]
        q, k, v = (groups.gather(x) for x in (q, k, v))
        inside, options = groups.tokens, {"scale": self.scale, "softcap": self.softcap}
        return groups.scatter(self.attend(q, k, v, self.rule, inside, inside, **options))

    def probe(self, stream: Stream) -> Array:
        """The whole stream as one group, nothing rotated."""
        batch, length = stream.tokens.valid.shape
        tokens = Tokens.sequence(stream.tokens.valid, segment=jnp.ones((batch, length), jnp.int32))
        index = jnp.broadcast_to(jnp.arange(length), (batch, 1, length))
        half = self.width // self.num_heads // 2
        memory = {self.reach: Groups.of(index, tokens), "angle": jnp.zeros((batch, length, half))}
        return self(stream, None, memory)[0].hidden


class QwenViT(nn.Module):
    """Flattened patches, learned positions if there are any, rotary rows and columns, pre-norm
    layers; no final norm.

    The tokens of the result are the patches in their order; `PatchMerger` makes tokens of them.
    """

    config: QwenViTConfig

    def setup(self) -> None:
        c = self.config
        shape, axes = (c.patch_dim, c.width), ("conv_in", "conv_out")
        self.patch = Proj("bpc,cd->bpd", shape, axes, bias=c.patch_bias)
        if c.table_side:
            init = nn.with_logical_partitioning(table_init(c.width), ("positions", "embed"))
            self.position = self.param("position", init, (c.table_side**2, c.width))
        self.stack = Stack(c.plan())

    def __call__(
        self,
        patches: Array,
        *,
        grid: Array,
        segment: Array,
        frame: Array,
        window: Array | None = None,
        taps: Sequence[int] = (),
    ) -> Features:
        """Encode the pictures of every row.

        Args:
          patches: [B, P, C'], `patches` of a batch.
          grid: [B, P, 2], `patch_grid`.
          segment: [B, P], `patch_segment`.
          frame: [B, G, K], `patch_frame`.
          window: [B, W, K'], `patch_window`; needed where the tower has windows.
          taps: depths at which to return the residual stream, 0 to `depth`.

        Returns:
          Features with tokens and taps [B, P, D], the grid (P,) and a mask.

        Raises:
          ValueError: an array has another shape, or a tap lies beyond the depth.
        """
        c = self.config
        batch, length, _ = patches.shape
        check_shape("patches", patches, "[B, P, C']", None, None, c.patch_dim)
        check_shape("patch_grid", grid, "[B, P, 2]", batch, length, 2)
        check_shape("patch_segment", segment, "[B, P]", batch, length)
        check_shape("patch_frame", frame, "[B, G, K]", batch, None, None)
        if bad := [tap for tap in taps if not 0 <= tap <= c.depth]:
            raise ValueError(f"taps {bad}: the tower has layers 0 to {c.depth}")
        tokens = Tokens.sequence(segment > 0, segment=segment)
        memory = {"angle": self._angle(grid), "frame": Groups.of(frame, tokens)}
        if c.window_size is not None:
            if window is None:
                raise ValueError("patch_window is missing: this tower attends to windows")
            check_shape("patch_window", window, "[B, W, K']", batch, None, c.window_patches)
            memory["window"] = Groups.of(window, tokens)

        hidden = self.patch(patches.astype(c.dtype))
        if c.table_side:
            hidden = hidden + self._learned(grid, segment).astype(hidden.dtype)
        stream = Stream(hidden, tokens)
        found, done = {}, 0
        for tap in sorted({*taps, c.depth}):
            stream, _, _ = self.stack(stream, None, memory, start=done, stop=tap)
            done = tap
            if tap in taps:
                found[tap] = stream.hidden
        return Features(stream.hidden, (length,), mask=segment > 0, taps=found)

    def _learned(self, grid: Array, segment: Array) -> Array:
        """[B, P, D]: the table of learned positions, stretched so that its corners are the corners
        of the frame, and read between its cells where each patch stands.
        """
        side, frames = self.config.table_side, segment.shape[1] // self.config.block + 1
        last = jax.vmap(lambda g, s: jax.ops.segment_max(g, s, frames)[s])(grid, segment)
        place = (grid * (side - 1)).astype(jnp.float32) / jnp.maximum(last, 1)  # [B, P, 2]
        cell = jnp.floor(place).astype(jnp.int32)
        past = place - cell  # how far towards the next row and column
        learned = jnp.zeros((), jnp.float32)
        for corner in np.ndindex(2, 2):
            row, column = jnp.moveaxis(jnp.minimum(cell + np.array(corner), side - 1), -1, 0)
            share = jnp.where(np.array(corner) == 1, past, 1 - past).prod(-1, keepdims=True)
            learned = learned + share * jnp.take(self.position, row * side + column, axis=0)
        return learned

    def _angle(self, grid: Array) -> Array:
        """[B, P, E / 2]: the first half of the pairs turns with the row, the second alike with the
        column.
        """
        half = self.config.width // self.config.num_heads // 2
        frequencies = rope_frequencies(half, self.config.rope_theta)
        return jnp.concatenate([grid[..., i : i + 1] * frequencies for i in (0, 1)], -1)


class PatchMerger(nn.Module):
    """Every block of patches concatenated into one token: a norm, then an MLP with an exact GELU.

    Attributes:
      vision_width: D of the tower.
      width: of the language model.
      block: patches per token.
      norm: as in the tower.
      norm_eps: epsilon of the norm.
      norm_blocks: the norm is over whole blocks instead of single patches.
    """

    vision_width: int
    width: int
    block: int = 4
    norm: NormKind = "layer"
    norm_eps: float = 1e-6
    norm_blocks: bool = False

    def setup(self) -> None:
        inner = self.vision_width * self.block
        self.in_norm = make_norm(self.norm, self.norm_eps)
        self.up = dense(inner, inner, bias=True)
        self.down = dense(inner, self.width, bias=True, axes=("mlp", "embed"))

    def __call__(self, x: Array) -> Array:
        """Patches [B, P, D] to tokens [B, P / block, width]."""
        if not self.norm_blocks:
            x = self.in_norm(x)
        x = x.reshape(*x.shape[:-2], -1, self.block * self.vision_width)  # [B, P / block, block D]
        if self.norm_blocks:
            x = self.in_norm(x)
        return self.down(nn.gelu(self.up(x), approximate=False))


def patch_kernel(config: QwenViTConfig) -> Transform:
    """Their 3-D convolution kernel [D, C, T, p, p]; ours [C', D]."""
    shape = (config.channels, config.temporal_patch_size, config.patch_size, config.patch_size)

    def save(ours: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return [ours[0].T.reshape(-1, *shape)]

    return Transform("patch_kernel", lambda t, s: [t[0].reshape(s[0][::-1]).T], save)


def tower_table(config: QwenViTConfig, *, up: str = "mlp.fc1", down: str = "mlp.fc2") -> Table:
    """Keys of the tower under `visual.` in Qwen-VL checkpoints; `up` and `down` are what they call
    the maps of MLPs without a gate.
    """
    steps, layer, at = tuple(range(config.depth)), "blocks.{}.", "stack/layers/"
    rows = [Row("patch/kernel", "patch_embed.proj.weight", patch_kernel(config))]
    if config.patch_bias:
        rows.append(Row("patch/bias", "patch_embed.proj.bias"))
    if config.table_side:
        rows.append(Row("position", "pos_embed.weight"))
    for name, key in {"attn_norm": "norm1", "mlp_norm": "norm2"}.items():
        rows += _norm_rows(config.norm, f"{at}{name}", f"{layer}{key}", steps)
    for leaf, key, each in (("kernel", "weight", linear()), ("bias", "bias", flat)):
        paths = tuple(f"{at}{name}/{leaf}" for name in "qkv")
        rows.append(Row(paths, f"{layer}attn.qkv.{key}", split(3, each), steps))
    maps = {"out": ("attn.proj", 2), "up": (up, 1), "down": (down, 1)}
    if config.gated:
        maps |= {name: (f"mlp.{name}_proj", 1) for name in ("gate", "up", "down")}
    for name, (key, num_in) in maps.items():
        rows.append(Row(f"{at}{name}/kernel", f"{layer}{key}.weight", linear(num_in), steps))
        rows.append(Row(f"{at}{name}/bias", f"{layer}{key}.bias", steps=steps))
    return Table(tuple(rows))


def merger_table(
    config: QwenViTConfig, *, norm: str = "ln_q", up: str = "mlp.0", down: str = "mlp.2"
) -> Table:
    """Keys of a `PatchMerger` in Qwen-VL checkpoints; the names are what they call its parts."""
    rows = _norm_rows(config.norm, "in_norm", norm, None)
    for name, key in {"up": up, "down": down}.items():
        rows.append(Row(f"{name}/kernel", f"{key}.weight", linear()))
        rows.append(Row(f"{name}/bias", f"{key}.bias"))
    return Table(tuple(rows))


def _norm_rows(kind: NormKind, path: str, key: str, steps: tuple[int, ...] | None) -> list[Row]:
    rows = [Row(f"{path}/scale", f"{key}.weight", steps=steps)]
    if kind == "layer":
        rows.append(Row(f"{path}/bias", f"{key}.bias", steps=steps))
    return rows
