"""The form of a method that leaves vision tokens out, or merges them, before the decoder.

A method is a frozen dataclass that derives from `Reducer` and says in `reduce` which tokens remain:

    @dataclass(frozen=True)
    class Loudest(Reducer):
        keep: Keep = 64

        def wants(self, tower: Any, layer: int) -> Wants:
            return Wants(qk=(layer,))

        def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
            score = class_attention(*seen.features.qk[seen.layer])  # [B, M, patches of the tower]
            return choose(seen, seen.at_tokens(score), keep)

    register(CARD, VARIANTS, reducers={"loudest": Loudest})

It is a field of a model's configuration (`LlavaConfig.reducer`), and with its name registered also
`zoo.create("llava_1_5_7b", reducer="loudest", keep=64)` and `loaded.with_(reducer="loudest")`.

Where it acts. `point` says which tokens it is given, M tiles of N each:

    "tower"      what the tower makes, before the connector, which then has less to do
    "connector"  what the connector makes
    "slots"      what stands in the decoder's sequence, as one tile: tiles in reading order, grids
                 reduced and frames pooled as the model does it, newlines among them

A method that only selects (`merges` False) need not care: where its point is the tower and the
connector merges patches (InternVL) it is given the connector's tokens, and where a batch
interpolates between tokens (large pictures and videos of LLaVA-OneVision) the slots; `at_tokens`
turns scores of the tower's patches into those of the tokens at hand, and `choose` keeps the share
of every tile. A method that merges is refused where its point is not to be had.

Pictures in their native resolution (Qwen2-VL) have no tiles: see `zoo.models.parts.reduce.native`.

What becomes of tiles. Kept tokens of a picture that was cut into tiles stand in the order that
`arrange` names, see `Arrange`. A method that keeps all tokens is not run: the model is the plain
one. The kept tokens carry their old place: the tag `cell` of the decoder's tokens is the number
that the token had among all M N, for figures, and for policies that read it.

How many. `keep` is a number of tokens per tile or a share of them; `num_kept` makes the static
number of it. A method whose numbers depend on the picture returns `mask` within a static bound:
`num_kept` per tile in the sequence (`num_slots` in all), while the set that it returns may have
more rows for a tile than that.

In the tower. A method may also merge tokens in the layers of the tower: `tower` puts policies into
its plan (`ViTConfig.policies`), and `reduce` is then given what these have left, with their reports
in `Features.aux`. `policies` adds some to the decoder, which read in training what `remember` makes
of the tower's features. Parameters of such policies stand with those of the layers.

Parameters. A method that learns overrides `build`, which by default makes a module without any;
they are called `reducer/...`, and drawn fresh where a checkpoint is loaded or `with_` adds them.

Methods inside the decoder are policies (`zoo.models.parts.decoders.composition.PolicyConfig`) and
registered under the same `reducers`. Such a configuration has a field `keep`, a schedule as a tuple
(`schedule` checks it), `reduces: ClassVar[bool] = True`, and reports `kept_cells` or `left_cells`
(`zoo.models.parts.reduce.report`). A method of both kinds registers a function of `keep` and its
settings that returns a tuple: the reducer, and the policies.

Text. A method with `reads_text` gets the embedded text; `Text.mask` is what may guide it: what the
batch's `guide` marks (one question of a conversation, say), or else all of the text. Policies find
the same in the tag `guide`, where the batch has one, and what they take for the last token of the
instruction is the last of these. Prompts are read anew for each question, so that a method chooses
for the question that `guide` marks: the last, or the first again. `zoo.loaded.Loaded.encode` marks
the question of a prompt for methods with `reads_text`, and makes the vector that `inputs` may want;
with `guide="first"` it marks for all methods what was there when the first question was asked.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import Array, Batch, Features, TokenSet
from zoo.models.parts.reduce.regroup import blended, squares

Keep = int | float | tuple[int | float, ...]
"""A number of tokens, a share of them (a float, at most 1.0), or one of these for each stage."""

Point = Literal["tower", "connector", "slots"]
"""Which tokens a reducer is given."""

Arrange = Literal["layout", "mosaic", "tiles"]
"""The order of the kept tokens of a picture that was cut into tiles: that of the batch's `layout`,
without those that it leaves out (padding); that of the whole mosaic of tiles, padding included; or
one tile after the other, in the order in which the reducer returns them.
"""


@dataclass(frozen=True)
class Wants:
    """What a reducer reads of the tower, numbered as `zoo.models.parts.towers.vit.ViT` does.

    Attributes:
      taps: depths of hidden states, 0 to `depth`.
      qk: layers whose queries and keys, 1 to `depth`.
    """

    taps: tuple[int, ...] = ()
    qk: tuple[int, ...] = ()


@struct.dataclass
class Text:
    """The text of a prompt.

    Attributes:
      ids: int32 [B, T].
      embedded: [B, T, D], as the decoder reads them.
      mask: bool [B, T], what guides a method: real tokens, no placeholders.
      vector: float32 [B, P], the batch's `guide_vector`, where there is one.
    """

    ids: Array
    embedded: Array
    mask: Array
    vector: Array | None = None


@struct.dataclass
class Seen:
    """What a reducer sees of the pictures of a batch.

    Attributes:
      tokens: [B, M, N, D], those to reduce.
      features: what the tower made, with the taps and queries that the reducer wants; the leading
        axes are [B, M'], M' tiles.
      mask: bool [B, M, N], the tokens that may be kept; None where all may.
      tiles: int32 [B, I, 3], of every picture: its tiles, and the rows and columns of those behind
        the first, where these are parts of it; None where every tile is a picture.
      layout: int32 [B, S, 4] and `blend` float32 [B, S, 4], at the point "slots" of a batch that
        has these: which of the M' patches stand in each slot.
      blend: see `layout`.
      grid: rows and columns of the N tokens of a tile; None where they are no grid.
      layer: the tower's layer whose output is read, from 1.
      prefix: tokens before the patches in taps, queries and keys.
      per_tile: how many tokens of a tile are to be kept.
    """

    tokens: Array
    features: Features
    mask: Array | None = None
    tiles: Array | None = None
    layout: Array | None = None
    blend: Array | None = None
    grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)
    layer: int = struct.field(pytree_node=False, default=0)
    prefix: int = struct.field(pytree_node=False, default=0)
    per_tile: int = struct.field(pytree_node=False, default=0)

    @property
    def in_slots(self) -> bool:
        """Whether the tokens are those of the decoder's sequence, all tiles in one."""
        return self.layout is not None

    @property
    def tile_tokens(self) -> int:
        """N of one tile, also where the tokens at hand are slots."""
        if self.in_slots and self.grid is not None:
            return self.grid[0] * self.grid[1]
        return int(self.tokens.shape[-2])

    def at_tokens(self, score: Array) -> Array:
        """Scores of the tower's patches [B, M', P] as scores [B, M, N] of the tokens at hand: the
        mean of the patches that a token is made of, weighted where the batch interpolates.
        """
        if self.grid is None:
            raise ValueError(
                "tokens of this connector are made of all patches, whose scores say nothing about "
                "them: want a connector that keeps the grid, or a method that compares tokens"
            )
        rows, columns = self.features.grid
        side = rows // self.grid[0], columns // self.grid[1]
        score = squares(score, (rows, columns), side)
        if not self.in_slots:
            return score
        assert self.layout is not None
        assert self.blend is not None
        flat = score.reshape(score.shape[0], -1)  # [B, M' Q]
        return blended(flat, self.layout, self.blend)[:, None]


@dataclass(frozen=True)
class Reducer:
    """Base of the methods. See the docstring of this module.

    Attributes:
      keep: tokens of a tile that remain, as a number or a share.
      positions: "renumbered": kept tokens are counted on; "original": each keeps the position that
        it has in the whole sequence, and so does the text.
    """

    keep: Keep = 1.0
    positions: Literal["renumbered", "original"] = field(default="renumbered", kw_only=True)

    reduces: ClassVar[bool] = True  # as such policies have it
    point: ClassVar[Point] = "tower"
    merges: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    skips_padding: ClassVar[bool] = False  # leaves out what shows none of the picture (`shown`)
    arrange: ClassVar[Arrange] = "layout"
    newlines: ClassVar[bool] = False  # whether those of the layout stay

    def __post_init__(self) -> None:
        if self.positions not in ("renumbered", "original"):
            raise ValueError(f"positions = {self.positions!r}: want 'renumbered' or 'original'")
        check_keep(self.keep)

    def num_kept(self, tokens: int) -> int:
        """Tokens of a tile that remain of so many.

        Raises:
          ValueError: `keep` does not fit so many.
        """
        return num_kept(self.keep, tokens)

    def num_slots(self, tiles: int, tokens: int, slots: int | None = None) -> int:
        """The most that remain of so many tiles together.

        Args:
          tiles: M.
          tokens: N, of each.
          slots: how many there are in all, where a batch interpolates between the tokens.
        """
        number = self.num_kept(tokens)
        return tiles * number if slots is None else max(1, slots * number // tokens)

    def wants(self, tower: Any, layer: int) -> Wants:
        """What it reads of a tower whose layer `layer` (from 1) makes the vision tokens.

        Args:
          tower: the tower's configuration.
          layer: 0 where that is the input of the first layer.

        Raises:
          ValueError: it does not work with this tower, with the reason.
        """
        del tower, layer
        return Wants()

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of what it reads of a batch besides pictures and text."""
        del batch_size
        return {}

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """What remains.

        Args:
          seen: the tokens, and what scores them.
          text: of the prompt; only where `reads_text`.
          keep: how many of a tile, what `num_kept` said (at slots: of all tiles together).

        Returns:
          tokens [B, M, K, D] with `index`, where the method has it `mask`, and for methods that
          merge `groups`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it keeps")

    def tower(self, tower: Any, layer: int) -> Any:
        """The tower that it wants to be run in place of that of the model.

        Args:
          tower: the tower's configuration.
          layer: whose output is read, from 1.
        """
        del layer
        return tower

    def policies(self, layer: int) -> tuple[Any, ...]:
        """Policies of the decoder that belong to it; `layer` as in `tower`."""
        del layer
        return ()

    def remember(self, features: Features, connect: Callable[[Array], Array]) -> dict[str, Any]:
        """What its policies read of the decoder's memory in training.

        Args:
          features: what the tower made, with the leading axes [B, M].
          connect: what the connector makes of tokens [B, M, N, C] that it works on one by one, with
            no gradient to its parameters.
        """
        del features, connect
        return {}

    def build(self, vision_width: int, width: int) -> nn.Module:
        """The module that is called as `reduce` is.

        Args:
          vision_width: D of the tower's tokens.
          width: D of the decoder.
        """
        del vision_width, width
        return Plain(self)


class Plain(nn.Module):
    """A reducer that learns nothing."""

    config: Reducer

    def __call__(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """See `Reducer.reduce`."""
        return self.config.reduce(seen, text, keep=keep)


def check_keep(keep: Any, *, stages: int | None = None) -> None:
    """Raise ValueError unless `keep` is a number of tokens or a share of them; with `stages`, one
    of these or a tuple of so many.
    """
    if isinstance(keep, tuple):
        if stages is None:
            raise ValueError(
                f"keep = {keep}: want one number of tokens, or one share; this method has one stage"
            )
        if len(keep) != stages:
            raise ValueError(
                f"keep = {keep}: a schedule of {len(keep)}, want {stages}, one for each stage"
            )
        for each in keep:
            check_keep(each)
        return
    number = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    share = isinstance(keep, float) and 0 < keep <= 1
    if not number and not share:
        raise ValueError(
            f"keep = {keep!r}: want a number of tokens, 1 or more, or a share of them such as "
            "0.25, above 0 and at most 1.0"
        )


def num_kept(keep: Keep, tokens: int) -> int:
    """The number that `keep` means of so many tokens: a share is cut off, to 1 at least.

    Raises:
      ValueError: more than there are, or a schedule.
    """
    check_keep(keep)
    assert not isinstance(keep, tuple)
    if isinstance(keep, float):
        return max(1, int(tokens * keep))
    if keep > tokens:
        raise ValueError(f"keep = {keep}: there are {tokens} tokens; want 1 to {tokens}")
    return keep


@dataclass(frozen=True)
class Kept:
    """How many remain of so many tokens, by a number or a share of them: as `num_kept` has it, but
    for fewer tokens than that number all.
    """

    keep: Keep

    def __call__(self, tokens: int) -> int:
        if isinstance(self.keep, int):
            return min(self.keep, tokens)
        return num_kept(self.keep, tokens) if tokens else 0


def schedule(keep: Keep, stages: int, tokens: int) -> tuple[int, ...]:
    """The numbers that a schedule means of so many tokens, one for each stage; a single `keep` is
    that of all.

    Raises:
      ValueError: of another length, more than there are, or more than the stage before keeps.
    """
    check_keep(keep, stages=stages)
    each = keep if isinstance(keep, tuple) else (keep,) * stages
    numbers = tuple(num_kept(one, tokens) for one in each)
    if any(later > former for former, later in itertools.pairwise(numbers)):
        raise ValueError(f"keep = {keep}: want numbers that do not grow from stage to stage")
    return numbers


def class_token_of(tower: Any, layer: int, name: str) -> int:
    """`layer`, if the tower has a class token whose attention can be read there.

    Raises:
      ValueError: it has none, or there is no layer.
    """
    if not getattr(tower, "class_token", False):
        raise ValueError(
            f"{name} reads the attention of the class token, and this tower has none: take a tower "
            "with one (CLIP, InternViT, DINOv2), or a method that does not need it"
        )
    if layer < 1:
        raise ValueError(f"{name} reads a layer of the tower, and this model reads its input")
    return layer


def unmasked(seen: Seen) -> Array:
    """Bool [B, M, N], the tokens that may be kept."""
    return jnp.ones(seen.tokens.shape[:-1], bool) if seen.mask is None else seen.mask
