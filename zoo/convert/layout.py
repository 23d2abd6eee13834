"""From the names in a checkpoint to those of a key table."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoo.convert.tensor import Tensor
from zoo.models.core.errors import ZooError

BUFFERS = (
    r"(^|\.)position_ids$",  # 0, 1, 2, ... in embeddings of CLIP, SigLIP and BERT
    r"(^|\.)rotary_(pos_)?emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$",
    r"(^|\.)masked_bias$",  # the number that stands for minus infinity
)
"""Regular expressions of tensors that some checkpoints hold, because the modules of the original
kept them, and that follow from the configuration. They are dropped, unless the architecture's key
table asks for them; and so is what it passes over (`zoo.models.core.keytable.Ignored`).
"""


@dataclass(frozen=True)
class Layout:
    """A checkpoint under the names of a key table.

    Attributes:
      tensors: {name in the table: tensor}.
      names: {name in the checkpoint: name in the table, or None if it is dropped}.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str | None]


def lay_out(
    found: Mapping[str, Tensor],
    renames: Sequence[tuple[str, str]],
    wanted: frozenset[str],
    ignored: re.Pattern[str] | None = None,
) -> Layout:
    """Give every tensor the name that the key table has for it.

    Args:
      found: the checkpoint.
      renames: of the architecture, see `zoo.models.core.registry.Base`.
      wanted: names in the key table, which are never dropped.
      ignored: what the names match that the key table passes over: they are dropped, too.

    Raises:
      ZooError: two tensors have the same name in the table.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[str, str | None] = {}
    for name, tensor in found.items():
        key = name
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        buffer = any(re.search(pattern, key) for pattern in BUFFERS)
        if key not in wanted and (buffer or (ignored is not None and ignored.fullmatch(key))):
            names[name] = None
            continue
        if key in tensors:
            twin = next(other for other, known in names.items() if known == key)
            raise ZooError(f"{twin} and {name} are the same tensor in this layout, {key}")
        tensors[key], names[name] = tensor, key
    return Layout(tensors, names)
