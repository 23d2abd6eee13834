"""Pictures of digits: real scans, true answers, the same bits for the same seed."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import grain
import numpy as np
import pytest

from zoo.images import read_image
from zoo.models.core.errors import UsageError, ZooError
from zoo.train.data import digits_vqa
from zoo.train.data.digits_vqa import KINDS, SCANS, Scene, compose, scans
from zoo.train.data.sources import DigitsVQA

SMALL = DigitsVQA(pictures=12, validation_pictures=4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    SMALL.prepare(folder)
    return folder


def drawn(number: int, seed: int = 0, scene: Scene = Scene()):  # noqa: B008
    for index in range(number):
        yield compose(scene, scans("train"), np.random.default_rng((seed, index)))


def fingerprint(config: DigitsVQA, folder: Path) -> str:
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        for record in config.source(split, folder):
            digest.update(repr(sorted(record.items())).encode())
    return digest.hexdigest()


def test_the_scans_are_the_ones_of_uci_with_their_attribution():
    with np.load(SCANS) as stored:
        assert stored["images"].shape == (1797, 8, 8)
        assert stored["images"].max() == 16
        assert len(np.unique(stored["images"].reshape(1797, -1), axis=0)) == 1797
        assert "10.24432/C50P49" in str(stored["notice"])
    assert "CC BY 4.0" in SCANS.with_name("ATTRIBUTION.md").read_text("utf-8")
    assert SCANS.stat().st_size < 60_000


def test_train_and_validation_share_no_scan_and_have_all_digits():
    train, validation = (scans(split) for split in ("train", "validation"))
    seen = {scan.tobytes() for scan in train.ink}
    assert not seen & {scan.tobytes() for scan in validation.ink}
    assert len(train.ink) + len(validation.ink) == 1797
    for split, share in ((train, 0.8), (validation, 0.2)):
        of_each = Counter(split.labels.tolist())
        assert sorted(of_each) == list(range(10))
        assert all(n == pytest.approx(share * 179.7, rel=0.05) for n in of_each.values())


def test_each_split_is_composed_of_its_own_scans(prepared):
    for split, name in enumerate(("train", "validation")):
        for record in SMALL.source(name, prepared):
            number = int(record["id"].split("-")[1])
            rng = np.random.default_rng((SMALL.seed, split, number))
            picture, asked = compose(SMALL.scene, scans(name), rng)
            assert np.array_equal(read_image(record["image"])[..., 0], picture)
            assert record["conversations"] == tuple((q.question, q.answer) for q in asked)
            assert record["kinds"] == tuple(q.kind for q in asked)


def test_every_answer_follows_from_the_reading():
    for _, asked in drawn(300):
        assert sorted(q.kind for q in asked) == sorted(KINDS)
        answers = {q.kind: (q.question, q.answer) for q in asked}
        row = [int(digit) for digit in answers["reading"][1].split()]
        true = {
            "leftmost digit": row[0],
            "rightmost digit": row[-1],
            "count the digits": len(row),
            "count even digits": sum(d % 2 == 0 for d in row),
            "count odd digits": sum(d % 2 == 1 for d in row),
            "largest digit": max(row),
            "smallest digit": min(row),
            "leftmost larger than rightmost": "yes" if row[0] > row[-1] else "no",
            "digit sum": sum(row),
        }
        for kind in ("position", "counting", "comparing", "summing"):
            question, answer = answers[kind]
            assert answer == str(true[question])


def test_cells_hold_whole_scans_and_questions_may_be_fewer():
    scene = Scene(canvas=40, min_size=8, max_size=10, cells=4, noise=0.0, questions=2)
    for index in range(50):
        rng = np.random.default_rng(index)
        sizes, corners = digits_vqa._place(scene, rng)
        first, last = corners // 10, (corners + sizes[:, None] - 1) // 10
        assert (first == last).all()
        assert len(set(first[:, 0])) == len(sizes)  # each in a column of its own
        assert len(compose(scene, scans("train"), rng)[1]) == 2
    with pytest.raises(UsageError, match="cells is 4"):
        Scene(canvas=40, min_size=8, max_size=11, cells=4)
    with pytest.raises(UsageError, match="questions is 6"):
        Scene(questions=6)


def test_questions_follow_the_places_and_nothing_else():
    centres = np.array([[50.0, 10.0], [10.0, 40.0], [30.0, 44.0]])
    asked = {}
    for seed in range(60):
        for q in digits_vqa._ask([7, 3, 4], centres, np.random.default_rng(seed)):
            asked.setdefault(q.question, set()).add(q.answer)
    assert asked == {
        "read the digits": {"3 4 7"},
        "leftmost digit": {"3"},
        "rightmost digit": {"7"},
        "count the digits": {"3"},
        "count even digits": {"1"},
        "count odd digits": {"2"},
        "largest digit": {"7"},
        "smallest digit": {"3"},
        "leftmost larger than rightmost": {"no"},
        "digit sum": {"14"},
    }


def test_scans_stand_apart_within_the_canvas():
    scene = Scene()
    for seed in range(300):
        sizes, corners = digits_vqa._place(scene, np.random.default_rng(seed))
        assert (corners >= 0).all()
        assert (corners + sizes[:, None] <= scene.canvas).all()
        cover = np.zeros((scene.canvas,) * 2, int)
        for size, (x, y) in zip(sizes, corners, strict=True):
            cover[y : y + size, x : x + size] += 1
        assert cover.max() == 1
        assert np.diff(np.sort(corners[:, 0] + sizes / 2)).min() >= scene.margin


def test_pictures_vary_and_the_ink_can_be_seen():
    pictures = np.stack([picture for picture, _ in drawn(100)])
    assert pictures.dtype == np.uint8
    assert len({picture.tobytes() for picture in pictures}) == 100
    assert (np.ptp(pictures.reshape(100, -1), axis=1) > 60).all()
    numbers = Counter(
        len(q.answer.split()) for _, asked in drawn(200) for q in asked if q.kind == "reading"
    )
    assert min(numbers[2], numbers[3]) > 60


def test_a_scene_of_other_measures():
    scene = Scene(canvas=48, min_scans=1, max_scans=1, min_size=20, max_size=20)
    for picture, asked in drawn(20, scene=scene):
        assert picture.shape == (48, 48)
        same = [q.answer for q in asked if q.kind in ("reading", "position", "summing")]
        assert len(set(same)) == 1


def test_impossible_scenes_are_refused():
    with pytest.raises(UsageError, match="min_scans"):
        Scene(min_scans=4)
    with pytest.raises(UsageError, match="min_size"):
        Scene(max_size=100)
    with pytest.raises(UsageError, match="do not fit"):
        compose(Scene(min_scans=9, max_scans=9), scans("train"), np.random.default_rng(0))
    with pytest.raises(UsageError, match="at least 1 of each"):
        DigitsVQA(pictures=0)


def test_every_question_is_known_to_the_tokenizer():
    texts = set(SMALL.texts())
    for _, asked in drawn(200):
        for q in asked:
            assert q.question in texts
            assert set(q.answer.split()) <= texts


def test_the_same_seed_gives_the_same_bits_in_any_process(prepared, tmp_path):
    code = (
        "import sys; from zoo.train.data.sources import DigitsVQA;"
        "DigitsVQA(pictures=12, validation_pictures=4).prepare(sys.argv[1]);"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert fingerprint(SMALL, tmp_path) == fingerprint(SMALL, prepared)


def test_a_picture_does_not_depend_on_how_many_there_are(prepared, tmp_path):
    fewer = DigitsVQA(pictures=3, validation_pictures=1)
    fewer.prepare(tmp_path)
    known = {record["id"]: record for record in SMALL.source("train", prepared)}
    assert all(record == known[record["id"]] for record in fewer.source("train", tmp_path))


def test_other_seeds_give_other_pictures_beside_the_first(prepared):
    other = DigitsVQA(pictures=12, validation_pictures=4, seed=1)
    before = fingerprint(SMALL, prepared)
    other.prepare(prepared)
    assert fingerprint(other, prepared) != before
    assert fingerprint(SMALL, prepared) == before


def test_the_source_goes_into_grain(prepared):
    source = SMALL.source("train", prepared)
    records = list(grain.MapDataset.source(source).shuffle(seed=3))
    assert sorted(r["id"] for r in records) == [f"train-{i:06d}" for i in range(12)]
    assert source[-1] == source[11]
    with pytest.raises(IndexError):
        source[12]


def test_progress_is_reported_and_a_complete_set_is_used_again(tmp_path, capfd):
    told = []
    SMALL.prepare(tmp_path, lambda done, total: told.append((done, total)))
    assert told == [(i, 16) for i in range(1, 17)]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    SMALL.prepare(tmp_path, lambda done, total: pytest.fail("was prepared again"))
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert capfd.readouterr() == ("", "")


def test_a_complete_set_is_read_where_nothing_can_be_written(prepared, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("opened a file for writing"))
    SMALL.prepare(prepared)


def test_a_killed_preparation_is_made_anew(prepared, tmp_path):
    code = (
        "import sys; from zoo.train.data.sources import DigitsVQA;"
        "tell = lambda done, total: done == 100 and print(flush=True);"
        "DigitsVQA(pictures=10**6, validation_pictures=4).prepare(sys.argv[1], tell)"
    )
    running = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert running.stdout.readline()
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    left = list((tmp_path / "digits_vqa").glob("*/incomplete*"))
    assert left
    # The same settings by name, small enough for a test: what is left behind is theirs.
    folder = SMALL._folder(tmp_path)
    shutil.move(left[0].parent, folder.parent)
    SMALL.prepare(tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert fingerprint(SMALL, tmp_path) == fingerprint(SMALL, prepared)


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "info", "garbage"])
def test_a_damaged_set_is_noticed_and_made_anew(prepared, tmp_path, damage):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    folder = SMALL._folder(tmp_path)
    shard = next(folder.glob("*train*"))
    content = shard.read_bytes()
    if damage == "info":
        (folder / "dataset_info.json").write_text("{")
    elif damage == "delete":
        shard.unlink()
    else:
        short = {"truncate": content[:-100], "empty": b"", "garbage": os.urandom(len(content))}
        shard.write_bytes(short[damage])
    with pytest.raises(ZooError, match="missing or incomplete"):
        SMALL.source("train", tmp_path)
    SMALL.prepare(tmp_path)
    assert fingerprint(SMALL, tmp_path) == fingerprint(SMALL, prepared)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    started = time.monotonic()
    with pytest.raises(ZooError, match=r"file/data/digits_vqa: Not a directory"):
        DigitsVQA().prepare(tmp_path / "file" / "data")
    assert time.monotonic() - started < 1


def test_a_full_disk_is_refused_at_once(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(ZooError, match=r"has 1 MB left and digits_vqa needs \d+ MB"):
        DigitsVQA().prepare(tmp_path)


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(tmp_path):
    code = (
        "import resource, signal, sys; from zoo.train.data.sources import DigitsVQA;"
        "from zoo.models.core.errors import ZooError;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));\n"
        "try: DigitsVQA(pictures=12, validation_pictures=4).prepare(sys.argv[1])\n"
        "except ZooError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert f"cannot write to {tmp_path}" in done.stdout
    assert not list(tmp_path.rglob("*.array_record*"))
    assert not list(tmp_path.rglob("incomplete*"))


def test_unknown_splits_and_unprepared_folders_are_refused(prepared, tmp_path):
    with pytest.raises(UsageError, match="no split 'test'"):
        SMALL.source("test", prepared)
    with pytest.raises(ZooError, match="prepare the data set first"):
        SMALL.source("train", tmp_path)


def test_the_stored_data_set_says_where_it_comes_from(prepared):
    info = json.loads((SMALL._folder(prepared) / "dataset_info.json").read_text())
    assert "10.24432/C50P49" in json.dumps(info)
