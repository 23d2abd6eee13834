"""What fewer tokens are worth on the clock: `python benchmarks/pillars.py [--out FILE]`.

A dense LLaVA against the same model with a Matryoshka Query Transformer (at several budgets),
p-MoD, γ-MoD and DeepStack: the answer to a prompt with one picture (encoding, prefill and decoding)
and one training step. All take turns on the same machine, in float32, with random weights, which
decide nothing about time: p-MoD and γ-MoD compute a fixed share of the tokens, whichever they are.

Beside each ratio of times stands that of FLOPs, counted over the very program that is timed. A
ratio above 1 says that the method is faster, or computes less, than the dense model.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import Runs, machine, report, take_turns, timed
from tests.models.draw import draw
from zoo.convert.place import flat_paths, nested
from zoo.costing import measure
from zoo.models.connectors.deepstack import DeepStack
from zoo.models.connectors.mqt import MQT
from zoo.models.core.names import tree_names
from zoo.models.decoders.gamma_mod import GammaMoD
from zoo.models.decoders.p_mod import PMoD
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.towers.vit import ViTConfig

IMAGE_ID = 3


@dataclass(frozen=True)
class Size:
    """How large everything is; the decoder dominates.

    Attributes:
      width: of the decoder.
      depth: of the decoder.
      vocab: of the decoder.
      image: side of the picture in pixels; patches are 14 wide.
      tower_width: of the tower.
      tower_depth: of the tower.
      text: tokens of the prompt's text.
      new: tokens of the answer.
      queries: of the Matryoshka Query Transformer.
    """

    width: int = 1024
    depth: int = 12
    vocab: int = 32_000
    image: int = 336
    tower_width: int = 256
    tower_depth: int = 4
    text: int = 64
    new: int = 64
    queries: int = 256


TINY = Size(32, 5, 128, 56, 16, 2, 8, 4, 9)


def contestants(size: Size) -> dict[str, tuple[LlavaConfig, int | None]]:
    """{name: configuration and budget}; "dense" is what the others are compared with."""
    heads = max(1, size.width // 64)
    tower = ViTConfig(
        image_size=size.image,
        width=size.tower_width,
        depth=size.tower_depth,
        num_heads=2,
        mlp_dim=4 * size.tower_width,
    )
    decoder = DecoderConfig(
        vocab_size=size.vocab,
        width=size.width,
        depth=size.depth,
        num_heads=heads,
        num_kv_heads=heads,
        mlp_dim=11 * size.width // 4,
    )
    dense = LlavaConfig(tower, decoder=decoder, image_id=IMAGE_ID, text_tokens=size.text + 1)
    mqt = dataclasses.replace(dense, connector=MQT(num_queries=size.queries, num_heads=2))
    budgets = [m for m in (2, 16, 64, 144, 256) if m < size.queries] + [size.queries]
    policies = {
        "p_mod": PMoD(),
        "gamma_mod": GammaMoD(text_prefix=1, capacity=0.5),
        "deepstack": DeepStack(),
    }
    return {
        "dense": (dense, None),
        **{f"mqt {m}": (mqt, m) for m in budgets},
        **{n: (dataclasses.replace(dense, policies=(p,)), None) for n, p in policies.items()},
    }


@dataclass(frozen=True)
class Contestant:
    """A model with weights; those that it shares with the dense one are the same arrays."""

    config: LlavaConfig
    budget: int | None
    boxed: Any
    params: Any

    def batch(self) -> dict[str, Any]:
        """One prompt with one picture."""
        rng = np.random.default_rng(0)
        made = {}
        for name, spec in self.config.inputs(1).items():
            if spec.dtype == jnp.float32:
                made[name] = rng.normal(size=spec.shape).astype(np.float32)
        text = self.config.text_tokens
        made["ids"] = rng.integers(4, self.config.decoder.vocab_size, (1, text), np.int32)
        made["ids"][:, 1] = IMAGE_ID
        return made

    def answer(self, params: Any, batch: Any, new: int) -> Any:
        """The greedy answer of `new` tokens."""
        model, variables = self.config.build(), {"params": params}
        logits, cache = model.apply(
            variables, batch, room=new, budget=self.budget, method="prefill"
        )

        def turn(carry: Any, _: None) -> Any:
            logits, cache = carry
            token = logits.argmax(-1)[:, None].astype(jnp.int32)
            return model.apply(variables, token, cache, method="decode"), token

        return jax.lax.scan(turn, (logits, cache), None, length=new)[1]

    def step(self, params: Any, batch: Any) -> Any:
        """The parameters after one step of gradient descent on all tokens of the text."""
        model = self.config.build()

        def loss(params: Any) -> jax.Array:
            variables = {"params": params}
            out = model.apply(variables, {**batch, "labels": batch["ids"]}, budget=self.budget)
            logits = model.apply(variables, out.hidden, method="head")
            label = out.tokens.tags["label"]
            safe = jnp.maximum(label, 0)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
            extra = [x for report in out.aux for n, x in report.items() if n.endswith("_loss")]
            return jnp.mean(jnp.where(label >= 0, each, 0)) + sum(extra)

        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)


def enter(size: Size, only: list[str]) -> dict[str, Contestant]:
    """The contestants of these names, and the dense one."""
    found: dict[str, Contestant] = {}
    shared: dict[str, Any] = {}
    for name, (config, budget) in contestants(size).items():
        if only and name.split()[0] not in (*only, "dense"):
            continue
        boxed = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
        wanted = flat_paths(nn.unbox(boxed))
        kept = {
            p: shared[p] for p, x in wanted.items() if p in shared and shared[p].shape == x.shape
        }
        new = flat_paths(draw(nested({p: x for p, x in wanted.items() if p not in kept})))
        shared |= {path: jnp.asarray(leaf) for path, leaf in new.items()}
        params = nested({path: shared[path] for path in wanted})
        found[name] = Contestant(config, budget, boxed, params)
    return found


def race(programs: dict[str, Any], operands: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Times and FLOPs of `programs[name](*operands[name])`, and what the dense one has of both."""
    flops = {name: measure(run, *operands[name])[0].total for name, run in programs.items()}
    jitted = {name: jax.jit(run) for name, run in programs.items()}
    runs: Runs = {n: timed(lambda n=n: jitted[n](*operands[n])) for n in programs}
    times = take_turns(runs, rounds)
    best = times["seconds"]
    return {
        **times,
        "flops": flops,
        "times_faster": {n: round(best["dense"] / best[n], 3) for n in programs},
        "times_fewer_flops": {n: round(flops["dense"] / flops[n], 3) for n in programs},
    }


def run(size: Size, rounds: int, only: list[str]) -> dict[str, Any]:
    """All that the benchmark finds out at one size."""
    entered = enter(size, only)
    batches = {name: each.batch() for name, each in entered.items()}
    answers = {n: lambda p, b, e=e: e.answer(p, b, size.new) for n, e in entered.items()}
    if jax.default_backend() == "cpu":  # as `zoo.load` lays parameters out for inference
        rows = unstack_once(entered)
    else:
        rows = {name: each.params for name, each in entered.items()}
    found = {"answer": race(answers, {n: (rows[n], batches[n]) for n in entered}, rounds)}
    del rows
    steps = {name: each.step for name, each in entered.items()}
    operands = {n: (e.params, batches[n]) for n, e in entered.items()}
    return {**found, "training_step": race(steps, operands, rounds)}


def unstack_once(entered: dict[str, Contestant]) -> dict[str, Any]:
    """The parameters with the rows of stacked ones apart, each made once."""
    made: dict[int, Any] = {}

    def apart(leaf: Any) -> Any:
        if id(leaf) not in made:
            made[id(leaf)] = tuple(leaf)
        return made[id(leaf)]

    return {
        name: jax.tree.map(
            lambda axes, leaf: apart(leaf) if axes and axes[0] == "layers" else leaf,
            tree_names(each.boxed),
            each.params,
            is_leaf=lambda axes: isinstance(axes, tuple),
        )
        for name, each in entered.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Run everything and write what came out, with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a size that says nothing, for tests")
    parser.add_argument("--only", nargs="*", default=[], help="of: mqt p_mod gamma_mod deepstack")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    size = TINY if args.tiny else Size()
    found = {
        **machine(jax),
        "dtype": "float32",
        "size": dataclasses.asdict(size),
        **run(size, args.rounds, args.only),
    }
    report(found, args.out)


if __name__ == "__main__":
    main()
