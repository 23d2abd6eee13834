"""iLLaMA: a vision transformer of the layers of LLaMA, causal, with the class token at the end.

RMS norms, gated MLPs and rotary embeddings stand where a ViT has its own; every patch attends to
those before it, and the class token, which comes last, to all. Training starts with attention in
both directions, which a soft mask makes causal in its first epochs.

Follows: arXiv:2404.06773. As in the official code the mask multiplies the weights after the softmax
and nothing is normalised again, so that what a token reads depends on those after it by the
softmax's sum alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.card import Card
from zoo.models.core.errors import UsageError
from zoo.models.core.keytable import (
    AnyRow,
    Row,
    Shape,
    Table,
    Transform,
    conv,
    flat,
    linear,
    weight_rows,
)
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Batch, Features, Memory, Stream, Tokens
from zoo.models.parts.assemblies.classifier import (
    Classified,
    Classifier,
    ClassifierConfig,
    head_table,
)
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.embed import PatchEmbed, check_pixels
from zoo.models.parts.layers.gates import DROP_KEY, stochastic_depth
from zoo.models.parts.layers.norms import RMSNorm
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.resize import resize_bicubic
from zoo.models.parts.layers.stack import Remat, Stack
from zoo.models.parts.towers.vit import ones

CARD = Card(
    slug="illama",
    paper="arXiv:2404.06773",
    code="https://github.com/techmonsterwang/iLLaMA",
    differs=(
        "Rotary embeddings turn the halves of a head instead of neighbours; the key table reorders "
        "the kernels of queries and keys, and the numbers are the same.",
        "Images of other sizes resize the position table; the official code takes one size.",
    ),
)

SOFT_MASK = "soft_mask"
"""The name of the soft mask's rate in the memory of the layers, and in a batch."""


@dataclass(frozen=True)
class ILlamaConfig:
    """Sizes of the tower.

    Attributes:
      image_size: side in pixels of the images that the positions were made for, a multiple of
        `patch_size`; others are taken too.
      patch_size: side of a patch in pixels.
      width: D.
      depth: number of layers.
      num_heads: attention heads.
      mlp_dim: hidden width of the gated MLP, see `hidden_width`.
      norm_eps: epsilon of the norms.
      drop_path: in training, the share of examples for which a half of the last layer is left out;
        it rises evenly from 0 in the first.
      channels: of the images.
      dtype: in which activations are computed.
      remat: what layers keep for the gradient, as in `Stack`.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_dim: int = 512
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    channels: int = 3
    dtype: str = "float32"
    remat: Remat = "none"

    class_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size = {self.image_size}: want a multiple of patch_size = {self.patch_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row of an image of `image_size`."""
        return (self.image_size // self.patch_size,) * 2

    def plan(self) -> tuple[Step, ...]:
        """The layers, all alike."""
        block = SoftCausalBlock(
            width=self.width,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            norm_eps=self.norm_eps,
            qkv_bias=True,
            out_bias=True,
            parent=None,
        )
        return tuple(Step(block, each) for each in stochastic_depth(self.depth, self.drop_path))

    def build(self) -> "ILlama":
        """The module."""
        return ILlama(self)


def hidden_width(width: int, ratio: float = 4) -> int:
    """Two thirds of `ratio * width`, rounded up to a multiple of 256, as in LLaMA."""
    return 256 * math.ceil(int(2 * int(ratio * width) / 3) / 256)


class SoftCausalBlock(Block):
    """The layer of LLaMA, whose attention weights to later tokens are multiplied by the rate of the
    soft mask, `memory["soft_mask"]`, a scalar; without one by 0.
    """

    def mix(
        self, stream: Stream, q: Array, k: Array, v: Array, key: Tokens, memory: Memory
    ) -> Array:
        """Attention [B, L, H, E] of all over all, masked after the softmax."""
        logits = jnp.einsum("blhe,bshe->bhls", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, -1)
        before = stream.tokens.order[:, :, None] >= key.order[:, None]  # [B, L, S]
        mask = jnp.where(before, 1.0, memory.get(SOFT_MASK, 0.0))
        weights = (weights * mask[:, None]).astype(v.dtype)
        return jnp.einsum("bhls,bshe->blhe", weights, v)


class ILlama(nn.Module):
    """Patches and then the class token, positions, layers, a norm.

    `features.taps[k]` is the residual stream after k layers, the class token last.
    """

    config: ILlamaConfig

    def setup(self) -> None:
        c = self.config
        self.patch = PatchEmbed(c.patch_size, c.width, c.channels)
        init = nn.initializers.truncated_normal(0.02)
        self.cls = self.param("cls", nn.with_logical_partitioning(init, ("norm",)), (c.width,))
        rows = nn.with_logical_partitioning(init, ("positions", "embed"))
        self.position = self.param("position", rows, (math.prod(c.grid) + 1, c.width))
        self.stack = Stack(c.plan(), remat=c.remat)
        self.final_norm = RMSNorm(c.norm_eps)

    def __call__(
        self,
        pixels: Array,
        *,
        train: bool = False,
        taps: tuple[int, ...] = (),
        soft_mask: Array | float = 0.0,
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, C], normalised; H and W are multiples of `patch_size`.
          train: whether paths are dropped, by the random stream "dropout".
          taps: depths at which to return the residual stream, 0 to `depth`.
          soft_mask: the rate of the soft mask, from 1, attention in both directions, to 0, causal.

        Raises:
          ValueError: an image that does not fit, or a layer that the tower does not have.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_pixels(pixels, channels=c.channels, multiple=c.patch_size)
        if bad := [tap for tap in taps if not 0 <= tap <= c.depth]:
            raise ValueError(f"taps {bad}: want 0 to {c.depth}, the layers of the tower")
        hidden, grid = self._embed(pixels.reshape(-1, *pixels.shape[-3:]).astype(c.dtype))
        stream = Stream(hidden, Tokens.sequence(jnp.ones(hidden.shape[:2], bool)))
        memory = {SOFT_MASK: jnp.asarray(soft_mask, jnp.float32)}
        if train and c.drop_path:
            memory[DROP_KEY] = self.make_rng("dropout")
        found, done = {}, 0
        for mark in sorted({*taps, c.depth}):
            stream, _, _ = self.stack(stream, memory=memory, start=done, stop=mark)
            done = mark
            if mark in taps:
                found[mark] = stream.hidden.reshape(*lead, *stream.hidden.shape[1:])
        y = self.final_norm(stream.hidden)  # [B, N + 1, D]
        y = y.reshape(*lead, *y.shape[1:])
        return Features(y[..., :-1, :], grid, cls=y[..., -1, :], taps=found)

    def _embed(self, pixels: Array) -> tuple[Array, tuple[int, int]]:
        """The input of the first layer [B, N + 1, D], and the grid of the patches."""
        c = self.config
        x = self.patch(pixels)
        grid = (pixels.shape[1] // c.patch_size, pixels.shape[2] // c.patch_size)
        table = self.position.astype(jnp.float32)
        patches = resize_bicubic(table[:-1].reshape(*c.grid, -1), *grid).reshape(-1, c.width)
        x = x + patches.astype(x.dtype)
        cls = jnp.broadcast_to((self.cls + table[-1]).astype(x.dtype), (x.shape[0], 1, c.width))
        return jnp.concatenate([x, cls], 1), grid


@dataclass(frozen=True)
class ILlamaClassifierConfig(ClassifierConfig):
    """The tower with a head on its class token; in training its batches may have a `soft_mask`."""

    def build(self) -> "ILlamaClassifier":
        """The module."""
        return ILlamaClassifier(self)


class ILlamaClassifier(Classifier):
    """A classifier that reads the rate of the soft mask in its batch, where there is one.

    `zoo.train.objectives.fading.Fading` puts it there.
    """

    def __call__(
        self, batch: Batch, *, train: bool = False, taps: tuple[int, ...] = (), **options: Any
    ) -> Classified:
        """As `Classifier`.

        Args:
          batch: `pixels` [..., H, W, C], and perhaps `soft_mask`, float32 [].
          train: as of the tower.
          taps: likewise.
          **options: likewise.
        """
        if SOFT_MASK in batch:
            options[SOFT_MASK] = batch[SOFT_MASK]
        return super().__call__(batch, train=train, taps=taps, **options)


def _size(width: int, depth: int, num_heads: int, **more: Any) -> ILlamaClassifierConfig:
    tower = ILlamaConfig(
        width=width, depth=depth, num_heads=num_heads, mlp_dim=hidden_width(width), **more
    )
    return ILlamaClassifierConfig(tower, num_classes=1000)


# Sizes: models/illama.py of the official code. Its own smallest size is called tiny, which is the
# name of the sizes for tests here.
VARIANTS = {
    "illama_t": _size(192, 12, 3),
    "illama_s": _size(384, 12, 6),
    "illama_b": _size(768, 12, 12),
    "illama_b.384": _size(768, 12, 12, image_size=384),
    "illama_l": _size(1024, 24, 16),
    "illama_l.384": _size(1024, 24, 16, image_size=384),
    "illama_tiny": ILlamaClassifierConfig(
        ILlamaConfig(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32),
        num_classes=5,
    ),
}


def _halves(num_heads: int, each: Transform) -> Transform:
    """Their one tensor is queries, keys and values, the first two with neighbours for rotary pairs;
    ours are three, with pairs of halves.
    """

    def reorder(piece: np.ndarray, first: int, second: int) -> np.ndarray:
        grouped = piece.reshape(num_heads, first, second, -1)
        return grouped.swapaxes(1, 2).reshape(piece.shape)

    def load(theirs: Any, shapes: Any) -> list[np.ndarray]:
        q, k, v = np.split(theirs[0], 3)
        half: int = len(v) // num_heads // 2
        pieces = (reorder(q, half, 2), reorder(k, half, 2), v)
        return [each.load([p], [s])[0] for p, s in zip(pieces, shapes, strict=True)]

    def save(ours: Any) -> list[np.ndarray]:
        q, k, v = (each.save([piece])[0] for piece in ours)
        half = len(v) // num_heads // 2
        return [np.concatenate([reorder(q, 2, half), reorder(k, 2, half), v])]

    return Transform(f"halves({num_heads}, {each.name})", load, save)


def table(config: ClassifierConfig) -> Table:
    """Keys of the official checkpoints."""
    tower = config.tower
    steps, ours, theirs = tuple(range(tower.depth)), "stack/layers/", "blocks.{}."
    rows: list[AnyRow] = [
        *weight_rows("patch", "patch_embed.proj", conv),
        Row("position", "pos_embed", ones(1)),
        Row("cls", "cls_token", ones(2)),
        Row("final_norm/scale", "norm.weight"),
        Row(f"{ours}attn_norm/scale", f"{theirs}norm1.weight", steps=steps),
        Row(f"{ours}mlp_norm/scale", f"{theirs}norm2.weight", steps=steps),
        *weight_rows(f"{ours}out", f"{theirs}attn.proj", linear(2), steps=steps),
    ]
    for leaf, key, each in (("kernel", "weight", linear()), ("bias", "bias", flat)):
        paths = tuple(f"{ours}{name}/{leaf}" for name in "qkv")
        fused = _halves(tower.num_heads, each)
        rows.append(Row(paths, f"{theirs}attn.qkv.{key}", fused, steps))
    for name, key in (("gate", "fc1"), ("up", "fc3"), ("down", "fc2")):
        rows += weight_rows(f"{ours}{name}", f"{theirs}mlp.{key}", steps=steps, bias=False)
    return Table(tuple(rows)).under("tower") + head_table(config, head="head")


def selected(teacher: np.ndarray, shape: Shape) -> np.ndarray:
    """A smaller tensor of evenly spaced elements of a larger one.

    Follows: arXiv:2311.18823 (weight selection): along an axis that the smaller size divides, every
    so many elements from the first; along others from the first to the last, rounded.

    Raises:
      ValueError: an axis of `teacher` is shorter than that of `shape`, or there is none for it.
    """
    if teacher.ndim != len(shape) or any(t < s for t, s in zip(teacher.shape, shape, strict=True)):
        raise ValueError(
            f"teacher: got {teacher.shape}, want as many axes as {shape}, none shorter"
        )
    return teacher[np.ix_(*map(_evenly, teacher.shape, shape))]


def _evenly(size: int, number: int) -> np.ndarray:
    """Indices of `number` of `size` elements; in single precision, as torch counts."""
    place = np.arange(number)
    if size % number == 0:
        return place * (size // number)
    step = np.float32(size - 1) / np.float32(max(number - 1, 1))
    from_end = np.float32(size - 1) - step * (number - 1 - place).astype(np.float32)
    found = np.where(place < number // 2, step * place.astype(np.float32), from_end)
    return np.round(found).astype(np.int64)


def weight_selection(
    params: Mapping[str, Any], teacher: Mapping[str, Any], config: ClassifierConfig
) -> dict[str, Any]:
    """Parameters whose layers start from those of a LLaMA, as in section 3.5 of the paper.

    Norms and kernels of layer i come from layer i of the teacher by `selected`; biases, embeddings
    and head stay.

    Args:
      params: of a model of `config`.
      teacher: tensors of a LLaMA in the layout of the Hugging Face hub (`model.layers.0....`).
      config: of the model.

    Raises:
      UsageError: the teacher has fewer layers, or smaller ones.
    """
    rows = table(config)
    state = rows.save(params)
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    sources = {
        "norm1": ("input_layernorm",),
        "norm2": ("post_attention_layernorm",),
        "attn.qkv": attention,
        "attn.proj": ("self_attn.o_proj",),
        "mlp.fc1": ("mlp.gate_proj",),
        "mlp.fc2": ("mlp.down_proj",),
        "mlp.fc3": ("mlp.up_proj",),
    }
    for i in range(config.tower.depth):
        for ours, theirs in sources.items():
            key = f"blocks.{i}.{ours}.weight"
            try:
                parts = [np.asarray(teacher[f"model.layers.{i}.{t}.weight"]) for t in theirs]
                state[key] = selected(np.concatenate(parts), state[key].shape).astype(np.float32)
            except (KeyError, ValueError) as error:
                raise UsageError(f"{key} cannot be made of the teacher: {error}") from error
    return rows.load(state, params)


register(CARD, VARIANTS, table=table)
