"""The Qwen-VL assembly: pictures in their native resolution, merged patches, a decoder with rotary
positions in time, rows and columns.

Follows: arXiv:2409.12191 (Qwen2-VL), arXiv:2502.13923 (Qwen2.5-VL), arXiv:2511.21631 (Qwen3-VL:
several levels of the tower).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Table
from zoo.models.core.types import Array, Batch, Memory, Stream, TokenSet, Visual, take
from zoo.models.parts.assemblies.language import LanguageModel
from zoo.models.parts.assemblies.splice import splice
from zoo.models.parts.decoders.composition import compose
from zoo.models.parts.decoders.gqa import Decoder, DecoderConfig, Plan, decoder_table
from zoo.models.parts.decoders.policies import AddTap, wrap
from zoo.models.parts.decoders.reading import read_decoder, read_rope
from zoo.models.parts.layers.rope import RopeConfig
from zoo.models.parts.reduce import native, station
from zoo.models.parts.reduce.base import Reducer
from zoo.models.parts.towers.qwen_vit import (
    PatchMerger,
    QwenViTConfig,
    merger_table,
    tower_table,
)

QWEN2_7B = DecoderConfig(
    vocab_size=152_064,
    width=3584,
    depth=28,
    num_heads=28,
    num_kv_heads=4,
    mlp_dim=18_944,
    context=32_768,
    rope=RopeConfig(theta=1e6, sections=(16, 24, 24)),
    norm_eps=1e-6,
    qkv_bias=True,
)
"""The language model of the 7B models."""

RENAMES = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
"""From the names of the live modules of transformers 5 to those of the hub's checkpoints."""

MODULES = ((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual."))
"""The way back."""


@dataclass(frozen=True)
class _Levels:
    """The policy that adds `count` levels behind the first layers, outside of all others."""

    count: int

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """What is behind layer i is before layer i + 1."""
        del slots
        return wrap(plan, {i + 1: AddTap(level=i) for i in range(self.count)})


@dataclass(frozen=True)
class QwenVLConfig(ModelConfig):
    """A vision-language model. The defaults are Qwen2-VL 7B.

    Attributes:
      tower: the vision transformer.
      decoder: the language model; its rotary embedding has `sections`.
      levels: depths of the tower, rising, whose features also become tokens, each by a connector of
        its own; those of the first are added to the hidden states of the same image tokens behind
        the decoder's first layer, those of the second behind its second, and so on.
      policies: applied to the decoder's plan in this order; the first is innermost.
      reducer: leaves vision tokens out before the decoder, see `zoo.models.parts.reduce.native`;
        None keeps all.
      image_id: the placeholder id of an image.
      video_id: the placeholder id of a video.
      tokens_per_second: temporal positions per second of video; None: one per pair of frames. The
        processor reads it, and the next.
      time_in_text: a video is one picture for each pair of frames, its time in the text before it.
      num_images: images per example that `inputs` describes.
      image_size: side in pixels of the square images that `inputs` describes.
      text_tokens: text length that `inputs` describes.
    """

    tower: QwenViTConfig = field(default_factory=QwenViTConfig)
    decoder: DecoderConfig = QWEN2_7B
    levels: tuple[int, ...] = ()
    policies: tuple[Any, ...] = ()
    reducer: Reducer | None = None
    image_id: int = 151_655
    video_id: int = 151_656
    tokens_per_second: float | None = None
    time_in_text: bool = False
    num_images: int = 1
    image_size: int = 448
    text_tokens: int = 64

    def __post_init__(self) -> None:
        side = self.tower.patch_size * self.tower.merge_size
        if self.image_size % side:
            raise ValueError(f"image_size = {self.image_size}: want a multiple of {side}")
        depths = range(1, self.tower.depth + 1)
        if self.levels != tuple(level for level in depths if level in self.levels):
            raise ValueError(
                f"levels = {self.levels}: want rising depths of the tower, 1 to {self.tower.depth}"
            )
        if self.reducer is not None:
            native.check(self.reducer, self.tower)
            if self.levels:
                raise ValueError(
                    f"levels = {self.levels}: these are added to all image tokens; want no "
                    "reducer, or a model without levels"
                )
        self.plan()

    @property
    def reducing(self) -> bool:
        """Whether there is a reducer, and it leaves anything out."""
        return self.reducer is not None and self.reducer.keep != 1.0

    @property
    def slots(self) -> int:
        """Vision tokens of the examples that `inputs` describes, as the decoder sees them."""
        every = self.num_images * self.image_tokens
        if not self.reducing or self.reducer is None:
            return every
        return self.reducer.num_slots(1, every, every)

    @property
    def image_tokens(self) -> int:
        """Tokens that the language model sees of an image of `inputs`."""
        return (self.image_size // self.tower.patch_size) ** 2 // self.tower.block

    def plan(self) -> Plan:
        """The decoder's plan with all policies applied, and the levels added between its layers."""
        slots = self.slots
        plan = compose(self.decoder.plan(), self.policies, slots=slots)
        if not self.levels:
            return plan
        # The taps are those of the levels: no other policy may read them.
        return compose(plan, (_Levels(len(self.levels)),), slots=slots, memory=("taps",))

    def build(self) -> "QwenVL":
        """The module."""
        return QwenVL(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a training batch."""
        tower, b, i, t = self.tower, batch_size, self.num_images, self.text_tokens
        patches, slots = self.image_tokens * tower.block, i * self.image_tokens
        ints = {
            "ids": (b, t),
            "labels": (b, t),
            "segments": (b, t),
            "sizes": (b, i),
            "patch_grid": (b, i * patches, 2),
            "patch_segment": (b, i * patches),
            "patch_frame": (b, i, patches),
        }
        if tower.window_size is not None:
            windows = i * (-(-self.image_size // tower.window_size)) ** 2
            ints["patch_window"] = (b, windows, tower.window_patches)
        floats = {
            "patches": (b, i * patches, tower.patch_dim),
            "positions": (b, t - i + slots, 3),
        }
        return {
            **{name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in ints.items()},
            **{name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in floats.items()},
            "text_mask": jax.ShapeDtypeStruct((b, t), jnp.bool_),
        }


class QwenVL(LanguageModel):
    """Pictures through tower and merger into the placeholders of the text, then the decoder."""

    config: QwenVLConfig

    def setup(self) -> None:
        c = self.config
        self.tower = c.tower.build()
        sizes = (c.tower.width, c.decoder.width, c.tower.block, c.tower.norm, c.tower.norm_eps)
        self.connector = PatchMerger(*sizes)
        self.level = [PatchMerger(*sizes, norm_blocks=True) for _ in c.levels]
        self.decoder = Decoder(c.decoder, c.plan())
        if c.reducing:
            assert c.reducer is not None
            self.reducer = c.reducer.build(c.decoder.width, c.decoder.width)

    def encode_image(self, batch: Batch) -> Visual:
        """The pictures of a batch (its names that begin with `patch`) as tokens [B, 1, S, D]: those
        of all pictures of a row, in the order of their placeholders, then padding. With `levels`,
        `memory["taps"]` [G, B, S, D] has those of each level.
        """
        features = self.tower(
            batch["patches"],
            grid=batch["patch_grid"],
            segment=batch["patch_segment"],
            frame=batch["patch_frame"],
            window=batch.get("patch_window"),
            taps=self.config.levels,
        )
        tokens, mask = self.connector(features.tokens), features.mask[:, :: self.config.tower.block]
        memory = {}
        if self.level:
            taps = [features.taps[level] for level in self.config.levels]
            memory["taps"] = jnp.stack([m(x) for m, x in zip(self.level, taps, strict=True)])
        return Visual(TokenSet(tokens[:, None], mask[:, None]), memory)

    def stream(self, batch: Batch, budget: int | Array | None) -> tuple[Stream, Memory]:
        """Embedded text with the pictures in their places; text alone if there are no patches.

        Raises:
          ValueError: a budget, because every picture keeps all of its tokens; or patches without
            `sizes` and `positions`.
        """
        if budget is not None:
            raise ValueError(f"budget = {budget}: this model keeps all tokens of a picture")
        vision, memory = None, {}
        if "patches" in batch:
            if missing := sorted({"sizes", "positions"} - set(batch)):
                raise ValueError(f"a batch with patches also needs {' and '.join(missing)}")
            visual = self.encode_image(batch)
            vision, memory = visual.tokens, visual.memory
        c = self.config
        embedded = self.decoder.embed(batch["ids"])
        ids = jnp.where(batch["ids"] == c.video_id, c.image_id, batch["ids"])
        places, kept = {"sizes": batch.get("sizes")}, None
        if c.reducing and vision is not None:
            assert c.reducer is not None
            text = station.text_of({**batch, "ids": ids}, embedded, c.image_id)
            kept = native.reduced(self.reducer, c.reducer, vision, text, batch["sizes"])
            assert kept.places is not None
            places = {"sizes": kept.places.sizes, "layout": kept.places.layout}
        stream = splice(
            ids,
            embedded,
            vision if kept is None else kept.vision,
            image_id=c.image_id,
            **places,
            **{name: batch.get(name) for name in ("text_mask", "labels", "segments", "guide")},
        )
        if vision is None:
            return stream, memory
        rows, length = ids.shape
        whole = (rows, length - batch["sizes"].shape[1] + vision.tokens.shape[2], 3)
        if batch["positions"].shape != whole:
            raise ValueError(
                f"positions: got {batch['positions'].shape}, want {whole}, one for every token of "
                "the expanded sequence"
            )
        position = batch["positions"]
        if kept is not None:
            # The places that the tokens have in the whole sequence are where their positions are.
            stream = kept.restore(stream, replace(c.reducer, positions="original"))
            place = jnp.clip(stream.tokens.position.astype(jnp.int32), 0, whole[1] - 1)
            position = take(position, place)
        tokens = stream.tokens.replace(position=position.astype(jnp.float32))
        return stream.replace(tokens=tokens), memory


def qwen_vl_table(config: QwenVLConfig) -> Table:
    """Keys in the hub's checkpoints: `visual.…`, `model.…` and `lm_head.…`."""
    return (
        tower_table(config.tower).under("tower", "visual.")
        + merger_table(config.tower).under("connector", "visual.merger.")
        + decoder_table(config.decoder).under("decoder")
    )


def tower_fields(vision: Fields, *, depth: int = 32, patch_size: int = 14) -> dict[str, Any]:
    """What the towers of all versions share in their `vision_config`, for `QwenViTConfig`; `depth`
    and `patch_size` are what a file means that names none.
    """
    channels, patch_size = vision.take("in_channels", 3), vision.take("patch_size", patch_size)
    # What older files call the same things again; the original does not read these.
    vision.want("in_chans", channels)
    vision.want("spatial_patch_size", patch_size)
    rope = vision.sub("rope_parameters")
    rope.want("rope_type", "axial", "default")
    theta = float(rope.take("rope_theta", 10_000.0))
    rope.done()
    return {
        "depth": vision.take("depth", depth),
        "num_heads": vision.take("num_heads", 16),
        "channels": channels,
        "patch_size": patch_size,
        "temporal_patch_size": vision.take("temporal_patch_size", 2),
        "merge_size": vision.take("spatial_merge_size", 2),
        "rope_theta": theta,
    }


def read_qwen_vl(
    fields: Fields,
    tower: QwenViTConfig,
    width: int,
    read_text: Callable[[Fields], DecoderConfig] | None = None,
    **known: Any,
) -> QwenVLConfig:
    """The configuration that a `config.json` of the family describes.

    The fields of the language model stand in `text_config`, or in older files beside
    `vision_config`; of files that have both the original reads the former.

    Args:
      fields: of the whole file.
      tower: what its `vision_config` says.
      width: of the tokens that the tower makes for the language model.
      read_text: from the fields of the language model to the decoder; by default that of Qwen2.
      **known: further fields of the `QwenVLConfig`.

    Raises:
      UsageError: a field that this code does not compute.
    """
    text = fields
    if "text_config" in fields:
        text = fields.sub("text_config")
        fields.ignore(*_TEXT_FIELDS)
    tied = bool(fields.take("tie_word_embeddings", False))
    decoder = (read_text or _read_qwen2)(text)
    decoder = replace(decoder, tie_embeddings=tied or decoder.tie_embeddings)
    if width != decoder.width:
        raise UsageError(
            f"{fields.name}: the tower makes tokens of width {width}, the language model takes "
            f"{decoder.width}"
        )
    # The tokens around a picture, which the prompt holds.
    fields.ignore("vision_start_token_id", "vision_end_token_id", "vision_token_id")
    config = QwenVLConfig(
        tower,
        decoder,
        image_id=fields.take("image_token_id", 151_655),
        video_id=fields.take("video_token_id", 151_656),
        **known,
    )
    text.done()
    fields.done()
    return config


_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
"""What older files say of the language model beside `vision_config`."""


def _read_qwen2(fields: Fields) -> DecoderConfig:
    """The language model of Qwen2."""
    fields.want("hidden_act", "silu")
    fields.want("use_sliding_window", False)
    fields.ignore("sliding_window", "max_window_layers")  # not in use
    context = fields.take("max_position_embeddings", 32_768)
    decoder = read_decoder(
        fields,
        vocab_size=152_064,
        width=8192,
        mlp_dim=29_568,
        depth=80,
        num_heads=64,
        num_kv_heads=8,
        context=context,
        norm_eps=1e-5,
        rope=read_rope(
            fields,
            context=context,
            theta=1e6,
            kinds=("default", "linear", "yarn"),
            sections=(16, 24, 24),
        ),
        qkv_bias=True,
    )
    fields.want("layer_types", ("full_attention",) * decoder.depth)
    return decoder
