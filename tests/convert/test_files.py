"""Files of weights: what is there is read exactly, and what is wrong is one clear error."""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from tests.convert.checkpoint import same_bits, write_safetensors
from zoo.convert.folder import read_weights
from zoo.convert.pickled import read_pickled
from zoo.convert.safetensors import read_safetensors
from zoo.convert.tensor import DTYPES
from zoo.models.core.errors import ZooError

STATE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float16),
    "scalar": np.array(7, np.int64),
}


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_safetensors_of_every_dtype(tmp_path):
    state = {name: np.arange(8).reshape(2, 4).astype(dtype) for name, dtype in DTYPES.items()}
    write_safetensors(tmp_path / "x.safetensors", {**state, **STATE})
    found = read_safetensors(tmp_path / "x.safetensors")
    assert set(found) == {*state, *STATE}
    assert all(same_bits(found[name], array) for name, array in {**state, **STATE}.items())
    assert found["a"].shape == (2, 3) and found["a"].nbytes == 24


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or no safetensors"),
        (b"abc", "truncated or no safetensors"),
        (b"<html>not found</html>" * 9, "truncated or no safetensors"),
        (struct.pack("<Q", 1 << 62) + b"{}", "truncated or no safetensors"),
        (struct.pack("<Q", 0) + b"{}", "truncated or no safetensors"),
        (safetensors(b"[1]"), "no JSON object"),
        (safetensors(b"{nope"), "no JSON"),
        (safetensors(b"[" * 100_000), "no JSON"),
        (safetensors(b'{"a":1,"a":2}'), "names 'a' twice"),
        (safetensors({"a": 3}), "want dtype, shape and two data_offsets"),
        (safetensors({"a": entry(dtype="C64")}, bytes(4)), "dtype 'C64' is not one of"),
        (safetensors({"a": entry(shape=(-1,))}, bytes(4)), "want integers of 0 or more"),
        (safetensors({"a": entry(shape=(1.0,))}, bytes(4)), "want integers of 0 or more"),
        (safetensors({"a": entry(shape=(True,))}, bytes(4)), "want integers of 0 or more"),
        (safetensors({"a": entry(shape=(1 << 70,))}, bytes(4)), "want integers of 0 or more"),
        (safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "no number"),
        (safetensors({"a": entry(shape=(1 << 31, 1 << 31))}, bytes(4)), "takes"),
        (safetensors({"a": entry(), "b": entry()}, bytes(8)), "b begins at 0 and overlaps"),
        (safetensors({"a": entry(), "b": entry(8, 12)}, bytes(12)), "b begins at 8 and follows"),
        (safetensors({"a": entry()}, bytes(3)), "is truncated or longer than it says"),
        (safetensors({"a": entry()}, bytes(5)), "is truncated or longer than it says"),
    ],
)
def test_safetensors_that_lie(tmp_path, content, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ZooError, match=message) as error:
        read_safetensors(file)
    assert str(file) in str(error.value)


# What `torch.save` writes, made without PyTorch: stand-ins whose names are replaced in the pickle.


class Storage:
    def __init__(self, kind, key, count):
        self.persistent = ("storage", kind, key, "cpu", count)


def rebuild(*args):
    raise AssertionError("a name in a pickle was called")


class Call:
    """Pickled as the call of a global name."""

    def __init__(self, name, *args):
        self.name, self.args = name, args


class Torch(pickle._Pickler):
    """A pickler that writes `Call` and `Storage` as `torch.save` would."""

    def persistent_id(self, value):
        return value.persistent if isinstance(value, Storage) else None

    def save_global_name(self, name):
        module, _, attribute = name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Call):
            self.save_global_name(value.name)
            self.save(tuple(value.args))
            self.write(pickle.REDUCE)
        elif isinstance(value, type) and issubclass(value, Name):
            self.save_global_name(value.text)
        else:
            super().save(value, save_persistent_id)


class Name:
    text = ""


def name(text):
    return type("Name", (Name,), {"text": text})


KINDS = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def tensor(array, key, strides=None, offset=0, shape=None):
    rows = tuple(step // array.itemsize for step in np.ascontiguousarray(array).strides)
    storage = Storage(name(f"torch.{KINDS[array.dtype.name]}"), key, array.size)
    shape, strides = shape or array.shape, strides or rows
    args = (storage, offset, shape, strides, False, Call("collections.OrderedDict"))
    return Call("torch._utils._rebuild_tensor_v2", *args)


def write_zip(file, value, storages, compress=zipfile.ZIP_STORED, order=b"little"):
    program = io.BytesIO()
    Torch(program, 2).dump(value)
    with zipfile.ZipFile(file, "w", compress) as archive:
        archive.writestr("archive/data.pkl", program.getvalue())
        archive.writestr("archive/byteorder", order)
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return file


A, B = STATE["a"], STATE["b"]


def write_state(file, **options):
    value = {"a": tensor(A, "0"), "b": tensor(B, "1")}
    return write_zip(file, value, {"0": A, "1": B}, **options)


def test_pickled_tensors(tmp_path):
    found = read_pickled(write_state(tmp_path / "x.bin"))
    assert same_bits(found["a"], A) and same_bits(found["b"], B)


def test_a_pickled_view_is_read_as_such(tmp_path):
    base = np.arange(12, dtype=np.float32)
    value = {"t": tensor(base, "0", strides=(1, 3), offset=2, shape=(3, 3))}
    found = read_pickled(write_zip(tmp_path / "x.bin", value, {"0": base}))
    want = np.array([[base[2 + i + 3 * j] for j in range(3)] for i in range(3)])
    assert same_bits(np.ascontiguousarray(found["t"]), want)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_of_every_protocol(tmp_path, protocol):
    program = pickle.dumps({"note": [1, 2.5, None, True, ("a", 1, 2, 3), OrderedDict()]}, protocol)
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ZooError, match="'note' is list: want a tensor"):
        read_pickled(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": (1,)}, "does not lie in its storage"),
        ({"offset": 1}, "does not lie in its storage"),
        ({"shape": (1 << 40, 1 << 40)}, "does not lie in its storage"),
        ({"strides": (-1, 1)}, "does not lie in its storage"),
    ],
)
def test_tensors_outside_of_their_storage(tmp_path, change, message):
    file = write_zip(tmp_path / "x.bin", {"a": tensor(A, "0", **change)}, {"0": A})
    with pytest.raises(ZooError, match=message):
        read_pickled(file)


def test_damaged_pickles(tmp_path):
    file = write_state(tmp_path / "x.bin")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ZooError, match="truncated or damaged"):
        read_pickled(file)
    at = whole.index(A.tobytes())
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    with pytest.raises(ZooError, match="damaged: the bytes from"):
        np.asarray(read_pickled(file)["a"])
    file.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ZooError, match="bare pickle, as PyTorch wrote before"):
        read_pickled(file)
    file.write_bytes(b"hello")
    with pytest.raises(ZooError, match="no PyTorch checkpoint"):
        read_pickled(file)
    write_state(file, compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(ZooError, match="is compressed"):
        read_pickled(file)
    write_state(file, order=b"big")
    with pytest.raises(ZooError, match="byte order"):
        read_pickled(file)
    write_zip(file, {"a": tensor(A, "9")}, {"0": A})
    with pytest.raises(ZooError, match="storage '9' of a tensor is not in the archive"):
        read_pickled(file)
    write_zip(file, {"a": tensor(A, "0")}, {"0": A[:1]})
    with pytest.raises(ZooError, match="has 12 bytes instead of 24"):
        read_pickled(file)


def test_descriptions_that_would_take_forever_are_refused(tmp_path):
    bomb = ("a",)  # becomes a tree of 2^60 leaves, which nobody may hash or print
    for _ in range(60):
        bomb = (bomb, bomb)
    file = tmp_path / "x.bin"
    with zipfile.ZipFile(file, "w") as archive:
        program = pickle.dumps(bomb, 2).removesuffix(pickle.STOP)
        archive.writestr("archive/data.pkl", program[:2] + b"}" + program[2:] + b"K\x01s.")
    with pytest.raises(ZooError, match="tuple where str or int is due"):
        read_pickled(file)
    storage = Storage(name("torch.FloatStorage"), bomb, 1)
    with pytest.raises(ZooError, match="tuple where str is due"):
        read_pickled(write_zip(file, {"a": storage}, {"0": A}))
    with pytest.raises(ZooError, match="tuple where int is due"):
        read_pickled(write_zip(file, {"a": tensor(A, "0", shape=(bomb,))}, {"0": A}))


class Harm:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return exec, (f"open({str(self.target)!r}, 'w').write('ran')",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_executes_code_is_refused(tmp_path, protocol, legacy):
    target = tmp_path / "ran"
    program = pickle.dumps({"a": Harm(target)}, protocol)
    file = tmp_path / "pytorch_model.bin"
    if legacy:
        file.write_bytes(program)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", program)
    with pytest.raises(ZooError, match="cannot be used") as error:
        read_weights(tmp_path)
    assert not target.exists()
    if not legacy and protocol:
        assert "exec, which is not needed for weights" in str(error.value)


def test_names_that_look_known_are_called_with_tensors_only(tmp_path):
    for call in (
        Call("torch._utils._rebuild_parameter", 3),
        Call("torch.FloatStorage", 3),
        Call("torch._utils._rebuild_tensor_v2", "storage"),
        Call("collections.OrderedDict", [("a", 1)]),
    ):
        file = write_zip(tmp_path / "x.bin", {"a": call}, {})
        with pytest.raises(ZooError, match="cannot be used"):
            read_pickled(file)


# Folders.


def shards(folder, homes, files):
    for file, state in files.items():
        write_safetensors(folder / file, state)
    index = {"weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path):
    homes = {"a": "1.safetensors", "b": "2.safetensors"}
    shards(tmp_path, homes, {"1.safetensors": {"a": A}, "2.safetensors": {"b": B}})
    found = read_weights(tmp_path)
    assert same_bits(found["a"], A) and same_bits(found["b"], B)


@pytest.mark.parametrize(
    ("homes", "message"),
    [
        ({"a": "1.safetensors", "b": "2.safetensors"}, "shards that are not there.*\n.*2.safe"),
        ({"a": "../1.safetensors"}, "names '../1.safetensors': want files in its own folder"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd': want files in its own folder"),
        ({"a": "sub/1.safetensors"}, "want files in its own folder"),
        ({"a": 3}, "names 3: want files"),
        ({"a": "1.safetensors", "c": "1.safetensors"}, "c is not in 1.safetensors"),
        ({"c": "1.safetensors"}, "a is in 1.safetensors unlisted"),
        ({}, "no index of shards"),
        ([], "no index of shards"),
    ],
)
def test_an_index_that_lies(tmp_path, homes, message):
    shards(tmp_path, homes, {"1.safetensors": {"a": A}})
    with pytest.raises(ZooError, match=message):
        read_weights(tmp_path)


def test_sharded_pickles(tmp_path):
    write_state(tmp_path / "1.bin")
    index = {"weight_map": {"a": "1.bin", "b": "1.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same_bits(read_weights(tmp_path)["b"], B)


def test_one_file_of_another_name_is_found_and_several_are_not(tmp_path):
    with pytest.raises(ZooError, match=r"want weights in one of .*; found none"):
        read_weights(tmp_path)
    write_state(tmp_path / "weights.pth")
    assert set(read_weights(tmp_path)) == {"a", "b"}
    write_safetensors(tmp_path / "other.safetensors", STATE)
    with pytest.raises(ZooError, match="found several and no index: other"):
        read_weights(tmp_path)
