"""Two towers on one image: a vision transformer that a convolutional tower at a higher resolution
feeds on the way.

Follows: arXiv:2403.03003 (the mixture-of-resolution adaptation of LLaVA-HR).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax import struct

from zoo.models.core.keytable import Row, Table, conv, linear, pointwise
from zoo.models.core.types import Array, Aux, Features, Memory, Stream, Tokens
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.conv import depthwise
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.plan import LayerPolicy, Run, Step
from zoo.models.parts.layers.resize import resize_bilinear
from zoo.models.parts.towers.convnext import ConvNeXtConfig, convnext_table
from zoo.models.parts.towers.pyramid import check_image_size
from zoo.models.parts.towers.vit import ViT, ViTConfig, clip_table

SLOW = "slow"
"""The name of the convolutional features in the memory of the transformer's layers."""


@dataclass(frozen=True)
class CoupledConfig:
    """The two towers. The defaults are ConvNeXt-L and CLIP ViT-L/14 on images of 1024 pixels.

    The image goes to the convolutional tower as it is, and to the transformer resized so that it
    has as many patches as the other has cells.

    Attributes:
      image_size: side in pixels, a multiple of the stride of `slow`.
      slow: the convolutional tower.
      fast: the transformer, whose class token is left out; its depth is a multiple of 4.
    """

    image_size: int = 1024
    slow: ConvNeXtConfig = field(default_factory=ConvNeXtConfig)
    fast: ViTConfig = field(default_factory=lambda: ViTConfig(position_resize="bicubic_antialias"))

    prefix: ClassVar[int] = 0
    class_token: ClassVar[bool] = False
    final_norm: ClassVar[bool] = False
    attention_pool: ClassVar[bool] = False
    depth: ClassVar[int] = 0  # there are no hidden states to read but the output

    def __post_init__(self) -> None:
        check_image_size(self.image_size, self.slow.stride)
        if self.fast.depth % 4:
            raise ValueError(f"depth = {self.fast.depth} of the transformer: want a multiple of 4")
        if not self.fast.class_token or self.fast.registers:
            raise ValueError("the transformer of coupled towers has a class token and no registers")
        if self.fast.grid != self.grid and self.fast.position_resize is None:
            raise ValueError(
                f"the transformer has positions for {self.fast.grid} patches and gets {self.grid}: "
                "give it a position_resize"
            )

    @property
    def width(self) -> int:
        """D of the tokens."""
        return self.fast.width

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per column and row."""
        return (self.image_size // self.slow.stride,) * 2

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that checkpoints carry and no forward pass reads."""
        norm = ("fast/final_norm/scale", "fast/final_norm/bias") * self.fast.final_norm
        return ("fast/cls", *norm)

    def build(self) -> "CoupledTowers":
        """The module."""
        return CoupledTowers(self)


class CoupledTowers(nn.Module):
    """`out_fast(fast) + out_slow(slow)`, with adapters between the quarters of the transformer."""

    config: CoupledConfig

    def setup(self) -> None:
        c = self.config
        self.slow = c.slow.build()
        sizes = {f.name: getattr(c.fast, f.name) for f in dataclasses.fields(c.fast)}
        self.fast = FedViT(_FedConfig(**sizes, slow_width=c.slow.width))
        self.out_fast = dense(c.fast.width, c.width, bias=True)
        self.out_slow = dense(c.slow.width, c.width, bias=True)

    def __call__(
        self,
        pixels: Array,
        *,
        train: bool = False,
        taps: tuple[int, ...] = (),
        stop_after: int | None = None,
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, 3], normalised; multiples of the stride. Leading axes are free.
          train: changes nothing.
          taps: none; the towers give no hidden states.
          stop_after: as `taps`.

        Raises:
          ValueError: hidden states are asked for.
        """
        del train
        if taps or stop_after is not None:
            raise ValueError("coupled towers give their output alone: want vision_layer=None")
        lead = pixels.shape[:-3]
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        slow = self.slow(pixels)
        grid, patch = slow.grid, self.config.fast.patch_size
        small = resize_bilinear(pixels, *(patch * side for side in grid), align_corners=True)
        cells = slow.tokens.reshape(-1, *grid, slow.tokens.shape[-1])
        y = self.out_fast(self.fast(small, cells)) + self.out_slow(slow.tokens)
        return Features(y.reshape(*lead, *y.shape[1:]), grid)


@dataclass(frozen=True)
class _FedConfig(ViTConfig):
    """A transformer with an adapter after each of its first three quarters."""

    slow_width: int = 1536

    def plan(self) -> tuple[Step, ...]:
        """The layers."""
        ends = {self.depth * quarter // 4 - 1 for quarter in (1, 2, 3)}
        return tuple(
            dataclasses.replace(step, policies=(Feed(self.slow_width),)) if i in ends else step
            for i, step in enumerate(super().plan())
        )


class FedViT(ViT):
    """The transformer without its class token, its layers reading convolutional features."""

    def __call__(self, pixels: Array, slow: Array) -> Array:
        """Pixels [B, H, W, 3] and features [B, h, w, C] of as many cells as there are patches, to
        the residual stream [B, h w, D] after the last layer.
        """
        hidden, _ = self._embed(pixels, None, None)
        if self.config.final_norm and self.is_initializing():
            self.final_norm(hidden)
        hidden = hidden[:, self.config.prefix :]
        stream = Stream(hidden, Tokens.sequence(jnp.ones(hidden.shape[:2], bool)))
        stream, _, _ = self.stack(stream, memory={SLOW: slow.astype(hidden.dtype)})
        return stream.hidden


@struct.dataclass
class Feed(LayerPolicy):
    """After the layer, an adapter adds `memory["slow"]`.

    Attributes:
      slow_width: C of the features in memory, which are [B, h, w, C] for h w tokens.
    """

    name: ClassVar[str] = "adapter"

    slow_width: int = struct.field(pytree_node=False)

    def module(self, block: nn.Module) -> nn.Module:
        """The adapter."""
        return Adapter(block.width, self.slow_width, parent=None)

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        stream, state, aux = run(stream, state)
        return stream.replace(hidden=own(stream.hidden, memory[SLOW])), state, aux


class Adapter(nn.Module):
    """`f + tanh(gate) s` with f and s the two features after a convolutional branch each.

    The gate is one number per image, from the means of f and s.

    Attributes:
      width: D of the tokens.
      slow_width: C of the convolutional features.
    """

    width: int
    slow_width: int

    def setup(self) -> None:
        d, c = self.width, self.slow_width
        self.slow_up = dense(c, c, bias=True)
        self.slow_down = _from_zero(c, d)
        self.fast_conv = depthwise(d, 7)
        self.fast_down = _from_zero(d, d)
        self.gate_up = dense(2 * d, d // 2, bias=True)
        self.gate_down = dense(d // 2, 1, bias=True, axes=("mlp", None))

    def __call__(self, fast: Array, slow: Array | None = None) -> Array:
        """Tokens [B, h w, D] and features [B, h, w, C] to tokens [B, h w, D].

        Without features, at initialisation, the tokens are one row of a grid.
        """
        if slow is None:
            slow = jnp.zeros((fast.shape[0], 1, fast.shape[1], self.slow_width), fast.dtype)
        gelu = ACTIVATIONS["gelu"]
        grid = fast.reshape(*slow.shape[:3], -1)
        fast = fast + self.fast_down(gelu(self.fast_conv(grid))).reshape(fast.shape)
        slow = self.slow_down(gelu(self.slow_up(slow))).reshape(fast.shape)
        mean = jnp.concatenate([fast, slow], -1).mean(1)  # [B, 2 D]
        gate = jnp.tanh(self.gate_down(gelu(self.gate_up(mean))))
        return fast + slow * gate[:, None]


def _from_zero(width: int, features: int) -> Proj:
    """`dense` with a bias and zeros to start from."""
    zeros, axes = nn.initializers.zeros, ("embed", "mlp")
    return Proj("...d,df->...f", (width, features), axes, bias=True, init=zeros)


def coupled_table(config: CoupledConfig) -> Table:
    """Keys of the towers in official LLaVA-HR checkpoints, as its code names them."""
    at, key = "fast/stack/layers/adapter/", "align_stages_latent.{}."
    rows = []
    for name, theirs, transform in (
        ("slow_up", "slow_conv", pointwise),
        ("slow_down", "slow_proj", pointwise),
        ("fast_conv", "fast_conv", conv),
        ("fast_down", "fast_proj", pointwise),
        ("gate_up", "gate.0", linear()),
        ("gate_down", "gate.2", linear()),
    ):
        steps = (0, 1, 2)
        rows.append(Row(f"{at}{name}/kernel", f"{key}{theirs}.weight", transform, steps))
        rows.append(Row(f"{at}{name}/bias", f"{key}{theirs}.bias", steps=steps))
    for name in ("fast", "slow"):
        rows.append(Row(f"out_{name}/kernel", f"align_stages.0.{name}_proj.weight", linear()))
        rows.append(Row(f"out_{name}/bias", f"align_stages.0.{name}_proj.bias"))
    slow = convnext_table(config.slow, gain="weight").under(
        "slow", "slow_vision_tower.vision_tower."
    )
    prefix = "fast_vision_tower.vision_tower.vision_model."
    return Table(tuple(rows)) + slow + clip_table(config.fast).under("fast", prefix)
