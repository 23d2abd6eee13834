"""What the recipes of LLaVA's two stages share: data, starts, lengths and learning rates.

Follows: arXiv:2310.03744. Both stages compute in bfloat16, keep only the input of each layer for
the gradient, and divide parameters over all devices.
"""

from dataclasses import replace

from zoo.models.core.config import with_dtype, with_field
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.train.config import Experiment, ProcessorConfig, Recipe, Start
from zoo.train.data.sources import LlavaJson
from zoo.train.mesh import MeshConfig
from zoo.train.objectives import NextToken
from zoo.train.optim import OptimConfig
from zoo.train.parts import Part

TOWER, DECODER = "openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"
WORDS = "llava-hf/llava-1.5-7b-hf"
"""Whose chat template, tokenizer and preprocessing are used: that of Vicuna v1.5 and of CLIP."""

CAPTIONS, CONVERSATIONS = 558_128, 665_298
"""Records of the two files of LLaVA-1.5."""


def two_stages(
    name: str,
    model: LlavaConfig,
    *,
    aligned: LlavaConfig | None = None,
    fresh: tuple[str, ...] = (),
    objective: NextToken = NextToken(),  # noqa: B008 (frozen)
    epochs: int = 1,
    tokens: int = 2048,
    pad: bool = True,
) -> Recipe:
    """Alignment of the connector with captions, then instruction tuning of it and the decoder.

    The tower stays frozen. Files are looked for in `data/`; `--stages.0.data.json`,
    `--stages.0.data.images` and the same of stage 1 say otherwise.

    Args:
      name: of the recipe.
      model: what is trained in the end.
      aligned: what is trained in the first stage; by default the same.
      fresh: patterns of the parameters that the second stage has and the first has not.
      objective: of the second stage.
      epochs: of the second stage.
      tokens: the longest sequence, vision tokens included.
      pad: whether pictures that are not square are padded; else their middle is cut out.
    """
    decoder = Start(DECODER, below="decoder", into="decoder")
    tower = Start(TOWER, below="vision", into="tower")
    align = Experiment(
        name="align",
        model=prepared(aligned or model, tokens),
        data=LlavaJson(
            json="data/blip_laion_cc_sbu_558k.json", images="data/pretrain", validation=0.0
        ),
        steps=CAPTIONS // 256,
        batch_size=256,
        start=(decoder, tower),
        fresh=("connector/.*",),
        parts=(Part("(tower|decoder)/.*", frozen=True), Part("connector/.*")),
        processor=ProcessorConfig(source=WORDS, pad=pad),
        optim=_optim(1e-3, CAPTIONS // 256),
        mesh=MeshConfig(data=1, fsdp=-1),
        save_every=500,
        keep=2,
        max_bad_share=0.05,  # conversations that are too long are left out
    )
    steps = epochs * CONVERSATIONS // 128
    instruct = replace(
        align,
        name="instruct",
        model=prepared(model, tokens),
        data=LlavaJson(json="data/llava_v1_5_mix665k.json", images="data", validation=0.0),
        steps=steps,
        batch_size=128,
        start=(),
        fresh=fresh,
        parts=(Part("tower/.*", frozen=True), Part("(connector|decoder)/.*")),
        objective=objective,
        optim=_optim(2e-5, steps),
    )
    return Recipe(name, (align, instruct))


def prepared(model: LlavaConfig, tokens: int) -> LlavaConfig:
    """The model with the vocabulary of Vicuna, for sequences of so many tokens."""
    model = replace(model, decoder=replace(model.decoder, vocab_size=32_000))
    model = with_dtype(with_field(model, "remat", "full"), "bfloat16")
    # The placeholder of the picture gives way to its tokens.
    return replace(model, text_tokens=tokens - model.slots + 1)


def _optim(lr: float, steps: int) -> OptimConfig:
    """AdamW without weight decay, 3 % of the steps of warmup, then a cosine to zero."""
    return OptimConfig(lr=lr, warmup=round(0.03 * steps))
