"""PyramidDrop: the decoder is cut into stages, and at the end of each some vision tokens go.

What remains is what the last token of the instruction would attend to most in the layer that comes
next: its own norm and projections rank the tokens, and then it runs on those that are left. Nothing
is learned; the same rule is used in training, where the token before every answer ranks.

Follows: arXiv:2410.17247.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from flax import struct

from zoo.models.base import llava, llava_next
from zoo.models.core.card import Card
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Memory, Stream
from zoo.models.parts.assemblies.llava_hub import hub_table
from zoo.models.parts.decoders.dropping import Compressed, DropBefore, asking, attention_of
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.reduce.base import Keep, Kept, check_keep, schedule

CARD = Card(
    slug="pyramiddrop",
    paper="arXiv:2410.17247",
    code="https://github.com/Cooperx521/PyramidDrop",
    differs=(
        "The vision tokens of all pictures of a prompt are ranked together; the official code "
        "prunes those of the first.",
        "Decoders with grouped queries work; the official ranking does not repeat their keys.",
        "A training example of which nothing is learned drops by its last token; the official code "
        "drops nothing there. The first 16 answers of a conversation rank.",
        "Without `layers` the stages are equal parts of any depth; the official scripts have 8, 16 "
        "and 24 for 32 and for 40 layers, as our variants do.",
        "Of tokens with equal attention the first is kept; the official code leaves it to torch.",
    ),
)


@dataclass(frozen=True)
class PyramidDrop:
    """The policy.

    Attributes:
      keep: vision tokens that remain after each stage but the last, as numbers of a sequence's or
        as shares of those that it had at first; a single one is that of all stages.
      layers: the layers before which tokens go, from 0, which are the ends of the stages counted
        from 1; by default those that cut the decoder into equal stages.
      positions: "renumbered": tokens count those that are there, anew after every stage;
        "original": they keep those that they have in the whole sequence.
    """

    keep: Keep = (0.5, 0.25, 0.125)
    layers: tuple[int, ...] | None = None
    positions: Literal["renumbered", "original"] = "renumbered"

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.positions not in ("renumbered", "original"):
            raise ValueError(f"positions = {self.positions!r}: want 'renumbered' or 'original'")
        if self.layers is not None and list(self.layers) != sorted({*self.layers} - {0}):
            raise ValueError(
                f"layers = {self.layers}: want different numbers of layers from 1 on, ascending"
            )
        check_keep(self.keep, stages=self.stages)

    @property
    def stages(self) -> int:
        """How often tokens are dropped."""
        if self.layers is not None:
            return len(self.layers)
        return len(self.keep) if isinstance(self.keep, tuple) else 3

    def drops(self, depth: int) -> dict[int, Keep]:
        """{layer: what remains before it}, of a decoder of `depth` layers; those layers alone that
        leave out more than the one before.
        """
        parts = self.stages + 1
        layers = self.layers or tuple(depth * n // parts for n in range(1, parts))
        keeps = self.keep if isinstance(self.keep, tuple) else (self.keep,) * self.stages
        former: tuple[Any, ...] = (1.0, *keeps)
        found = zip(layers, former, keeps, strict=False)
        return {layer: keep for layer, before, keep in found if keep != before}

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan that drops vision tokens between its stages.

        Raises:
          ValueError: layers that the plan does not have, numbers that grow or are more than there
            are; or a decoder with positions of several axes that are to be counted anew.
        """
        if slots:
            schedule(self.keep, self.stages, slots)
        drops = self.drops(len(plan))
        if not drops:
            return plan
        if self.layers is None and len(plan) < self.stages + 1:
            raise ValueError(
                f"PyramidDrop: {self.stages + 1} stages, and the decoder has {len(plan)} layers"
            )
        if self.positions == "renumbered":
            first = min(drops)
            for block in {step.block for step in plan[first:]}:
                if (rope := getattr(block, "rope", None)) is not None and rope.sections:
                    raise ValueError(
                        "PyramidDrop counts positions anew, and those of this decoder have several "
                        "axes: want positions='original'"
                    )
            plan = wrap(plan, dict.fromkeys(range(first, len(plan)), Compressed()))
        return wrap(plan, {layer: RankByNext(Kept(keep)) for layer, keep in drops.items()})


@struct.dataclass
class RankByNext(DropBefore):
    """Scores tokens by the attention that this layer would pay them, before it runs."""

    def score(self, layer: Any, stream: Stream, memory: Memory) -> Array:
        """The mean over heads, and over the answers to come."""
        own = layer.qkv(stream, memory)
        return attention_of(layer, own, stream.tokens, *asking(stream.tokens))


def tokens_per_layer(policy: PyramidDrop, depth: int, tokens: int) -> tuple[int, ...]:
    """How many of so many vision tokens every layer runs."""
    drops, here, found = policy.drops(depth), tokens, []
    for layer in range(depth):
        here = Kept(drops[layer])(tokens) if layer in drops else here
        found.append(here)
    return tuple(found)


_POLICY = PyramidDrop(layers=(8, 16, 24))


def _with(config: Any, policy: PyramidDrop = _POLICY) -> Any:
    return replace(config, policies=(policy,))


VARIANTS = {
    # The schedule of all released scripts.
    "pyramiddrop_llava_1_5_7b": _with(llava.VARIANTS["llava_1_5_7b"]),
    "pyramiddrop_llava_1_5_13b": _with(llava.VARIANTS["llava_1_5_13b"]),
    "pyramiddrop_llava_next_7b": _with(llava_next.VARIANTS["llava_next_vicuna_7b"]),
    "pyramiddrop_tiny": replace(
        llava.VARIANTS["llava_tiny"],
        decoder=replace(llava.VARIANTS["llava_tiny"].decoder, depth=5),
        policies=(PyramidDrop(),),
    ),
}


register(CARD, VARIANTS, table=hub_table, reducers={"pyramiddrop": PyramidDrop})
