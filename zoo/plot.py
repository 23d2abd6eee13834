"""Figures: accuracy against the number of vision tokens, questions with the answers of a model, the
patches of a picture that each layer of a model keeps, and power laws through points.

Every function returns a `matplotlib.figure.Figure` that belongs to no window and no global state;
`save` writes it.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from zoo.models.core.errors import ZooError

if TYPE_CHECKING:
    from zoo.evaluate.powerlaw import PowerLaw

INK, FAINT, GRID = "#1a1a1a", "#6b6b6b", "#e3e3e3"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's colours, which colour-blind people tell apart; markers repeat the distinction."""
MARKERS = "osD^vP"
RIGHT, WRONG = "#0072B2", "#D55E00"

_FONT = get_font(findfont("DejaVu Sans"))  # comes with matplotlib
_INCHES_PER_LINE = 0.19
_LETTERS_PER_INCH = 12.4


@dataclass(frozen=True)
class Sample:
    """A question and what a model answered.

    Attributes:
      picture: [H, W, 3] uint8.
      kind: of the question.
      question: the prompt.
      expected: the right answer.
      answers: what was generated, by number of vision tokens.
    """

    picture: np.ndarray
    kind: str
    question: str
    expected: str
    answers: Mapping[int, str]


def accuracy_figure(
    overall: Mapping[int, float], by_kind: Mapping[str, Mapping[int, float]], *, title: str
) -> Figure:
    """Accuracy against vision tokens per picture: a strong line for all questions, one per kind.

    Args:
      overall: share of right answers, 0 to 1, by number of vision tokens.
      by_kind: the same for each kind of question.
      title: what was measured on what.
    """
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    styles = zip(sorted(by_kind), COLOURS, MARKERS, strict=False)
    for kind, colour, marker in styles:
        _curve(axes, by_kind[kind], kind, color=colour, marker=marker, linewidth=1.5, markersize=6)
    _curve(axes, overall, "all questions", color=INK, marker="o", linewidth=3.2, markersize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(overall), [str(budget) for budget in overall])
    axes.minorticks_off()
    # The numbers of the strong line, above it all, where they hide nothing.
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(overall), [f"{100 * share:.0f} %" for share in overall.values()])
    top.minorticks_off()
    top.tick_params(labelsize=11, labelcolor=INK, length=0)
    for label in top.get_xticklabels():
        label.set_fontweight("bold")
    top.spines[:].set_visible(False)
    axes.set_ylim(0, 104)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("vision tokens per picture", fontsize=12, color=INK)
    axes.set_ylabel("right answers (%)", fontsize=12, color=INK)
    axes.set_title(title, fontsize=13, fontweight="bold", loc="left", color=INK, pad=30)
    axes.grid(color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11, colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    # In the order in which the lines end, so that the eye finds them.
    lines = sorted(axes.get_lines(), key=lambda line: np.asarray(line.get_ydata())[-1])
    figure.legend(
        handles=lines[::-1],
        loc="outside right center",
        frameon=False,
        fontsize=11,
        labelcolor=INK,
    )
    return figure


def answers_figure(samples: Sequence[Sample], *, title: str, columns: int = 5) -> Figure:
    """Pictures with question, right answer and generated answers, marked right (✓) or wrong (✗).

    Args:
      samples: shown row by row.
      title: what they are.
      columns: number of pictures in a row.
    """
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    side, gap, header = 2.1, 0.28, 0.75
    letters = int(side * _LETTERS_PER_INCH)
    wrapped = [textwrap.wrap(_printable(s.question), letters) for s in samples]
    lines = max(len(w) + 1 + len(s.answers) for w, s in zip(wrapped, samples, strict=True)) + 1.7
    card = side + lines * _INCHES_PER_LINE
    width = columns * side + (columns + 1) * gap
    height = header + rows * (card + gap)
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(
        gap / width, 1 - 0.3 / height, title, fontsize=15, fontweight="bold", color=INK, va="center"
    )
    for index, (sample, question) in enumerate(zip(samples, wrapped, strict=True)):
        row, column = divmod(index, columns)
        left = gap + column * (side + gap)
        top = height - header - row * (card + gap)
        box = (left / width, (top - side) / height, side / width, side / height)
        _card(figure.add_axes(box), sample, question)
    return figure


def kept_patches_figure(
    picture: np.ndarray,
    grid: tuple[int, int],
    kept: np.ndarray,
    *,
    title: str,
    labels: Sequence[str] | None = None,
    columns: int = 8,
) -> Figure:
    """The picture once for every layer, with a veil over the patches that the layer leaves out.

    Args:
      picture: [H, W, 3] uint8.
      grid: rows and columns of patches.
      kept: bool [layers, N], the patches row by row.
      title: what it shows.
      labels: what stands above each, where these are no layers (methods, or budgets).
      columns: number of layers in a row of the figure.

    Raises:
      ValueError: `kept` has another number of patches than the grid.
    """
    kept = np.asarray(kept, bool)
    if kept.ndim != 2 or kept.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"kept {kept.shape}: want [layers, {grid[0] * grid[1]}], grid {grid}")
    names = [f"layer {i}" for i in range(len(kept))] if labels is None else labels
    veils = np.ones((len(kept), *grid, 4))
    veils[..., 3] = np.where(kept.reshape(-1, *grid), 0, 0.85)
    titles = [f"{name}: {mask.sum()}" for name, mask in zip(names, kept, strict=True)]
    return _over_picture(picture, veils, titles, title=title, columns=columns)


def token_groups_figure(
    picture: np.ndarray,
    grid: tuple[int, int],
    groups: np.ndarray,
    *,
    title: str,
    labels: Sequence[str] | None = None,
    columns: int = 4,
) -> Figure:
    """The picture once for every row of `groups`, patches that became one token in one colour and
    those that were dropped under a veil. Patches that stayed by themselves have no colour.

    Args:
      picture: [H, W, 3] uint8.
      grid: rows and columns of patches.
      groups: int [rows, N], which token each patch became a part of, -1 for none, as
        `TokenSet.groups` has it.
      title: what it shows.
      labels: what stands above each row; by default the number of tokens.
      columns: number of pictures in a row of the figure.

    Raises:
      ValueError: `groups` has another number of patches than the grid.
    """
    groups = np.asarray(groups)
    if groups.ndim != 2 or groups.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"groups {groups.shape}: want [rows, {grid[0] * grid[1]}], grid {grid}")
    veils, titles = np.zeros((len(groups), *grid, 4)), []
    for number, row in enumerate(groups):
        found, count = np.unique(row[row >= 0], return_counts=True)
        # Hues a golden angle apart: neighbours in number are far apart in colour.
        hues = {group: (i * 0.381966) % 1 for i, group in enumerate(found[count > 1])}
        for patch, group in enumerate(row):
            cell = veils[number, patch // grid[1], patch % grid[1]]
            if group < 0:
                cell[:] = 1, 1, 1, 0.85
            elif group in hues:
                cell[:] = *hsv_to_rgb((hues[group], 0.85, 0.95)), 0.62
        name = "" if labels is None else f"{labels[number]}: "
        titles.append(f"{name}{len(found)} tokens")
    return _over_picture(picture, veils, titles, title=title, columns=columns)


def _over_picture(
    picture: np.ndarray, veils: np.ndarray, titles: Sequence[str], *, title: str, columns: int
) -> Figure:
    """The picture once for each of `veils` [n, rows, columns, RGBA], which lie over it."""
    height, width = picture.shape[:2]
    columns = min(columns, len(veils))
    rows = -(-len(veils) // columns)
    side, header = 1.5, 0.5
    size = (columns * side, header + rows * (side * height / width + 0.3))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK, x=0.02, ha="left")
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in every:
        axes.set_axis_off()
    extent = (0, width, height, 0)
    for axes, veil, label in zip(every, veils, titles, strict=False):
        axes.imshow(picture, extent=extent, interpolation="nearest")
        axes.imshow(veil, extent=extent, interpolation="nearest")
        axes.set_title(label, fontsize=9, color=INK, loc="left", pad=3)
    return figure


def power_law_figure(
    groups: "Mapping[str, tuple[np.ndarray, np.ndarray, PowerLaw]]",
    *,
    title: str,
    x: str,
    y: str,
) -> Figure:
    """Points with their fitted laws on logarithmic axes.

    Args:
      groups: {name: (sizes [n], errors [n], law)}.
      title: what it shows.
      x: what the sizes are.
      y: what the errors are.
    """
    chart = Figure(figsize=(8.2, 4.8), layout="constrained")
    axes = chart.subplots()
    for number, (name, (sizes, errors, law)) in enumerate(groups.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        label = f"{name}  {law.alpha:.3g} · x^{law.beta:.3f}"
        label += f" + {law.gamma:.3g}" if law.gamma else ""
        axes.plot(sizes, errors, marker, color=colour, markeredgecolor="white", label=label)
        line = np.geomspace(np.min(sizes), np.max(sizes), 100)
        axes.plot(line, law(line), color=colour, linewidth=1.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x, fontsize=11, color=INK)
    axes.set_ylabel(y, fontsize=11, color=INK)
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left", color=INK)
    axes.grid(which="both", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    chart.legend(loc="outside right center", frameon=False, fontsize=9, labelcolor=INK)
    return chart


def speed_figure(points: Sequence[tuple[str, float, float, int]], *, title: str) -> Figure:
    """Speed of image models against what they compute, on logarithmic axes; larger dots have more
    parameters.

    Args:
      points: (name, GFLOPs of an image, images per second, parameters) each.
      title: what it shows.
    """
    chart = Figure(figsize=(8.2, 4.8), layout="constrained")
    axes = chart.subplots()
    for number, (name, gflops, speed, params) in enumerate(points):
        area = 30 + 4e-6 * params
        axes.scatter(gflops, speed, area, COLOURS[number % len(COLOURS)], alpha=0.75, linewidth=0)
        axes.annotate(name, (gflops, speed), (6, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("GFLOPs of an image", fontsize=11, color=INK)
    axes.set_ylabel("images per second", fontsize=11, color=INK)
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left", color=INK)
    axes.grid(which="both", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    return chart


def save(figure: Figure, file: str | Path) -> None:
    """Write `figure` as a PNG, whole or not at all. Raises ZooError if that is impossible."""
    file = Path(file)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=150)
        temporary.replace(file)
    except OSError as error:
        raise ZooError(
            f"{file} could not be written: {error.strerror}; make room or choose another folder"
        ) from error


def _curve(axes: Axes, shares: Mapping[int, float], label: str, **style: Any) -> None:
    percent = [100 * share for share in shares.values()]
    axes.plot(list(shares), percent, label=label, markeredgecolor="white", **style)


def _card(axes: Axes, sample: Sample, question: Sequence[str]) -> None:
    """One picture with the text below it."""
    axes.imshow(sample.picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(sample.kind, fontsize=10, color=FAINT, loc="left", pad=4)
    line = 0.6

    def write(x: float, text: str, **style: Any) -> None:
        below = (0, -72 * _INCHES_PER_LINE * (line + 0.5))
        axes.annotate(
            text,
            (x, 0),
            xycoords="axes fraction",
            xytext=below,
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            parse_math=False,
            **style,
        )

    for part in question:
        write(0, part, fontsize=10.5, fontweight="bold", color=INK)
        line += 1
    line += 0.25
    write(0, "right answer", fontsize=10, color=FAINT)
    write(0.56, sample.expected, fontsize=10.5, color=INK)
    line += 1
    for budget, answer in sample.answers.items():
        right = answer == sample.expected
        colour, mark = (RIGHT, "✓") if right else (WRONG, "✗")
        write(0, f"{budget} token{'' if budget == 1 else 's'}", fontsize=10, color=FAINT)
        shown = textwrap.shorten(_printable(answer), 12, placeholder=" …") or "–"
        write(0.56, shown, fontsize=10.5, fontweight="bold", color=colour)
        write(1, mark, fontsize=11, fontweight="bold", color=colour, ha="right")
        line += 1


def _printable(text: str) -> str:
    """`text` with a dot for all that the font has no sign for, such as an untrained model says."""
    known = _FONT.get_charmap()
    return "".join(sign if ord(sign) in known else "·" for sign in text)
