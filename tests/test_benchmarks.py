"""The benchmarks run; what they say is another matter, and takes a quiet machine."""

import json

import pytest

from benchmarks import figures, pillars


@pytest.mark.parametrize("name", ["p_mod"])
def test_pillars_at_a_tiny_size(name, tmp_path, capsys):
    pillars.main(["--tiny", "--rounds", "1", "--only", name, "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["cores"] and found["versions"]["jax"]
    for part in ("answer", "training_step"):
        assert set(found[part]["seconds"]) == {"dense", name}
        assert all(seconds > 0 for seconds in found[part]["seconds"].values())
        assert found[part]["times_fewer_flops"]["dense"] == 1
        assert found[part]["times_fewer_flops"][name] > 1.05


def test_every_contestant_shares_the_weights_of_the_dense_one():
    entered = pillars.enter(pillars.TINY, [])
    assert {name.split()[0] for name in entered} == {
        "dense",
        "mqt",
        "p_mod",
        "gamma_mod",
        "deepstack",
    }
    dense = entered["dense"].params["decoder"]["stack"]["layers"]["q"]["kernel"]
    for each in entered.values():
        assert each.params["decoder"]["stack"]["layers"]["q"]["kernel"] is dense


def test_the_figures_are_fresh(repo):
    """The tables say what was counted, and a line of some is counted again; `python
    benchmarks/figures.py` counts and writes all.
    """
    numbers = json.loads((repo / figures.NUMBERS).read_text("utf-8"))
    assert (repo / figures.TABLES).read_text("utf-8") == figures.render(numbers)
    drawn = {"mqt": "MQT-LLaVA-7B, 16 tokens", "deepstack": "DeepStack-L, FLOPs of the decoder"}
    drawn["gamma_mod"] = "LLaVA-7B, 800 tokens, 31 % skipped"
    for pillar in figures.PILLARS:
        assert list(numbers[pillar.slug]) == [figure.what for figure in pillar.figures]
        for figure in pillar.figures:
            if figure.what == drawn.get(pillar.slug):
                assert round(figure.ours(), 6) == numbers[pillar.slug][figure.what]
            if figure.paper and abs(numbers[pillar.slug][figure.what] / figure.paper - 1) > 0.01:
                assert figure.why, figure.what
