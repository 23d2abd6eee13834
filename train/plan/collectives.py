"""The collectives of a compiled program: how many bytes every device sends, and along which axes of
the mesh.

Read from the text of the optimised program, because only there is decided what is communicated.
What stands in the body of a loop counts as often as the loop turns.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

Axes = tuple[str, ...]
Traffic = Mapping[tuple[str, Axes], int]
"""(kind, mesh axes) -> bytes that every device sends in a run of the program."""

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_BODY = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_OPCODE = re.compile(r"^\s*([\w\-]+)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)"
    r"=\{?((?:%?[\w.\-]+(?:, )?)+)"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CHAINED = "chain_id="
_SCATTERED = "all-reduce-scatter"
"""How the compiler for TPUs calls the computations in which a sum is made and cut in one: a device
sends what a reduce-scatter would send, though an all-reduce stands there."""
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")


@dataclass
class _Computation:
    """A function of the program: what it sends itself, and what it calls how often."""

    sent: Counter[tuple[str, Axes]] = field(default_factory=Counter)
    calls: list[tuple[str, int]] = field(default_factory=list)


def traffic(text: str, mesh: Mapping[str, int]) -> Traffic:
    """The collectives of a program.

    Args:
      text: of the compiled program.
      mesh: sizes of the axes of the mesh, in their order.
    """
    lines = dict(_computations(text))
    bodies = {name: body for name, (body, _) in lines.items()}
    chained: set[str] = set()
    read = {name: _read(name, body, bodies, mesh, chained) for name, body in bodies.items()}
    totals: dict[str, Counter[tuple[str, Axes]]] = {}

    def total(name: str) -> Counter[tuple[str, Axes]]:
        if name not in totals:
            sent = Counter(read[name].sent)
            for callee, times in read[name].calls:
                for key, number in total(callee).items():
                    sent[key] += number * times
            totals[name] = sent
        return totals[name]

    (entry,) = (name for name, (_, is_entry) in lines.items() if is_entry)
    return total(entry)


def by_kind(found: Traffic) -> dict[str, int]:
    """Bytes by kind alone."""
    sums = Counter[str]()
    for (kind, _), number in found.items():
        sums[kind] += number
    return {kind: sums[kind] for kind in KINDS if sums[kind]}


def _computations(text: str) -> Iterator[tuple[str, tuple[list[str], bool]]]:
    """(name, (instructions, whether it is the entry)) of each."""
    name, body, entry = "", [], False
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, body, entry = head[1], [], line.startswith("ENTRY")
        elif line.startswith("}") and name:
            yield name, (body, entry)
            name = ""
        elif name and (instruction := _BODY.match(line)):
            body.append(instruction[1])


def _read(
    called: str,
    body: list[str],
    bodies: Mapping[str, list[str]],
    mesh: Mapping[str, int],
    chained: set[str],
) -> _Computation:
    """What stands in a computation.

    Args:
      called: its name.
      body: its instructions.
      bodies: all computations.
      mesh: sizes of its axes.
      chained: channels of the collectives that have been met so far in parts. The compiler for
        TPUs cuts them up and puts a part, which looks like the whole, beside each of several
        computations that run meanwhile.
    """
    found = _Computation()
    for line in body:
        shape, rest = _split(line)
        opcode = _OPCODE.match(rest)
        if opcode is None:
            continue
        name = opcode[1]
        kind = name.removesuffix("-start")
        if kind in KINDS:
            if _CHAINED in rest and (channel := _CHANNEL.search(rest)):
                if channel[1] in chained:
                    continue
                chained.add(channel[1])
            axes, ways = _group(rest, mesh)
            size = _size(shape, name)
            if kind == "all-reduce" and called.startswith(_SCATTERED):
                kind, size = "reduce-scatter", size // ways
            if ways > 1:
                found.sent[kind, axes] += _sent(kind, size, ways)
        elif not name.endswith(("-done", "-update")):
            turns = _turns(rest, bodies) if name == "while" else 1
            for several in _CALLED.findall(rest):
                names = [each.strip().lstrip("%") for each in several.split(",")]
                found.calls += [(each, turns) for each in names if each in bodies]
    return found


def _split(line: str) -> tuple[str, str]:
    """The type of an instruction, and the rest."""
    depth = 0
    for place, letter in enumerate(line):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == " " and depth == 0:
            return line[:place], line[place:]
    return line, ""


def _size(shape: str, opcode: str) -> int:
    """Bytes of the result; the start of an asynchronous operation has its operands before it."""
    if opcode.endswith("-start") and not opcode.startswith("all-reduce") and shape.startswith("("):
        shape = _elements(shape)[1]
    return sum(_bytes(*match.groups()) for match in _ARRAY.finditer(shape))


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's type."""
    found, depth, begin = [], 0, 1
    for place, letter in enumerate(shape):
        if letter == "," and depth == 1:
            found.append(shape[begin:place])
            begin = place + 1
        depth += (letter in "({[") - (letter in ")}]")
    return [*found, shape[begin:-1]]


def _bytes(name: str, bits: str | None, dims: str) -> int:
    width = 8 if name == "pred" else int(bits or 0)
    return math.prod(int(dim) for dim in dims.split(",") if dim) * width // 8


def _sent(kind: str, size: int, ways: int) -> int:
    """Bytes that a member of a group of `ways` sends, at least, for a result of `size`."""
    match kind:
        case "all-gather" | "all-to-all":
            return size * (ways - 1) // ways
        case "reduce-scatter":
            return size * (ways - 1)
        case "all-reduce":
            return 2 * size * (ways - 1) // ways
        case _:
            return size


def _turns(loop: str, bodies: Mapping[str, list[str]]) -> int:
    """How often a loop turns: as the compiler says, else the bound that its condition names."""
    if known := _TURNS.search(loop):
        return int(known[1])
    condition = _CONDITION.search(loop)
    lines = bodies.get(condition[1], []) if condition else []
    bounds = [int(bound) for line in lines for bound in _CONSTANT.findall(line)]
    return max(bounds, default=1)


# ------------------------------------------------------------------ groups of devices

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(?([^{]*?)\)?)? ?\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")


def _group(line: str, mesh: Mapping[str, int]) -> tuple[Axes, int]:
    """The axes of our mesh along which an instruction communicates, and how many take part."""
    if pairs := _PAIRS.search(line):
        ends = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\d+,\d+", pairs[1])]
        moved = {axis for pair in ends for axis in _varying(pair, mesh)}
        return tuple(axis for axis in mesh if axis in moved), 2 if moved else 1
    members = _members(line, math.prod(mesh.values()))
    return _varying(members, mesh), len(members)


def _members(line: str, everyone: int) -> list[int]:
    """The first group of devices."""
    if found := _LISTED.search(line):
        return [int(number) for number in found[1].split(",")]
    if found := _IOTA.search(line):
        groups, size = int(found[1]), int(found[2])
        ids = np.arange(groups * size).reshape([int(n) for n in found[3].split(",")])
        if found[4]:
            ids = ids.transpose([int(n) for n in found[4].split(",")])
        return ids.reshape(groups, size)[0].tolist()
    if found := _MESH.search(line):
        return _of_axes(found[1], found[2], found[3])
    return list(range(everyone))


def _of_axes(axes: str, ids: str | None, used: str) -> list[int]:
    """The first group of `mesh['a'=2,'b'=4], device_ids=([8]) {'b':(1)2}`.

    A group varies in the used axes; of an axis, `(before)size` is a part.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = np.arange(math.prod(sizes.values()))
    if ids and (iota := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids)):
        order = order.reshape([int(n) for n in iota[1].split(",")])
        order = order.transpose([int(n) for n in iota[2].split(",")]) if iota[2] else order
    chosen = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)
    }
    shape, index = [], []
    for name, size in sizes.items():
        before, part = chosen.get(name, (1, 1))
        shape += [before, part, size // (before * part)]
        index += [0, slice(None), 0]
    return np.asarray(order.reshape(shape)[tuple(index)]).reshape(-1).tolist()


def _varying(members: list[int] | tuple[int, ...], mesh: Mapping[str, int]) -> Axes:
    """The axes in which devices differ."""
    places = np.unravel_index(np.asarray(members), tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if np.ptp(place) > 0)
