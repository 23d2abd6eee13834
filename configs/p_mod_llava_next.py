"""p-MoD-LLaVA-NeXT 7B: deeper layers run fewer of up to 2,928 vision tokens of a picture in tiles.

Follows: arXiv:2412.04449. The first stage is that of LLaVA-1.5, with a picture as one tile; the
second has the data of LLaVA-NeXT and sequences of 4096 tokens.
"""

from dataclasses import replace

from zoo.configs import p_mod_llava
from zoo.configs._llava import prepared
from zoo.models.decoders.p_mod import VARIANTS
from zoo.train.config import ProcessorConfig, Recipe
from zoo.train.parts import Part

CONVERSATIONS = 779_289
"""Records of the file of LLaVA-NeXT."""


def config() -> Recipe:
    """The recipe."""
    align, instruct = p_mod_llava.config().stages
    steps = CONVERSATIONS // instruct.batch_size
    instruct = replace(
        instruct,
        model=prepared(VARIANTS["p_mod_llava_next_7b"], 4096),
        data=replace(instruct.data, json="data/llava_next_data.json"),
        steps=steps,
        fresh=(*instruct.fresh, "newline"),
        parts=(Part("tower/.*", frozen=True), Part("(connector|decoder)/.*|newline")),
        processor=ProcessorConfig(source="llava-hf/llava-v1.6-vicuna-7b-hf"),
        optim=replace(instruct.optim, warmup=round(0.03 * steps)),
    )
    return Recipe("p_mod_llava_next", (align, instruct))
