"""Pictures of a few coloured shapes, and every question the demo model was trained to answer about them."""

import zlib
from dataclasses import dataclass
from math import cos, pi, sin
from random import Random

from PIL import Image, ImageDraw

COLORS = {
    "red": (220, 40, 40),
    "yellow": (240, 205, 40),
    "green": (40, 165, 65),
    "blue": (45, 85, 220),
    "purple": (150, 60, 185),
}
SHAPES = ("circle", "square", "triangle", "star")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the center", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
GRID = 3
MOST_THINGS = 3
NUMBERS = ("no", "one", "two", "three")
KINDS = ("color", "place", "content", "count", "presence", "description")

_HELD_OUT_ONE_IN = 10
_POLYGONS = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "star": [
        ((0.45, 1.1)[tip] * sin(pi * (i / 5)), -(0.45, 1.1)[tip] * cos(pi * (i / 5)))
        for i in range(10)
        for tip in [i % 2 == 0]
    ],
}


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One coloured shape in one cell of the grid; things sort in reading order."""

    row: int
    column: int
    shape: str
    color: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: its things, in reading order."""

    things: tuple[Thing, ...]

    @property
    def is_held_out(self) -> bool:
        """Whether training never draws this layout; crc32, since hash() differs from one process to the next."""
        layout = "; ".join(f"{thing.name} {thing.place}" for thing in self.things)
        return zlib.crc32(layout.encode()) % _HELD_OUT_ONE_IN == 0


def random_scene(rng: Random) -> Scene:
    """One to three shapes in different cells; shapes and colours may repeat."""
    cells = rng.sample([(row, column) for row in range(GRID) for column in range(GRID)], rng.randint(1, MOST_THINGS))
    return Scene(tuple(Thing(*cell, rng.choice(SHAPES), rng.choice(tuple(COLORS))) for cell in sorted(cells)))


def training_scene(rng: Random) -> Scene:
    """A random scene whose layout is not held out."""
    while (scene := random_scene(rng)).is_held_out:
        pass
    return scene


def held_out_scenes(count: int) -> list[Scene]:
    """The first `count` different held-out scenes, the same on every call."""
    rng, scenes = Random(2026), {}
    while len(scenes) < count:
        if (scene := random_scene(rng)).is_held_out:
            scenes[scene] = None
    return list(scenes)


def draw(scene: Scene, size: int = 240, rng: Random | None = None) -> Image.Image:
    """A square picture; with `rng`, sizes, places, colours and the background vary a little."""
    vary = rng.uniform if rng else lambda low, high: (low + high) / 2
    image = Image.new("RGB", (size, size), tuple(round(vary(222, 255)) for _ in range(3)))
    canvas, cell = ImageDraw.Draw(image), size / GRID
    for thing in scene.things:
        radius = cell * vary(0.28, 0.42)
        x = cell * (thing.column + 0.5 + vary(-0.1, 0.1))
        y = cell * (thing.row + 0.5 + vary(-0.1, 0.1))
        fill = tuple(min(255, max(0, round(level + vary(-18, 18)))) for level in COLORS[thing.color])
        if thing.shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            canvas.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _POLYGONS[thing.shape]], fill=fill)
    return image


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Every question that has one true answer, with that answer."""
    return [pair for pairs in questions_by_kind(scene).values() for pair in pairs]


def questions_by_kind(scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """All questions with their answers, under each of KINDS; a kind without any has an empty list."""
    return {
        "color": _color_questions(scene),
        "place": _place_questions(scene),
        "content": _content_questions(scene),
        "count": _count_questions(scene),
        "presence": _presence_questions(scene),
        "description": _description_questions(scene),
    }


def random_question(scene: Scene, rng: Random, kinds: tuple[str, ...] = KINDS) -> tuple[str, str]:
    """A question of a random kind; the rare answers of a kind come up as often as its frequent ones."""
    by_kind = questions_by_kind(scene)
    pairs = by_kind[rng.choice([kind for kind in kinds if by_kind[kind]])]
    answer = rng.choice(sorted({answer for _, answer in pairs}))
    return rng.choice([pair for pair in pairs if pair[1] == answer])


def _color_questions(scene: Scene) -> list[tuple[str, str]]:
    return [
        (f"What color is the {shape}?", f"The {shape} is {thing.color}.")
        for shape in SHAPES
        if (thing := _only([thing for thing in scene.things if thing.shape == shape]))
    ]


def _place_questions(scene: Scene) -> list[tuple[str, str]]:
    names = [*SHAPES, *(f"{color} {shape}" for color in COLORS for shape in SHAPES)]
    return [
        (f"Where is the {name}?", f"The {name} is {thing.place}.")
        for name in names
        if (thing := _only([thing for thing in scene.things if name in (thing.shape, thing.name)]))
    ]


def _content_questions(scene: Scene) -> list[tuple[str, str]]:
    content = {thing.place: f"A {thing.name}." for thing in scene.things}
    return [(f"What is {place}?", content.get(place, "Nothing.")) for row in PLACES for place in row]


def _count_questions(scene: Scene) -> list[tuple[str, str]]:
    counts = {"shape": len(scene.things)}
    for shape in SHAPES:
        counts[shape] = sum(thing.shape == shape for thing in scene.things)
    for color in COLORS:
        counts[f"{color} shape"] = sum(thing.color == color for thing in scene.things)
    return [(f"How many {name}s are there?", _there_are(count, name)) for name, count in counts.items()]


def _presence_questions(scene: Scene) -> list[tuple[str, str]]:
    present = {name for thing in scene.things for name in (thing.shape, thing.name, f"{thing.color} shape")}
    names = [*SHAPES, *(f"{color} {shape}" for color in COLORS for shape in ("shape", *SHAPES))]
    return [(f"Is there a {name}?", "Yes." if name in present else "No.") for name in names]


def _description_questions(scene: Scene) -> list[tuple[str, str]]:
    *first, last = (f"a {thing.name} {thing.place}" for thing in scene.things)
    listed = f"{', '.join(first)} and {last}" if first else last
    description = listed[0].upper() + listed[1:] + "."
    return [(question, description) for question in ("Describe the picture.", "What is in the picture?")]


def _only(things: list[Thing]) -> Thing | None:
    return things[0] if len(things) == 1 else None


def _there_are(count: int, name: str) -> str:
    return f"There is one {name}." if count == 1 else f"There are {NUMBERS[count]} {name}s."
