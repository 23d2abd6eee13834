"""A few minutes on a CPU: a small CLIP learns which of your captions belongs to which picture.

Pictures and captions are `pictures/` and `captions.json`, in LLaVA's form with the caption as the
first answer; tokenizer and picture sizes are those of CLIP ViT-B/32. All three can be set:

    zoo train contrastive_tiny --data.json mine.json --data.images photos --processor.source clip
"""

from zoo.models.parts.assemblies.dual import DualConfig
from zoo.models.parts.text.clip import TextConfig
from zoo.models.parts.towers.vit import ViTConfig
from zoo.train.config import Experiment, ProcessorConfig
from zoo.train.data.sources import LlavaJson
from zoo.train.objectives.contrastive import Contrastive
from zoo.train.optim import OptimConfig


def config() -> Experiment:
    """The experiment."""
    small = {"width": 64, "depth": 2, "num_heads": 2, "mlp_dim": 256}
    return Experiment(
        name="contrastive_tiny",
        model=DualConfig(
            ViTConfig(image_size=224, patch_size=32, **small), TextConfig(**small), 64
        ),
        data=LlavaJson(json="captions.json", images="pictures"),
        steps=200,
        batch_size=64,
        objective=Contrastive(max_scale=100.0),
        processor=ProcessorConfig(source="openai/clip-vit-base-patch32"),
        optim=OptimConfig(lr=1e-3, warmup=20, weight_decay=0.1, b2=0.98, end=0.1),
        eval_examples=64,
    )
