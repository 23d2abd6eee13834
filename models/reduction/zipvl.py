"""ZipVL: every layer finds out how many tokens it needs, attends among these, and caches the others
in few bits.

Some rows of attention are computed first. As many tokens are important as hold the share `tau` of
what these rows attend to; which they are is decided by what a token gets per row that can see it.
Attention is among the important ones; the others keep their hidden state there, and all tokens run
through the MLP. The cache holds keys and values of important tokens in more bits than those of the
rest, or those of the important ones alone. Text and vision compete alike. Nothing is learned.

Generating is not reading all anew: what is decoded attends to a rounded cache.

Follows: arXiv:2410.08584 (the first version; `bits=(16, 0)` is the second), of which no code is
published, and arXiv:2405.14256 by the same authors for what it does not say.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.base import llava, llava_next
from zoo.models.core.card import Card
from zoo.models.core.registry import register
from zoo.models.core.types import IMAGE, Array, Aux, Memory, Reserve, Stream, Tokens, take
from zoo.models.parts.assemblies.llava_hub import hub_table
from zoo.models.parts.decoders.dropping import attention_logits
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.mixed_kv import BITS, MixedKV
from zoo.models.parts.layers.plan import LayerPolicy, Run
from zoo.models.parts.layers.selection import put
from zoo.models.parts.reduce.base import Keep, Kept, check_keep, num_kept

CARD = Card(
    slug="zipvl",
    paper="arXiv:2410.08584",
    differs=(
        "A re-creation from secondary sources and the code of its predecessor, ZipCache; the "
        "paper's accuracies are not claimed.",
        "The earlier rows that are probed lie evenly; the paper draws them.",
        "Scores are divided by the probed rows that see a token; ZipCache divides by all rows.",
        "New tokens stay in full precision; the paper rounds each hundred of them.",
        "How many vision tokens may be important can be bounded (`keep`), so that less is computed "
        "and stored; without a bound the tokens that are not important are masked.",
    ),
)


@dataclass(frozen=True)
class ZipVL:
    """The policy.

    Attributes:
      keep: vision tokens that can be important in a layer, at most, as a number or a share.
      tau: share of the probed attention that the important tokens hold; with 1.0 all are.
      bits: of the cached numbers of important tokens, and of the others: 2, 4, 8 or 16, which is as
        they are; 0 for others that are not cached.
      recent: how many of the last rows are probed.
      spread: how many of the rows before these.
    """

    keep: Keep = 1.0
    tau: float = 0.975
    bits: tuple[int, int] = (4, 2)
    recent: int = 64
    spread: int = 64

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau = {self.tau}: want a share of the attention, above 0 to 1")
        high, low = self.bits
        if high not in BITS or low not in (0, *BITS) or low > high:
            raise ValueError(
                f"bits = {self.bits}: want two of {BITS}, the second no greater than the first; "
                "it may be 0"
            )
        if self.recent < 1 or self.spread < 0:
            raise ValueError(
                f"recent = {self.recent}, spread = {self.spread}: want 1 or more, and 0 or more"
            )

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan whose layers all attend among their important tokens.

        Raises:
          ValueError: a decoder whose norms come after the residual, or more tokens than there are.
        """
        if slots:  # every layer counts its own
            num_kept(self.keep, slots)
        if any(getattr(step.block, "norm_place", "pre") == "post" for step in plan):
            raise ValueError("ZipVL: want a decoder whose norms come before its layers or branches")
        return wrap(plan, dict.fromkeys(range(len(plan)), Important(self)))


def probed(tokens: Tokens, recent: int, spread: int) -> tuple[Array, Array]:
    """The rows whose attention is computed: the last ones, and some that lie evenly before these.

    Returns:
      places int [B, R], and which of them are there, bool [B, R].
    """
    valid = tokens.valid
    length = valid.shape[1]
    recent, spread = min(recent, length), min(spread, length)
    place = jnp.argsort(~valid, -1, stable=True)  # of every valid token
    number = valid.sum(-1, keepdims=True)
    last = number - 1 - jnp.arange(recent)
    before = jnp.maximum(number - recent, 0)
    some = jnp.minimum(before, spread)
    each = jnp.arange(spread)
    even = each * before // jnp.maximum(some, 1)
    rank, there = jnp.concatenate([last, even], 1), jnp.concatenate([last >= 0, each < some], 1)
    return take(place, jnp.clip(rank, 0, length - 1)), there


def least_number(mass: Array, tau: float) -> Array:
    """The least number of entries of [B, L] that hold the share `tau` of their sum, int32 [B]."""
    ordered = jnp.sort(mass, -1)[:, ::-1]
    held = jnp.cumsum(ordered, -1)
    return ((held < tau * held[:, -1:]).sum(-1) + 1).astype(jnp.int32)


def column_mass(logits: Array, there: Array) -> tuple[Array, Array]:
    """What each token gets of the probed rows, and how much of it per row that can see it, float32
    [B, L] each.

    Args:
      logits: [B, H, R, L].
      there: bool [B, R], rows that count.
    """
    counts = there[:, :, None]
    mass = (jax.nn.softmax(logits, -1).mean(1) * counts).sum(1)
    seen = (logits[:, 0] > jnp.finfo(jnp.float32).min) & counts
    return mass, mass / jnp.maximum(seen.sum(1), 1)


@struct.dataclass
class Important(LayerPolicy):
    """Runs attention among the important tokens, and the MLP on all.

    The aux is `kept`, int32 [B]: how many tokens are important, text among them; and `kept_cells`.
    """

    name: ClassVar[str] = "important"
    splits: ClassVar[bool] = True

    config: ZipVL = struct.field(pytree_node=False)

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del own
        if isinstance(state, MixedKV):
            return run(stream, state)
        projected, tokens = layer.qkv(stream, memory), stream.tokens
        chosen, capacity = self.choose(layer, projected, stream)
        index = jnp.argsort(~chosen, -1, stable=True)[:, :capacity]
        keep = take(chosen, index)
        part = take(tokens, index)
        part = part.replace(valid=part.valid & keep)
        hidden, q, k, v = take((stream.hidden, *projected), index)
        inside = Stream(hidden, part, min(stream.slots, capacity))
        y = layer.attention_out(layer.mix(inside, q, k, v, part, memory), part, memory)
        stream = stream.replace(hidden=put(stream.hidden, index, hidden + y, keep))
        stream = stream.replace(hidden=stream.hidden + layer.feed_forward(stream, memory))
        if isinstance(state, Reserve):
            options = {"capacity": capacity, "bits": self.config.bits, "room": state.n}
            state = MixedKV.start(projected.k, projected.v, tokens, chosen, **options)
        vision = chosen & (tokens.modality == IMAGE)
        cells = jnp.where(vision, tokens.tags.get("cell", -1), -1)
        return stream, state, {"kept": chosen.sum(-1), "kept_cells": cells}

    def choose(self, layer: Any, projected: Any, stream: Stream) -> tuple[Array, int]:
        """Which tokens are important, bool [B, L], and how many there can be, a static bound."""
        c, tokens = self.config, stream.tokens
        valid, image = tokens.valid, tokens.modality == IMAGE
        rows, there = probed(tokens, c.recent, c.spread)
        logits = attention_logits(layer, projected, tokens, rows)
        mass, score = column_mass(jax.lax.stop_gradient(logits), there)
        number = valid.sum(-1)
        if c.tau < 1:
            number = jnp.minimum(least_number(jnp.where(valid, mass, 0), c.tau), number)
        vision = image & valid
        most = np.array([Kept(c.keep)(n) for n in range(stream.slots + 1)], np.int32)
        bound = jnp.asarray(most)[vision.sum(-1)][:, None]
        standing = valid & (~image | (_rank(jnp.where(vision, score, -1)) < bound))
        chosen = standing & (_rank(jnp.where(standing, score, -1)) < number[:, None])
        return chosen, valid.shape[1] - stream.slots + int(most[-1])


def _rank(score: Array) -> Array:
    """The rank of each of [B, L], the greatest 0; of equal ones the first comes first."""
    return jnp.argsort(jnp.argsort(-score, -1, stable=True), -1)


_LLAVA, _NEXT = llava.VARIANTS, llava_next.VARIANTS

VARIANTS = {
    # The two thresholds of the paper's tables.
    "zipvl_llava_1_5_7b": replace(_LLAVA["llava_1_5_7b"], policies=(ZipVL(),)),
    "zipvl_llava_1_5_7b.96": replace(_LLAVA["llava_1_5_7b"], policies=(ZipVL(tau=0.96),)),
    "zipvl_llava_next_7b": replace(_NEXT["llava_next_vicuna_7b"], policies=(ZipVL(),)),
    "zipvl_llava_next_13b": replace(_NEXT["llava_next_vicuna_13b"], policies=(ZipVL(),)),
    "zipvl_tiny": replace(_LLAVA["llava_tiny"], policies=(ZipVL(tau=0.9),)),
}

register(CARD, VARIANTS, table=hub_table, reducers={"zipvl": ZipVL})
