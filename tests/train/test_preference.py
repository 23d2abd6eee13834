"""Preferences: the costs by hand, the reference, the data, and a model that comes to prefer."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

import zoo
from tests.train.test_lora import adapted
from tests.train.tiny import tiny
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.types import IGNORE
from zoo.models.parts.layers.operands import merge
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.train.data.preferences import PreferenceJson, encoded
from zoo.train.loop import train
from zoo.train.lora import LoRA
from zoo.train.mesh import MeshConfig
from zoo.train.objectives.lm import sequence_logps
from zoo.train.objectives.preference import Preference, Scores, paired, preference_costs
from zoo.train.optim import OptimConfig

KEY = jax.random.key(0)
CONFIG = replace(zoo.config("llava_tiny"), text_tokens=24)


def scores(seed):
    rng = np.random.default_rng(seed)
    sums = -rng.random((2, 5)).astype(np.float32) * 20
    lengths = rng.integers(1, 9, (2, 5)).astype(np.float32)
    return Scores(*sums, *lengths)


def test_costs_by_hand():
    policy, reference, beta = scores(0), scores(0)._replace(chosen=scores(1).chosen), 0.3
    reference = reference._replace(rejected=scores(2).rejected)
    margin = policy.chosen - reference.chosen - policy.rejected + reference.rejected
    wanted = {
        "sigmoid": np.log1p(np.exp(-beta * margin)),
        "hinge": np.maximum(0, 1 - beta * margin),
    }
    for kind, value in wanted.items():
        found = preference_costs(policy, reference, beta, kind)
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
    smooth = 0.9 * wanted["sigmoid"] + 0.1 * np.log1p(np.exp(beta * margin))
    found = preference_costs(policy, reference, beta, "sigmoid", label_smoothing=0.1)
    np.testing.assert_allclose(found, smooth, rtol=1e-5, atol=1e-6)
    means = (policy.chosen - reference.chosen) / policy.chosen_length
    means = means - (policy.rejected - reference.rejected) / policy.rejected_length
    found = preference_costs(policy, reference, beta, "ipo")
    np.testing.assert_allclose(found, (means - 1 / (2 * beta)) ** 2, rtol=1e-4, atol=1e-5)
    same = preference_costs(policy, policy, beta, "sigmoid")
    np.testing.assert_allclose(same, np.log(2), rtol=1e-6)


def test_the_gradient_of_the_paper():
    """beta sigmoid(-beta margin), up for the chosen answer and down for the other."""
    policy, reference, beta = scores(0), scores(3), 0.2
    margin = policy.chosen - reference.chosen - policy.rejected + reference.rejected

    def total(chosen, rejected):
        moved = policy._replace(chosen=chosen, rejected=rejected)
        return preference_costs(moved, reference, beta, "sigmoid").sum()

    up, down = jax.grad(total, (0, 1))(policy.chosen, policy.rejected)
    wanted = beta / (1 + np.exp(beta * margin))
    np.testing.assert_allclose(up, -wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(down, wanted, rtol=1e-5, atol=1e-7)


def test_log_probabilities_of_sequences_by_hand():
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(3, 7, 4)), rng.normal(size=(4, 9))
    label = np.where(rng.random((3, 7)) < 0.5, rng.integers(0, 9, (3, 7)), IGNORE)
    label[2] = IGNORE
    logits = hidden @ table
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = [sum(logp[b, t, n] for t, n in enumerate(label[b]) if n != IGNORE) for b in range(3)]
    for chunk in (None, 3):
        sums, counts = sequence_logps(
            lambda table, x: x @ table,
            table.astype(np.float32),
            hidden.astype(np.float32),
            label,
            chunk,
        )
        np.testing.assert_allclose(sums, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(counts, (label != IGNORE).sum(1))


def batch_of(size=4, seed=0):
    rng = np.random.default_rng(seed)

    def answer():
        ids = rng.integers(4, 300, (size, 24)).astype(np.int32)
        ids[:, 1] = CONFIG.image_id
        labels = np.where(np.arange(24) > 9, ids, IGNORE).astype(np.int32)
        return {
            "ids": ids,
            "labels": labels,
            "text_mask": np.ones(ids.shape, bool),
            "segments": np.zeros_like(ids),
        }

    pixels = rng.standard_normal((size, 1, 16, 16, 3)).astype(np.float32)
    other = {f"rejected_{name}": array for name, array in answer().items()}
    return {"pixels": pixels, **answer(), **other}


def test_rows_stand_in_pairs():
    batch = batch_of()
    both = paired(batch)
    assert set(both) == {"pixels", "ids", "labels", "text_mask", "segments"}
    np.testing.assert_array_equal(both["ids"][::2], batch["ids"])
    np.testing.assert_array_equal(both["ids"][1::2], batch["rejected_ids"])
    np.testing.assert_array_equal(both["pixels"][1::2], batch["pixels"])


def test_the_reference_is_what_training_found_or_the_model_without_adapters():
    model, batch = CONFIG.build(), batch_of()
    objective = Preference(beta=0.5, likelihood=1 / 1024)
    operands, base, _ = adapted(CONFIG, patterns=LoRA().targets)
    assert objective.init(model, {"params": operands}, {}) == {}
    aux = objective.init(model, {"params": base}, {})

    def loss(params, aux):
        terms, others, _ = objective.loss(model, {"params": params}, aux, batch, KEY, None)
        return terms["loss"].value, others

    found, facts = jax.jit(loss)(operands, {})
    wanted, others = jax.jit(loss)(merge(operands), aux)
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)
    margin = float(facts["chosen_reward"].value - facts["rejected_reward"].value)
    assert abs(margin) > 1e-3
    assert float(others["preferred"].value) == float(facts["preferred"].value)
    start, facts = jax.jit(loss)(base, aux)
    nll = float(facts["chosen_logp"].value) / 1024
    assert float(start) == pytest.approx(np.log(2) - nll, rel=1e-5)
    grads = jax.jit(jax.grad(lambda aux: loss(base, aux)[0]))(aux)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    with pytest.raises(UsageError, match="no rejected answers"):
        objective.loss(model, {"params": base}, aux, paired(batch), KEY, None)
    for wrong in ({"beta": 0.0}, {"kind": "x"}, {"label_smoothing": 0.5}, {"likelihood": -1.0}):
        with pytest.raises(UsageError, match=f"objective.{next(iter(wrong))}"):
            Preference(**wrong)
    with pytest.raises(UsageError, match="for 'sigmoid'"):
        Preference(kind="ipo", label_smoothing=0.1)


@pytest.fixture
def data(tmp_path):
    """Pictures, of which the light ones are preferred to be called so."""
    entries = []
    for i in range(24):
        light = i % 2 == 0
        Image.new("RGB", (16, 16), (200 if light else 20,) * 3).save(tmp_path / f"{i}.png")
        said = ["light", "dark"] if light else ["dark", "light"]
        entries.append(
            {"id": i, "image": f"{i}.png", "prompt": "<image> how is it?"}
            | dict(zip(("chosen", "rejected"), said, strict=True))
        )
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    return PreferenceJson(str(tmp_path / "pairs.json"), str(tmp_path), validation=0.0)


def test_records_become_pairs_of_answers(data, tmp_path):
    source = data.source("train", tmp_path)
    assert len(source) == 24
    assert source[0]["conversations"] == (("how is it?", "light"),)
    assert source[0]["rejected"] == "dark"
    assert {"light", "dark", "how is it?"} <= set(data.texts())
    tokenizer = Tokenizer.train(data.texts(), 300)
    processor = Processor(ImageProcessor(16), tokenizer, 24)
    example = encoded(processor, source[1])
    plain = processor.encode({**source[1], "conversations": (("how is it?", "light"),)})
    for name in ("ids", "labels", "text_mask", "segments"):
        np.testing.assert_array_equal(example[f"rejected_{name}"], plain[name])
    assert set(example) == set(plain) | {
        f"rejected_{name}" for name in ("ids", "labels", "text_mask", "segments")
    }
    bad = json.loads((tmp_path / "pairs.json").read_text())
    bad[3]["rejected"] = " "
    (tmp_path / "pairs.json").write_text(json.dumps(bad))
    with pytest.raises(ZooError, match=r"record 3: want texts `prompt`, `chosen` and `rejected`"):
        data.source("train", tmp_path)[3]


@pytest.mark.parametrize(
    "lora", [None, pytest.param(LoRA(rank=2, alpha=8), marks=pytest.mark.thorough)]
)
def test_training_makes_the_preferred_answer_likelier(data, tmp_path, lora):
    experiment = tiny(
        model=CONFIG,
        data=data,
        objective=Preference(beta=0.5),
        lora=lora,
        optim=OptimConfig(lr=2e-2, warmup=2),
        mesh=MeshConfig(fsdp=2),
    )
    out = tmp_path / "run"
    train(experiment, out)
    assert (out / "checkpoints" / "fixed").exists() == (lora is None)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert lines[-1]["loss"] < 0.6
    assert lines[-1]["chosen_reward"] > lines[-1]["rejected_reward"]
