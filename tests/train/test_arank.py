"""ARank of a model against a plain computation, and the command `zoo arank`."""

import json
import operator

import jax
import numpy as np
import pytest
from PIL import Image

import zoo
from tests.models.draw import draw
from tests.models.test_systems import random_batch, shapes
from zoo.cli import main
from zoo.compress.arank import attention_ranks, low_layers
from zoo.models.core.codec import decode
from zoo.models.core.errors import UsageError
from zoo.models.core.types import Reserve
from zoo.models.decoders.gamma_mod import GammaMoD
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.saving import save_model

PROMPT = "which digit?"


def rotated(x):
    """Rotary embedding of [L, H, E], written out."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def direct(hidden, layer):
    """The mean rank over heads of one layer, for a prompt [L, D] without padding."""
    x = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5) * layer["attn_norm"]["scale"]
    q, k = (rotated(np.einsum("ld,dhe->lhe", x, layer[name]["kernel"])) for name in "qk")
    k = k.repeat(q.shape[1] // k.shape[1], 1)
    logits = np.einsum("lhe,she->hls", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(np.tri(len(x), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    below = (weights * np.tri(len(x), k=-1)).astype(np.float32)
    return np.mean([np.linalg.matrix_rank(head) for head in below])


def test_ranks_are_those_of_a_plain_computation():
    """Of every layer, for two prompts of which one is shorter, in one batch."""
    config = zoo.config("mqt_tiny")
    model, params, batch = config.build(), draw(shapes(config)), random_batch(config)
    batch["text_mask"][1, -3:] = False
    layers, depth = params["decoder"]["stack"]["layers"], config.decoder.depth
    layers["q"]["kernel"] *= np.array([1, 30, 300])[:, None, None, None]  # sharper and sharper
    ranks = attention_ranks(model, params, batch)
    assert ranks.shape == (depth,)

    @jax.jit
    def entering(params):
        def run(model):
            stream, memory = model.stream(batch, None)
            stack = model.decoder.stack
            return [stack(stream, Reserve(0), memory, stop=layer)[0] for layer in range(depth)]

        return model.apply({"params": params}, method=run)

    for number, stream in enumerate(entering(params)):
        valid = np.asarray(stream.tokens.valid)
        own = jax.tree.map(operator.itemgetter(number), layers)
        want = [direct(np.asarray(stream.hidden[row])[valid[row]], own) for row in range(2)]
        assert ranks[number] == pytest.approx(np.mean(want), abs=0.13)  # one head of eight
    assert valid.sum(-1).mean() - 1 > ranks[0] > ranks[1] > ranks[2]


def test_layers_by_rank():
    ranks = [120.0, 30.0, 110.0, 20.0]
    assert low_layers(ranks, threshold=110) == (1, 3)
    assert low_layers(ranks, keep=1) == (1, 2, 3)
    assert low_layers(ranks, keep=4) == ()
    with pytest.raises(UsageError, match="keep is 5: the model has 4 layers"):
        low_layers(ranks, keep=5)
    with pytest.raises(UsageError, match="either"):
        low_layers(ranks, threshold=110, keep=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = zoo.config("mqt_tiny")
    processor = Processor(ImageProcessor(16), Tokenizer.train([PROMPT], 300), 20)
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "model", config, draw(shapes(config)), processor, {"step": 1})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(
        folder / "a.png"
    )
    turns = [{"from": "human", "value": f"<image>{PROMPT}"}, {"from": "gpt", "value": "one"}]
    (folder / "data.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    return folder


def test_the_command(run, capsys):
    """Prompts of a file and of the command line; what it writes is a policy."""
    asked = ["arank", str(run), "--keep", "1", "--json"]
    out = run / "policy.json"
    files = ["--data", str(run / "data.json"), "--images", str(run), "--out", str(out)]
    assert main([*asked, *files]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["ranks"]) == 3 and len(found["layers"]) == 2 and found["prompts"] == 1
    policy = decode(json.loads(out.read_text()))
    assert policy == GammaMoD(layers=tuple(found["layers"]))
    zoo.create("mqt_tiny", policies=(policy,))

    assert main([*asked, "--prompt", PROMPT, "--image", str(run / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == found["ranks"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "want prompts, from --data FILE or from --prompt TEXT"),
        (("--prompt", "a", "--data", "b.json"), "want prompts, from"),
        (("--prompt", "a", "--out", "/nowhere/x.json"), "there is no folder /nowhere"),
        (("--data", "b.json", "--samples", "0"), "--samples is 0: want 1 or more"),
        (("--prompt", "a", "--image", "b", "--image", "c"), "got 2 pictures for 1 prompts"),
        (("--data", "nowhere.json"), "nowhere.json cannot be read"),
    ],
)
def test_wrong_use(run, capsys, flags, message):
    assert main(["arank", str(run), *flags]) in (1, 2)
    assert message in capsys.readouterr().err
