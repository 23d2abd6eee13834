import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import pytest

from tests.train.tiny import tiny, tiny_recipe
from zoo.cli import main
from zoo.costing import program_flops
from zoo.models.base import llava
from zoo.models.core.config import with_field
from zoo.models.core.errors import UsageError
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.train.objectives import NextToken
from zoo.train.plan import CHIPS, Chip, Topology, plan, topology
from zoo.train.plan.cli import stage_of
from zoo.train.plan.collectives import by_kind, traffic
from zoo.train.plan.plan import needed, traced_step, without_waste
from zoo.train.plan.suggest import candidates, flags, suggest

KEYS = ["fits", "hbm_bytes", "flops", "collectives", "step_seconds_bound", "mfu_bound", "mesh"]
MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def test_what_a_program_sends():
    found = traffic(Path(__file__).with_name("step.hlo").read_text(), MESH)
    assert found == {
        ("all-gather", ("fsdp",)): 7 * (8 * 4 * 2) * 3 // 4,  # in two parts, and two loops
        ("all-reduce", ("data",)): 7 * 2 * (16 + 4) * 4 // 2,
        ("reduce-scatter", ("fsdp",)): 3 * 4 * 3 + 4 * 4 * 3,  # one of them summed and cut
        ("all-gather", ("data", "fsdp")): 16 * 4 * 7 // 8,
        ("all-to-all", ("fsdp",)): 4 * 4 // 2,
        ("collective-permute", ("data",)): 8 * 4,
    }
    assert by_kind(found)["all-gather"] == 7 * 48 + 56


@pytest.fixture(scope="module")
def eight() -> Topology:
    """Eight CPU devices, taken for chips that do a FLOP, read and send a byte in a nanosecond."""
    return Topology("cpu:8", jax.devices("cpu")[:8], Chip(1e9, 1 << 30, 1e9, 1e9, 2))


@pytest.fixture(scope="module")
def planned(eight):
    return plan(tiny(mesh=MeshConfig(data=2, fsdp=2, tensor=2)), eight)


def test_memory_is_that_of_the_shards(planned):
    table, matrices, norm = 320 * 8, 2 * 8 * 32, 8
    params = 4 * (table // 4 + matrices // 4 + norm)
    assert planned.hbm_bytes["params"] == params
    assert planned.hbm_bytes["optimizer"] == 2 * params + 8  # two moments and two counters
    parts = [planned.hbm_bytes[name] for name in ("params", "optimizer", "temporaries")]
    assert planned.hbm_bytes["total"] == sum(parts)
    assert planned.hbm_bytes["temporaries"] > 0
    assert planned.fits


def test_flops_are_those_of_all_products(planned):
    tokens = 8 * 24
    forward = 2 * tokens * (8 * 32 + 32 * 8 + 8 * 320)
    assert planned.flops == 3 * forward


def test_bounds_follow_from_what_is_done(planned):
    moved = planned.bounds["memory"] * 1e9
    assert planned.bounds["compute"] == pytest.approx(planned.flops / 8 / 1e9)
    assert planned.bounds["network"] == pytest.approx(sum(planned.collectives.values()) / 1e9)
    assert moved >= 2 * (planned.hbm_bytes["params"] + planned.hbm_bytes["optimizer"])
    assert planned.step_seconds_bound == max(planned.bounds.values())
    share = planned.flops / 8 / 1e9 / planned.step_seconds_bound
    assert planned.mfu_bound == pytest.approx(share)
    assert {axis for _, axes in planned.traffic for axis in axes} == {"data", "fsdp", "tensor"}
    assert planned.collectives["all-reduce"] > 0


def test_what_is_computed_twice_counts_twice_but_is_no_use():
    # Traced and not compiled: a deeper model.
    def flops(experiment, devices=1):
        mesh = make_mesh(experiment.mesh, jax.devices("cpu")[:devices])
        return program_flops(traced_step(experiment, mesh)[1].jaxpr)

    model = dataclasses.replace(llava.VARIANTS["llava_tiny"], text_tokens=25)
    plain = tiny(model=model, objective=NextToken())
    twice = tiny(
        model=with_field(model, "remat", "full"), objective=NextToken(chunk=8), accumulate=2
    )
    assert 1.2 * flops(plain) < flops(twice) < 1.4 * flops(plain)
    assert flops(without_waste(twice)) == flops(plain)
    # Attention and loss are programs of one device there; what all do is counted.
    divided = dataclasses.replace(plain, mesh=MeshConfig(data=1, fsdp=4, seq=2))
    assert flops(divided, 8) == flops(plain)


def test_it_says_what_to_change_where_it_does_not_fit(eight):
    two = dataclasses.replace(eight, devices=eight.devices[:2])
    whole = tiny(objective=NextToken(), batch_size=256, mesh=MeshConfig(data=2))
    needs = plan(whole, two).hbm_bytes["total"]
    small = dataclasses.replace(two, chip=dataclasses.replace(two.chip, hbm=needs // 2))
    assert not plan(whole, small).fits
    said = []
    better, found = suggest(whole, small, said.append)
    assert found.fits
    assert found.hbm_bytes["total"] <= needs // 2
    assert (better.mesh, better.accumulate) == (MeshConfig(data=1, fsdp=2), 128)
    assert flags(whole, better) == "--accumulate 128 --mesh.data 1 --mesh.fsdp 2"
    assert [line.split("trying ")[1] for line in said] == [
        "--mesh.data 1 --mesh.fsdp 2",
        flags(whole, better),
    ]


def test_what_is_tried_divides_evenly_and_is_new():
    for batch, devices in ((128, 64), (128, 512), (8, 8), (6, 4)):
        begin = tiny(batch_size=batch, mesh=MeshConfig(fsdp=devices, data=-1))
        tried = candidates(begin, devices)
        assert begin not in tried
        assert len({repr(each) for each in tried}) == len(tried)
        for each in tried:
            sizes = each.mesh.sizes
            assert math.prod(sizes.values()) == devices
            assert batch % (sizes["data"] * sizes["fsdp"] * each.accumulate) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("memory required for HLO temporaries (800.00G) exceeds available HBM (15.75G)", 800 << 30),
        ("Ran out of memory in memory space hbm. Used 20.50M of 15.75M hbm.", 41 << 19),
    ],
)
def test_how_much_is_missing(text, size):
    assert needed(RuntimeError(text)) == size
    with pytest.raises(RuntimeError, match="else"):
        needed(RuntimeError("something else"))


# The command line


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    """A configuration whose step compiles at once."""
    path = tmp_path_factory.mktemp("configs") / "mine.py"
    path.write_text("from tests.train.tiny import tiny\n\n\ndef config():\n    return tiny()\n")
    return str(path)


def test_the_command_prints_the_facts(file, capsys):
    flags = ["--topology", "cpu:8", "--mesh", "data=2,fsdp=4", "--json"]
    assert main(["plan", file, *flags]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == KEYS
    assert list(facts["hbm_bytes"]) == ["params", "optimizer", "temporaries", "total", "limit"]
    assert facts["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "seq": 1, "expert": 1}
    assert facts["fits"] is True
    assert facts["collectives"]
    assert facts["step_seconds_bound"] is facts["mfu_bound"] is None


def test_of_a_recipe_one_stage_is_planned():
    recipe = tiny_recipe()
    assert stage_of(recipe, None) is recipe.stages[1]
    assert stage_of(recipe, "align") is recipe.stages[0]
    with pytest.raises(UsageError, match="--stage other: tiny has the stages align, instruct"):
        stage_of(recipe, "other")


def test_a_table_for_people_and_advice(file, capsys, monkeypatch):
    monkeypatch.setattr(Topology, "hbm", 1 << 10)
    assert main(["plan", file, "--topology", "cpu:2", "--mesh=fsdp=2", "--batch-size", "2"]) == 1
    out, err = capsys.readouterr()
    assert "cpu:2, mesh fsdp=2, batch 2: DOES NOT FIT" in out
    assert "all-reduce over fsdp" in out
    assert "--mesh.data 1 --mesh.fsdp 1 --mesh.tensor 2" in err
    assert "nothing that was tried fits" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--topology v9:2x2", "topology is 'v9:2x2': want a kind of chip (v4, v5e, v5p, v6e)"),
        ("--topology v5p:4x4", "slices of v5p have 3 dimensions, such as v5p:4x4x4"),
        ("--topology cpu:0", "topology is 'cpu:0'"),
        ("--topology cpu:99", "this process has 8 CPU devices; set XLA_FLAGS"),
        ("--topology cpu:8 --mesh fsdp=3", "does not cover 8 devices"),
        ("--topology cpu:8 --mesh fsdp", "--mesh fsdp: want axes and sizes"),
        ("--topology cpu:8 --batch-size 12", "batch_size is 12: want a multiple of 8"),
        ("--topology cpu:8 --stage align", "tiny is one experiment, and has no stages"),
    ],
)
def test_wrong_use_is_told(flags, message, file, capsys):
    assert main(["plan", file, *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_without_the_compiler_it_says_how_to_get_it(file, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", file, "--topology", "v5e:2x2"]) == 2
    assert "pip install libtpu" in capsys.readouterr().err


# With the compiler for TPUs

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)


@pytest.fixture
def no_flags(monkeypatch):
    """libtpu reads XLA_FLAGS when it is loaded, and ends the process at a flag of the CPU's."""
    jax.devices()
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@libtpu
@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.usefixtures("no_flags")
def test_a_slice_of_a_pod():
    found = plan(tiny(mesh=MeshConfig(data=2, fsdp=2, tensor=2)), "v5e:2x4")
    assert found.fits
    assert found.hbm_bytes["limit"] == CHIPS["v5e"].hbm
    assert found.collectives
    assert 0 < found.mfu_bound < 1
    assert {axis for _, axes in found.traffic for axis in axes} <= {"data", "fsdp", "tensor"}


@libtpu
@pytest.mark.tpu
@pytest.mark.usefixtures("no_flags")
@pytest.mark.parametrize("kind", CHIPS)
def test_every_kind_of_chip_is_one_device(kind):
    axes = CHIPS[kind].axes
    assert len(topology(f"{kind}:{'x'.join(['2'] * axes)}").devices) == 2**axes


@libtpu
@pytest.mark.tpu
@pytest.mark.usefixtures("no_flags")
def test_a_shape_that_does_not_exist():
    with pytest.raises(UsageError, match="v5e:3x7"):
        topology("v5e:3x7")
