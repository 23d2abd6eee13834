"""HR-Bench: questions with four options about small things in very large pictures.

    found = evaluate(subject, read("hr_bench_4k.tsv"))     # any `zoo.evaluate.subject.Subject`
    found.overall, found.categories                        # {"single": ..., "cross": ...}

Every question is asked four times, its options in turn at every place (a *cycle*); the score is the
mean over the cycles of the share of right answers. Answers are read by their letter, or where they
name none by the option that they spell.

Follows: arXiv:2408.15556, section 3. The release asks a language model whether an answer is right.
"""

import base64
import binascii
import csv
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo.evaluate.subject import Query, Subject
from zoo.models.core.errors import UsageError

LETTERS = "ABCD"
ASK = "Answer with the option's letter from the given choices directly."
_COLUMNS = ("question", *LETTERS, "answer", "category", "cycle_category", "image")


@dataclass(frozen=True, eq=False)
class Item:
    """One question in one cycle.

    Attributes:
      query: the question with its options, and the picture.
      options: {letter: text}.
      answer: the letter of the right one.
      category: "single" for one thing, "cross" for several.
      cycle: which of the orders of the options it is.
    """

    query: Query
    options: Mapping[str, str]
    answer: str
    category: str
    cycle: str


@dataclass(frozen=True)
class Score:
    """Shares of right answers, the mean over cycles: of all questions, and of each category."""

    overall: float
    categories: Mapping[str, float]


def read(file: str | Path) -> Iterator[Item]:
    """The items of the published table, one by one, because their pictures are large.

    Raises:
      UsageError: a column is missing, or a picture is no base64.
    """
    csv.field_size_limit(sys.maxsize)
    with open(file, encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t")
        if missing := sorted({*_COLUMNS} - {*(rows.fieldnames or ())}):
            raise UsageError(f"{file} has no column {', '.join(missing)}: want a table of HR-Bench")
        for number, row in enumerate(rows, 1):
            try:
                picture = base64.b64decode(row["image"], validate=True)
            except binascii.Error as error:
                raise UsageError(f"{file}, row {number}: image is no base64") from error
            options = {letter: row[letter] for letter in LETTERS if row[letter]}
            listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
            prompt = f"{row['question']}\n{listed}\n{ASK}"
            query = Query(prompt, (picture,), about=row["question"])
            answer, kind, cycle = (row[name] for name in ("answer", "category", "cycle_category"))
            yield Item(query, options, answer.strip(), kind, cycle)


def letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer means: the letter that it begins with or names alone, or else the
    one option whose text it has; None where that is not clear.
    """
    said = answer.strip()
    if found := re.match(rf"\(?([{LETTERS}])(?:[.:,)]|$)", said):
        return found[1]
    named = set(re.findall(r"\b(?:A(?=[.:,)]|$)|[B-D](?!['\w]))", said))  # "A" may be an article
    if len(named) == 1:
        return named.pop()
    spelled = [key for key, text in options.items() if text.strip().lower() in said.lower()]
    return spelled[0] if len(spelled) == 1 else None


def evaluate(subject: Subject, items: Iterable[Item], *, batch: int = 8) -> Score:
    """What a subject knows.

    Args:
      subject: a model, or an agent around one.
      items: as `read` yields them.
      batch: questions that are asked at once, whose pictures are in memory together.

    Raises:
      UsageError: there are no items.
    """
    asked, right = [], []
    waiting = iter(items)
    while part := list(itertools.islice(waiting, batch)):
        answers = subject.generate([item.query for item in part], max_new_tokens=32)
        pairs = zip(part, answers, strict=True)
        right += [letter(answer, item.options) == item.answer for item, answer in pairs]
        asked += [(item.category, item.cycle) for item in part]
    return score(asked, right)


def score(asked: Sequence[tuple[str, str]], right: Sequence[bool]) -> Score:
    """The score of answers to questions of (category, cycle).

    Raises:
      UsageError: there are none.
    """
    if not asked:
        raise UsageError("HR-Bench: there are no questions")

    def mean(kind: str | None) -> float:
        rows = [(c, r) for (k, c), r in zip(asked, right, strict=True) if kind in (None, k)]
        cycles = {cycle for cycle, _ in rows}
        return float(np.mean([np.mean([r for c, r in rows if c == cycle]) for cycle in cycles]))

    return Score(mean(None), {kind: mean(kind) for kind in sorted({kind for kind, _ in asked})})
