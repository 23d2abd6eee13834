"""Minutes on a CPU: an InceptionNeXt that learns to read single digits."""

from zoo.configs._classes import on_digits
from zoo.models.vision.inceptionnext import InceptionNeXtClassifierConfig, InceptionNeXtConfig
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment."""
    tower = InceptionNeXtConfig(
        image_size=32,
        depths=(1, 1, 2, 1),
        widths=(16, 32, 48, 64),
        mlp_ratios=(2, 2, 2, 2),
        band=7,
        layer_scale=0.1,
        drop_path=0.1,
    )
    model = InceptionNeXtClassifierConfig(tower, "mean", num_classes=10)
    return on_digits("inceptionnext_digits", model)
