"""Converting and exporting: bit by bit, resumable, and nothing is left of what fails."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import zoo
from tests.convert.checkpoint import LLAMA, same_bits, state_of, write_checkpoint
from zoo import cli
from zoo.convert import convert as converting
from zoo.convert import export as exporting
from zoo.convert import parts
from zoo.convert.convert import convert
from zoo.convert.export import export
from zoo.convert.folder import read_weights
from zoo.convert.parts import StoredParts, list_parts, write_part
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.keytable import Piece, Row, Table
from zoo.train.mesh import MeshConfig, make_mesh

ONE = np.float32(1)[None].reshape(())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A checkpoint of mixed dtypes with a tied head and an old buffer, and its conversion."""
    folder = tmp_path_factory.mktemp("pair")
    fields = {**LLAMA, "tie_word_embeddings": True}
    state = state_of(fields)
    state["model.norm.weight"] = state["model.norm.weight"].astype(np.float32)
    norm = "model.layers.1.input_layernorm.weight"
    state[norm] = state[norm].astype(np.float16)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    theirs = write_checkpoint(folder / "theirs", {**state, **buffer}, fields, shards=2)
    (theirs / "config.json").write_text(json.dumps(fields, indent=3) + "\n\n")
    done = convert(theirs, folder / "ours")
    return theirs, folder / "ours", state, done


@pytest.fixture
def ours(pair, tmp_path):
    """A copy of the conversion to damage."""
    return shutil.copytree(pair[1], tmp_path / "ours")


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def same_state(folder, state):
    found = read_weights(folder)
    assert set(found) == set(state)
    return all(same_bits(found[name], array) for name, array in state.items())


def test_what_is_converted_is_loaded(pair):
    theirs, ours, _, done = pair
    assert done.model_type == "llama" and done.parts == 1 and not done.resumed
    assert done.dropped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    a, b = zoo.load(theirs), zoo.load(ours)
    assert a.config == b.config
    assert jax.tree.all(jax.tree.map(same_bits, a.params, b.params))
    assert b.processor is None
    names = {path.name for path in ours.iterdir()}
    assert names == {"config.json", "params", "tensors.json", "source", "manifest.json"}
    assert {path.name for path in (ours / "source").iterdir()} == {"config.json", "README.md"}
    described = json.loads((ours / "config.json").read_text())
    assert described["layout"] == 1 and described["about"]["base"] == "llama"


def test_a_converted_model_on_a_mesh_and_in_another_dtype(pair):
    theirs, ours, _, _ = pair
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    a, b = (zoo.load(folder, mesh=mesh, dtype="float32") for folder in (theirs, ours))
    assert jax.tree.all(jax.tree.map(same_bits, a.params, b.params))
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, a.params, b.params))


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 10_000])
def test_what_is_exported_is_what_was_there(pair, tmp_path, monkeypatch, shard_bytes):
    theirs, ours, state, _ = pair
    monkeypatch.setattr(exporting, "SHARD_BYTES", shard_bytes)
    done = export(ours, tmp_path / "back")
    assert same_state(tmp_path / "back", state)
    assert (len(done.files) > 1) == (shard_bytes == 10_000)
    for name in ("config.json", "README.md"):
        assert (tmp_path / "back" / name).read_bytes() == (theirs / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["back"]


def test_converting_again_does_nothing_and_another_source_is_refused(pair, tmp_path):
    theirs, ours, _, done = pair
    before = (ours / "manifest.json").stat().st_mtime_ns
    again = convert(theirs, ours)
    assert again.resumed == again.parts == done.parts
    assert (again.tensors, again.bytes, again.dropped) == (done.tensors, done.bytes, done.dropped)
    assert (ours / "manifest.json").stat().st_mtime_ns == before
    other = write_checkpoint(tmp_path / "other")
    with pytest.raises(UsageError, match="holds another model"):
        convert(other, ours)


@pytest.mark.parametrize("run", [convert, export])
def test_places_that_are_taken(pair, tmp_path, run):
    source = pair[0] if run is convert else pair[1]
    (tmp_path / "notes").write_text("mine")
    for place in (tmp_path, tmp_path / "notes", source):
        with pytest.raises(UsageError, match="choose"):
            run(source, place)
    assert files(tmp_path) == ["notes"]
    (tmp_path / "new").mkdir()  # an empty folder may be used
    run(source, tmp_path / "new")


@pytest.mark.parametrize("run", [convert, export])
def test_places_that_cannot_be_written(pair, tmp_path, run):
    source = pair[0] if run is convert else pair[1]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ZooError, match=r"cannot write|could not be written"):
        run(source, tmp_path / "file" / "deeper")
    assert files(tmp_path) == ["file"]


def test_a_full_disk_while_converting(pair, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parts.ocp.Checkpointer, "save", full)
        with pytest.raises(ZooError, match="No space left"):
            convert(pair[0], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with monkeypatch.context() as patch:
        patch.setattr(converting.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(ZooError, match="make room"):
            convert(pair[0], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert convert(pair[0], tmp_path / "new").tensors == pair[3].tensors
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_full_disk_while_exporting(pair, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_header", full)
    with pytest.raises(ZooError, match="No space left"):
        export(pair[1], tmp_path / "new")
    assert files(tmp_path) == []
    left = exporting.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: left)
    with pytest.raises(ZooError, match="100 bytes are left and the weights need"):
        export(pair[1], tmp_path / "new")
    assert files(tmp_path) == []


@pytest.mark.parametrize("damage", ["truncated", "no file", "pickle", "header"])
def test_a_bad_source_leaves_nothing(tmp_path, damage):
    folder = write_checkpoint(tmp_path / "theirs")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "header":
        file.write_bytes(content.replace(b'"data_offsets":[0,', b'"data_offsets":[2,'))
    else:
        file.unlink()
    if damage == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02c__builtin__\nexec\n.")
    with pytest.raises(ZooError):
        convert(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_flipped_bit_in_a_converted_model(ours, tmp_path):
    data = max((ours / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    name = str(data.relative_to(ours))
    with pytest.raises(ZooError, match=f"{name} has changed since it was written.*convert the"):
        zoo.load(ours)
    with pytest.raises(ZooError, match=f"{name} has changed since it was written"):
        export(ours, tmp_path / "back")
    assert files(tmp_path) == sorted(["ours", *(f"ours/{name}" for name in files(ours))])


def test_a_tensor_that_is_not_what_it_was_is_not_exported(ours, tmp_path):
    listing = json.loads((ours / "tensors.json").read_text())
    listing["tensors"]["model.norm.weight"]["sha256"] = "0" * 64
    (ours / "tensors.json").write_text(json.dumps(listing))
    from zoo.whole import write_manifest

    write_manifest(ours)
    with pytest.raises(ZooError, match=r"model.norm.weight is not what it was"):
        export(ours, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_only_converted_models_can_be_exported(pair, tmp_path):
    with pytest.raises(UsageError, match="holds no converted checkpoint"):
        export(pair[0], tmp_path / "back")
    with pytest.raises(UsageError, match="nowhere does not exist"):
        export(tmp_path / "nowhere", tmp_path / "back")


def interrupt(theirs, ours, seconds=120):
    """Kill a conversion after its second part; how many parts were finished by then."""
    code = (
        "import sys, time\n"
        "from zoo.convert import parts, convert\n"
        "parts.PART_BYTES = 8_000\n"
        "seen = []\n"
        "def say(line):\n"
        "    seen.append(line)\n"
        "    if len(seen) == 2: print('two', flush=True); time.sleep(600)\n"
        "convert.convert(sys.argv[1], sys.argv[2], say)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, theirs, ours],
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    try:
        assert process.stdout.readline() == b"two\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(seconds)
        process.stdout.close()


def test_a_killed_conversion_goes_on(tmp_path, monkeypatch):
    state = state_of()
    theirs = write_checkpoint(tmp_path / "theirs", state)
    interrupt(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    with pytest.raises(ZooError):
        zoo.load(tmp_path / "ours")
    work = tmp_path / ".ours.converting"
    with open(work / "journal.jsonl", "a") as journal:
        journal.write('{"name": "params/0')  # as a kill in the middle of a line leaves it
    monkeypatch.setattr(parts, "PART_BYTES", 8_000)
    first = max((work / "params" / "000").rglob("*"), key=lambda path: path.stat().st_size)
    damaged = shutil.copytree(work, tmp_path / ".again.converting")
    done = convert(theirs, tmp_path / "ours")
    assert done.resumed == 2 and done.parts > 3
    assert sorted(path.name for path in tmp_path.iterdir() if "again" not in path.name) == [
        "ours",
        "theirs",
    ]
    export(tmp_path / "ours", tmp_path / "back")
    assert same_state(tmp_path / "back", state)
    # A part that is not as it was written is written again, and so is all of another source.
    file = damaged / first.relative_to(work)
    file.write_bytes(file.read_bytes()[:-1])
    assert convert(theirs, tmp_path / "again").resumed == 1
    shutil.rmtree(tmp_path / "again")


def test_what_was_begun_with_another_source_starts_anew(tmp_path):
    work = tmp_path / ".ours.converting"
    (work / "params" / "000").mkdir(parents=True)
    (work / "origin.json").write_text('{"another": 1}')
    (work / "journal.jsonl").write_text('{"name": "params/000", "files": {}, "sha256": {}}\n')
    assert convert(write_checkpoint(tmp_path / "theirs"), tmp_path / "ours").resumed == 0
    zoo.load(tmp_path / "ours")


def test_two_conversions_do_not_meet(tmp_path):
    theirs = write_checkpoint(tmp_path / "theirs")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom zoo.whole import locked\n"
        "with locked(Path(sys.argv[1])): print('in', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".ours.converting")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"in\n"
            with pytest.raises(ZooError, match="another run"):
                convert(theirs, tmp_path / "ours")
        finally:
            other.kill()


def test_float8_and_a_bin_go_both_ways(tmp_path):
    from tests.convert.test_files import tensor, write_zip

    state = state_of(dtype=np.float32)
    folder = write_checkpoint(tmp_path / "theirs", {})
    (folder / "model.safetensors").unlink()
    keys = {name: str(number) for number, name in enumerate(state)}
    value = {name: tensor(state[name], keys[name]) for name in state}
    write_zip(folder / "pytorch_model.bin", value, {keys[n]: a for n, a in state.items()})
    convert(folder, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert same_state(tmp_path / "back", state)
    eight = state_of(dtype=ml_dtypes.float8_e4m3fn)
    convert(write_checkpoint(tmp_path / "eight", eight), tmp_path / "ours8")
    export(tmp_path / "ours8", tmp_path / "back8")
    assert same_state(tmp_path / "back8", eight)


def test_numbers_keep_their_shape(tmp_path):
    """A parameter without axes, as the temperature of CLIP is."""
    pieces = [Piece({"scale": ((), np.dtype(np.float32))}, None, (), lambda: {"scale": 2 * ONE})]
    write_part(tmp_path / "000", pieces)
    stored = StoredParts(tmp_path, list_parts({"000": pieces}))
    (piece,) = stored.pieces()
    assert same_bits(piece.read()["scale"], 2 * ONE)
    table = Table((Row("scale", "logit_scale"),))
    assert table.save({"scale": ONE})["logit_scale"].shape == ()


def test_a_bin_with_a_flipped_bit_leaves_nothing(tmp_path):
    from tests.convert.test_files import tensor, write_zip

    state = state_of(dtype=np.float32)
    folder = write_checkpoint(tmp_path / "theirs", {})
    (folder / "model.safetensors").unlink()
    keys = {name: str(number) for number, name in enumerate(state)}
    file = write_zip(
        folder / "pytorch_model.bin",
        {name: tensor(state[name], keys[name]) for name in state},
        {keys[name]: array for name, array in state.items()},
    )
    content = file.read_bytes()
    at = content.index(state["model.norm.weight"].tobytes())
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(ZooError, match="damaged: the bytes from"):
        convert(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_the_commands(tmp_path, capsys):
    theirs = write_checkpoint(tmp_path / "theirs")
    assert cli.main(["convert", str(theirs), str(tmp_path / "ours"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tensors"] == len(state_of()) and facts["model_type"] == "llama"
    assert cli.main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert f"{facts['tensors']} tensors" in capsys.readouterr().out
    assert cli.main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 2
    assert "exists: choose a folder" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    assert "nowhere" in capsys.readouterr().err
