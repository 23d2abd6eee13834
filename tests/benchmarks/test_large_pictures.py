"""HR-Bench and LRS-VQA: what is read, what counts as right, and how it is added up."""

import base64
import json

import pytest

from zoo.benchmarks import hr_bench, lrs_vqa
from zoo.models.core.errors import UsageError

OPTIONS = {"A": "red", "B": "dark blue", "C": "blue", "D": "green"}


class Scripted:
    """Says one thing after the other."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def generate(self, queries, **settings):
        self.asked += queries
        return [self.answers.pop(0) for _ in queries]


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("B", "B"),
        ("(c) no, C.", "C"),
        (" D. green", "D"),
        ("The answer is A.", "A"),
        ("A red one", "A"),
        ("it is green", "D"),
        ("dark blue", None),  # which has the text of two
        ("A green one", "D"),
        ("B or C", None),
        ("Don't know", None),
    ],
)
def test_which_option_is_meant(answer, want):
    assert hr_bench.letter(answer, OPTIONS) == want


def table(folder, rows):
    names = ("index", "question", *"ABCD", "answer", "category", "cycle_category", "image")
    lines = ["\t".join(names), *("\t".join(map(str, row)) for row in rows)]
    (folder / "bench.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "bench.tsv"


def test_hr_bench(tmp_path):
    """Cycles weigh the same, whatever their number of questions."""
    shown = base64.b64encode(b"picture").decode()
    kinds = (("single", 0), ("single", 0), ("single", 1), ("cross", 1))
    rows = [(i, "colour?", *OPTIONS.values(), "D", *kind, shown) for i, kind in enumerate(kinds)]
    subject = Scripted("D", "A", "D", "B")
    found = hr_bench.evaluate(subject, hr_bench.read(table(tmp_path, rows)), batch=3)
    assert found.categories == {"cross": 0, "single": (0.5 + 1) / 2}
    assert found.overall == 0.5
    first = subject.asked[0]
    assert first.images == (b"picture",) and first.question == "colour?"
    assert first.prompt.startswith("colour?\nA. red\nB. dark blue\nC. blue\nD. green\n")
    with pytest.raises(UsageError, match="row 1: image is no base64"):
        list(hr_bench.read(table(tmp_path, [(*rows[0][:-1], "?")])))
    (tmp_path / "bench.tsv").write_text("index\tA\n")
    with pytest.raises(UsageError, match="no column B, C, D, answer"):
        list(hr_bench.read(tmp_path / "bench.tsv"))
    with pytest.raises(UsageError, match="no questions"):
        hr_bench.evaluate(subject, [])


def test_lrs_vqa(tmp_path):
    kinds = (("STAR/a.png", "count"), ("STAR/b.png", "shape"), ("FAIR/c.png", "count"))
    rows = [
        {"question_id": i, "image": name, "category": kind, "text": "?", "ground_truth": "Ship"}
        for i, (name, kind) in enumerate([*kinds, kinds[0]])
    ]
    file = tmp_path / "bench.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    subject = Scripted("ship.", "plane", " SHIP ", "boat")
    alike = lambda *words: set(words) == {"boat", "ship"}
    found = lrs_vqa.evaluate(subject, lrs_vqa.read(file, "images"), alike=alike, batch=2)
    assert found["STAR"] == lrs_vqa.Score(2 / 3, {"count": 1, "shape": 0}, 0.5)
    assert (found["FAIR"].accuracy, found["all"].accuracy) == (1, 0.75)
    assert str(subject.asked[0].images[0]) == "images/STAR/a.png"
    assert not lrs_vqa.same("boat", "ship") and not lrs_vqa.same("", "ship", alike)
    file.write_text('{"image": "a.png"}')
    with pytest.raises(UsageError, match="line 1: want an object with question_id"):
        list(lrs_vqa.read(file, "."))
