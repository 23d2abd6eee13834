"""DC²: how a picture is divided, what is remembered and asked, on a scripted subject."""

import json
from pathlib import Path

import numpy as np
import pytest

import zoo
from zoo.agents.dc2 import DC2, Place, filter_places, things_in
from zoo.evaluate.scripted import Scripted
from zoo.evaluate.subject import Query
from zoo.models.core.errors import UsageError
from zoo.processors.tiling import Box

GOLDEN = Path(__file__).parents[1] / "goldens/dc2/filter_location.json"
INFORM = zoo.config("dc2_tiny").wording.inform.partition("{}")[0]


def places(listed):
    """Of the official form, whose boxes are left, top, height, width."""
    found = []
    for place in listed:
        boxes = [Box(y, x, y + h, x + w) for _, (x, y, h, w) in place["react"]]
        found.append(Place(tuple(boxes), place["mode"] == "union"))
    return found


def test_filter_is_the_official_one():
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert set(golden["in"]) == set(golden["out"])
    for thing, listed in golden["in"].items():
        assert filter_places(places(listed), official=True) == places(golden["out"][thing])


def test_filter_drops_what_lies_in_a_larger_place():
    inside, other, large = (
        Place((Box(10, 10, 30, 30),)),
        Place((Box(0, 90, 20, 110),)),
        Place((Box(0, 0, 80, 80),)),
    )
    assert filter_places([inside, other, large]) == [other, large]
    # By area the inner one is the second or third, and so another one goes.
    assert inside in filter_places([inside, other, large], official=True)
    pair = Place((Box(0, 0, 20, 20), Box(20, 0, 40, 20)), merged=True)
    assert pair.around() == Box(0, 0, 40, 20) and pair.around(official=True) == Box(0, 0, 40, 40)
    assert filter_places([pair, Place((Box(5, 25, 15, 35),))])[1:] != []


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(1, 256, (64, 48, 3), np.uint8)


def stub(vector, objects="[]", **more):
    """Says what it was shown: the number of pixels; `objects` for every description."""

    def answer(query):
        if not query.images:
            return objects(query.prompt) if callable(objects) else objects
        return f"{query.images[0].size} bytes, {query.images[0].sum()}"

    return Scripted(answer=answer, vector=vector, **more)


def different(item):
    """Vectors of which no two are alike."""
    return np.random.default_rng(int(np.sum(item)) if len(np.shape(item)) else 0).normal(size=64)


def same(item):
    return np.ones(4)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_calls_without_merging(picture, depth):
    script = stub(different)
    subject = zoo.create("dc2_tiny", max_depth=depth, theta=0.0).wrap(script)
    subject.generate([Query("What?", (picture,))])
    shown = [q for m, asked in script.log if m == "generate" for q in asked if q.images]
    leaves, inner = 4**depth, sum(4**d for d in range(depth))
    assert len(shown) == leaves + inner + 1  # captions, refinements and the answer
    assert shown[-1].prompt == "What?"
    assert sum(method == "embed" for method, _ in script.log) == depth
    assert sum(method == "generate" for method, _ in script.log) <= 2 * (depth + 1) + 1


def test_everything_merges(picture):
    script = stub(same)
    agent = zoo.create("dc2_tiny", theta=2.0)
    levels = agent.divide(picture, lambda pieces: np.ones((len(pieces), 4)))
    assert [len(level) for level in levels] == [1, 1, 1]
    quarters = [picture[y : y + 32, x : x + 24] for y in (0, 32) for x in (0, 24)]
    mean = np.mean(quarters, 0).astype(np.uint8)
    np.testing.assert_array_equal(levels[1][0].pixels, mean)
    place = levels[0][0].places[0]
    assert place.merged and len(place.boxes) == 4 and place.around() == Box(0, 0, 64, 48)
    np.testing.assert_array_equal(place.look(picture), mean)
    agent.wrap(script).generate([Query("What?", (picture,))])


def test_division_is_bounded(picture):
    looks = []

    def look(pieces):
        looks.append(len(pieces))
        return np.stack([different(piece) for piece in pieces])

    for most, want in ((None, [1, 4, 16]), (21, [1, 4, 16]), (20, [1, 4]), (4, [1])):
        agent = zoo.create("dc2_tiny", theta=0.0, max_parts=most)
        assert [len(level) for level in agent.divide(picture, look)] == want
    small = zoo.create("dc2_tiny", theta=0.0, smallest=13)
    assert [len(level) for level in small.divide(picture, look)] == [1, 4]
    assert set(looks) == {4, 16}


def test_boxes_are_those_of_the_whole_picture(picture):
    agent = zoo.create("dc2_tiny", theta=0.0)
    look = lambda pieces: np.stack([different(piece) for piece in pieces])
    *_, deepest = agent.divide(picture, look)
    for part in deepest:
        box = part.box
        shown = picture[box.top : box.bottom, box.left : box.right]
        np.testing.assert_array_equal(part.pixels, shown)


def test_memory_holds_what_parts_and_wholes_agree_on(picture):
    """A cat in one quarter, dogs in two, and a ghost in the whole picture alone."""
    agent = zoo.create("dc2_tiny", max_depth=2, theta=0.0, smallest=24)
    [[whole], parts] = agent.divide(picture, lambda p: np.stack([different(x) for x in p]))
    whole.objects = ["cat", "dog", "ghost"]
    parts[1].objects, parts[2].objects = ["cat", "dog"], ["dog", "mouse"]
    memory = agent.remember(whole)
    assert memory == {"cat": [Place((parts[1].box,))], "dog": [Place((whole.box,))]}
    shallow = zoo.create("dc2_tiny", max_depth=1, theta=0.0, smallest=24)
    memory = shallow.remember(whole)
    assert set(memory) == {"cat", "dog", "ghost", "mouse"}
    assert memory["mouse"] == [Place((parts[2].box,))]
    parts[1].pixels[:] = whole.pixels[:] = 0
    assert agent.remember(whole) == {}


def test_the_question_is_answered_with_what_was_seen(picture):
    things = {"cat": [1.0, 0, 0], "dog": [0, 1.0, 0], "where is the cat": [0.9, 0.1, 0]}

    def vector(item):
        return np.array(things[item]) if isinstance(item, str) else different(item)

    script = stub(vector, '{"object_list": ["cat", "dog"]}')
    subject = zoo.create("dc2_tiny", max_depth=1, alpha=0.5).wrap(script)
    answer = subject.generate([Query("where is the cat", (picture,))])
    assert set(subject.memory) == {"cat", "dog"}
    asked = [q for method, asked in script.log if method == "generate" for q in asked]
    about = [q for q in asked if q.prompt.startswith(INFORM)]
    assert about and all("where is the cat" in q.prompt for q in about)
    last = asked[-1]
    assert last.images[0] is picture and "where is the cat" in last.prompt
    assert all(f"{q.images[0].size} bytes" in last.prompt for q in about)
    assert answer == [f"{picture.size} bytes, {picture.sum()}"]
    before = len(script.log)
    subject.generate([Query("where is the cat", (picture,))])
    assert len(script.log) == before


def test_another_subject_knows_texts(picture):
    words = Scripted(vector=lambda text: np.array([len(text), 1.0]))
    pictures = stub(different, '["cat"]')
    subject = zoo.create("dc2_tiny", max_depth=1).wrap(pictures, words)
    subject.generate([Query("a cat?", (picture,))])
    assert [asked for _, asked in words.log] == [["cat"], ["a cat?"]]


def test_black_parts_are_not_described(picture):
    picture[:32] = 0
    script = stub(lambda item: different(item) if np.any(item) else np.ones(64))
    agent = zoo.create("dc2_tiny", max_depth=1, theta=0.0, smallest=24)
    agent.wrap(script).study(picture)
    shown = [q for method, asked in script.log for q in asked if getattr(q, "images", ())]
    assert len(shown) == 2 + 1 and all(q.images[0].any() for q in shown)


@pytest.mark.parametrize(
    ("said", "things"),
    [
        ('{"object_list": ["cat", " dog", "cat"]}', ["cat", "dog"]),
        ('Here:\n```json\n{"object_list": ["a"]}\n```\nand {', ["a"]),
        ('["a", 3, "b"] and more', ["a", "b"]),
        ("[]", []),
        ("none", []),
        ('{"object_list": [', []),
        ('{"things": ["a"]}', []),
        ('{"object_list": null}', []),
    ],
)
def test_things_in(said, things):
    assert things_in(said) == things


def test_bad_input(picture):
    agent = zoo.create("dc2_tiny").wrap(stub(lambda item: np.zeros(3)))
    with pytest.raises(UsageError, match="no direction"):
        agent.generate([Query("What?", (picture,))])
    with pytest.raises(UsageError, match="got 2 pictures"):
        agent.generate([Query("What?", (picture, picture))])
    for wrong in ({"max_depth": -1}, {"smallest": 0}, {"max_parts": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="or more"):
            DC2(**wrong)
    assert zoo.create("dc2") == DC2(5, 168, 0.1, 0.3, 2)
