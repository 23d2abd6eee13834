"""The catalogue: facts of all systems, the registry, overrides, statuses, generated files."""

import dataclasses
import json
from dataclasses import dataclass, field

import pytest

import zoo
from zoo import catalogue
from zoo.models.core import registry
from zoo.models.core.card import SCOPES, Card, System, kinds, systems
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError, ZooError


@dataclass(frozen=True)
class Part:
    width: int = 8
    rate: float = 0.5
    causal: bool = True
    name: str = "part"


@dataclass(frozen=True)
class Deep:
    inner: Part = field(default_factory=Part)
    depth: int = 2


@dataclass(frozen=True)
class Whole(ModelConfig):
    left: Part = field(default_factory=Part)
    right: Part = field(default_factory=Part)
    deep: Deep = field(default_factory=Deep)
    depth: int = 1
    limit: int | None = None

    def build(self):
        return self


@pytest.fixture
def empty(monkeypatch):
    """A registry and an index with nothing in them."""
    monkeypatch.setattr(registry, "_entries", {})
    monkeypatch.setattr(registry, "index", dict)


@pytest.fixture
def swin(empty):
    registry.register(
        Card.planned("swin"), {"swin_base": Whole(), "swin_base.small": Whole(depth=7)}
    )


# Facts


def test_systems_are_complete():
    assert len(systems()) == 190
    assert list(systems()) == sorted(systems())
    for slug, entry in systems().items():
        assert slug == entry.slug
        assert slug.isidentifier()
        assert slug == slug.lower()
        assert entry.scope in SCOPES
        for value in (entry.name, entry.title, entry.kind):
            assert value == value.strip()
            assert value
        assert not entry.paper or entry.paper.startswith("arXiv:")
        assert not entry.code or entry.code.startswith("https://")
    surveys = {slug for slug, entry in systems().items() if entry.scope == "none"}
    assert surveys == {slug for slug in systems() if slug.startswith("survey_")}
    assert len(surveys) == 4


def test_every_kind_has_a_home():
    for entry in systems().values():
        if entry.scope != "none":
            assert any(f"{entry.kinds[0]} ".startswith(f"{kind} ") for kind in catalogue.HOMES)


@pytest.mark.parametrize(
    ("slug", "kind"),
    [
        ("fastvlm", "vlm"),
        ("fastvlm", "vision-backbone"),
        ("fastvlm", "vlm + vision-backbone"),
        ("uni_moe", "moe"),
        ("llamafusion", "moe"),
        ("s2", "vision-backbone"),
        ("internvl3", "test-time scaling"),
    ],
)
def test_compound_kinds_are_found_by_any_part(slug, kind):
    assert slug in zoo.list_models(kind=kind)


def test_a_kind_is_no_substring():
    assert System("a", "A", "A", "vlm / tool", "tool", "", "").is_kind("tool")
    assert not System("a", "A", "A", "vision-backbone", "full", "", "").is_kind("vision")
    assert "vlm" in kinds()


def test_list_models():
    assert len(zoo.list_models()) == 190
    assert zoo.list_models("MQT*") == ["mqt"]
    assert zoo.list_models("matryoshka") == ["mqt", "mrl"]
    assert zoo.list_models("no such thing") == []
    assert "mqt" not in zoo.list_models(status="planned")
    with pytest.raises(UsageError, match="did you mean vlm"):
        zoo.list_models(kind="vml")
    with pytest.raises(UsageError, match="want one of planned"):
        zoo.list_models(status="done")


# Cards


def test_card_of_a_planned_system():
    card = zoo.card("survey_vlm_frontier")
    assert card.title.startswith("Exploring the Frontier")
    assert (card.kind, card.scope, card.differs) == ("survey-theory", "none", ())


def test_card_by_slug_and_by_variant():
    assert zoo.card("mqt") == zoo.card("mqt_tiny")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slug": "swim"}, "did you mean swin"),
        ({"slug": "swin", "extends": "nothing_like_it"}, "unknown system"),
        ({"slug": "swin", "differs": "one"}, "tuple of sentences"),
        ({"slug": "swin", "paper": "arXiv:1234.56789"}, "2103.14030"),
        ({"slug": "swin", "code": "https://example.com"}, "microsoft"),
    ],
)
def test_a_wrong_card_is_refused(fields, message):
    known = {"paper": "arXiv:2103.14030", "code": "https://github.com/microsoft/Swin-Transformer"}
    with pytest.raises(UsageError, match=message):
        Card(**(known | fields))


# Registry


def test_create_builds_the_first_variant(swin):
    assert zoo.create("swin") == Whole()
    assert zoo.create("swin_base.small") == Whole(depth=7)


@pytest.mark.parametrize(
    ("card", "variants", "message"),
    [
        (Card.planned("swin"), {"other": Whole()}, "registered already"),
        (Card.planned("mqt"), {"swin_base": Whole()}, "belongs to swin"),
        (Card.planned("mqt"), {"swin": Whole()}, "belongs to swin"),
        (Card.planned("mqt"), {}, "at least one variant"),
    ],
)
def test_names_are_taken_once(swin, card, variants, message):
    with pytest.raises(UsageError, match=message):
        registry.register(card, variants)


def test_unknown_names(swin):
    with pytest.raises(UsageError, match=r"unknown name 'swin_bas'; did you mean swin_base"):
        zoo.create("swin_bas")
    with pytest.raises(UsageError, match="mqt has no code yet"):
        zoo.create("mqt")
    with pytest.raises(UsageError, match="is a survey"):
        zoo.create("survey_vlm_frontier")
    with pytest.raises(UsageError, match="unknown name"):
        zoo.card("%")


def test_overrides_find_the_shallowest_field(swin):
    assert zoo.config("swin", depth=3) == Whole(depth=3)
    assert zoo.config("swin", **{"deep.depth": 3}) == Whole(deep=Deep(depth=3))
    assert zoo.config("swin", **{"left.width": 3}).left.width == 3
    assert zoo.config("swin", **{"inner.width": 3}).deep.inner.width == 3
    assert zoo.config("swin", limit=3).limit == 3
    assert zoo.config("swin", **{"left.rate": 1}).left.rate == 1
    assert zoo.config("swin", left=Part(width=1)).left.width == 1
    assert zoo.config("swin", depth=3, limit=4) == Whole(depth=3, limit=4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"width": 3}, r"ambiguous; say which: left\.width, right\.width$"),
        ({"dept": 3}, "no setting 'dept'; did you mean depth"),
        ({"left.depth": 3}, "no setting 'left.depth'"),
        ({"depth": "3"}, "depth = '3', want int"),
        ({"depth": True}, "want int"),
        ({"left.causal": 1}, "want bool"),
        ({"left.rate": "fast"}, "want a number"),
        ({"left": 3}, "want a configuration"),
    ],
)
def test_wrong_overrides_are_refused(swin, overrides, message):
    with pytest.raises(UsageError, match=message):
        zoo.config("swin", **overrides)


def test_a_real_model_by_name():
    config = zoo.config("mqt_tiny", num_queries=9)
    assert config.connector.num_queries == 9
    assert dataclasses.is_dataclass(config)
    assert zoo.create("mqt_tiny").config == zoo.config("mqt_tiny")


# Generated files and statuses


def test_generated_files_are_fresh(repo):
    old = catalogue.stale(repo)
    assert not old, f"out of date: {', '.join(old)}; run python -m zoo.catalogue"


def test_index_names_real_modules_with_one_home_each(repo):
    homes = dict(catalogue.system_files(repo))
    assert set(registry.index()) <= set(homes)
    assert all(systems()[slug].scope != "none" for slug in homes)


def test_status_follows_the_evidence(tmp_path):
    def status():
        return catalogue.status(tmp_path, "mqt", ["mqt_tiny"])

    def write(path, text=""):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert status() == "shapes"
    write("tests/parity/mqt.py")
    result = {"model": "mqt_tiny", "seed": 0, "steps": 9, "accuracy": {"1": 0.5, "4": 1.0}}
    write("docs/results/mqt.json", json.dumps(result))
    assert status() == "shapes", "an adapter without records proves nothing"
    write("tests/goldens/mqt/exact.json")
    assert status() == "shapes"
    write("tests/goldens/mqt/a.npz")
    assert status() == "trained"
    (tmp_path / "docs/results/mqt.json").unlink()
    assert status() == "parity"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "swin_base"}, "model"),
        ({"seed": None}, "seed"),
        ({"steps": 0}, "steps"),
        ({"accuracy": {}}, "accuracy"),
        ({"accuracy": 93.0}, "accuracy"),
        ({"accuracy": {"1": True}}, "accuracy"),
    ],
)
def test_a_result_says_what_ran_and_what_came_out(tmp_path, change, named):
    result = {"model": "mqt_tiny", "seed": 0, "steps": 9, "accuracy": 0.9}
    path = tmp_path / "mqt.json"
    path.write_text(json.dumps(result))
    catalogue.check_result(path, ["mqt_tiny"])
    path.write_text(json.dumps(result | change))
    with pytest.raises(ZooError, match=f"wrong: {named}"):
        catalogue.check_result(path, ["mqt_tiny"])
    path.write_text("{")
    with pytest.raises(ZooError, match="no JSON"):
        catalogue.check_result(path, ["mqt_tiny"])


def test_recorded_statuses_hold(repo):
    for slug, row in registry.index().items():
        assert row["status"] == catalogue.status(repo, slug, row["variants"])


def test_check_reports_and_writes_nothing(repo, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "stale", lambda root: {"docs/none.md": "text"})
    assert catalogue.main(["--check"]) == 1
    assert "out of date: docs/none.md" in capsys.readouterr().err
    assert not (repo / "docs/none.md").exists()
