"""Which heads of a decoder say something about vision: the masks of YOPO."""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.types import IMAGE, Aux, Memory, Stream
from zoo.models.parts.decoders.dropping import attention_logits
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.plan import LayerPolicy, Run

HeadMask = tuple[tuple[bool, ...], ...]
"""Of every layer, which heads are active."""


@dataclass(frozen=True)
class Calibrate:
    """The policy that changes nothing and reports `vision_ratio` [B, H] in the aux of every layer:
    the attention that its heads pay to vision, over what they pay to text.
    """

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan with the report around every layer."""
        return wrap(plan, dict.fromkeys(range(len(plan)), VisionRatio())) if slots else plan


@struct.dataclass
class VisionRatio(LayerPolicy):
    """See `Calibrate`."""

    name: ClassVar[str] = "vision_ratio"

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
        if not stream.slots:
            return run(stream, state)
        tokens = stream.tokens
        logits = attention_logits(layer, layer.qkv(stream, memory), tokens)  # type: ignore[attr-defined]
        weights = jnp.where(tokens.valid[:, None, :, None], jax.nn.softmax(logits, -1), 0)
        paid = weights.sum(-2)  # [B, H, L]
        image = (tokens.modality == IMAGE)[:, None]
        ratio = jnp.where(image, paid, 0).sum(-1) / jnp.where(image, 0, paid).sum(-1)
        stream, state, _ = run(stream, state)
        return stream, state, {"vision_ratio": ratio}


def active_heads(
    ratios: np.ndarray, threshold: float, *, share: float = 0.4, always: int = 2
) -> np.ndarray:
    """Which heads are active, bool [layers, H].

    Args:
      ratios: [examples, layers, H], as `Calibrate` reports them.
      threshold: a head votes for itself where its ratio is greater. Published for LLaVA-1.5-13B:
        0.2, 0.077 and 0.035 for about 10, 20 and 30 of 40 heads.
      share: a head is active with the votes of more than this share of the examples.
      always: layers, from the first, whose heads are all active.

    Raises:
      ValueError: ratios of another form.
    """
    ratios = np.asarray(ratios)
    if ratios.ndim != 3 or not len(ratios):
        raise ValueError(f"ratios of shape {ratios.shape}: want [examples, layers, heads]")
    active: np.ndarray = (ratios > threshold).sum(0) > share * len(ratios)
    active[:always] = True
    return active


def head_mask(mask: Any) -> HeadMask:
    """What `Yopo.heads` wants of an array [layers, H], such as a released .npy file.

    Raises:
      ValueError: an array of another form.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask of shape {mask.shape}: want [layers, heads]")
    return tuple(tuple(bool(head) for head in row) for row in mask)
