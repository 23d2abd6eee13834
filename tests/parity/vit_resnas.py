"""ViT-ResNAS against the official networks, and the operations of its super-network."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.core.keytable import Table
from zoo.models.vision.vit_resnas import ResNASClassifierConfig, layer_rows, table
from zoo.models.vision.vit_resnas.nets import Layer, Net, Stage
from zoo.models.vision.vit_resnas.supernet import rewired, sliced
from zoo.models.vision.vit_resnas.tower import FirstNorm, ResNASConfig, ResNASLayer

CONVOLUTIONS = {0: 0, 4: 24}
"""{kind of the first entry: channels of its stem}; that of kind 5 says them."""


def read(network: list) -> tuple[Net, int]:
    """A `network_def`: the network, and the channels of its stem."""
    first, *entries, _ = network
    stages = [Stage(first[1], ())]
    for kind, *sizes in entries:
        if kind == 3:
            stages.append(Stage(sizes[1], ()))
            continue
        (width, heads, head_dim), (_, mlp_dim), present = sizes
        layer = Layer(heads, head_dim, mlp_dim, bool(present))
        stages[-1] = Stage(width, (*stages[-1].layers, layer))
    return tuple(stages), first[2] if first[0] == 5 else CONVOLUTIONS[first[0]]


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    if "network_def" not in case.kwargs:
        return _operations(case)
    sizes, pixels = case.kwargs, case.inputs["x"].transpose(0, 2, 3, 1)
    net, stem = read(sizes["network_def"])
    tower = ResNASConfig(
        net,
        sizes["img_size"],
        stem,
        distill_token=sizes["distill_token"],
        channels=pixels.shape[-1],
    )
    config = ResNASClassifierConfig(
        tower, num_classes=sizes["num_classes"], patch_head=sizes["patch_output"]
    )
    model, batch = config.build(), {"pixels": pixels}
    shapes = dict(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)))
    rows = table(config)
    variables = rows.load(case.params, shapes if stem else shapes["params"])
    variables = variables if stem else {"params": variables}

    def of_the_tower(module, _):
        return len(module.path) == 2

    @jax.jit
    def every():
        options = {"capture_intermediates": of_the_tower, "mutable": ["intermediates"]}
        return model.apply(variables, batch, **options)

    out, state = every()
    inner = {name: x["__call__"][0] for name, x in state["intermediates"]["tower"].items()}
    layers = [f"layers_{s}_{i}" for s, stage in enumerate(net) for i in range(len(stage.layers))]
    found = {
        "patch_embed": inner["patch"],
        "block0": next(inner[name] for name in layers if name in inner),
        "cls_logits": out.logits,
        "dist_logits": out.distill_logits,
        "train_patch_logits": out.patch_logits,
        "train_token_features": out.features.cls[:, None],
    }
    found |= {f"sr{i + 1}": inner[f"reductions_{i}"] for i in range(len(net) - 1)}
    return {name: np.asarray(found[name]) for name in case.outputs}


def _operations(case: Case) -> dict[str, np.ndarray]:
    """The norm of a sub-network, a layer re-wired, and a smaller one cut out of it."""
    sizes, inputs = case.kwargs, case.inputs
    params = {"scale": inputs["ln_weight"], "bias": inputs["ln_bias"]}
    number = inputs["mask"][:, 0].sum(-1).astype(np.int32)
    out = {"y": jax.jit(FirstNorm().apply)({"params": params}, inputs["x"], number)}

    def shapes(sizes):
        layer = Layer(sizes["num_heads"], sizes["head_dim"], sizes["mlp_features"])
        x = jax.ShapeDtypeStruct((1, 1, sizes["dim"]), np.float32)
        module = ResNASLayer(sizes["dim"], layer)
        return nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"])

    rows = Table(tuple(layer_rows("", "")))
    state = {key.removeprefix("block."): x for key, x in inputs.items() if key.startswith("block.")}
    whole = jax.jit(rewired)(rows.load(state, shapes(sizes)))
    part = sliced(whole, shapes(sizes["sub"]))
    for name, params in (("rewired", whole), ("sub", part)):
        out |= {f"{name}.{key}": x for key, x in rows.save(params).items()}
    return {name: np.asarray(out[name]) for name in case.outputs}
