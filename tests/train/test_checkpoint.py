import errno
import json
import math
import shutil
import threading
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.train.tiny import TinyConfig
from zoo.models.core.errors import ZooError
from zoo.train import checkpoint
from zoo.train.checkpoint import Checkpoints
from zoo.train.config import Best
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.train.optim import OptimConfig, make_optimizer
from zoo.train.state import abstract_state, boxed_params, initial_state
from zoo.whole import check, write_manifest


class Counter(grain.DatasetIterator):
    """Counts; the simplest place in a data set."""

    def __init__(self):
        super().__init__()
        self.place = 0

    def __next__(self):
        self.place += 1
        return self.place

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


def states(mesh_config=None, seed=0):
    config, optimizer = TinyConfig(), make_optimizer(OptimConfig(warmup=0), 10)
    model, inputs = config.build(), config.inputs(1)
    mesh = make_mesh(mesh_config or MeshConfig(fsdp=2))
    abstract = abstract_state(boxed_params(model, inputs), optimizer, mesh)
    return abstract, initial_state(model, inputs, optimizer, abstract, seed)


def written(folder, steps, keep=3, best=None, metrics=None):
    """Checkpoints of `steps` in `folder`; returns the last state."""
    _, state = states()
    checkpoints = Checkpoints(folder, keep, pytest.fail, best or Best())
    data = Counter()
    for step in steps:
        data.place = 10 * step
        state = state.replace(step=jax.numpy.int32(step))
        checkpoints.save(state, data, (metrics or {}).get(step))
    checkpoints.wait()
    checkpoints.close()
    return state


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    written(folder, [4, 8])
    return folder


@pytest.fixture
def copy(two, tmp_path):
    return Path(shutil.copytree(two, tmp_path / "checkpoints"))


def test_what_was_saved_comes_back_on_any_mesh(copy):
    _, saved = states()
    abstract, other = states(MeshConfig(data=2, fsdp=2, tensor=2), seed=5)
    assert not np.array_equal(saved.params["embedding"], other.params["embedding"])
    checkpoints, data = Checkpoints(copy, 3, pytest.fail), Counter()
    found = checkpoints.restore(abstract, data)
    assert (int(found.step), data.place) == (8, 80)
    saved = saved.replace(step=found.step)
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, abstract)


def test_the_newest_are_kept(tmp_path):
    written(tmp_path, [1, 2, 3, 5], keep=2)
    assert Checkpoints(tmp_path, 2, pytest.fail).steps == [3, 5]


@pytest.mark.parametrize(("largest", "stay"), [(False, [2, 4, 5, 6]), (True, [1, 3, 5, 6])])
def test_the_best_are_kept_too(tmp_path, largest, stay):
    # Step 5 was not judged, and one number is none.
    metrics = {1: {"m": 9.0}, 2: {"m": 1.0}, 3: {"m": 8.0}, 4: {"m": 2.0}, 6: {"m": math.nan}}
    best = Best(2, "m", largest)
    written(tmp_path, [1, 2, 3], keep=2, best=best, metrics=metrics)
    written(tmp_path, [4, 5, 6], keep=2, best=best, metrics=metrics)  # knows of those before
    assert Checkpoints(tmp_path, 2, pytest.fail).steps == stay


def test_it_is_written_while_training_goes_on(tmp_path, monkeypatch):
    abstract, state = states()
    wanted = jax.tree.map(np.array, state)
    checkpoints, data = Checkpoints(tmp_path, 2, pytest.fail), Counter()
    slow = threading.Event()
    write_manifest = checkpoint.write_manifest
    monkeypatch.setattr(
        checkpoint, "write_manifest", lambda path: slow.wait(60) and write_manifest(path)
    )
    checkpoints.save(state, data)
    checkpoints.poll()
    assert checkpoints.newest is None
    # The state is used up, and what is drawn from next takes its memory.
    use = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    for _ in range(3):
        state, data.place = use(state), 7
    assert not np.array_equal(state.params["embedding"], wanted.params["embedding"])
    slow.set()
    checkpoints.wait()
    assert checkpoints.newest == 0
    found = checkpoints.restore(abstract, data)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert data.place == 0


def damage(how, file):
    raw = file.read_bytes()
    if how == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif how == "flipped":
        file.write_bytes(
            raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]
        )
    elif how == "emptied":
        file.write_bytes(b"")
    else:
        file.unlink()
    return raw


@pytest.mark.parametrize("how", ["truncated", "flipped", "emptied", "missing"])
def test_damage_to_any_file_is_noticed(copy, how):
    newest = copy / "8"
    files = [f for f in newest.rglob("*") if f.is_file() and f.stat().st_size]
    assert len(files) > 10
    for file in files:
        raw = damage(how, file)
        problem = check(newest)
        assert problem, f"{how}: {file}"
        assert file.name in problem or file.name == "manifest.json"
        file.write_bytes(raw)
    assert check(newest) is None


@pytest.mark.parametrize("what", ["array", "manifest", "everything"])
def test_a_bad_checkpoint_is_set_aside_for_the_one_before(copy, what):
    biggest = max((copy / "8").rglob("d/*"), key=lambda f: f.stat().st_size)
    if what == "everything":
        shutil.rmtree(copy / "8")
        (copy / "8").mkdir()
    else:
        damage("flipped", biggest) if what == "array" else (copy / "8" / "manifest.json").unlink()
    said = []
    checkpoints, data = Checkpoints(copy, 3, said.append), Counter()
    assert checkpoints.newest == 4
    assert len(said) == 1
    assert str(copy / "8") in said[0]
    assert "step 4" in said[0]
    if what == "array":
        assert biggest.name in said[0]
    state = checkpoints.restore(states()[0], data)
    assert (int(state.step), data.place) == (4, 40)
    assert (copy / "damaged" / "8").exists()
    checkpoints.save(state.replace(step=jax.numpy.int32(6)), data)
    checkpoints.wait()
    assert (copy / "damaged" / "8").exists()  # not caught up yet
    checkpoints.save(state.replace(step=jax.numpy.int32(8)), data)
    checkpoints.wait()
    assert not (copy / "damaged").exists()
    assert Checkpoints(copy, 3, pytest.fail).steps == [4, 6, 8]


def test_with_no_good_one_left_it_says_that_it_begins_again(copy):
    for step in ("4", "8"):
        damage("truncated", copy / step / "manifest.json")
    said = []
    assert Checkpoints(copy, 3, said.append).newest is None
    assert len(said) == 2
    assert "beginning" in said[1]


def test_leftovers_of_a_killed_save_are_removed(copy):
    (copy / "12.orbax-checkpoint-tmp-3" / "params").mkdir(parents=True)
    assert Checkpoints(copy, 3, pytest.fail).newest == 8
    assert sorted(p.name for p in copy.iterdir()) == ["4", "8"]


@pytest.mark.parametrize("where", ["beforehand", "orbax", "background", "manifest"])
def test_a_full_disk_is_said_and_leaves_the_last_good_one(copy, monkeypatch, where):
    checkpoints, (_, state) = Checkpoints(copy, 3, pytest.fail), states()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "beforehand":
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 900_000}))
    elif where == "orbax":
        monkeypatch.setattr(ocp.AsyncCheckpointer, "save", full)
    elif where == "background":
        monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", full)
    else:
        monkeypatch.setattr("zoo.whole.write_atomically", full)

    def save():
        checkpoints.save(state.replace(step=jax.numpy.int32(12)), Counter())
        checkpoints.wait()

    with pytest.raises(
        ZooError, match=r"step 12 could not .* the disk is full.*; the last good one is .*8"
    ):
        save()
    assert Checkpoints(copy, 3, pytest.fail).steps == [4, 8]


def retold(copy, change):
    """The newest checkpoint with other numbers, as another version might have written it."""
    file = copy / "8" / "rest" / "metadata"
    rest = json.loads(file.read_text())
    change(rest)
    file.write_text(json.dumps(rest))
    write_manifest(copy / "8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rest: rest.update(form=0),
            r"8 is of another form .* \(0, want 1\): finish the run",
        ),
        (lambda rest: rest.pop("typical"), r"another form .* \(typical is missing\)"),
        (lambda rest: rest["data"].clear(), r"could not be restored"),
        (lambda rest: rest.pop("form"), None),  # the first versions did not say it
    ],
)
def test_a_checkpoint_of_another_form_is_told_in_a_line(copy, change, message):
    retold(copy, change)
    abstract, _ = states()
    checkpoints = Checkpoints(copy, 3, pytest.fail)
    if message is None:
        assert int(checkpoints.restore(abstract, Counter()).step) == 8
    else:
        with pytest.raises(ZooError, match=message) as caught:
            checkpoints.restore(abstract, Counter())
        assert "\n" not in str(caught.value)
    checkpoints.close()


def test_arrays_of_another_form_are_named(copy):
    abstract, _ = states()
    checkpoints = Checkpoints(copy, 3, pytest.fail)
    params = dict(abstract.params)
    extra = {**params, "more": params["norm"]["scale"]}
    with pytest.raises(ZooError, match=r"another form .* \(params/more is missing\)"):
        checkpoints.restore(abstract.replace(params=extra), Counter())
    del params["embedding"]
    with pytest.raises(ZooError, match=r"another form .* \(params/embedding is unknown to it\)"):
        checkpoints.restore(abstract.replace(params=params), Counter())
    checkpoints.close()
