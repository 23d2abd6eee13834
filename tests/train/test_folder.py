import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.train.tiny import TinyData, tiny
from zoo.models.core.errors import UsageError, ZooError
from zoo.train.cli import find
from zoo.train.config import MAY_CHANGE, Best, Experiment, Faults, Watch
from zoo.train.folder import check_room, claim, read_experiment, writing
from zoo.train.lora import LoRA
from zoo.train.mesh import MeshConfig
from zoo.train.objectives import Objective
from zoo.train.parts import Part
from zoo.whole import locked


def begun(folder, experiment):
    claim(folder, experiment)
    (folder / "checkpoints" / "4").mkdir(parents=True)


def test_a_folder_belongs_to_one_experiment(tmp_path):
    begun(tmp_path, tiny())
    claim(tmp_path, tiny())
    other = tiny(seed=1, optim=replace(tiny().optim, lr=1.0), data=TinyData(records=50))
    with pytest.raises(UsageError) as refused:
        claim(tmp_path, other)
    for line in ("seed: 0 → 1", "optim.lr: 0.01 → 1.0", "data.records: 40 → 50", str(tmp_path)):
        assert line in str(refused.value)
    assert "batch_size" not in str(refused.value)


def test_a_run_of_another_version_is_told_in_a_line(tmp_path):
    begun(tmp_path, tiny())
    described = json.loads((tmp_path / "config.json").read_text())
    del described["optim"]["state"]
    described["dropout"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(UsageError, match=r"another version, .* \(.*\): finish it") as refused:
        claim(tmp_path, tiny())
    assert "(dropout, optim.state)" in str(refused.value)
    assert "\n" not in str(refused.value)
    # Another class, or more of a list, has other fields in the same version, too.
    (tmp_path / "other").mkdir()
    begun(tmp_path / "other", tiny())
    with pytest.raises(UsageError, match="another configuration"):
        claim(tmp_path / "other", tiny(lora=LoRA(), parts=(Part(".*"),), objective=Objective()))


def test_what_changes_no_number_may_change(tmp_path):
    begun(tmp_path, tiny())
    free = tiny(
        name="other", log_every=3, eval_every=3, eval_examples=8, save_every=7, keep=5,
        max_bad_share=0.5, best=Best(2), faults=Faults("skip"), watch=Watch(wandb="zoo"),
        mesh=MeshConfig(fsdp=2), accumulate=2,
        objective=replace(tiny().objective, chunk=3),
    )  # fmt: skip
    claim(tmp_path, free)
    assert set(MAY_CHANGE) <= set(Experiment.__dataclass_fields__)


def test_length_may_change_only_where_no_learning_rate_depends_on_it(tmp_path):
    begun(tmp_path, tiny())
    with pytest.raises(UsageError, match="steps: 12 → 24"):
        claim(tmp_path, tiny(steps=24))
    steady = replace(tiny().optim, schedule="constant")
    (tmp_path / "steady").mkdir()
    begun(tmp_path / "steady", tiny(optim=steady))
    claim(tmp_path / "steady", tiny(optim=steady, steps=24))


def test_before_the_first_checkpoint_all_may_change(tmp_path):
    claim(tmp_path, tiny())
    claim(tmp_path, tiny(seed=1))


@pytest.mark.parametrize("text", [None, "", '{"class": "zoo.train.con'])
def test_a_lost_configuration_is_said(tmp_path, text):
    begun(tmp_path, tiny())
    file = tmp_path / "config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ZooError, match=r"config\.json"):
        claim(tmp_path, tiny())


def test_the_experiment_is_read_back(tmp_path):
    claim(tmp_path, find("digits_vqa_tiny"))
    assert read_experiment(tmp_path) == find("digits_vqa_tiny")
    (tmp_path / "config.json").write_text('{"class": "zoo.train.mesh.MeshConfig"}')
    with pytest.raises(ZooError, match="no experiment"):
        read_experiment(tmp_path)


def test_one_run_at_a_time(tmp_path):
    code = "import sys; from zoo.whole import locked\nwith locked(sys.argv[1]): pass"
    with locked(tmp_path):
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert f"another run (process {os.getpid()})" in other.stderr
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(ZooError, match=r"cannot write to .*choose another"), locked(place):
            pass
    with pytest.raises(ZooError, match=r"cannot write to .*No space left"), writing(tmp_path):
        raise OSError(28, "No space left on device")


def test_room_for_the_checkpoints_is_asked_for_beforehand(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 7_900_000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    check_room(tmp_path, 1_000_000, keep=2)
    with pytest.raises(ZooError, match=r"7\.9 MB left, and 4 checkpoints of 1\.0 MB need 8\.0 MB"):
        check_room(tmp_path, 1_000_000, keep=3)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "old").write_bytes(bytes(200_000))
    check_room(tmp_path, 1_000_000, keep=3)
