"""p-MoD-LLaVA-1.5 7B: deeper layers run fewer vision tokens, on the data of LLaVA-1.5.

Follows: arXiv:2412.04449, which takes the released result of the first stage; that stage is dense.
"""

from dataclasses import replace

from zoo.configs._llava import two_stages
from zoo.models.decoders.p_mod import VARIANTS
from zoo.train.config import Recipe


def config() -> Recipe:
    """The recipe."""
    model = VARIANTS["p_mod_llava_1_5_7b"]
    dense = replace(model, policies=())
    return two_stages("p_mod_llava", model, aligned=dense, fresh=(".*/router/.*",))
