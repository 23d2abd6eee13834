"""The command `zoo`: what it prints, where, and with which exit status."""

import json
import subprocess
import sys
import types

import pytest

import zoo
from zoo import cli
from zoo.models.core.errors import UsageError, ZooError


def run(capsys, *argv):
    status = cli.main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def test_list_as_json(capsys):
    status, out, _ = run(capsys, "list", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [row["slug"] for row in rows] == zoo.list_models()
    assert all(
        list(row) == ["slug", "title", "kind", "scope", "status", "variants"] for row in rows
    )
    mqt = next(row for row in rows if row["slug"] == "mqt")
    assert mqt["variants"][0] == "mqt_llava_7b"
    assert mqt["status"] != "planned"


def test_list_filters(capsys):
    _, out, _ = run(capsys, "list", "pyramid", "--kind", "token-reduction", "--json")
    assert [row["slug"] for row in json.loads(out)] == ["lrs_vqa", "pyramiddrop"]
    assert run(capsys, "list", "no such thing", "--json")[:2] == (0, "[]\n")


def test_list_as_a_plain_table(capsys):
    status, out, err = run(capsys, "list")
    assert status == 0
    assert len(out.splitlines()) == 191
    assert "\x1b" not in out
    assert "…" not in out
    assert err == "190 systems\n"


def test_info_of_a_planned_system(capsys):
    status, out, _ = run(capsys, "info", "cambrian", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["status"] == "planned"
    assert facts["variants"] == []
    assert facts["paper"] == "arXiv:2406.16860"
    assert "Cambrian" in run(capsys, "info", "cambrian")[1]


def test_info_counts_parameters(capsys):
    _, out, _ = run(capsys, "info", "mqt_tiny", "--json")
    facts = json.loads(out)
    (variant,) = facts["variants"]
    sizes = variant["parameters"]
    assert variant["name"] == "mqt_tiny"
    assert sizes["total"] == sum(count for part, count in sizes.items() if part != "total") > 0
    assert facts["differs"]
    shown = run(capsys, "info", "mqt_tiny")[1]
    assert f"{sizes['total']:,}" in shown
    assert facts["differs"][0] in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["info", "mqtt"], "did you mean mqt"),
        (["list", "--kind", "vml"], "did you mean vlm"),
        (["list", "--status", "done"], "want one of planned"),
        (["new", "swim"], "did you mean swin"),
        (["new", "mqt"], "has been started"),
    ],
)
def test_wrong_use(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("argv", [[], ["lst"], ["list", "--jsn"], ["info"]])
def test_wrong_arguments(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().out == ""


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for command in ("list", "info", "new", *cli.ELSEWHERE):
        assert command in out


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (None, 0, ""),
        (ZooError("disk full"), 1, "zoo: disk full\n"),
        (UsageError("no such run"), 2, "zoo: no such run\n"),
        (KeyboardInterrupt(), 130, "zoo: interrupted\n"),
        (PermissionError(13, "Permission denied", "a.png"), 1, "Permission denied: 'a.png'\n"),
    ],
)
@pytest.mark.parametrize("command", list(cli.ELSEWHERE))
def test_other_commands_are_reached_by_name(capsys, monkeypatch, command, raised, status, message):
    seen = []

    def main(argv):
        seen.extend(argv)
        if raised:
            raise raised
        return 0

    module = types.SimpleNamespace(main=main)
    monkeypatch.setitem(sys.modules, cli.ELSEWHERE[command][0], module)
    found, out, err = run(capsys, command, "--help", "x")
    assert (found, out) == (status, "") and err.endswith(message)
    assert len(err.splitlines()) == bool(message)
    assert seen == ["--help", "x"]


def test_a_closed_pipe_is_no_error(repo):
    command = [sys.executable, "-m", "zoo", "list"]
    with subprocess.Popen(
        command, cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        err = process.stderr.read().decode()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert process.returncode == 0


@pytest.mark.parametrize(
    "argv", [["list"], ["list", "--json"], ["info", "cambrian"], ["--version"]]
)
def test_looking_up_imports_nothing_heavy(repo, argv):
    script = (
        "import sys, zoo.cli\n"
        "try: zoo.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'flax', 'torch', 'transformers', 'tensorflow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, *argv], cwd=repo, check=True, capture_output=True)
