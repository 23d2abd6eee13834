"""Minutes on a CPU: a Swin with VWFormer's head finds which digit every pixel is the ink of."""

from zoo.configs._classes import on_digits
from zoo.models.dense.vwformer import SegmenterConfig, VWFormerConfig
from zoo.models.parts.towers.swin import SwinConfig
from zoo.train.config import Experiment
from zoo.train.data.dense import DigitsSegment
from zoo.train.objectives.dense import Segment


def config() -> Experiment:
    """The experiment: pictures of one to three digits, 11 classes of pixels."""
    tower = SwinConfig(
        image_size=64, first_width=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window=4
    )
    head = VWFormerConfig(tower.widths, width=64, num_classes=11, detail=16, image_size=64)
    return on_digits(
        "vwformer_digits",
        SegmenterConfig(tower, head),
        data=DigitsSegment(),
        objective=Segment(),
        steps=900,
        batch_size=30,
    )
