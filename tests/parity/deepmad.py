"""DeepMAD against the official network."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.deepmad import DeepMADConfig, table
from zoo.models.vision.deepmad.score import Kind, Unit

KINDS: dict[str, Kind] = {
    "ConvKXBNRELU": "conv",
    "SuperResK1KXK1": "bottleneck",
    "SuperResK1DWSEK1": "inverted",
}


def read(structure: list[dict]) -> tuple[Unit, ...]:
    """A `structure_info`."""
    return tuple(
        Unit(
            KINDS[unit["class"]],
            unit["out"],
            unit["k"],
            unit.get("s", 1),
            unit.get("L", 1),
            unit.get("btn", 0),
        )
        for unit in structure
    )


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, pixels = case.kwargs, case.inputs["x"].transpose(0, 2, 3, 1)
    units = read(sizes["structure_info"])
    tower = DeepMADConfig(pixels.shape[1], units, channels=pixels.shape[-1])
    config = ClassifierConfig(tower, "mean", num_classes=sizes["num_classes"])
    model = config.build()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), {"pixels": pixels}))
    variables = table(config).load(case.params, shapes)
    inner = {name: tree["tower"] for name, tree in variables.items() if "tower" in tree}

    @jax.jit
    def every():
        grids = tower.build().apply(inner, pixels, method="grids")
        return grids, model.apply(variables, {"pixels": pixels}).logits

    grids, logits = every()
    found = {f"block{i}": np.asarray(x).transpose(0, 3, 1, 2) for i, x in enumerate(grids)}
    found["logits"] = np.asarray(logits)
    return {name: found[name] for name in case.outputs}
