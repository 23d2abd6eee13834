"""DeepStack: more vision tokens at the same sequence length, added layer by layer to those that are
there already.

The picture seen whole gives the vision tokens of the sequence. A closer look (crops of the picture,
or other layers of the tower) gives further groups of as many tokens, of which group i is added to
the hidden states of the same tokens before decoder layer `start + i interval`. With crops, nothing
has to be learned that LLaVA-1.5 does not have.

Follows: arXiv:2406.04334; groups from layers of the tower follow Qwen3-VL, arXiv:2511.21631.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.card import Card
from zoo.models.core.keytable import AnyRow, Row, Table, linear
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Features, Stream, Tokens, TokenSet, Visual
from zoo.models.parts.assemblies.llava import LlavaConfig, llava_table
from zoo.models.parts.connect.crops import Crops, Sampling, deal, default_grid, present
from zoo.models.parts.connect.mlp import MLPConnector
from zoo.models.parts.decoders.gqa import DecoderConfig, Plan
from zoo.models.parts.decoders.policies import AddTap, wrap
from zoo.models.parts.towers.vit import ViT, ViTConfig

CARD = Card(
    slug="deepstack",
    paper="arXiv:2406.04334",
    code="https://github.com/MengLcool/DeepStack-VL",
    differs=(
        "Groups are added to the vision tokens wherever they stand, so that prompts may have "
        "several pictures; the official code finds those of the first picture only.",
        "Groups are made of the tower's tokens, before the connector instead of after it: the same "
        "numbers for one that works token by token, and any other connector can be used.",
        "Layers that the decoder does not have are refused; the official code passes over them.",
        "The tower's further layers, for a start after its last one, are asked for (`added`) and "
        "may be any number; the official code appends five of its own accord.",
    ),
)


@dataclass(frozen=True)
class Views:
    """Groups are dealt from crops of the picture, one for each crop at most.

    Attributes:
      sampling: how the tokens of all crops become groups, see `zoo.models.parts.connect.crops`.
      square: pictures are always cut into a square grid of crops, not as suits their proportions.
    """

    sampling: Sampling = "2d"
    square: bool = False

    def __post_init__(self) -> None:
        if self.sampling not in Sampling.__args__:
            raise ValueError(
                f"sampling = {self.sampling!r}: want one of {', '.join(Sampling.__args__)}"
            )


@dataclass(frozen=True)
class Levels:
    """Groups are hidden states of the tower, each through a connector of its own.

    Attributes:
      layers: which hidden states, numbered as `LlavaConfig.vision_layer`, one for each group.
      connector: configuration of each of the connectors.
    """

    layers: tuple[int, ...]
    connector: Any = field(default_factory=MLPConnector)


@dataclass(frozen=True)
class DeepStack:
    """The policy.

    Attributes:
      start: decoder layer, from 0, before which the first group is added.
      interval: layers from one group to the next.
      groups: G.
      source: where the groups come from.
    """

    start: int = 1
    interval: int = 1
    groups: int = 4
    source: Views | Levels = field(default_factory=Views)

    def __post_init__(self) -> None:
        if self.start < 0 or self.interval < 1 or self.groups < 1:
            raise ValueError(
                f"start = {self.start}, interval = {self.interval}, groups = {self.groups}: want 0 "
                "or more, 1 or more, 1 or more"
            )
        if isinstance(self.source, Levels) and len(self.source.layers) != self.groups:
            raise ValueError(
                f"groups = {self.groups}: want one for each of the layers {self.source.layers} of "
                "the tower"
            )

    @property
    def crops(self) -> Crops | None:
        """The crops that it wants to see of every image."""
        return Crops(self.groups, self.source.square) if isinstance(self.source, Views) else None

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan whose layers add a group each."""
        del slots
        added = {self.start + self.interval * i: AddTap(level=i) for i in range(self.groups)}
        return wrap(plan, added)

    def hidden_states(self, depth: int) -> tuple[int, ...]:
        """The hidden states that the groups are, 0 to `depth`."""
        if isinstance(self.source, Views):
            return ()
        given = self.source.layers
        chosen = tuple(layer + depth + 1 if layer < 0 else layer for layer in given)
        if bad := [layer for layer in chosen if not 0 <= layer <= depth]:
            raise ValueError(f"layers {given} mean hidden states {bad}: the tower has 0 to {depth}")
        return chosen

    def taps(self, config: LlavaConfig) -> nn.Module:
        """The module that makes the groups."""
        if isinstance(self.source, Views):
            return ViewTaps(self)
        grid, own = config.tower.grid, self.source.connector
        counts = own.num_tokens(grid), config.connector.num_tokens(grid)
        if counts[0] != counts[1] or config.keep_class:
            raise ValueError(
                f"{own!r} makes {counts[0]} tokens of an image, which are added to "
                f"{config.tile_tokens}: want as many"
            )
        return LevelTaps(self, config.tower, config.decoder.width)


class ViewTaps(nn.Module):
    """Groups from crops. Nothing is learned here."""

    config: DeepStack

    def __call__(
        self,
        vision: Features,
        connector: nn.Module,
        *,
        view_grid: Array | None = None,
        budget: int | Array | None = None,
    ) -> Visual:
        """Features [B, M, 1 + V, N, C], whole pictures first, to the vision tokens of the whole and
        `memory["taps"]` [G, B, M Q, D].

        Args:
          vision: what the tower makes of all views.
          connector: is applied to the whole and to every group.
          view_grid: int [B, M, 2], rows and columns of the crops; a square grid by default.
          budget: tokens of each image and of each group, where the connector can vary them.
        """
        c, tokens = self.config, vision.tokens
        batch, images, _, n, width = tokens.shape
        grid = default_grid(c.crops) if view_grid is None else view_grid
        options = {"groups": c.groups, "sampling": c.source.sampling, "side": vision.grid}
        groups = deal(tokens[:, :, 1:], grid, **options)  # [B, M, G, N, C]
        views = jnp.concatenate([tokens[:, :, :1], groups], 2)
        views = views.reshape(batch, images * (1 + c.groups), n, width)
        read: TokenSet = connector(Features(views, vision.grid), budget=budget).tokens
        tokens = read.tokens.reshape(batch, images, 1 + c.groups, *read.tokens.shape[2:])
        mask = read.mask
        if mask is not None:
            mask = mask.reshape(tokens.shape[:-1])[:, :, 0]
        there = jnp.broadcast_to(present(grid, c.groups), (batch, images, c.groups))
        groups = jnp.where(there[..., None, None], tokens[:, :, 1:], 0)
        return Visual(TokenSet(tokens[:, :, 0], mask), {"taps": _by_level(groups)})


class LevelTaps(nn.Module):
    """Groups from hidden states of the tower, each through a connector of its own."""

    config: DeepStack
    tower: ViTConfig
    width: int

    def setup(self) -> None:
        source, tower = self.config.source, self.tower
        self.levels = [
            source.connector.build(tower.width, self.width, tower.grid) for _ in source.layers
        ]

    def __call__(
        self,
        vision: Features,
        connector: nn.Module,
        *,
        view_grid: Array | None = None,
        budget: int | Array | None = None,
    ) -> Visual:
        """Features [B, M, N, C] with the hidden states to the vision tokens and `memory["taps"]`
        [G, B, M Q, D].
        """
        del view_grid
        visual: Visual = connector(vision, budget=budget)
        n, read = vision.grid[0] * vision.grid[1], []
        layers = self.config.hidden_states(self.tower.depth)
        for layer, level in zip(layers, self.levels, strict=True):
            patches = Features(vision.taps[layer][..., -n:, :], vision.grid)
            read.append(level(patches, budget=budget).tokens.tokens)
        return visual.replace(memory={**visual.memory, "taps": _by_level(jnp.stack(read, 2))})


def _by_level(groups: Array) -> Array:
    """[B, M, G, Q, D] to [G, B, M Q, D]."""
    batch, images, levels, queries, width = groups.shape
    by_level: Array = groups.transpose(2, 0, 1, 3, 4)
    return by_level.reshape(levels, batch, images * queries, width)


@dataclass(frozen=True)
class DeepStackV(ViTConfig):
    """A tower that adds the groups within itself: the decoder sees an ordinary picture.

    The whole picture and its four crops go through the first layers together; then the crops become
    groups, which are added to the patches of the whole before one layer each. Beside the policy
    `DeepStack` with the same crops, these go on through all layers, and the decoder adds what
    becomes of them.

    Attributes:
      start: layer, from 0, before which the first group is added; by default the middle one.
      added: of the `depth` layers, how many at the end checkpoints of the plain tower lack.
    """

    start: int | None = None
    added: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.added < self.depth:
            raise ValueError(f"added = {self.added}: want 0 or more, and less than {self.depth}")
        if not 0 <= self.first < self.depth:
            raise ValueError(f"start = {self.start}: the tower has layers 0 to {self.depth - 1}")

    @property
    def crops(self) -> Crops:
        """The crops that it wants to see of every image."""
        return Crops(4, square=True)

    @property
    def first(self) -> int:
        """The layer before which the first group is added."""
        return self.depth // 2 if self.start is None else self.start

    def build(self) -> "StackedViT":
        """The module."""
        return StackedViT(self)


class StackedViT(ViT):
    """The tower that looks closer.

    `features.taps[k]` is what layer k, counted from 0, takes in: with the group that is added
    before it.
    """

    config: DeepStackV

    def __call__(
        self,
        pixels: Array,
        *,
        taps: tuple[int, ...] = (),
        qk: tuple[int, ...] = (),
        keep: Array | None = None,
        insert: Array | None = None,
        stop_after: int | None = None,
        crops: bool = False,
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., 1 + V, H, W, 3], of every image the whole and its crops.
          taps: as in `ViT`, of what is handed back.
          qk: not of this tower; nor `keep` and `insert`.
          keep: see above.
          insert: see above.
          stop_after: as in `ViT`.
          crops: they go on through all layers, as in a plain tower, and are handed back too.

        Returns:
          Features of the whole, [..., N, C]; with `crops` of all views, [..., 1 + V, N, C].

        Raises:
          ValueError: as `ViT`, and for what this tower does not have.
        """
        c, (*lead, views, height, width, _) = self.config, pixels.shape
        if qk or keep is not None or insert is not None:
            raise ValueError("qk, keep, insert: a tower that sees crops has none of these")
        last = c.depth if stop_after is None else stop_after
        self._check(pixels[(0,) * (len(lead) + 1)], taps, qk, last)
        hidden, grid = self._embed(pixels.reshape(-1, height, width, 3), None, None)
        stream = _plain(hidden)

        def shaped(seen: Array) -> Array:
            """[B, 1 + V, ...] as it is handed back."""
            wanted: Array = seen if crops else seen[:, 0]
            return wanted.reshape(*lead, *wanted.shape[1:])

        joint = min(c.first, last)
        found: dict[int, Array] = {}
        done, prefix, running = 0, c.prefix, views
        levels = range(c.first, min(c.first + c.crops.number, c.depth))
        for mark in sorted({*taps, *levels, joint, last}):
            if mark > last:
                break
            if mark > done:
                stream, _, _ = self.stack(stream, start=done, stop=mark)
                done = mark
            seen = stream.hidden.reshape(-1, running, *stream.hidden.shape[1:])  # [B, 1 + V, ...]
            if mark == joint:
                side = default_grid(c.crops)
                options = {"groups": c.crops.number, "sampling": "2d", "side": grid}
                groups = deal(seen[:, 1:, prefix:], side, **options)
                if not crops:
                    seen, running = seen[:, :1], 1
            if mark in levels:
                seen = seen.at[:, 0, prefix:].add(groups[:, mark - c.first])
            if mark == joint or mark in levels:
                stream = _plain(seen.reshape(-1, *seen.shape[2:]))
            if mark in taps:
                found[mark] = shaped(seen)

        y = stream.hidden
        if c.final_norm and stop_after is None:
            y = self.final_norm(y)
        y = shaped(y.reshape(-1, running, *y.shape[1:]))
        cls = y[..., 0, :] if c.class_token else None
        return Features(y[..., prefix:, :], grid, cls=cls, taps=found)


def _plain(hidden: Array) -> Stream:
    return Stream(hidden, Tokens.sequence(jnp.ones(hidden.shape[:2], bool)))


_TINY = ViTConfig(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=32)

VARIANTS = {
    # Sizes of menglc/deepstack-l-vicuna-7b and -l-hd-vicuna-7b: LLaVA-1.5 with Vicuna v1.5.
    "deepstack_l_vicuna_7b": LlavaConfig(policies=(DeepStack(),)),
    # A picture whole and in 2 x 2 tiles; every one of these is a view with crops of its own.
    "deepstack_l_hd_vicuna_7b": LlavaConfig(
        policies=(DeepStack(source=Views(square=True)),),
        newline=True,
        num_images=5,
        num_slots=576 + 48 * 49,
    ),
    "deepstack_v_vicuna_7b": LlavaConfig(tower=DeepStackV()),
    "deepstack_tiny": LlavaConfig(
        tower=_TINY,
        decoder=DecoderConfig(
            vocab_size=320, width=24, depth=6, num_heads=4, num_kv_heads=2, mlp_dim=32
        ),
        policies=(DeepStack(),),
        image_id=3,
        text_tokens=12,
    ),
}


def table(config: LlavaConfig) -> Table:
    """Keys of the official checkpoints, which are those of LLaVA-1.5."""
    rows = []
    for path, key in (("up", "0"), ("down", "2")):
        rows.append(Row(f"connector/{path}/kernel", f"model.mm_projector.{key}.weight", linear()))
        rows.append(Row(f"connector/{path}/bias", f"model.mm_projector.{key}.bias"))
    if config.newline:
        rows.append(Row("newline", "model.image_newline"))
    found = llava_table(config)
    if isinstance(config.tower, DeepStackV) and config.tower.added:
        found = _with_added(found, config.tower)
    return found + Table(tuple(rows))


def _with_added(table: Table, tower: DeepStackV) -> Table:
    """The table of a tower whose last layers stand beside those of the plain one."""
    plain, own = "vision_tower.vision_model.encoder.layers.", tower.depth - tower.added
    names = [f"{plain}{n}" for n in range(own)]
    names += [f"post_encoder.{n}" for n in range(tower.added)]

    def rename(row: AnyRow) -> AnyRow:
        if not isinstance(row, Row) or not row.paths[0].startswith("tower/stack/"):
            return row
        keys = tuple(key.replace(plain, "") for key in row.keys)
        return dataclasses.replace(row, keys=keys, steps=tuple(names))

    return Table(tuple(map(rename, table.rows)))


register(CARD, VARIANTS, table=table)
