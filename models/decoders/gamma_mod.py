"""γ-MoD: layers of an aligned model that run only some of the tokens, chosen by one shared router.

Most layers of the decoder become mixture-of-depths layers: a linear map gives each token the
probability p of being processed; the others skip the layer and keep their hidden state bit for
bit. Which layers may skip is decided by the rank of their attention maps
(`zoo.compress.arank`); the question and the answer are never skipped in training.

Follows: arXiv:2410.13859. For the tokens that run, x with positions counted among themselves,

    m = x + Attn(norm(x))        y = m + p MLP(norm(m))

with p = softmax(router(norm(x)))[1] and the same router in all of these layers.

There are two rules of selection, as in the official code:

- *training*: of the prefix (pictures and system prompt) the tokens with the greatest p, a fixed
  share; of the rest all. A forward pass without a cache (`model.apply`, `Loaded.logits`) does this.
  `GammaMoD(without_cache="infer")` makes it do what `prefill` does, for scoring texts as the
  model generates them; there is no routing loss then.
- *inference*: every token with p above a small threshold, questions included; in decoding the new
  token with p of at least a half, otherwise the layer leaves it and its cache alone.

So generating does not equal recomputing the whole sequence, with the official thresholds: a new
token that decoding skips at p < 0.5 runs in a whole pass at p > 0.005. With `decode_threshold`
equal to `threshold`, and `without_cache="infer"`, it does.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.card import Card
from zoo.models.core.keytable import Row, Table, linear, repeated
from zoo.models.core.registry import register
from zoo.models.core.types import IGNORE, IMAGE, KV, Array, Aux, Memory, Stream, Tokens, take
from zoo.models.parts.assemblies.llava import LlavaConfig, llava_table
from zoo.models.parts.assemblies.llava_hub import projector_rows
from zoo.models.parts.decoders.gqa import DecoderConfig, Plan, decoder_table
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.linear import Proj, uniform
from zoo.models.parts.layers.plan import LayerPolicy, Run
from zoo.models.parts.layers.selection import pick, put
from zoo.models.parts.towers.coupled import CoupledConfig, coupled_table
from zoo.models.parts.towers.vit import ViTConfig

CARD = Card(
    slug="gamma_mod",
    paper="arXiv:2410.13859",
    code="https://github.com/Yaxin9Luo/Gamma-MOD",
    differs=(
        "The prefix is the vision tokens of each row and 35 more; the official code has the number "
        "1059 written into it.",
        "A batch may mix rows of any length, with pictures and without; padding counts neither "
        "among the tokens to choose from nor in the routing loss.",
        "With a `capacity`, inference computes at most this share of the prefix; without it all "
        "tokens, of which it masks those that the official code leaves out.",
    ),
)

MODES: dict[str, Callable[[int], range]] = {
    "arank_mod": lambda depth: range(3, depth - 1),
    "first_half": lambda depth: range(depth // 2),
    "second_half": lambda depth: range(depth // 2, depth - 1),
    "sparse": lambda depth: range(0, depth, 2),
    "dense": range,
    "first_last_dense": lambda depth: range(1, depth - 1),
    "last_two_thirds": lambda depth: range(depth // 3 + 2, depth - 1),
    "first_five_dense": lambda depth: range(5, depth - 1),
}
"""The official names of sets of layers, as functions of the depth."""


@dataclass(frozen=True)
class GammaMoD:
    """The policy: which layers skip tokens, and by which rule.

    Attributes:
      layers: a name of `MODES`, or the numbers of the layers.
      ratio: the share of the prefix that skips a layer in training, 0.5 and 0.34 as published.
      text_prefix: tokens beside the pictures that belong to the prefix, which are the first of
        every row: pictures and system prompt have to come first.
      threshold: a prompt's token runs where p is greater.
      decode_threshold: a new token runs where p is not smaller.
      capacity: the share of the prefix that a prefill computes at most, those with the greatest p;
        None for the official rule, which bounds nothing, and computes all tokens here.
      style: which of the two official versions is followed in text alone and in decoding.
        "llava_hr": text alone runs whole in training; decoding skips, and counts positions by what
        the layer's own cache holds. "mini_gemini": text alone runs by half, the question before the
        answer; decoding never skips, and has the positions of the whole sequence.
      without_cache: what a forward pass without a cache does, "train" or "infer".
      loss_weight: factor of each layer's routing loss.
    """

    layers: str | tuple[int, ...] = "arank_mod"
    ratio: float = 0.5
    text_prefix: int = 35
    threshold: float = 0.005
    decode_threshold: float = 0.5
    capacity: float | None = None
    style: Literal["llava_hr", "mini_gemini"] = "llava_hr"
    without_cache: Literal["train", "infer"] = "train"
    loss_weight: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) and self.layers not in MODES:
            raise ValueError(
                f"layers = {self.layers!r}: want one of {', '.join(MODES)}, or numbers of layers"
            )
        for name in ("ratio", "threshold", "decode_threshold", "capacity"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} = {share}: want 0 to 1")
        for name, known in (
            ("style", ("llava_hr", "mini_gemini")),
            ("without_cache", ("train", "infer")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: want one of {known}")
        if self.text_prefix < 0:
            raise ValueError(f"text_prefix = {self.text_prefix}: want 0 or more")

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The numbers of the layers that skip tokens, in a decoder of `depth` layers."""
        known = MODES[self.layers](depth) if isinstance(self.layers, str) else self.layers
        return tuple(known)

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan with this policy in the layers that it names.

        Raises:
          ValueError: no layer, or one that the plan does not have; or a decoder without a norm
            before its attention, or with positions of several axes.
        """
        del slots  # every layer counts its own
        chosen = self.chosen(len(plan))
        if not chosen:
            raise ValueError(f"GammaMoD: layers = {self.layers!r} names no layer of {len(plan)}")
        for block in {step.block for step in plan}:
            if getattr(block, "norm_place", "pre") == "post":
                raise ValueError("GammaMoD: want a decoder with norms before its layers")
            if (rope := getattr(block, "rope", None)) is not None and rope.sections:
                raise ValueError(
                    "GammaMoD numbers the tokens of a layer anew, and so wants a decoder with "
                    "positions of one axis"
                )
        return wrap(plan, dict.fromkeys(chosen, SkipTokens(self)))


class Router(nn.Module):
    """Logits [..., 2] of a token [..., D]: skip, process."""

    width: int

    def setup(self) -> None:
        init = uniform(self.width**-0.5)
        self.router = Proj("...d,dc->...c", (self.width, 2), ("embed", None), init=init)

    def __call__(self, x: Array) -> Array:
        return self.router(x)


@struct.dataclass
class SkipTokens(LayerPolicy):
    """A layer that runs some of its tokens; see the module.

    Reports `kept` int [B], how many tokens ran, and in training `router_loss`, already weighted.
    """

    name: ClassVar[str] = "gamma_mod"
    shared: ClassVar[bool] = True
    splits: ClassVar[bool] = True

    config: GammaMoD = struct.field(pytree_node=False)

    def module(self, block: nn.Module) -> nn.Module:
        """The router."""
        return Router(block.width, parent=None)

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del run
        logits = self.route(layer, own, stream.hidden)
        probability = jax.nn.softmax(logits, -1)[..., 1]  # [B, L]
        index, runs = self.choose(probability, stream, state)

        tokens, hidden, weight = stream.tokens, stream.hidden, probability
        if index is not None:
            tokens, hidden, weight = take((tokens, hidden, weight), index)
        tokens = tokens.replace(
            position=self._positions(tokens, runs, state), valid=tokens.valid & runs
        )
        # How many of the tokens that run are image tokens differs: the number is a bound.
        part = Stream(hidden, tokens, min(stream.slots, hidden.shape[1]))

        def compute(part: Stream, state: Any) -> tuple[Array, Any]:
            part, state, _ = layer.attention(part, state, memory)
            branch = layer.feed_forward(part, memory)
            return part.hidden + weight[..., None].astype(branch.dtype) * branch, state

        def leave(part: Stream, state: Any) -> tuple[Array, Any]:
            return part.hidden, state

        if self._skips(state):  # where no row's token runs, neither weights nor cache are read
            rows, state = jax.lax.cond(runs.any(), compute, leave, part, state)
        else:
            rows, state = compute(part, state)
        if index is None:
            out = jnp.where(runs[..., None], rows, stream.hidden)
        else:
            out = put(stream.hidden, index, rows, runs)

        aux = {"kept": tokens.valid.sum(-1)}
        if self._learning(state):
            if index is not None:
                runs = put(jnp.zeros(probability.shape, bool), index, runs, runs)
            loss = routing_loss(logits, runs, stream.tokens.valid)
            aux["router_loss"] = self.config.loss_weight * loss
        return stream.replace(hidden=out), state, aux

    def route(self, layer: nn.Module, own: nn.Module | None, hidden: Array) -> Array:
        """The router's float32 logits [B, L, 2]."""
        return own(layer.attn_norm(hidden)).astype(jnp.float32)

    def choose(self, probability: Array, stream: Stream, state: Any) -> tuple[Array | None, Array]:
        """Which tokens run.

        Args:
          probability: [B, L].
          stream: input of the layer.
          state: its state.

        Returns:
          index: int [B, C], what is computed; None for all L tokens.
          runs: bool [B, C], which of these count.
        """
        c, valid = self.config, stream.tokens.valid
        if isinstance(state, KV):
            runs = valid & (probability >= c.decode_threshold)
            return None, runs if self._skips(state) else valid
        prefix = stream.slots + c.text_prefix
        text_alone = not stream.slots or probability.shape[1] <= prefix
        if self._learning(state):
            if not text_alone:
                return self._best(probability, stream.tokens, prefix, c.ratio)
            if c.style == "mini_gemini":
                return None, _best_half(probability, stream.tokens)
            return None, jnp.ones_like(valid)
        above = valid & (probability > c.threshold)
        if text_alone or c.capacity is None:
            return None, above
        index, keep = self._best(probability, stream.tokens, prefix, 1 - c.capacity)
        return index, keep & take(above, index)

    def _best(
        self, probability: Array, tokens: Tokens, prefix: int, skipped: float
    ) -> tuple[Array, Array]:
        """Of each row's prefix all but the share `skipped`, and everything after it."""
        candidate, pictured = self._prefix(tokens)
        real = candidate & tokens.valid
        number = real.sum(-1)
        count = jnp.where(pictured, _rest(number, skipped), number)
        score = jnp.where(real, probability, -jnp.inf)
        # The text of rows without pictures has room in any case.
        capacity = max(_rest(prefix, skipped), self.config.text_prefix)
        index, keep = pick(score, candidate, count, slots=prefix, capacity=capacity)
        return index, keep & take(real | ~candidate, index)

    def _prefix(self, tokens: Tokens) -> tuple[Array, Array]:
        """The tokens to choose from, bool [B, L], exactly slots + text_prefix of them in each row:
        those at its beginning, and the slots that no picture needs. And bool [B]: which rows have a
        picture.
        """
        image = tokens.modality == IMAGE
        surplus = image & ~tokens.valid
        images = (image & tokens.valid).sum(-1, keepdims=True)
        place = jnp.cumsum(~surplus, -1) - 1
        return surplus | (place < images + self.config.text_prefix), images[:, 0] > 0

    def _positions(self, tokens: Tokens, runs: Array, state: Any) -> Array:
        """Positions that count the tokens that run, after those in the layer's cache."""
        if isinstance(state, KV) and not self._skips(state):
            return tokens.position
        segment = {name: tokens.tags[name] for name in ("segment",) if name in tokens.tags}
        position = Tokens.sequence(runs & tokens.valid, **segment).position
        # Padding that runs, which nobody sees, goes on counting.
        position = jnp.where(tokens.valid, position, Tokens.sequence(runs).position)
        if isinstance(state, KV):
            position += state.tokens.valid.sum(-1, keepdims=True)
        return position

    def _skips(self, state: Any) -> bool:
        """Whether new tokens may leave out the layer."""
        return isinstance(state, KV) and self.config.style == "llava_hr"

    def _learning(self, state: Any) -> bool:
        return state is None and self.config.without_cache == "train"


def _rest(number: Any, skipped: float) -> Any:
    """How many of `number` tokens remain when a share is skipped, rounded up."""
    if isinstance(number, int):
        return number - math.floor(number * skipped + 1e-6)
    return number - jnp.floor(number * skipped + 1e-6).astype(number.dtype)


def _best_half(probability: Array, tokens: Tokens) -> Array:
    """In training on text alone: half of the tokens, those of the question before the answer's."""
    label = tokens.tags.get("label")  # of the token after each
    answer = jnp.zeros_like(tokens.valid)
    if label is not None:
        answer = jnp.pad(label != IGNORE, ((0, 0), (1, 0)))[:, :-1]
    score = jnp.where(tokens.valid, probability + ~answer, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-score, stable=True), stable=True)  # [B, L], the best has 0
    return tokens.valid & (rank < _rest(tokens.valid.sum(-1, keepdims=True), 0.5))


def routing_loss(logits: Array, selected: Array, counted: Array) -> Array:
    """Mean cross-entropy of the router against what was selected, forced tokens included.

    Args:
      logits: float32 [B, L, 2].
      selected: bool [B, L].
      counted: bool [B, L], False on tokens that have no say.
    """
    chance = jax.nn.log_softmax(logits)
    each = -jnp.where(selected, chance[..., 1], chance[..., 0])
    return (each * counted).sum() / jnp.maximum(counted.sum(), 1)


# A prefill computes what training does: half of the prefix at most.
_PUBLISHED = (GammaMoD(capacity=0.5),)
_HR = LlavaConfig(tower=CoupledConfig(), vision_layer=None, policies=_PUBLISHED)

VARIANTS = {
    # Sizes of LLaVA-1.5 7B, and of YaxinLuo/Gamma-MoD-llava-hr-{7b,13b}, with Vicuna v1.5.
    "gamma_mod_llava_7b": LlavaConfig(policies=_PUBLISHED),
    "gamma_mod_llava_hr_7b": _HR,
    "gamma_mod_llava_hr_13b": dataclasses.replace(
        _HR,
        decoder=DecoderConfig(width=5120, depth=40, num_heads=40, num_kv_heads=40, mlp_dim=13_824),
    ),
    "gamma_mod_tiny": LlavaConfig(
        tower=ViTConfig(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=32),
        decoder=DecoderConfig(
            vocab_size=320, width=24, depth=6, num_heads=4, num_kv_heads=2, mlp_dim=32
        ),
        policies=(GammaMoD(text_prefix=2, capacity=0.5),),
        image_id=3,
        text_tokens=12,
    ),
}


def router_rows(layers: Sequence[int]) -> Table:
    """The shared router, which official checkpoints repeat in each of these layers."""
    keys = tuple(f"model.layers.{layer}.router.weight" for layer in layers)
    path = f"stack/layers/{SkipTokens.name}/router/kernel"
    return Table((Row(path, keys, repeated(len(keys), linear()), steps=(0,)),))


def table(config: LlavaConfig) -> Table:
    """Keys of the official checkpoints: those of LLaVA-1.5 or LLaVA-HR, and the router of every
    layer.
    """
    [policy] = [each for each in config.policies if isinstance(each, GammaMoD)]
    projector = projector_rows(bias=config.connector.bias, keys=("0", "2"))
    rows = projector.under("connector", "model.mm_projector.")
    rows += router_rows(policy.chosen(config.decoder.depth)).under("decoder")
    if isinstance(config.tower, CoupledConfig):
        tower = coupled_table(config.tower).under("tower", "model.vision_tower.")
        return rows + tower + decoder_table(config.decoder).under("decoder")
    return rows + llava_table(config)


register(CARD, VARIANTS, table=table)
