"""Minutes on a CPU: a small STU-Net finds digits in volumes, each of which runs through a part of
the slices.
"""

from zoo.configs._classes import on_digits
from zoo.models.dense.stunet import STUNetConfig, supervision_weights
from zoo.train.config import Experiment
from zoo.train.data.dense import DigitsSegment
from zoo.train.data.digits_vqa import Scene
from zoo.train.objectives.dense import Segment


def config() -> Experiment:
    """The experiment, with the published losses: eight slices of one or two digits, 11 classes."""
    model = STUNetConfig(
        widths=(8, 16, 32, 48),
        strides=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
        num_classes=11,
        sides=(8, 32, 32),
    )
    scene = Scene(canvas=32, min_scans=1, max_scans=2, min_size=12, max_size=16)
    return on_digits(
        "stunet_digits",
        model,
        data=DigitsSegment(slices=8, scene=scene),
        objective=Segment(dice=1.0, batch_dice=True, levels=supervision_weights(3)),
        steps=600,
        batch_size=12,
    )
