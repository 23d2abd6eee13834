"""CrossGET: tokens are merged in every layer of the encoders, and what the other modality makes of
the same example says which of them matter.

An encoder has one more token, the cross token. Before each layer it is a copy of what it was, or of
the token that stands for the text, plus a learned vector, so that a loss that makes the cross
tokens of pictures and texts alike reaches these vectors alone. How much a token has to do with the
cross token is its importance: of the tokens that are most like another, those that matter least are
merged into it between attention and MLP. A token counts in attention as often as it has parts.

Follows: arXiv:2305.17455.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp

from zoo.models.base import clip, llava
from zoo.models.core.card import Card
from zoo.models.core.keytable import Row, Table
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Features, TokenSet
from zoo.models.parts.assemblies.dual import DualConfig
from zoo.models.parts.assemblies.llava import LlavaConfig, llava_table
from zoo.models.parts.assemblies.llava_hub import projector_rows
from zoo.models.parts.reduce.base import (
    Arrange,
    Keep,
    Reducer,
    Seen,
    Text,
    Wants,
    class_token_of,
)
from zoo.models.parts.text.clip import TextConfig
from zoo.models.parts.towers.vit import ViTConfig, ones
from zoo.models.reduction.crossget.dual import CrossCLIP, dual_table, with_cross_tokens
from zoo.models.reduction.crossget.encoder import CrossLayer, CrossTokens, lengths
from zoo.models.reduction.crossget.guidance import CrossText

CARD = Card(
    slug="crossget",
    paper="arXiv:2305.17455",
    code="https://github.com/sdc17/CrossGET",
    differs=(
        "Of two tokens that are nearest to each other the first in order may be merged into the "
        "other; the official choice among them is arbitrary.",
        "`keep` sets how many tokens the language model reads, the cross token among them; the "
        "layers share out evenly what is merged. With 278 of 576 that is the official 13 a layer.",
        "The tower's last layer, which LLaVA does not read, has no part in the loss that makes "
        "cross tokens alike; in the official code it has.",
        "Where a row has several pictures or tiles, that loss is the mean over them; the official "
        "code has one picture.",
        "Padding that a mask hides can be merged with text like any token; the official CLIP reads "
        "padding.",
        "CoOp, whose prompts are learned around the same encoders, is left out, and so are BLIP "
        "and BLIP-2, which the official repository lacks too.",
    ),
)


@dataclass(frozen=True)
class CrossGET(Reducer):
    """The method in a LLaVA: the tower merges, and the decoder has cross tokens too.

    Attributes:
      keep: tokens of a tile that remain, the cross token among them.
      weight: of the loss that makes cross tokens alike; 0.001 for 7B, 0.1 for 13B.
    """

    keep: Keep = 0.483
    weight: float = 0.001

    merges: ClassVar[bool] = True
    arrange: ClassVar[Arrange] = "tiles"  # the cross token comes last

    def numbers(self, layers: int, tokens: int) -> tuple[int, ...]:
        """How many tokens each of so many layers merges, evenly; the first ones more where the last
        ones have too few.

        Args:
          layers: of the tower that are run.
          tokens: of a tile, without those before the patches and the cross token.

        Raises:
          ValueError: a layer merges half of its tokens at most, which is not enough.
        """
        left, found = self.num_kept(tokens), []
        rest = tokens + 1 - left
        for number in range(layers, 0, -1):
            here = min(rest // number, max(0, left - 1))
            found.append(here)
            left, rest = left + here, rest - here
        if lengths(tuple(found[::-1]), tokens + 1, protected=1)[-1] != self.num_kept(tokens):
            least = lengths((tokens,) * layers, tokens + 1, protected=1)[-1]
            raise ValueError(
                f"keep = {self.keep}: {layers} layers can merge {tokens} tokens to {least} or more "
                f"(a layer half of its own at most); want {least} to {tokens}"
            )
        return tuple(found[::-1])

    def wants(self, tower: Any, layer: int) -> Wants:
        """Nothing but the tokens.

        Raises:
          ValueError: a tower without a class token, one with other layers than a ViT, or so few
            tokens that the layers cannot merge the others.
        """
        class_token_of(tower, layer, "CrossGET")
        self.tower(tower, layer)
        return Wants()

    def tower(self, tower: Any, layer: int) -> Any:
        """The tower whose layers merge."""
        if not isinstance(tower, ViTConfig):
            raise self._other_layers(tower)
        rows, columns = tower.grid
        numbers = self.numbers(layer, rows * columns) + (0,) * (tower.depth - layer)
        policy = CrossTokens(numbers, tower.prefix, "attention")
        merging = replace(tower, policies=(*tower.policies, policy))
        if not any(isinstance(p, CrossLayer) for step in merging.plan() for p in step.policies):
            raise self._other_layers(tower)
        return merging

    def _other_layers(self, tower: Any) -> ValueError:
        return ValueError(
            f"CrossGET merges tokens in the layers of a ViT, and {type(tower).__name__} has "
            "others: want a plain ViT such as CLIP's, or a method that acts behind the tower"
        )

    def policies(self, layer: int) -> tuple[Any, ...]:
        """The cross tokens of the decoder."""
        return (CrossText(layer, self.weight),)

    def remember(self, features: Features, connect: Callable[[Array], Array]) -> dict[str, Array]:
        """The cross tokens of the picture as the decoder would have them: [B, M, layers, D]."""
        return {"cross_image": connect(jnp.stack([each["cross"] for each in features.aux], -2))}

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """What the tower has left, and what became of its patches."""
        del text, keep
        first, reports = seen.prefix, seen.features.aux[: seen.layer]
        groups = reports[0]["groups"]
        for report in reports[1:]:
            groups = jnp.take_along_axis(report["groups"], groups, -1)
        groups = groups[..., first:-1] - first
        place = reports[-1]["place"][..., first:] - first
        index = jnp.where(place < groups.shape[-1], place, -1)  # the cross token has none
        return TokenSet(seen.tokens, None, index, groups)


_CLIP, _TINY = clip.VARIANTS["clip_vit_b16"], llava.VARIANTS["llava_tiny"]
_13B = replace(llava.VARIANTS["llava_1_5_13b"].decoder, vocab_size=32_000)

VARIANTS = {
    "crossget_llava_1_5_7b": LlavaConfig(reducer=CrossGET()),
    "crossget_llava_1_5_13b": LlavaConfig(decoder=_13B, reducer=CrossGET(weight=0.1)),
    "crossget_clip_b16": with_cross_tokens(_CLIP),
    "crossget_tiny": replace(_TINY, reducer=CrossGET(keep=0.5)),
    "crossget_clip_tiny": with_cross_tokens(
        DualConfig(
            vision=ViTConfig(
                image_size=16, patch_size=4, width=32, depth=2, num_heads=2, mlp_dim=48
            ),
            text=TextConfig(
                vocab_size=64, max_length=12, width=24, depth=2, num_heads=2, mlp_dim=40, end_id=63
            ),
            embedding_dim=20,
        ),
        r=4,
        text_r=2,
    ),
}


def table(config: LlavaConfig | CrossCLIP) -> Table:
    """Keys of the official code's checkpoints."""
    if isinstance(config, CrossCLIP):
        return dual_table(config)
    projector = projector_rows(bias=config.connector.bias, keys=("0", "2"))
    found = llava_table(config) + projector.under("connector", "model.mm_projector.")
    if not config.reducing:
        return found
    tower = "model.vision_tower.vision_tower.vision_model.encoder.cross_image"
    rows = (
        Row("tower/stack/layers/cross/token", tower, ones(1)),
        Row("decoder/stack/layers/cross/token", "model.cross_text", ones(1)),
    )
    return found + Table(rows)


register(CARD, VARIANTS, table=table, reducers={"crossget": CrossGET})
