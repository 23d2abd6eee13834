"""Figures: what is drawn, and that nothing global is touched."""

import subprocess
import sys
from errno import ENOSPC

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from zoo.models.core.errors import ZooError
from zoo.plot import (
    Sample,
    accuracy_figure,
    answers_figure,
    kept_patches_figure,
    save,
    token_groups_figure,
)

OVERALL = {1: 0.05, 4: 0.5, 16: 0.9}
BY_KIND = {"reading": {1: 0.1, 4: 0.2, 16: 0.8}, "counting": {1: 0.0, 4: 0.8, 16: 1.0}}


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_accuracy_against_vision_tokens():
    figure = accuracy_figure(OVERALL, BY_KIND, title="The title")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines.keys() == {"all questions", *BY_KIND}
    assert lines["counting"].get_xdata().tolist() == [1, 4, 16]
    assert lines["counting"].get_ydata().tolist() == [0, 80, 100]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16"]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "vision tokens per picture"
    assert axes.get_ylabel() == "right answers (%)"
    assert axes.get_title(loc="left") == "The title"
    (top,) = axes.child_axes
    assert [label.get_text() for label in top.get_xticklabels()] == ["5 %", "50 %", "90 %"]
    (legend,) = figure.legends
    # The lines in the order in which they end.
    assert [t.get_text() for t in legend.get_texts()] == ["counting", "all questions", "reading"]


def samples(number):
    answers = {1: "3", 16: "7"}
    picture = np.zeros((8, 8, 3), np.uint8)
    return [Sample(picture, "reading", "which digit is there?", "7", answers)] * number


def test_answers_are_marked():
    figure = answers_figure(samples(3), title="The title", columns=2)
    assert len(figure.axes) == 3
    assert texts(figure)[:9] == [
        "which digit is there?",
        *("right answer", "7"),
        *("1 token", "3", "✗"),
        *("16 tokens", "7", "✓"),
    ]


def test_kept_patches_are_seen_and_the_others_veiled():
    kept = np.ones((3, 6), bool)
    kept[2, [0, 4]] = False
    picture = np.zeros((8, 12, 3), np.uint8)
    figure = kept_patches_figure(picture, (2, 3), kept, title="The title", columns=2)
    assert figure.get_suptitle() == "The title"
    shown = [axes for axes in figure.axes if axes.images]
    titles = [axes.get_title(loc="left") for axes in shown]
    assert titles == ["layer 0: 6", "layer 1: 6", "layer 2: 4"]
    below, above = shown[2].images
    assert tuple(below.get_extent()) == tuple(above.get_extent()) == (0, 12, 8, 0)
    veil = np.asarray(above.get_array())[..., 3]
    assert (veil > 0).tolist() == [[True, False, False], [False, True, False]]
    with pytest.raises(ValueError, match=r"want \[layers, 6\]"):
        kept_patches_figure(picture, (2, 3), kept[:, :5], title="")


def test_merged_patches_have_the_colour_of_their_token():
    picture = np.zeros((20, 30, 3), np.uint8)
    groups = np.array([[0, 0, 1, -1, 2, 2], [0, 1, 2, 3, 4, 5]])
    figure = token_groups_figure(picture, (2, 3), groups, title="x", labels=["one", "all"])
    first, second = figure.axes[:2]
    assert first.get_title("left") == "one: 3 tokens"
    assert second.get_title("left") == "all: 6 tokens"
    veil = first.images[1].get_array()
    assert (veil[0, 0] == veil[0, 1]).all()
    assert (veil[1, 1] == veil[1, 2]).all()
    assert (veil[0, 0] != veil[1, 1]).any()
    assert veil[0, 2, 3] == 0  # alone
    assert veil[1, 0, 3] == 0.85  # dropped
    with pytest.raises(ValueError, match="groups"):
        token_groups_figure(picture, (2, 3), groups[:, :5], title="")


@pytest.mark.filterwarnings("error")
def test_whatever_a_model_says_can_be_drawn(tmp_path):
    answers = {1: "", 2: "$x$ \x1a 字", 4: "much too long for a line"}
    odd = Sample(np.zeros((4, 6, 3), np.uint8), "", "what is $y?", "", answers)
    figure = answers_figure([odd], title="odd")
    assert [text for text in texts(figure) if "$" in text or "…" in text] == [
        "what is $y?",
        "$x$ · ·",
        "much too …",
    ]
    save(figure, tmp_path / "odd.png")


def test_a_saved_figure_is_a_whole_picture(tmp_path):
    file = tmp_path / "figure.png"
    save(accuracy_figure(OVERALL, BY_KIND, title="x"), file)
    with Image.open(file) as picture:
        assert picture.width > 800
        picture.load()
    assert list(tmp_path.iterdir()) == [file]


def test_drawing_leaves_the_state_of_pyplot_alone(repo):
    script = "import sys, zoo.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=repo).returncode == 0


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(ZooError, match=r"figure\.png could not be written: No space left"):
        save(answers_figure(samples(1), title="x"), tmp_path / "figure.png")
