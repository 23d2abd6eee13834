"""The LLaVA assembly: tower, connector, decoder. Follows: arXiv:2310.03744.

Any tower, connector and decoder policy composes here, from one typed configuration. Pictures may be
cut into tiles, whose tokens the batch's `layout` puts into reading order, with a learned newline
between rows (LLaVA-NeXT, arXiv:2408.03326): see `zoo.processors.tiling`.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.config import ModelConfig
from zoo.models.core.keytable import Table
from zoo.models.core.registry import check_part
from zoo.models.core.types import Array, Batch, Memory, Stream, TokenSet, Visual
from zoo.models.parts.assemblies.language import LanguageModel
from zoo.models.parts.assemblies.splice import fill_slots, splice
from zoo.models.parts.connect.crops import Crops, join_views
from zoo.models.parts.connect.mlp import MLPConnector
from zoo.models.parts.decoders.composition import compose
from zoo.models.parts.decoders.gqa import Decoder, DecoderConfig, Plan, decoder_table
from zoo.models.parts.layers.linear import table_init
from zoo.models.parts.towers.vit import ViTConfig, clip_table


@runtime_checkable
class Connector(Protocol):
    """Configuration of a connector. Its module maps (`Features`, budget=) to a `Visual`."""

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Vision tokens per image at most."""
        ...

    def build(self, vision_width: int, width: int, grid: tuple[int, int]) -> nn.Module:
        """The module from tower width to decoder width, for a tower of this patch grid."""
        ...


@runtime_checkable
class TapSource(Protocol):
    """Configuration of a policy whose layers read vision features of their own, the taps."""

    @property
    def crops(self) -> Crops | None:
        """The crops that it wants to see of every image."""
        ...

    def hidden_states(self, depth: int) -> tuple[int, ...]:
        """The hidden states that it reads, 0 to `depth`, of a tower with so many layers.

        Raises:
          ValueError: one that this tower does not have.
        """
        ...

    def taps(self, config: "LlavaConfig") -> nn.Module:
        """The module that makes them, which stands around the connector.

        It maps (`Features`, the module of the connector, view_grid=, budget=) to a `Visual` with
        `memory["taps"]` [G, B, M Q, D]. The tokens of the features are [B, M, N, C], with crops
        [B, M, 1 + V, N, C], the whole first.

        Raises:
          ValueError: the model has no place for it, with the reason.
        """
        ...


@dataclass(frozen=True)
class LlavaConfig(ModelConfig):
    """A vision-language model. The defaults are LLaVA-1.5 7B.

    Attributes:
      tower: the vision transformer.
      connector: from vision tokens to decoder tokens.
      decoder: the language model.
      policies: applied to the decoder's plan in this order; the first is innermost.
      vision_layer: which hidden state of the tower is read: 0 is the input of the first layer, -1
        the output of the last, before the tower's final norm, -2 of the one before. Several are
        concatenated. None is what the tower returns, after the final norm where it has one.
      keep_class: the class token is read too, before the patches; by default it is dropped.
      newline: a learned vector that a batch's `layout` may put between vision tokens; it is token
        M Q of every row.
      image_id: the placeholder id of an image.
      num_images: images or tiles per example that `inputs` describes.
      num_slots: vision tokens per example that `inputs` describes, as the layout of one image; None
        for all tokens of all images, with a newline at the end where there is one.
      text_tokens: text length that `inputs` describes.
    """

    tower: ViTConfig = field(default_factory=ViTConfig)
    connector: Any = field(default_factory=MLPConnector)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    policies: tuple[Any, ...] = ()
    vision_layer: int | tuple[int, ...] | None = -2
    keep_class: bool = False
    newline: bool = False
    image_id: int = 32_000
    num_images: int = 1
    num_slots: int | None = None
    text_tokens: int = 64

    def __post_init__(self) -> None:
        check_part("connector", self.connector, Connector)
        depth = self.tower.depth
        if bad := [layer for layer in self.layers if not 0 <= layer <= depth]:
            raise ValueError(
                f"vision_layer = {self.vision_layer} means hidden states {bad}: the tower has 0 to "
                f"{depth}"
            )
        if self.keep_class and (self.vision_layer is None or not self.tower.class_token):
            raise ValueError(
                "keep_class: want a tower with a class token, and hidden states of it to read"
            )
        rows, columns = self.tower.grid
        if self.newline and self.connector.num_tokens(self.tower.grid) != rows * columns:
            raise ValueError(
                f"connector = {self.connector!r}: this model reads its tiles row by row, with a "
                f"newline after each, and so wants a connector that keeps the {rows} x {columns} "
                "tokens of the tower's grid; with newline=False and num_slots=None tiles follow "
                "one another"
            )
        self.plan()
        if self.crops is not None and self.keep_class:
            raise ValueError("keep_class: class tokens have no place in a grid of crops")
        if self.tap_source is not None:
            self.tap_source.hidden_states(depth)
            self.tap_source.taps(self)

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden states that are read, 0 to `tower.depth`; empty for the tower's output."""
        given = self.vision_layer
        chosen = () if given is None else (given,) if isinstance(given, int) else given
        return tuple(layer + self.tower.depth + 1 if layer < 0 else layer for layer in chosen)

    @property
    def tap_source(self) -> TapSource | None:
        """The policy, if any, that reads vision features of its own."""
        found = [policy for policy in self.policies if isinstance(policy, TapSource)]
        if len(found) > 1:
            raise ValueError(f"policies {found}: want one at most that makes taps")
        return found[0] if found else None

    @property
    def crops(self) -> Crops | None:
        """The crops that the tower or a policy wants to see of every image besides the whole."""
        parts = (self.tower, *self.policies)
        found = [part for part in parts if getattr(part, "crops", None) is not None]
        if len(found) > 1:
            raise ValueError(f"{found}: want one at most that sees crops")
        crops: Crops | None = getattr(found[0], "crops", None) if found else None
        return crops

    @property
    def tile_tokens(self) -> int:
        """Q: vision tokens of one image or tile, at most."""
        return self.connector.num_tokens(self.tower.grid) + self.keep_class

    @property
    def slots(self) -> int:
        """S: vision tokens of the examples that `inputs` describes."""
        return self.num_slots or self.num_images * self.tile_tokens + self.newline

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that checkpoints carry and no forward pass reads, such as the tower's last
        norm.
        """
        names = list(self.tower.unread)
        if self.layers and self.tower.final_norm:
            names += ["final_norm/scale", "final_norm/bias"]
        if self.tower.attention_pool:
            linears = [f"pool/{part}" for part in ("q", "k", "v", "out", "up", "down")]
            names += [f"{part}/{leaf}" for part in linears for leaf in ("kernel", "bias")]
            names += ["pool/query", "pool/mlp_norm/scale", "pool/mlp_norm/bias"]
        return tuple(f"tower/{name}" for name in names)

    def plan(self) -> Plan:
        """The decoder's plan with all policies applied."""
        return compose(
            self.decoder.plan(),
            self.policies,
            slots=self.slots,
            memory=() if self.tap_source is None else ("taps",),
        )

    def build(self) -> "Llava":
        """The module."""
        return Llava(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a training batch."""
        text, side = (batch_size, self.text_tokens), self.tower.image_size
        pixels = (batch_size, self.num_images, side, side, 3)
        batch = {
            "pixels": jax.ShapeDtypeStruct(pixels, jnp.float32),
            "ids": jax.ShapeDtypeStruct(text, jnp.int32),
            "labels": jax.ShapeDtypeStruct(text, jnp.int32),
            "text_mask": jax.ShapeDtypeStruct(text, jnp.bool_),
            "segments": jax.ShapeDtypeStruct(text, jnp.int32),
        }
        if self.crops is not None:
            views = (batch_size, self.num_images, self.crops.number)
            batch["crops"] = jax.ShapeDtypeStruct((*views, side, side, 3), jnp.float32)
            if not self.crops.square:
                batch["view_grid"] = jax.ShapeDtypeStruct((*views[:2], 2), jnp.int32)
        if self.newline or self.num_slots is not None:
            batch["sizes"] = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
            batch["layout"] = jax.ShapeDtypeStruct((batch_size, self.slots), jnp.int32)
        return batch


class Llava(LanguageModel):
    """Images through tower and connector into the placeholders of the text, then the decoder."""

    config: LlavaConfig

    def setup(self) -> None:
        c = self.config
        self.tower = c.tower.build()
        vision_width = c.tower.width * max(1, len(c.layers))
        self.connector = c.connector.build(vision_width, c.decoder.width, c.tower.grid)
        self.decoder = Decoder(c.decoder, c.plan())
        if c.tap_source is not None:
            self.taps = c.tap_source.taps(c)
        if c.newline:
            vector = nn.with_logical_partitioning(table_init(c.decoder.width), ("norm",))
            self.newline = self.param("newline", vector, (c.decoder.width,))

    def encode_image(
        self,
        pixels: Array,
        *,
        crops: Array | None = None,
        view_grid: Array | None = None,
        budget: int | Array | None = None,
    ) -> Visual:
        """Pixels [B, M, H, W, 3] to what the connector makes of them: tokens [B, M, Q, D].

        Args:
          pixels: whole images.
          crops: [B, M, V, H, W, 3], for models that see them.
          view_grid: int [B, M, 2], how the crops lie; a square grid by default.
          budget: as in `__call__`.

        Raises:
          ValueError: no crops for a model that sees them, or others than it wants.
        """
        c, source = self.config, self.config.tap_source
        if c.crops is not None:
            if crops is None:
                raise ValueError(
                    f"a batch of pixels for this model needs crops: {c.crops.number} of each "
                    "image, as its processor makes them"
                )
            pixels = join_views(pixels, crops, c.crops)
        more = () if source is None else source.hidden_states(c.tower.depth)
        taps = tuple(sorted({*c.layers, *more}))
        last = max(taps) if c.layers and not self.is_initializing() else None
        features = self.tower(pixels, taps=taps, stop_after=last)
        if c.layers:
            first = 0 if c.keep_class else c.tower.prefix
            read = [features.taps[tap][..., first:, :] for tap in c.layers]
            features = features.replace(tokens=jnp.concatenate(read, -1))
        visual: Visual
        if source is None:
            visual = self.connector(features, budget=budget)
        else:
            visual = self.taps(features, self.connector, view_grid=view_grid, budget=budget)
        return visual

    def stream(self, batch: Batch, budget: int | Array | None) -> tuple[Stream, Memory]:
        """Embedded text with the images in their places; text alone if there are no pixels.

        Raises:
          ValueError: pixels without a `layout` for a model with a newline, which stands where the
            layout says; pixels without the crops that the model sees.
        """
        visual = Visual(None)
        extra = self.newline[None] if self.config.newline else None
        if "pixels" in batch:
            views = {name: batch.get(name) for name in ("crops", "view_grid")}
            visual = self.encode_image(batch["pixels"], **views, budget=budget)
            if self.config.newline and "layout" not in batch:
                raise ValueError(
                    "a batch of pixels for a model with a newline needs a layout and sizes: "
                    "zoo.processors.tiling.pack makes them"
                )
        memory = visual.memory
        if "taps" in memory:
            memory = {**memory, "taps": _numbered(memory["taps"], batch, extra)}
        facts = ("text_mask", "labels", "segments", "sizes", "layout", "blend")
        stream = splice(
            batch["ids"],
            self.decoder.embed(batch["ids"]),
            visual.tokens,
            image_id=self.config.image_id,
            extra=extra,
            **{name: batch.get(name) for name in facts},
        )
        return stream, memory


def _numbered(taps: Array, batch: Batch, extra: Array | None) -> Array:
    """Taps [G, B, M Q, D] in the numbers that `splice` gives the vision tokens (`cell`): those that
    the model adds come after them in every level, and where tokens are blended, so are the taps.
    """
    if "blend" in batch:

        def blended(level: Array) -> Array:
            vision = TokenSet(level[:, None])
            return fill_slots(vision, batch["layout"], batch["blend"], extra)[0]

        return jax.lax.map(blended, taps)
    if extra is None:
        return taps
    more = jnp.broadcast_to(extra.astype(taps.dtype), (*taps.shape[:2], *extra.shape))
    return jnp.concatenate([taps, more], 2)


def llava_table(config: LlavaConfig) -> Table:
    """Keys of tower and decoder in official LLaVA-1.5 checkpoints; connectors add theirs."""
    tower = clip_table(config.tower).under("tower", "model.vision_tower.vision_tower.vision_model.")
    return tower + decoder_table(config.decoder).under("decoder")
