"""The questions of `digits_vqa` to a plain model, which gives its decoder a token for every patch:
what methods for fewer vision tokens are compared on.

Its tower has a class token, whose attention some of these methods read. In the first stage the
decoder reads the class token too, or nothing would teach it where to look; in the second it goes.
"""

from dataclasses import replace

from zoo.configs import digits_vqa
from zoo.models.parts.connect.mlp import MLPConnector
from zoo.train.config import Recipe
from zoo.train.objectives import NextToken


def config() -> Recipe:
    """The recipe: minutes on two CPU cores."""
    quick = digits_vqa.config()
    model = replace(
        quick.model,
        tower=replace(quick.model.tower, class_token=True),
        connector=MLPConnector(),
        decoder=replace(quick.model.decoder, depth=4),
        policies=(),
        keep_class=True,
    )
    read = replace(
        quick, name="read", model=model, steps=1_000, objective=NextToken(), parts=(), keep=1
    )
    patches = replace(
        read,
        name="patches",
        model=replace(model, keep_class=False),
        steps=200,
        optim=replace(read.optim, lr=5e-3, warmup=20),
        eval_examples=300,
    )
    return Recipe("digits_vqa_patches", (read, patches))
