"""ZoomEye: where it looks, what it shows and how often it asks, on a scripted subject."""

import numpy as np
import pytest

import zoo
from zoo.agents.wording import SearchWording, cues
from zoo.agents.zoomeye import Search, ZoomEye, find_all, find_one
from zoo.evaluate.scripted import Scripted
from zoo.evaluate.subject import Query
from zoo.models.core.errors import UsageError
from zoo.processors import crops
from zoo.processors.tiling import Box

WORDING = SearchWording()
LEFT, RIGHT = Box(8, 8, 16, 16), Box(40, 48, 48, 64)
"""Where the red and the green thing of the picture are."""


@pytest.fixture
def picture():
    found = np.random.default_rng(0).integers(80, 120, (64, 96, 3), np.uint8)
    found[LEFT.top : LEFT.bottom, LEFT.left : LEFT.right] = (255, 0, 0)
    found[RIGHT.top : RIGHT.bottom, RIGHT.left : RIGHT.right] = (0, 255, 0)
    return found


def share(view, channel):
    """Which part of a view is of a pure colour."""
    others = [c for c in range(3) if c != channel]
    return float(np.mean((view[..., channel] > 200) & (view[..., others] < 50).all(-1)))


def subject(things, **more):
    """Sees the red and the green thing where they fill a part of a view; says which it looks for.

    It expects them wherever there is a trace of them.
    """
    colours = {"red thing": 0, "green thing": 1}

    def chance(query, word):
        view, prompt = query.images[-1], query.prompt
        seen = [share(view, c) for name, c in colours.items() if name in prompt]
        latent = WORDING.ask("latent", "X").partition("X")[0] in prompt
        sure = max(seen, default=0) > (0.001 if latent else 0.2)
        return 0.0 if sure == (word == "Yes") else -6.0

    def answer(query):
        return f"So. Look for: {things}." if not query.images else f"{len(query.images)}"

    return Scripted(answer=answer, chance=chance, **more)


AGENT = zoo.config("zoomeye_tiny", **{"search.depth": 4})


def shows(box, thing):
    """Whether a region is shown with a thing in view."""
    return crops.overlap(crops.patch_around(box, (64, 96), side=16), thing)


def test_it_finds_what_a_question_is_about(picture):
    script = subject("red thing")
    agent = AGENT.wrap(script)
    agent.generate([Query("What is the red thing?", (picture,))])
    [(cue, [box])] = agent.trace
    assert cue == "red thing"
    assert shows(box, LEFT) and max(box.size) < 40
    [shown] = script.log[-1][1]
    assert share(shown.images[0], 0) > 0.2 and shown.prompt == "What is the red thing?"


def test_two_things_are_shown_together(picture):
    script = subject("red thing and green thing")
    agent = AGENT.wrap(script)
    agent.generate([Query("Which is larger?", (picture,))])
    assert [cue for cue, _ in agent.trace] == ["red thing", "green thing"]
    [shown] = script.log[-1][1]
    assert share(shown.images[0], 0) > 0 and share(shown.images[0], 1) > 0


def test_all_of_a_kind(picture):
    picture[52:60, 84:92] = (255, 0, 0)
    agent = zoo.config("zoomeye_tiny", **{"search.all_depth": 3}).wrap(subject("all red things"))
    boxes = agent.search(picture, "How many?")
    assert any(shows(box, LEFT) for box in boxes)
    assert any(shows(box, Box(52, 84, 60, 92)) for box in boxes)
    assert not any(box == Box(0, 0, 64, 96) for box in boxes)


def test_beside_the_whole_picture(picture):
    wide = zoo.config("zoomeye_tiny", beside=True, patch_scale=1.2, **{"search.depth": 4})
    script = subject("red thing")
    agent = wide.wrap(script)
    agent.generate([Query("What is the red thing?", (picture,))])
    [shown] = script.log[-1][1]
    assert len(shown.images) == 2 and shown.prompt.startswith(WORDING.closer)
    whole, closer = shown.images
    assert whole.shape == (16, 16, 3) and share(closer, 0) > share(whole, 0)
    # What the whole picture already shows is not searched for.
    easy = Scripted(
        answer=lambda q: "Look for: a and b" if not q.images else "",
        chance=lambda q, word: 0.0 if word == "Yes" else -9.0,
    )
    agent = wide.wrap(easy)
    agent.generate([Query("Which?", (picture,))])
    assert agent.trace == [] and easy.log[-1][1][0].images[0] is not None
    assert easy.log[-1][1][0].images[0].shape == picture.shape


def test_nothing_to_look_for_is_the_whole_picture(picture):
    script = Scripted(answer=lambda query: "I do not know.")
    agent = AGENT.wrap(script)
    assert agent.generate([Query("What?", (picture,)), Query("And?")]) == ["I do not know."] * 2
    assert script.log[-1][1][0].images[0].shape == (16, 16, 3)
    assert [len(asked) for _, asked in script.log] == [1, 2]


def test_calls_are_batched_bounded_and_remembered(picture):
    script = subject("blue thing")
    agent = AGENT.wrap(script)
    agent.generate([Query("What is the blue thing?", (picture,))])
    sizes = [len(asked) for method, asked in script.log if method == "next_token"]
    assert set(sizes) <= {1, 8} and 8 in sizes
    tree = crops.region_tree(picture.shape[:2], smallest=16)
    assert sum(sizes) <= 3 * len(tree)
    agent.generate([Query("What is the blue thing?", (picture,))])
    assert len(script.log) == len(sizes) + 2


def test_options_are_judged_by_what_is_shown(picture):
    script = subject("red thing", loss=lambda q, option: -share(q.images[0], 0) * len(option))
    query = Query("What is it? red or green", (picture,), about="What is the red thing?")
    [found] = AGENT.wrap(script).option_loss([query], [["red", "green"]])
    assert found.argmin() == 1
    asked = script.log[0][1][0].prompt
    assert "What is the red thing?" in asked and "or green" not in asked


def test_bad_input(picture):
    agent = AGENT.wrap(Scripted())
    for query in (
        Query("Which?", (picture, picture)),
        Query([{"role": "user", "content": "?"}], (picture,)),
    ):
        with pytest.raises(UsageError, match="one picture for one question"):
            agent.generate([query])
    with pytest.raises(ValueError, match="parts = 5: want one of 4, 9, 16"):
        ZoomEye(parts=5)
    with pytest.raises(ValueError, match="regions of at least 16"):
        ZoomEye(resolution=4)
    with pytest.raises(ValueError, match="max_cues = 0"):
        ZoomEye(max_cues=0)
    with pytest.raises(ValueError, match="numbers above 0"):
        Search(steps=())
    with pytest.raises(ValueError, match="from 1 on"):
        Search(patience=0)


def test_cues():
    lead = WORDING.lead
    assert cues("Hm. Look for: dog and red bicycle.", lead) == ["dog", "red bicycle"]
    assert cues("Look for: a, b, and all cars.\nLook for: c", lead) == ["a", "b", "all cars"]
    assert cues("Look for: man and his bag", lead) == ["man"]
    assert cues("dog and cat", lead) == [] and cues("dog and cat", "") == ["dog", "cat"]


def test_a_picture_that_is_not_cut():
    tree = crops.region_tree((8, 8), smallest=16)
    asked = []

    def judge(pairs):
        asked.extend(pairs)
        return [-1.0] * len(pairs)

    found = find_one(tree, judge, Search())
    assert asked == [("answering", 0)] and found.nodes == () and found.steps == 1
    assert find_all(tree, judge, Search()) == ()


def test_a_search_gives_up():
    """Three regions for each of five levels, and two more for each lower aim: 0.5, 0.4, 0.2, 0."""
    tree = crops.region_tree((9000, 9000), smallest=336)
    found = find_one(tree, lambda pairs: [-1.0] * len(pairs), Search())
    assert found.steps == len(found.looked) == 15 + 4 * 2 and found.nodes == ()


def test_published_settings():
    onevision = zoo.create("zoomeye_llava_onevision")
    assert onevision.search.bias == 0.6 and onevision.beside and onevision.patch_scale == 1.2
    assert zoo.create("zoomeye_internvl2_5").search.least == -0.2
    assert zoo.create("zoomeye_qwen2_5_vl").search.steps == (0.05, 0.1, 0.2)
    assert zoo.create("zoomeye").search == Search(0.2, 0.6, 0.0, (0.1, 0.1, 0.2), 3, 2, 5, 0.6, 2)
