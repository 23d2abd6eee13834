"""The LLaVA assembly: tower, connector, decoder. Follows: arXiv:2310.03744.

Any tower, connector and decoder policy composes here, from one typed configuration. Pictures may be
cut into tiles, whose tokens the batch's `layout` puts into reading order, with a learned newline
between rows (LLaVA-NeXT, arXiv:2408.03326): see `zoo.processors.tiling`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.config import ModelConfig
from zoo.models.core.keytable import Table
from zoo.models.core.registry import check_part
from zoo.models.core.types import Array, Batch, Features, Memory, Stream, TokenSet, Visual
from zoo.models.parts.assemblies.language import LanguageModel
from zoo.models.parts.assemblies.protocols import Connector, TapSource
from zoo.models.parts.assemblies.splice import fill_slots, number_taps, splice
from zoo.models.parts.connect.crops import Crops, join_views
from zoo.models.parts.connect.mlp import MLPConnector
from zoo.models.parts.decoders.composition import compose
from zoo.models.parts.decoders.gqa import Decoder, DecoderConfig, Plan, decoder_table
from zoo.models.parts.layers.detach import detached
from zoo.models.parts.layers.linear import table_init
from zoo.models.parts.reduce import station
from zoo.models.parts.reduce.base import Reducer, Seen, Text, Wants
from zoo.models.parts.towers.vit import ViTConfig, clip_table


@dataclass(frozen=True)
class LlavaConfig(ModelConfig):
    """A vision-language model. The defaults are LLaVA-1.5 7B.

    Attributes:
      tower: the vision transformer.
      connector: from vision tokens to decoder tokens.
      decoder: the language model.
      policies: applied to the decoder's plan in this order; the first is innermost.
      reducer: leaves vision tokens out, or merges them, before the decoder; None keeps all.
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
    reducer: Reducer | None = None
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
        self._check_reducer()
        self.plan()
        if self.crops is not None and self.keep_class:
            raise ValueError("keep_class: class tokens have no place in a grid of crops")
        if self.tap_source is not None:
            self.tap_source.hidden_states(depth)
            self.tap_source.taps(self)

    def _check_reducer(self) -> None:
        """Raise ValueError unless the reducer, if any, fits the tower and the connector."""
        if self.reducer is None:
            return
        if not isinstance(self.reducer, Reducer):
            raise ValueError(
                f"reducer = {self.reducer!r}: want a configuration that derives from "
                "zoo.models.parts.reduce.base.Reducer, or with zoo.create the name of a method"
            )
        if self.keep_class:
            raise ValueError("keep_class: reducers choose among patches; want a model without")
        if self.reducing:
            station.point_of(self.reducer, self.connector, taps=self.tap_source is not None)
            self.reducer.wants(self.tower, self.read_layer)
            if len(self.layers) > 1 and self.running_tower is not self.tower:
                raise ValueError(
                    f"vision_layer = {self.vision_layer}: {type(self.reducer).__name__} merges "
                    "tokens in the tower, whose layers then have different numbers of them; want "
                    "a model that reads one layer"
                )

    @property
    def reducing(self) -> bool:
        """Whether there is a reducer, and it leaves anything out."""
        return self.reducer is not None and (
            self.reducer.num_kept(self.tile_tokens) < self.tile_tokens
        )

    @property
    def running_tower(self) -> Any:
        """The tower, in whose layers the reducer may have put policies."""
        if not self.reducing or self.reducer is None:
            return self.tower
        return self.reducer.tower(self.tower, self.read_layer)

    @property
    def _no_newlines(self) -> bool:
        """Whether the reducer leaves newlines out."""
        return self.reducing and self.reducer is not None and not self.reducer.newlines

    @property
    def read_layer(self) -> int:
        """The tower's layer that makes the vision tokens, from 1."""
        return self.layers[-1] if self.layers else self.tower.depth

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
        found = {crops for part in parts if (crops := getattr(part, "crops", None)) is not None}
        if len(found) > 1:
            raise ValueError(f"{found}: want the same crops of a picture wherever they are seen")
        return found.pop() if found else None

    @property
    def tile_tokens(self) -> int:
        """Q: vision tokens of one image or tile, at most, before a reducer."""
        return self.connector.num_tokens(self.tower.grid) + self.keep_class

    @property
    def all_slots(self) -> int:
        """Vision tokens of the examples that `inputs` describes, before a reducer."""
        return self.num_slots or self.num_images * self.tile_tokens + self.newline

    @property
    def slots(self) -> int:
        """S: vision tokens of the examples that `inputs` describes, as the decoder sees them."""
        if not self.reducing:
            return self.all_slots
        assert self.reducer is not None
        # A method that acts on slots keeps a share of these, which may be fewer than all tokens.
        slots = self.all_slots if self.reducer.point == "slots" else None
        kept = self.reducer.num_slots(self.num_images, self.tile_tokens, slots)
        return min(kept, self.all_slots)

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that checkpoints carry and no forward pass reads, such as the tower's last
        norm.
        """
        names = list(self.tower.unread)
        own = ("newline",) if self.newline and self._no_newlines else ()
        if self.layers and self.tower.final_norm:
            names += ["final_norm/scale", "final_norm/bias"]
        if self.tower.attention_pool:
            linears = [f"pool/{part}" for part in ("q", "k", "v", "out", "up", "down")]
            names += [f"{part}/{leaf}" for part in linears for leaf in ("kernel", "bias")]
            names += ["pool/query", "pool/mlp_norm/scale", "pool/mlp_norm/bias"]
        return tuple(f"tower/{name}" for name in names) + own

    def plan(self) -> Plan:
        """The decoder's plan with all policies applied, those of the reducer last."""
        own = self.reducer.policies(self.read_layer) if self.reducing and self.reducer else ()
        return compose(
            self.decoder.plan(),
            (*self.policies, *own),
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
            batch["layout"] = jax.ShapeDtypeStruct((batch_size, self.all_slots), jnp.int32)
            if self.reducing:
                batch["tiles"] = jax.ShapeDtypeStruct((batch_size, 1, 3), jnp.int32)
        if self.reducing and self.reducer is not None:
            batch.update(self.reducer.inputs(batch_size))
        return batch


class Llava(LanguageModel):
    """Images through tower and connector into the placeholders of the text, then the decoder."""

    config: LlavaConfig

    def setup(self) -> None:
        c = self.config
        self.tower = c.running_tower.build()
        vision_width = c.tower.width * max(1, len(c.layers))
        self.connector = c.connector.build(vision_width, c.decoder.width, c.tower.grid)
        self.decoder = Decoder(c.decoder, c.plan())
        if c.tap_source is not None:
            self.taps = c.tap_source.taps(c)
        if c.reducing:
            assert c.reducer is not None
            self.reducer = c.reducer.build(vision_width, c.decoder.width)
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
        text: Text | None = None,
        tiles: Array | None = None,
    ) -> Visual:
        """Pixels [B, M, H, W, 3] to what the connector makes of them: tokens [B, M, Q, D], or what
        a reducer that acts on tiles has kept of these.

        Args:
          pixels: whole images.
          crops: [B, M, V, H, W, 3], for models that see them.
          view_grid: int [B, M, 2], how the crops lie; a square grid by default.
          budget: as in `__call__`.
          text: for reducers that read it.
          tiles: int [B, I, 3], as in a batch, for reducers that read it.

        Raises:
          ValueError: no crops for a model that sees them, or others than it wants; no text for a
            reducer that reads it.
        """
        batch = {"pixels": pixels, "crops": crops, "view_grid": view_grid, "tiles": tiles}
        given = {name: value for name, value in batch.items() if value is not None}
        return self._see(given, budget, text)[0]

    def stream(self, batch: Batch, budget: int | Array | None) -> tuple[Stream, Memory]:
        """Embedded text with the images in their places; text alone if there are no pixels.

        Raises:
          ValueError: pixels without a `layout` for a model with a newline, which stands where the
            layout says; pixels without the crops that the model sees.
        """
        c, embedded = self.config, self.decoder.embed(batch["ids"])
        visual, seen, kept = Visual(None), None, None
        extra = self.newline[None] if c.newline else None
        if "pixels" in batch:
            text = station.text_of(batch, embedded, c.image_id)
            visual, seen = self._see(batch, budget, text)
            if c.newline and "layout" not in batch:
                raise ValueError(
                    "a batch of pixels for a model with a newline needs a layout and sizes: "
                    "zoo.processors.tiling.pack makes them"
                )
            kept = self._remaining(batch, visual.tokens, seen, text, extra)
        memory = visual.memory
        if "taps" in memory:
            memory = {**memory, "taps": number_taps(memory["taps"], batch, extra)}
        places = {name: batch.get(name) for name in ("sizes", "layout", "blend")}
        if kept is not None and kept.places is not None:
            places = {"sizes": kept.places.sizes, "layout": kept.places.layout}
        stream = splice(
            batch["ids"],
            embedded,
            visual.tokens if kept is None else kept.vision,
            image_id=c.image_id,
            extra=extra,
            **places,
            **{name: batch.get(name) for name in ("text_mask", "labels", "segments", "guide")},
        )
        return stream if kept is None else kept.restore(stream, c.reducer), memory

    def _see(
        self, batch: Batch, budget: int | Array | None, text: Text | None
    ) -> tuple[Visual, Seen | None]:
        """The vision tokens of tiles, reduced where that is done in tiles; and with a reducer, what
        it sees of them.
        """
        c, source = self.config, self.config.tap_source
        features, whole = self._features(batch)
        if not c.reducing:
            return self._connect(features, batch, budget), None
        assert c.reducer is not None
        if c.reducer.reads_text and text is None:
            raise ValueError(
                f"{type(c.reducer).__name__} chooses vision tokens by the text: want a batch with "
                "ids, or the text"
            )
        blended = "blend" in batch
        point = station.point_of(c.reducer, c.connector, taps=source is not None, blended=blended)
        stride = getattr(c.connector, "stride", None)
        rows, columns = c.tower.grid
        grid = None if stride is None else (rows // stride, columns // stride)
        facts = {"tiles": batch.get("tiles"), "layer": c.read_layer, "prefix": c.tower.prefix}
        if point == "tower":
            facts["number"] = math.prod(whole.grid) if whole.aux else None
            seen = station.seen_by(c.reducer, whole.tokens, whole, grid=grid, **facts)
            kept = self.reducer(seen, text, keep=seen.per_tile)
            inner = Features(kept.tokens, features.grid)
            visual = self._connect(inner, batch, None)
            if "labels" in batch:
                memory = c.reducer.remember(whole, self._connect_detached)
                visual = visual.replace(memory={**visual.memory, **memory})
            return visual.replace(tokens=kept.replace(tokens=visual.tokens.tokens)), seen
        visual = self._connect(features, batch, budget)
        found, mask = visual.tokens, visual.tokens.mask
        if c.reducer.skips_padding and "shown" in batch and grid is not None:
            shown = station.shown_tokens(batch["shown"], grid, c.tower.image_size // grid[0])
            mask = shown if mask is None else mask & shown
        seen = station.seen_by(c.reducer, found.tokens, whole, grid=grid, mask=mask, **facts)
        if point == "connector":
            kept = self.reducer(seen, text, keep=seen.per_tile)
            visual = visual.replace(tokens=kept)
        return visual, seen

    def _features(self, batch: Batch) -> tuple[Features, Features]:
        """What the tower makes of the pictures; and of the whole ones, where it sees crops too."""
        c, source, pixels = self.config, self.config.tap_source, batch["pixels"]
        if c.crops is not None:
            if batch.get("crops") is None:
                raise ValueError(
                    f"a batch of pixels for this model needs crops: {c.crops.number} of each "
                    "image, as its processor makes them"
                )
            pixels = join_views(pixels, batch["crops"], c.crops)
        more = () if source is None else source.hidden_states(c.tower.depth)
        wants = c.reducer.wants(c.tower, c.read_layer) if c.reducing else Wants()
        taps = tuple(sorted({*c.layers, *more, *wants.taps}))
        last = max(*taps, *wants.qk, 0) if c.layers and not self.is_initializing() else None
        options: dict[str, Any] = {"qk": wants.qk} if wants.qk else {}
        if getattr(c.tower, "crops", None) is not None and source is not None and source.crops:
            options["crops"] = True  # or the tower keeps them to itself
        features = self.tower(pixels, taps=taps, stop_after=last, **options)
        if c.layers:
            first = 0 if c.keep_class else c.tower.prefix
            read = [features.taps[tap][..., first:, :] for tap in c.layers]
            features = features.replace(tokens=jnp.concatenate(read, -1))
        if features.tokens.ndim == 4:
            return features, features
        return features, jax.tree.map(lambda leaf: leaf[:, :, 0], features)

    def _connect(self, features: Features, batch: Batch, budget: int | Array | None) -> Visual:
        """What the connector makes of features, or the policy that makes taps around it."""
        if self.config.tap_source is None:
            return self.connector(features, budget=budget)
        grid = batch.get("view_grid")
        return self.taps(features, self.connector, view_grid=grid, budget=budget)

    def _connect_detached(self, tokens: Array) -> Array:
        """What the connector makes of tokens one by one, with no gradient to its parameters."""
        features = Features(tokens, tokens.shape[-2:-1])
        connected: Array = detached(self.connector, features).tokens.tokens
        return connected

    def _remaining(
        self, batch: Batch, vision: TokenSet, seen: Seen | None, text: Text, extra: Array | None
    ) -> station.Remaining | None:
        """What remains of the vision tokens, in its places; None where there is no reducer."""
        c = self.config
        if seen is None:
            return None
        assert c.reducer is not None
        tokens = c.tile_tokens
        if vision.index is not None:
            return station.remaining(c.reducer, vision, batch, seen, tokens)
        filled, cell, valid = fill_slots(vision, batch.get("layout"), batch.get("blend"), extra)
        newline = vision.tokens.shape[1] * vision.tokens.shape[2]
        seen = station.at_slots(c.reducer, seen, batch, filled, valid, newline)
        keep = c.reducer.num_slots(vision.tokens.shape[1], tokens, filled.shape[1])
        kept = self.reducer(seen, text, keep=keep)
        return station.remaining_slots(kept, batch, cell)


def llava_table(config: LlavaConfig) -> Table:
    """Keys of tower and decoder in official LLaVA-1.5 checkpoints; connectors add theirs."""
    tower = clip_table(config.tower).under("tower", "model.vision_tower.vision_tower.vision_model.")
    return tower + decoder_table(config.decoder).under("decoder")
