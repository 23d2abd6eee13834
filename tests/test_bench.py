"""`zoo bench tokens` on a tiny model with random weights."""

import csv
import json

import jax
import numpy as np
import pytest

from zoo.costing import cost
from zoo.kept import kept_tokens
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.train.bench import main, prompts, tokens
from zoo.train.bench.pages import table
from zoo.train.bench.plots import tokens_figure

METHODS = ["random", "no_method", "fastv"]


@pytest.fixture(scope="module")
def loaded():
    return prompts.opened("llava_tiny")


@pytest.fixture(scope="module")
def asked(loaded):
    return prompts.made_up(loaded, batch=2)


@pytest.fixture(scope="module")
def measured(loaded, asked, tmp_path_factory):
    """Rows of some methods, and the folder that they were written to."""
    out = tmp_path_factory.mktemp("bench")
    rows = tokens.bench(loaded, asked, METHODS, [4, 1.0], out=out, runs=1, decode=1)
    return rows, out


def of(rows, method, keep):
    return next(row for row in rows if (row["method"], row["keep"]) == (method, keep))


def test_figures(measured):
    rows, _ = measured
    full, few = of(rows, "full", None), of(rows, "random", 4)
    assert full["tokens_per_layer"] == [16, 16] and few["tokens_per_layer"] == [4, 4]
    assert of(rows, "fastv", 4)["tokens_per_layer"] == [16, 4]
    assert full["top1_agreement"] == 1 and full["kl"] == 0 and full["accuracy"] is None
    assert few["prefill_flops"] < full["prefill_flops"] and few["kv_bytes"] < full["kv_bytes"]
    assert few["kl"] > 0
    for row in rows:
        if not row["error"]:
            assert row["ttft_s"] > 0 and row["tokens_per_s"] > 0 and row["peak_bytes"] > 0


def test_keeping_all_is_the_full_model(measured):
    rows, _ = measured
    for method in ("random", "fastv"):
        row = of(rows, method, 1.0)
        assert row["top1_agreement"] == 1 and abs(row["kl"]) < 1e-6
        assert row["prefill_flops"] == of(rows, "full", None)["prefill_flops"]


def test_the_batch_itself_is_counted():
    """Not what a configuration describes: of a picture in two tiles of five, two."""
    config, seen = registry.config("llava_next_tiny"), {}
    for number in (2, 5):
        spec = dict(config.inputs(1))
        spec["pixels"] = jax.ShapeDtypeStruct((1, number, *spec["pixels"].shape[2:]), np.float32)
        spec["layout"] = jax.ShapeDtypeStruct((1, 16 * number), np.int32)
        seen[number] = cost(config, inputs=spec)
        assert seen[number].vision_tokens == 16 * number
    assert seen[5].flops["encode"].total > 2 * seen[2].flops["encode"].total


@pytest.mark.thorough
def test_models_of_native_resolution():
    model = prompts.opened("qwen2_5_vl_tiny")
    asked = prompts.made_up(model, batch=2)
    rows = tokens.bench(model, asked, ["uniform", "fastervlm"], [0.5], runs=1, decode=1)
    full, half, refused = rows
    assert half["tokens_per_layer"][0] == full["tokens_per_layer"][0] / 2
    assert half["prefill_flops"] < full["prefill_flops"] and "class token" in refused["error"]


def test_one_that_fails_stops_nothing(measured):
    rows, out = measured
    failed = of(rows, "no_method", 4)
    assert "no_method" in failed["error"] and failed["kl"] is None
    assert json.loads((out / "tokens.json").read_text())["rows"] == rows
    with open(out / "tokens.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [row["method"] for row in rows]
    assert tokens_figure(rows, title="tiny").get_axes()


def test_what_is_there_is_not_measured_again(loaded, asked, measured, monkeypatch):
    rows, out = measured
    tried = []
    monkeypatch.setattr(tokens, "_tried", lambda *args: tried.append(args[1:3]) or {"error": "no"})
    monkeypatch.setattr(tokens, "_prefilled", lambda *args: (None, None))
    again = tokens.bench(loaded, asked, METHODS, [4, 1.0], out=out, runs=1, decode=1)
    assert tried == [("no_method", 4), ("no_method", 1.0)]
    assert of(again, "random", 4) == of(rows, "random", 4)
    with pytest.raises(UsageError, match="other settings"):
        tokens.bench(loaded, asked, METHODS, [4], out=out, runs=1, decode=2)


def test_what_is_kept_can_be_drawn(loaded, asked):
    """Patches by layer, and the groups of methods that merge; of tiles the numbers of all."""
    batch = {name: x for name, x in asked[0].batch.items() if name not in ("labels", "segments")}
    few = kept_tokens(loaded.with_(reducer="fastv", keep=4), batch)
    assert few.layers.sum(-1).tolist() == [[16, 16], [4, 4]] and few.groups is None
    merged = kept_tokens(loaded.with_(reducer="aim", keep=4), batch)
    assert (merged.layers[0].sum(-1) == 4).all()
    assert [len(set(row) - {-1}) for row in merged.groups[:, 0].tolist()] == [4, 4]


def test_answers_are_judged(monkeypatch):
    """Three answers, each the tokens from its first on, up to the end; the last does not count."""
    first = {"logits": np.eye(9)[[2, 3, 3]]}

    def program(params, batch):
        return batch["logits"], batch["logits"]

    def step(params, ids, cache):
        return np.roll(cache, 1, -1), np.roll(cache, 1, -1)

    class Model:
        params = None
        speaker = type("Speaker", (), {"decode": lambda self, ids: f" {ids[: ids.index(5)]}"})()

    batch = prompts.Asked(first, np.array([True, True, False]), ("[2, 3, 4]", "[3]", "[3, 4]"))
    assert tokens._answers(Model(), program, step, first) == ["[2, 3, 4]", "[3, 4]", "[3, 4]"]
    assert tokens._accuracy(Model(), program, step, [batch]) == 0.5
    unasked = prompts.Asked(first, np.array([True] * 3), ("",) * 3)
    assert tokens._accuracy(Model(), program, step, [unasked]) is None


def test_the_page(measured):
    rows, out = measured
    assert (out / "tokens.md").read_text().startswith("The full model: 100.0 % agrees.")
    page = table(rows)
    assert "| method | 4: agrees | 4: FLOPs | 1: agrees | 1: FLOPs |" in page
    share = of(rows, "fastv", 4)["prefill_flops"] / of(rows, "full", None)["prefill_flops"]
    [line] = [line for line in page.splitlines() if line.startswith("| fastv |")]
    assert f"{100 * share:.1f} | 100.0 | 100.0 |" in line
    assert page.count("- no_method: UsageError") == 1
    unmeasured = [{**row, "ttft_s": None} for row in rows]
    assert len(tokens_figure(unmeasured, title="tiny").get_axes()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["speed"], "want zoo bench tokens"),
        (["tokens", "--model", "llava_tiny", "--keep", "few"], "want numbers"),
        (["tokens", "--model", "llava_tiny", "--methods", "fastvv"], "want all, or some of"),
        (["tokens", "--model", "siglip_base_patch16_224"], "does not answer prompts"),
    ],
)
def test_bad_input(argv, message):
    with pytest.raises(UsageError, match=message):
        main(argv)
