"""Minutes on a CPU: a small Meta-Transformer reads single digits; its encoder trains as well, since
there is none of this size to start from.
"""

from zoo.configs._classes import on_digits
from zoo.models.encoders.meta_transformer import MetaTransformerConfig
from zoo.models.parts.layers.modalities import Pictures
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment: a scan is four patches, which the encoder sees without their places."""
    model = MetaTransformerConfig(
        (Pictures(image_size=16, patch_size=8),),
        width=64,
        depth=3,
        num_heads=4,
        mlp_dim=128,
        num_classes=10,
    )
    return on_digits("meta_transformer_digits", model)
