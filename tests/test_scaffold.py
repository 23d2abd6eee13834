"""`zoo new`: what it writes is whole, passes lint, and claims nothing."""

import ast
import json
import runpy
import shutil
import subprocess
import sys

import pytest

from zoo import catalogue, cli
from zoo.models.core.card import systems
from zoo.models.core.errors import UsageError
from zoo.scaffold import scaffold

BUILDABLE = [slug for slug, entry in systems().items() if entry.scope != "none"]


@pytest.fixture
def root(repo, tmp_path):
    """A tree without any system, under this project's lint rules."""
    shutil.copy(repo / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_system_can_be_started_and_passes_lint(root):
    for slug in BUILDABLE:
        code, parity, page = scaffold(root, slug)
        assert code.stem == parity.stem == page.stem == slug
        assert (code.parent / "__init__.py").is_file()
        assert "{" not in page.read_text()
    assert {slug for slug, _ in catalogue.system_files(root)} == set(BUILDABLE)
    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, "--no-cache", str(root)]
        done = subprocess.run(ruff, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]


def test_a_started_system_stays_planned(root):
    code, parity, _ = scaffold(root, "swin")
    calls = [
        node.func for node in ast.walk(ast.parse(code.read_text())) if isinstance(node, ast.Call)
    ]
    assert "register" not in {call.id for call in calls if isinstance(call, ast.Name)}
    space = runpy.run_path(str(code))
    assert space["CARD"].slug == "swin"
    with pytest.raises(NotImplementedError, match="swin"):
        space["Config"]().build()
    assert "NotImplementedError" in parity.read_text()


def test_the_folder_follows_the_kind(root):
    assert scaffold(root, "swin")[0] == root / "models/vision/swin.py"
    assert scaffold(root, "s2")[0] == root / "models/vision/s2.py"
    assert scaffold(root, "pyramiddrop")[0] == root / "models/reduction/pyramiddrop.py"
    assert scaffold(root, "stic")[0] == root / "train/recipes/stic.py"
    assert scaffold(root, "mmstar")[0] == root / "zoo/benchmarks/mmstar.py"
    assert scaffold(root, "fastvlm", "vlm")[0] == root / "models/vlm/fastvlm.py"


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_nothing_is_overwritten(root, taken):
    path = scaffold(root, "swin")[taken]
    for each in scaffold(root, "pill"):
        each.write_text("mine")
    for file in root.rglob("swin.*"):
        if file != path:
            file.unlink()
    path.write_text("CARD = None  # mine")
    with pytest.raises(UsageError, match=f"swin has been started: .*{path.name}"):
        scaffold(root, "swin")
    assert list(root.rglob("swin.*")) == [path]
    assert path.read_text() == "CARD = None  # mine"


def test_a_system_in_another_folder_has_been_started(root):
    scaffold(root, "fastvlm", "vlm")
    with pytest.raises(UsageError, match=r"models/vlm/fastvlm\.py is there"):
        scaffold(root, "fastvlm")


@pytest.mark.parametrize(
    ("slug", "kind", "message"),
    [
        ("swim", None, "did you mean swin"),
        ("survey_vlm_frontier", None, "nothing to build"),
        ("swin", "conector", "did you mean connector"),
    ],
)
def test_wrong_use(root, slug, kind, message):
    with pytest.raises(UsageError, match=message):
        scaffold(root, slug, kind)
    assert [path.name for path in root.iterdir()] == ["pyproject.toml"]


def test_the_command(root, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "checkout", lambda: root)
    assert cli.main(["new", "swin"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["models/vision/swin.py", "tests/parity/swin.py", "docs/systems/swin.md"]
    assert cli.main(["new", "mqt", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["files"][0] == "models/connectors/mqt.py" and err == ""


def test_outside_of_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "__file__", str(tmp_path / "zoo" / "catalogue.py"))
    assert cli.main(["new", "swin"]) == 1
    assert "source checkout" in capsys.readouterr().err
