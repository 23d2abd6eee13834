"""γ-MoD-LLaVA 7B: layers that attend to little let tokens skip, on the data of LLaVA-1.5.

Follows: arXiv:2410.13859. The first stage is dense. `zoo arank` on its result tells which layers
attend to little; `--stages.1.model.policies.0.layers` takes them, in place of the published ones.
"""

from dataclasses import replace

from zoo.configs._llava import two_stages
from zoo.models.decoders.gamma_mod import VARIANTS
from zoo.train.config import Recipe


def config() -> Recipe:
    """The recipe."""
    dense = replace(VARIANTS["gamma_mod_llava_7b"], policies=())
    [policy] = VARIANTS["gamma_mod_llava_7b"].policies
    # All that stands before a picture, which is 35 tokens with the official system prompt. This
    # template has none: `<s>`, `▁US`, `ER`, `:`, `▁`.
    model = replace(dense, policies=(replace(policy, text_prefix=5),))
    return two_stages("gamma_mod_llava", model, aligned=dense, fresh=(".*/router/kernel",))
