"""The package: what is in it, how it installs, what it imports, and who may import whom."""

import ast
import functools
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo.models.core.card import systems

FOLDERS = ("models", "train", "configs")
SYSTEMS, BASE, PARTS, CORE = "systems", "base", "parts", "core"
RANKS = {"configs": 6, "train": 5, "zoo": 4, SYSTEMS: 3, BASE: 2, PARTS: 1, CORE: 0}
"""A layer may import from itself and from those with a lower rank."""

ORDINARY = frozenset(
    {"aim", "bus", "comm", "dust", "emma", "eve", "fiber", "liquid", "parrot", "phantom", "pill"}
    | {"s2", "slime", "solo", "spiel", "swift", "swin"}
)
"""Slugs that shared code may use as words: they are words or names of every day, the name of a
variable (s2), or that of an architecture which is itself a shared part (swin)."""


def python_files(repo: Path) -> Iterator[Path]:
    """Every module of the package, at its place in the tree."""
    for folder in (*FOLDERS, "zoo"):
        for path, names, files in os.walk(repo / folder):  # does not follow the links in zoo/
            names[:] = [name for name in names if name != "__pycache__"]
            yield from (Path(path, file) for file in sorted(files) if file.endswith(".py"))


def run_python(script: str, *, cwd: Path, path: Path) -> str:
    """Standard output of `script`, run in `cwd` with `path` before everything installed."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Layers


def layer(module: str) -> str:
    """The layer of a dotted module name that starts with zoo."""
    _, top, inner = (*module.split("."), "", "")[:3]
    if top != "models":
        return top if top in RANKS else "zoo"
    return inner if inner in (BASE, PARTS, CORE) else SYSTEMS


def module_name(repo: Path, path: Path) -> str:
    parts = path.relative_to(repo).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "zoo" else ("zoo", *parts))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def test_imports_point_one_way(repo):
    wrong = []
    for path in python_files(repo):
        mine = layer(module_name(repo, path))
        for name, line in imports(path):
            where = f"{path.relative_to(repo)}:{line} imports {name}"
            top = name.split(".")[0]
            if top in ("", *FOLDERS):
                wrong.append(f"{where}; say zoo.…")
            elif top == "zoo" and RANKS[layer(name)] > RANKS[mine]:
                wrong.append(f"{where}: {mine} may not use {layer(name)}")
    assert not wrong, "\n".join(wrong)


def test_no_system_imports_another_but_the_one_it_extends(repo):
    wrong = []
    for path in python_files(repo):
        mine = module_name(repo, path)
        if layer(mine) not in (SYSTEMS, BASE) or mine.count(".") < 3:
            continue
        extends = re.search(r'extends="(\w+)"', path.read_text(encoding="utf-8"))
        allowed = {mine.split(".")[3], extends and extends[1]}
        for name, line in imports(path):
            parts = name.split(".")
            other = name.startswith("zoo.models.") and layer(name) == layer(mine) and len(parts) > 3
            if other and parts[3] not in allowed:
                wrong.append(f"{path.relative_to(repo)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_another_framework(repo):
    wrong = [
        f"{path.relative_to(repo)}:{line} imports {name}"
        for path in python_files(repo)
        for name, line in imports(path)
        if name.split(".")[0] in ("torch", "torchvision", "transformers", "timm", "tensorflow")
    ]
    assert not wrong, "\n".join(wrong)


def words(path: Path) -> Iterator[str]:
    """Name, identifiers and strings of a file; comments and docstrings are prose."""
    yield path.stem
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        for field in ("id", "attr", "name", "asname", "arg", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


@functools.cache
def names_a_system(word: str) -> str | None:
    """The slug that a string or identifier is, or holds as words of snake_case or CamelCase."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", word).lower()
    for slug in systems().keys() - ORDINARY:
        inside = re.search(rf"(?<![a-z0-9]){slug}(?![a-z0-9])", snake)
        if inside or snake.replace("_", "") == slug.replace("_", ""):
            return slug
    return None


def test_shared_code_names_no_system(repo):
    shared = [
        path for path in python_files(repo) if layer(module_name(repo, path)) in (PARTS, CORE)
    ]
    assert shared
    found = {
        f"{path.relative_to(repo)} says {word!r}, which names {slug}"
        for path in shared
        for word in words(path)
        if (slug := names_a_system(word))
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize(
    ("word", "slug"),
    [
        ("mqt", "mqt"),
        ("MQT", "mqt"),
        ("mqt_llava_7b", "mqt"),
        ("build_p_mod", "p_mod"),
        ("FastVLM", "fastvlm"),
        ("PyramidDrop", "pyramiddrop"),
        ("system == 'albef'", "albef"),
        ("phantom", None),
        ("drop", None),
        ("amqtest", None),
        ("llava", None),
    ],
)
def test_what_counts_as_naming_a_system(word, slug):
    assert names_a_system(word) == slug


# What an import costs


def test_importing_the_package_imports_next_to_nothing(repo, tmp_path):
    # What is imported, and not how long it takes: a busy machine makes no test fail.
    script = "import sys, zoo; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(run_python(script, cwd=tmp_path, path=repo).split())
    bare = set(
        run_python(script.replace(", zoo", ""), cwd=tmp_path, path=repo).split(),
    )
    assert loaded - bare - set(sys.stdlib_module_names) == {"zoo"}


def test_a_model_needs_jax_and_no_other_framework(repo, tmp_path):
    script = (
        "import sys, zoo\n"
        "assert 'jax' not in sys.modules\n"
        "zoo.create('mqt_tiny')\n"
        "assert 'jax' in sys.modules\n"
        "assert not {'torch', 'transformers', 'tensorflow'} & set(sys.modules)"
    )
    run_python(script, cwd=tmp_path, path=repo)


def test_public_names():
    import zoo

    assert set(zoo.__all__) == set(dir(zoo))
    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'craete'"):
        _ = zoo.craete


# What is distributed


def build(repo: Path, out: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out)]
    done = subprocess.run([*command, str(repo)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def distributions(repo, tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of the tree, and the wheel that is built from that sdist."""
    out = build(repo, tmp_path_factory.mktemp("dist"))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """The wheel in a folder of its own.

    Its dependencies are those of the running environment: fetching half a gigabyte of wheels for an
    empty one would need a network. What is proven is that the package does not lean on the tree.
    """
    return install(distributions[1], tmp_path_factory.mktemp("site"))


def install(wheel: Path, site: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    return site


def expected_files(repo: Path) -> set[str]:
    """Everything under zoo/, models/, train/ and configs/ at its place in the package."""
    found = set()
    for folder in (*FOLDERS, "zoo"):
        for path, _, files in os.walk(repo / folder):
            where = Path(path).relative_to(repo)
            where = where if where.parts[0] == "zoo" else Path("zoo", where)
            found |= {str(where / file) for file in files if not file.endswith(".pyc")}
    return found


def test_the_wheel_is_complete(repo, distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
    assert len(names) == len(set(names))
    assert {name for name in names if name.startswith("zoo/")} == expected_files(repo)
    assert {name.split("/")[0] for name in names} == {"zoo", names[-1].split("/")[0]}
    for data in ("zoo/py.typed", "zoo/models/core/systems.tsv", "zoo/models/core/index.json"):
        assert data in names
    assert any(name.startswith("zoo/train/") and name.endswith(".npz") for name in names)
    for licence in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names)


def test_the_sdist_has_what_the_wheel_is_made_of(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "models/core/systems.tsv"} <= names
    assert not any(name.startswith(("tests/", ".cache/", ".venv/", "runs/")) for name in names)


def test_a_wheel_from_the_tree_is_the_same(repo, distributions, tmp_path):
    (wheel,) = build(repo, tmp_path, "--wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as mine, zipfile.ZipFile(distributions[1]) as other:
        assert sorted(mine.namelist()) == sorted(other.namelist())


def test_installed_beside_folders_of_the_same_names(installed, tmp_path):
    script = (
        "import sys, zoo, zoo.cli, zoo.models, zoo.train, zoo.configs\n"
        "assert zoo.create('mqt_tiny')\n"
        "assert zoo.list_models()\n"
        "print(zoo.__file__, zoo.models.__file__)"
    )
    assert run_python(script, cwd=tmp_path, path=installed).count(str(installed)) == 2
    for name in (*FOLDERS, "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('of the user')")
    (tmp_path / "train.py").write_text("raise RuntimeError('of the user')")
    assert run_python(script, cwd=tmp_path, path=installed).count(str(installed)) == 2


def test_installed_it_does_not_take_itself_for_a_checkout(installed, tmp_path):
    script = "import sys, zoo.cli; sys.exit(0 if zoo.cli.main(['new', 'swin']) == 1 else 9)"
    run_python(script, cwd=tmp_path, path=installed)


def test_the_editable_layout_resolves(repo, tmp_path):
    build = (
        "import sys; from hatchling.build import build_editable; "
        "print(build_editable(sys.argv[1]), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=repo, capture_output=True, check=True
    )
    wheel = tmp_path / done.stdout.decode().splitlines()[-1]
    site = install(wheel, tmp_path / "site")
    script = (
        f"import site; site.addsitedir({str(site)!r})\n"
        "import zoo.models.core.types, zoo.train, zoo.configs\n"
        "print(zoo.__file__)"
    )
    assert run_python(script, cwd=tmp_path, path=tmp_path).strip() == str(repo / "zoo/__init__.py")


# Types


def mypy(repo: Path, *args: str, path: Path | None = None) -> str:
    command = [sys.executable, "-m", "mypy", "--config-file", str(repo / "pyproject.toml"), *args]
    environment = os.environ | ({"MYPYPATH": str(path)} if path else {})
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_public_surface_passes_the_type_checker(repo):
    mypy(repo)


@pytest.mark.parametrize("where", ["tree", "wheel"])
def test_a_type_checker_resolves_the_package(where, repo, installed, tmp_path):
    source = (
        "import zoo\n"
        "from zoo.models.core.types import Tokens\n"
        "names: list[str] = zoo.list_models()\n"
        "reveal_type(zoo.card)\n"
        "reveal_type(Tokens)\n"
    )
    file = tmp_path / "user.py"
    file.write_text(source)
    path = repo if where == "tree" else installed
    shown = mypy(repo, "--cache-dir", str(tmp_path / "cache"), str(file), path=path)
    assert "zoo.models.core.card.Card" in shown
    assert re.search(r"type is .*zoo\.models\.core\.types\.Tokens", shown)
