"""Minutes on a CPU: a small ViT that sees digits at two sizes; it trains as well, since there is
none of this size to start from.
"""

from zoo.configs._classes import on_digits
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.towers.vit import ViTConfig
from zoo.models.vision.s2 import S2Config
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment: scans of 16 and, in four tiles, of 32 pixels."""
    tower = ViTConfig(image_size=16, patch_size=4, width=48, depth=3, num_heads=4, mlp_dim=96)
    model = ClassifierConfig(S2Config(tower, sizes=(16, 32), tile=16), "mean", num_classes=10)
    return on_digits("s2_digits", model)
