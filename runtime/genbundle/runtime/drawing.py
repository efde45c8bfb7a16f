"""Drawings of how a bundle's programs feed one another: in text for a terminal, and as SVG."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from genbundle.bundles import Manifest
from genbundle.bundles.manifest import Input, Program

_SYMBOLS = {"encoder": "encoder", "projector": "projector", "merge": "merge", "language_model": "language model",
            "lm_head": "lm head", "decode": "decode"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One program of a pass: what comes into it from outside the pass, and what leaves the pass from it."""

    name: str
    roles: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """Values that go from one box of a pass to later ones, by the boxes' places."""

    label: str
    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The programs that run one after another for a prompt or a step."""

    title: str
    boxes: tuple[Box, ...]
    wires: tuple[Wire, ...]


def passes(manifest: Manifest) -> tuple[Pass, ...]:
    """Every pass of a generation: the prompt's routes and the step; equal ones are one."""
    titles: dict[tuple[str, ...], list[str]] = {}
    alone = len(manifest.flow.prompt) == 1
    for route in manifest.flow.prompt:
        needs = f"prompt with {summary(route.needs)}" if route.needs else "prompt" if alone else "prompt of text alone"
        titles.setdefault(route.programs, []).append(needs)
    titles.setdefault(manifest.flow.step, []).append("every further token")
    return tuple(_pass(manifest, names, " and ".join(title)) for names, title in titles.items())


def _pass(manifest: Manifest, names: tuple[str, ...], title: str) -> Pass:
    programs = [manifest.program(name) for name in names]
    made = {output.name: index for index, program in enumerate(programs) for output in program.outputs}
    readers: dict[str, list[int]] = {}
    for index, program in enumerate(programs):
        for item in program.inputs:
            if item.source.kind == "output" and item.source.name in made:
                readers.setdefault(item.source.name, []).append(index)
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for value, targets in readers.items():
        groups.setdefault((made[value], tuple(targets)), []).append(value)
    wires = [Wire(label=summary(values), source=key[0], targets=key[1]) for key, values in groups.items()]
    boxes = tuple(_box(program, readers) for program in programs)
    return Pass(title=title, boxes=boxes, wires=tuple(sorted(wires, key=lambda wire: (wire.source, wire.targets))))


def _box(program: Program, readers: dict[str, list[int]]) -> Box:
    carried = [item for item in program.inputs if item.source.kind == "state"]
    takes = [_origin(item) for item in program.inputs if item.source.kind not in ("state", "output")]
    if carried:
        takes.append(f"state ({_tensors(len(carried))})")
    gives = [output.name for output in program.outputs if output.state is None and output.name not in readers]
    replaced = sum(output.state is not None for output in program.outputs)
    if replaced:
        gives.append(f"state ({_tensors(replaced)})")
    kinds = {item.source.kind for item in program.inputs}
    if "start" in kinds and "state" not in kinds:
        gives.append("state (inside the program)")
    roles = " + ".join(_SYMBOLS.get(role, role) for role in program.roles)
    return Box(name=program.name, roles=roles, takes=tuple(dict.fromkeys(takes)), gives=tuple(gives))


def _origin(item: Input) -> str:
    """What a program input is fed from, in a few words."""
    source = item.source
    if source.kind == "position":
        return f"positions ({source.rule})"
    if source.kind == "prepared":
        return f"{summary(source.options.get('inputs', ()))} ({source.rule})"
    if source.kind == "constant":
        return f"{item.name} = {source.value:g}"
    words = {"tokens": "token ids", "mask": "padding mask", "start": "tokens so far"}
    return words.get(source.kind) or source.name or item.name


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def summary(names: Iterable[str]) -> str:
    """Names joined; three or more that differ by a number alone are one with a count."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault("".join("#" if letter.isdigit() else letter for letter in name), []).append(name)
    parts = []
    for stem, members in stems.items():
        parts.extend([f"{stem.replace('#', '*')} x {len(members)}"] if len(members) > 2 else members)
    return ", ".join(parts)


def as_text(manifest: Manifest, width: int = 100) -> str:
    """The drawing in box-drawing characters, at most `width` columns wide."""
    return "\n\n".join(f"{item.title}\n{_pass_text(item, width)}" for item in passes(manifest))


class _Canvas:
    """A grid of characters that grows; a horizontal line over a vertical one becomes a crossing."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int], str] = {}

    def put(self, row: int, column: int, text: str) -> None:
        """Write `text` from that place on."""
        for offset, letter in enumerate(text):
            place = (row, column + offset)
            crossing = {letter, self._cells.get(place)} == {"─", "│"}
            self._cells[place] = "┼" if crossing else letter

    def lines(self) -> list[str]:
        """The rows, without spaces at their ends."""
        height = 1 + max((row for row, _ in self._cells), default=-1)
        rows = [dict[int, str]() for _ in range(height)]
        for (row, column), letter in self._cells.items():
            rows[row][column] = letter
        return ["".join(row.get(column, " ") for column in range(1 + max(row, default=-1))) for row in rows]


def _pass_text(item: Pass, width: int) -> str:
    canvas, lanes = _Canvas(), _lanes(item)
    left = min(30, max((len(label) for box in item.boxes for label in box.takes), default=0))
    inner = min(34, max(len(line) for box in item.boxes for line in (box.name, box.roles)))
    begin = left + 6  # of the boxes, behind "label ──►"
    end = begin + inner + 3  # the boxes' right border
    count = 1 + max(lanes.values(), default=-1)
    room = width - end - 2 * count - 5
    widest = max((len(wire.label) for wire in item.wires), default=0)
    first_lane = end + min(widest, max(room, 8)) + 5
    row, starts = 0, dict[int, int]()
    for index, box in enumerate(item.boxes):
        arriving = [place for place, wire in enumerate(item.wires) if index in wire.targets]
        leaving = [place for place, wire in enumerate(item.wires) if wire.source == index]
        words = [_cut(box.name, inner), *_wrapped(box.roles, inner)]
        height = max(len(box.takes), len(words), len(arriving) + len(leaving) + len(box.gives))
        canvas.put(row, begin, f"┌{'─' * (inner + 2)}┐")
        for line in range(height):
            words_here = words[line] if line < len(words) else ""
            canvas.put(row + 1 + line, begin, f"│ {words_here:<{inner}} │")
        canvas.put(row + 1 + height, begin, f"└{'─' * (inner + 2)}┘")
        for line, label in enumerate(box.takes):
            canvas.put(row + 1 + line, 2, f"{_cut(label, left):>{left}} ─►")
        line = row + 1
        for place in arriving:
            lane = first_lane + 2 * lanes[place]
            last = item.wires[place].targets[-1] == index
            for between in range(starts[place] + 1, line):
                canvas.put(between, lane, "│")
            canvas.put(line, end + 1, "◄" + "─" * (lane - end - 2))
            canvas.put(line, lane, "┘" if last else "┤")
            starts[place] = line
            line += 1
        for place in leaving:
            lane = first_lane + 2 * lanes[place]
            label = _cut(item.wires[place].label, first_lane - end - 5)
            canvas.put(line, end + 1, f"─ {label} " + "─" * (lane - end - len(label) - 4))
            canvas.put(line, lane, "┐")
            starts[place] = line
            line += 1
        for label in box.gives:
            canvas.put(line, end + 1, f"─► {_cut(label, width - end - 5)}")
            line += 1
        row += height + 2
    return "\n".join(canvas.lines())


def _lanes(item: Pass) -> dict[int, int]:
    """A lane for every wire, shorter ones further in, none shared by wires that run side by side."""
    lanes: dict[int, int] = {}
    order = sorted(range(len(item.wires)), key=lambda i: item.wires[i].targets[-1] - item.wires[i].source)
    for place in order:
        wire = item.wires[place]
        taken = {
            lanes[other]
            for other in lanes
            if item.wires[other].source < wire.targets[-1] and wire.source < item.wires[other].targets[-1]
        }
        lanes[place] = next(lane for lane in range(len(item.wires)) if lane not in taken)
    return lanes


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def _wrapped(text: str, width: int) -> list[str]:
    """Roles over several lines where they are too long for one."""
    lines = [""]
    for word in text.split(" + "):
        joined = f"{lines[-1]} + {word}" if lines[-1] else word
        if len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(f"+ {word}"[:width])
    return lines


_ROW, _PAD, _GAP = 18, 12, 26
_STYLE = """\
text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #24292f; }
.title { font-weight: 600; font-size: 14px; } .name { font-weight: 600; font-size: 13px; } .roles { fill: #57606a; }
.outside { fill: #57606a; } .label { fill: #0550ae; }
rect { fill: #f6f8fa; stroke: #8c959f; } path { fill: none; stroke: #8c959f; stroke-width: 1.3; }
.wire { stroke: #0550ae; } .page { fill: #ffffff; stroke: none; } marker path { fill: #8c959f; stroke: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .roles, .outside { fill: #9198a1; } .label { fill: #79c0ff; }
  rect { fill: #161b22; stroke: #6e7681; } .page { fill: #0d1117; } .wire { stroke: #79c0ff; }
}"""


def as_svg(manifest: Manifest) -> str:
    """The drawing as one standalone SVG, a pass below the other; it follows the viewer's light or dark scheme."""
    parts, top, widest = [], 20, 0
    for item in passes(manifest):
        body, width, bottom = _pass_svg(item, top)
        parts += body
        widest, top = max(widest, width), bottom + _GAP
    title = escape(f"{manifest.model.name} for {manifest.backend}: how its programs feed one another")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{widest}" height="{top}" '
        f'viewBox="0 0 {widest} {top}" role="img">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}\n</style>\n"
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z"/></marker></defs>\n'
        '<rect class="page" width="100%" height="100%"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def _pass_svg(item: Pass, top: int) -> tuple[list[str], int, int]:
    """The elements of one pass from the height `top` on, its width, and where it ends."""
    letter, lanes = 7.3, _lanes(item)
    left = 30 + round(letter * max((len(label) for box in item.boxes for label in box.takes), default=0))
    inner = 2 * _PAD + round(letter * max(len(line) for box in item.boxes for line in (box.name, box.roles)))
    right = left + 30 + inner
    first_lane = right + 40 + round(letter * max((len(wire.label) for wire in item.wires), default=0))
    parts = [f'<text class="title" x="14" y="{top + 8}">{escape(item.title)}</text>']
    y, starts, widest = top + 24, dict[int, int](), first_lane + 16 * (1 + max(lanes.values(), default=0))
    for index, box in enumerate(item.boxes):
        arriving = [place for place, wire in enumerate(item.wires) if index in wire.targets]
        leaving = [place for place, wire in enumerate(item.wires) if wire.source == index]
        rows = max(len(box.takes), 2, len(arriving) + len(leaving) + len(box.gives))
        height = rows * _ROW + _PAD
        parts.append(f'<rect x="{left + 30}" y="{y}" width="{inner}" height="{height}" rx="6"/>')
        for line, (style, words) in enumerate((("name", box.name), ("roles", box.roles))):
            parts.append(_label(style, left + 30 + _PAD, y + 19 + line * _ROW, words))
        for line, words in enumerate(box.takes):
            at = y + 15 + line * _ROW
            parts.append(_label("outside", left - 6, at + 4, words, anchor="end"))
            parts.append(f'<path marker-end="url(#arrow)" d="M{left},{at} H{left + 29}"/>')
        at = y + 15
        for place in arriving:
            lane = first_lane + 16 * lanes[place]
            parts.append(
                f'<path class="wire" marker-end="url(#arrow)" d="M{lane},{starts[place]} V{at} H{right + 1}"/>'
            )
            at += _ROW
        for place in leaving:
            lane = first_lane + 16 * lanes[place]
            parts.append(f'<path class="wire" d="M{right},{at} H{lane}"/>')
            parts.append(_label("label", right + 14, at - 4, item.wires[place].label))
            starts[place], at = at, at + _ROW
        for words in box.gives:
            parts.append(f'<path marker-end="url(#arrow)" d="M{right},{at} H{right + 26}"/>')
            parts.append(_label("outside", right + 32, at + 4, words))
            widest = max(widest, right + 46 + round(letter * len(words)))
            at += _ROW
        y += height + 14
    return parts, widest, y


def _label(style: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
