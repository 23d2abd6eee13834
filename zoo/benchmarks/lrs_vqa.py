"""LRS-VQA: questions about remote sensing pictures of up to 27,328 pixels.

    found = evaluate(subject, read("LRS_VQA_merged.jsonl", "images"))
    found["all"].accuracy, found["all"].categories

An answer is right if it is the expected word, in whatever case, or one that means nearly the same:
the release takes words for these that have a path similarity above 0.8 in WordNet (`wordnet`).

Follows: arXiv:2503.07588 and the released script, which groups by `id` what the released file calls
`question_id`.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo.evaluate.subject import Query, Subject
from zoo.models.core.errors import UsageError

Alike = Callable[[str, str], bool]
"""Whether two words, in lower case, mean nearly the same."""

_FIELDS = ("question_id", "image", "category", "text", "ground_truth")


@dataclass(frozen=True, eq=False)
class Item:
    """One question.

    Attributes:
      query: it and its picture.
      answer: the expected word.
      category: such as "count" or "object shape".
      source: the data set that the picture is of: the first folder of its name, "" without one.
    """

    query: Query
    answer: str
    category: str
    source: str


@dataclass(frozen=True)
class Score:
    """Shares of right answers.

    Attributes:
      accuracy: of all questions.
      categories: of those of each category.
      mean: of the categories.
    """

    accuracy: float
    categories: dict[str, float]
    mean: float


def read(file: str | Path, images: str | Path) -> Iterator[Item]:
    """The items of the published file.

    Args:
      file: a line of JSON for each question.
      images: the folder that the names of pictures belong to.

    Raises:
      UsageError: a line is none of these.
    """
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                name, kind, text, answer = (str(row[key]) for key in _FIELDS[1:])
            except (ValueError, TypeError, KeyError) as error:
                raise UsageError(
                    f"{file}, line {number}: want an object with {', '.join(_FIELDS)}"
                ) from error
            source = Path(name).parts[0] if len(Path(name).parts) > 1 else ""
            yield Item(Query(text, (Path(images) / name,)), answer, kind, source)


def same(answer: str, expected: str, alike: Alike | None = None) -> bool:
    """Whether an answer is the expected one, or by `alike` nearly so."""
    said, want = (text.strip().rstrip(".").lower() for text in (answer, expected))
    return said == want or (alike is not None and bool(said) and alike(said, want))


def wordnet(threshold: float = 0.8) -> Alike:
    """Words are alike where a meaning of the one is nearer to one of the other than `threshold`.

    Raises:
      UsageError: nltk or its WordNet is not installed.
    """
    try:
        from nltk.corpus import wordnet as words

        words.synsets("ship")
    except (ImportError, LookupError) as error:
        raise UsageError(
            "WordNet is not here: pip install nltk, then python -m nltk.downloader wordnet"
        ) from error

    def alike(one: str, other: str) -> bool:
        pairs = itertools.product(words.synsets(one), words.synsets(other))
        return any((a.path_similarity(b) or 0) > threshold for a, b in pairs)

    return alike


def evaluate(
    subject: Subject, items: Iterable[Item], *, alike: Alike | None = None, batch: int = 8
) -> dict[str, Score]:
    """What a subject knows: {data set: score}, and of all questions as "all".

    Args:
      subject: a model, or an agent around one.
      items: as `read` yields them.
      alike: which other words count as right; by default none.
      batch: questions that are asked at once.

    Raises:
      UsageError: there are no items.
    """
    asked, right = [], []
    waiting = iter(items)
    while part := list(itertools.islice(waiting, batch)):
        answers = subject.generate([item.query for item in part], max_new_tokens=32)
        right += [same(a, item.answer, alike) for item, a in zip(part, answers, strict=True)]
        asked += [(item.source, item.category) for item in part]
    return scores(asked, right)


def scores(asked: Sequence[tuple[str, str]], right: Sequence[bool]) -> dict[str, Score]:
    """The scores of answers to questions of (source, category).

    Raises:
      UsageError: there are none.
    """
    if not asked:
        raise UsageError("LRS-VQA: there are no questions")

    def of(source: str | None) -> Score:
        rows = [(k, r) for (s, k), r in zip(asked, right, strict=True) if source in (None, s)]
        each = {
            kind: float(np.mean([r for k, r in rows if k == kind]))
            for kind in sorted({kind for kind, _ in rows})
        }
        return Score(float(np.mean([r for _, r in rows])), each, float(np.mean([*each.values()])))

    sources = sorted({source for source, _ in asked} - {""})
    return {source: of(source) for source in sources} | {"all": of(None)}
