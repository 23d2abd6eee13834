"""DeepStack-L 7B: crops of each picture are added layer by layer, on the data of LLaVA-1.5.

Follows: arXiv:2406.04334. Both stages see the crops.
"""

from zoo.configs._llava import two_stages
from zoo.models.connectors.deepstack import VARIANTS
from zoo.train.config import Recipe


def config() -> Recipe:
    """The recipe."""
    # Crops are those of the picture itself, not of a square around it.
    return two_stages("deepstack_llava", VARIANTS["deepstack_l_vicuna_7b"], pad=False)
