"""Matryoshka Query Transformer: one set of weights for any number of vision tokens, by nested
learned queries.

A single cross-attention layer with M learned queries reads the vision tokens. Each training step
uses only the first m queries, m drawn at random, so that at inference any prefix 1 <= m <= M works.

Follows: arXiv:2405.19315. As in the official code the keys hold positions only, so the attention
weights are the same for every image, and token i does not depend on m.
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.card import Card
from zoo.models.core.keytable import Constant, Row, Table, flat, linear, same, split
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Features, TokenSet, Visual
from zoo.models.parts.assemblies.llava import LlavaConfig, llava_table
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.layers.linear import Proj, uniform
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.positions import sincos_2d
from zoo.models.parts.layers.resize import resize_bicubic
from zoo.models.parts.towers.vit import ViTConfig

CARD = Card(
    slug="mqt",
    paper="arXiv:2405.19315",
    code="https://github.com/gordonhu608/MQT-LLaVA",
    differs=(
        "The key positions follow the tower's grid; the official encoder always assumes 24 x 24.",
        "Attention weights are computed once per call instead of once per image (same numbers).",
    ),
)


@dataclass(frozen=True)
class MQT:
    """The connector.

    Attributes:
      num_queries: M, a square number.
      num_heads: attention heads; the attention width is the tower's.
      norm_eps: epsilon of the LayerNorms.
    """

    num_queries: int = 256
    num_heads: int = 16
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_queries < 1 or math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ValueError(
                f"num_queries = {self.num_queries}: want a square number (queries sit on a grid)"
            )

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Vision tokens per image at most."""
        del grid
        return self.num_queries

    def build(self, vision_width: int, width: int, grid: tuple[int, int]) -> "QueryTransformer":
        """The module from tower width to decoder width; it takes any grid."""
        del grid
        return QueryTransformer(self, vision_width, width)


def training_budgets(num_queries: int) -> tuple[int, ...]:
    """The numbers of queries that instruction tuning draws from, uniformly: 2, 4, ..., M."""
    return tuple(range(2, num_queries + 1, 2))


def query_positions(num_queries: int, width: int) -> np.ndarray:
    """The fixed position table of the queries, float32 [M, width], rounded to half precision as
    released.
    """
    side = math.isqrt(num_queries)
    return sincos_2d(side, side, width).astype(np.float16).astype(np.float32)


class QueryTransformer(nn.Module):
    """`proj(attention(LN(queries + P), LN(resized P), LN(vision)))` for the first m queries."""

    config: MQT
    vision_width: int
    width: int

    def setup(self) -> None:
        c, d = self.config, self.vision_width
        h, e = c.num_heads, d // c.num_heads
        if d % h:
            raise ValueError(f"vision width {d} is no multiple of num_heads = {h}")
        learned = nn.with_logical_partitioning(
            nn.initializers.truncated_normal(0.02), ("queries", "embed")
        )
        self.queries = self.param("queries", learned, (c.num_queries, d))
        self.q_norm, self.k_norm, self.v_norm = (LayerNorm(c.norm_eps) for _ in range(3))
        heads = ("embed", "heads", "head_dim")
        # The official projections are one fused matrix, whose Xavier bound counts 3 d outputs.
        fused = uniform(math.sqrt(6 / (d + 3 * d)))
        self.q, self.k, self.v = (
            Proj("...d,dhe->...he", (d, h, e), heads, bias=True, init=fused) for _ in range(3)
        )
        small = nn.initializers.truncated_normal(0.02)
        out = ("heads", "head_dim", "embed")
        self.out = Proj("...he,hed->...d", (h, e, d), out, num_in=2, bias=True, init=small)
        scaled = nn.initializers.normal(self.width**-0.5)
        self.proj = Proj("...d,df->...f", (d, self.width), ("embed", "mlp"), init=scaled)

    def attention(self, budget: int, grid: tuple[int, int]) -> Array:
        """The weights with which every image is pooled: float32 [H, budget, N]."""
        table = query_positions(self.config.num_queries, self.vision_width)
        side = math.isqrt(self.config.num_queries)
        keys = resize_bicubic(jnp.asarray(table).reshape(side, side, -1), *grid)  # [h, w, D]
        keys = keys.reshape(grid[0] * grid[1], -1)  # [N, D]
        q = self.q(self.q_norm(self.queries[:budget] + table[:budget]))  # [m, H, E]
        k = self.k(self.k_norm(keys))  # [N, H, E]
        return jax.nn.softmax(jnp.einsum("mhe,nhe->hmn", q, k) / math.sqrt(q.shape[-1]), -1)

    def __call__(self, vision: Features, *, budget: int | Array | None = None) -> Visual:
        """Features [B, M, N, C] to the first `budget` tokens of each image.

        Args:
          vision: patch tokens on a grid, before any norm of the tower.
          budget: 1 <= budget <= num_queries; all by default. A Python number is static: only so
            many tokens are computed, by a program of their own. An array (a scalar, or [B]) masks
            the others, so that one program serves all budgets; both give the same numbers.

        Raises:
          ValueError: if a static budget is out of range.
        """
        most = self.config.num_queries
        static = most if budget is None or isinstance(budget, jax.Array) else budget
        if not 1 <= static <= most:
            raise ValueError(f"budget = {budget}: want 1 to num_queries = {most}")
        v = self.v(self.v_norm(vision.tokens))  # [B, M, N, H, E]
        weights = self.attention(static, vision.grid).astype(v.dtype)
        pooled = jnp.einsum("hqn,...nhe->...qhe", weights, v)
        tokens = self.proj(self.out(pooled))  # [B, M, m, D]
        mask = None
        if isinstance(budget, jax.Array):
            seen = jnp.arange(most) < budget.reshape(-1, 1, 1)  # [B or 1, 1, Q]
            mask = jnp.broadcast_to(seen, tokens.shape[:-1])
        return Visual(TokenSet(tokens, mask))


VARIANTS = {
    # Sizes of gordonhu/MQT-LLaVA-7b: CLIP ViT-L/14-336 and Vicuna-7B v1.5.
    "mqt_llava_7b": LlavaConfig(connector=MQT()),
    # Ours, for pictures of 40 x 40 pixels: trains on two CPU cores in minutes.
    "mqt_digits": LlavaConfig(
        tower=ViTConfig(
            image_size=40,
            patch_size=10,
            width=64,
            depth=3,
            num_heads=4,
            mlp_dim=256,
            activation="gelu",
            class_token=False,
            input_norm=False,
        ),
        connector=MQT(num_queries=16, num_heads=4),
        decoder=DecoderConfig(
            vocab_size=336,
            width=64,
            depth=3,
            num_heads=2,
            num_kv_heads=1,
            mlp_dim=112,
            norm_eps=1e-6,
            tie_embeddings=True,
        ),
        vision_layer=-1,
        image_id=3,
        text_tokens=40,
    ),
    "mqt_tiny": LlavaConfig(
        tower=ViTConfig(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=32),
        connector=MQT(num_queries=4, num_heads=2),
        decoder=DecoderConfig(
            vocab_size=320, width=24, depth=3, num_heads=4, num_kv_heads=2, mlp_dim=32
        ),
        image_id=3,
        text_tokens=12,
    ),
}


def connector_table(num_queries: int, vision_width: int) -> Table:
    """Keys of the official `query_abstractor`."""
    norms = {"q_norm": "ln_q", "k_norm": "ln_k", "v_norm": "ln_v"}
    rows: list[Row | Constant] = [
        Row("queries", "query", same),
        Constant("pos_embed", lambda: query_positions(num_queries, vision_width)),
        Row(("q/kernel", "k/kernel", "v/kernel"), "attn.in_proj_weight", split(3, linear())),
        Row(("q/bias", "k/bias", "v/bias"), "attn.in_proj_bias", split(3, flat)),
        Row("out/kernel", "attn.out_proj.weight", linear(2)),
        Row("out/bias", "attn.out_proj.bias", same),
        Row("proj/kernel", "proj", same),
    ]
    for ours, theirs in norms.items():
        rows += [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]
    return Table(tuple(rows))


def table(config: LlavaConfig) -> Table:
    """Keys of gordonhu/MQT-LLaVA-7b for an assembly with this connector."""
    own = connector_table(config.connector.num_queries, config.tower.width)
    return llava_table(config) + own.under("connector", "model.query_abstractor.")


register(CARD, VARIANTS, table=table)
