"""LLaVA-1.5 7B, all of it fine-tuned on conversations of up to 2048 tokens about pictures."""

from dataclasses import replace

from zoo.models.base.llava import VARIANTS
from zoo.models.core.config import with_dtype, with_field
from zoo.train.config import Experiment, ProcessorConfig
from zoo.train.data.sources import LlavaJson
from zoo.train.mesh import MeshConfig
from zoo.train.optim import OptimConfig
from zoo.train.start import Start

TOKENS = 2048


def config() -> Experiment:
    """An epoch of the instruction data of arXiv:2310.03744, with its batch and learning rate.

    `docs/planning.md` tells on which devices it fits.
    """
    model = with_dtype(with_field(VARIANTS["llava_1_5_7b"], "remat", "full"), "bfloat16")
    # The placeholder of the picture gives way to its tokens.
    model = replace(model, text_tokens=TOKENS - model.slots + 1)
    return Experiment(
        name="llava_1_5_7b",
        model=model,
        data=LlavaJson(json="llava_v1_5_mix665k.json", images="images"),
        steps=5_197,
        batch_size=128,
        start=(Start("llava-hf/llava-1.5-7b-hf"),),
        processor=ProcessorConfig(
            mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
        ),
        optim=OptimConfig(lr=2e-5, warmup=156),
        mesh=MeshConfig(data=1, fsdp=-1),
        save_every=500,
    )
