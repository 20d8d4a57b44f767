"""Drawn scenes and the questions about them, for the demo vision-language model.

A scene is a 112x112 palette image with one to three things (coloured shapes, and at most one digit)
in the cells of a 3x3 grid.  Everything is drawn without anti-aliasing, so an image is a small array
of palette indices: drawing, storing (as PNG) and turning into model input are all cheap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 112
CELL = SIZE / 3
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 75, 205),
    "yellow": (240, 212, 40),
    "purple": (130, 50, 160),
    "orange": (245, 130, 30),
    "pink": (246, 140, 186),
    "black": (28, 28, 28),
}
COLOR_NAMES = list(COLORS)
SHAPES = ["circle", "square", "triangle", "diamond", "star", "cross", "ring"]
DIGITS = list("0123456789")
KINDS = SHAPES + DIGITS
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
CELLS = [f"{row} {column}" for row in ROWS for column in COLUMNS]
COUNTS = ["zero", "one", "two", "three"]
DIGIT_ROWS = {  # 5x7 bitmaps, one string of seven rows (each a 5-bit number) for each digit
    "0": (14, 17, 19, 21, 25, 17, 14), "1": (4, 12, 4, 4, 4, 4, 14), "2": (14, 17, 1, 2, 4, 8, 31),
    "3": (31, 2, 4, 2, 1, 17, 14), "4": (2, 6, 10, 18, 31, 2, 2), "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14), "7": (31, 1, 2, 4, 8, 8, 8), "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One drawn thing; `kind` is the name of a shape or a digit character."""

    kind: str
    color: str
    cell: int
    x: float
    y: float
    radius: int

    @property
    def is_digit(self) -> bool:
        return self.kind in DIGITS

    @property
    def noun(self) -> str:
        return "digit" if self.is_digit else self.kind


@dataclass
class Scene:
    """Things plus the palette they are drawn with (row 0 is the background)."""

    things: list[Thing]
    palette: np.ndarray

    def unique(self, attribute: str) -> list[Thing]:
        """Things that `attribute` ("noun" or "color") alone identifies."""
        values = [getattr(thing, attribute) for thing in self.things]
        return [thing for thing, value in zip(self.things, values) if values.count(value) == 1]

    @property
    def digit(self) -> Thing | None:
        return next((thing for thing in self.things if thing.is_digit), None)


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene at random."""
    count = int(rng.integers(1, len(COUNTS)))
    digit = rng.choice(DIGITS) if rng.random() < 0.45 else ""
    kinds = list(rng.choice(SHAPES, count))
    if digit:
        kinds[0] = digit
    colors = rng.choice(COLOR_NAMES, count)
    things = []
    for kind, color, cell in zip(kinds, colors, rng.permutation(9)[:count]):
        radius = int(rng.integers(12 if kind in DIGITS else 9, 16))
        play = CELL / 2 - radius  # how far the centre may move without leaving the cell
        x, y = (
            (cell % 3 + 0.5) * CELL + rng.uniform(-play, play),
            (cell // 3 + 0.5) * CELL + rng.uniform(-play, play),
        )
        things.append(Thing(str(kind), str(color), int(cell), x, y, radius))
    background = rng.integers(205, 256, 3)
    palette = np.array([background, *COLORS.values()]) + rng.integers(-22, 23, (len(COLORS) + 1, 3))
    return Scene(things, palette.clip(0, 255).astype(np.uint8))


def _polygon(
    corners: int, radius: float, start: float, inner: float = 1.0
) -> list[tuple[float, float]]:
    """Corner offsets of a regular polygon, or of a star when every second corner is pulled in by
    `inner`."""
    angles = [math.radians(start + 360 * i / corners) for i in range(corners)]
    radii = [radius * (inner if i % 2 else 1.0) for i in range(corners)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)]


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, r, fill = thing.x, thing.y, thing.radius, COLOR_NAMES.index(thing.color) + 1
    polygons = {
        "triangle": _polygon(3, r, -90),
        "diamond": _polygon(4, r, -90),
        "square": _polygon(4, r * 1.15, -45),
        "star": _polygon(10, r, -90, inner=0.42),
    }
    if thing.kind in polygons:
        draw.polygon([(x + dx, y + dy) for dx, dy in polygons[thing.kind]], fill=fill)
    elif thing.kind == "circle":
        draw.ellipse((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), fill=fill)
    elif thing.kind == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        draw.ellipse((x - r * 0.5, y - r * 0.5, x + r * 0.5, y + r * 0.5), fill=0)
    elif thing.kind == "cross":
        draw.rectangle((x - r, y - r * 0.3, x + r, y + r * 0.3), fill=fill)
        draw.rectangle((x - r * 0.3, y - r, x + r * 0.3, y + r), fill=fill)
    else:
        dot = 2 * r / 7
        for row, bits in enumerate(DIGIT_ROWS[thing.kind]):
            for column in range(5):
                if bits >> (4 - column) & 1:
                    left, top = x + (column - 2.5) * dot, y + (row - 3.5) * dot
                    draw.rectangle((left, top, left + dot, top + dot), fill=fill)


def draw_indices(scene: Scene) -> Image.Image:
    """Draw the scene as palette indices."""
    image = Image.new("P", (SIZE, SIZE), 0)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        draw_thing(draw, thing)
    image.putpalette(scene.palette.flatten().tolist())
    return image


# --------------------------------------------------------------------------------------------------
# one image


def pick(rng: np.random.Generator, items: list):
    return items[rng.integers(len(items))] if items else None


# Questions end with what they ask about and answers begin with it: "What color is the star?" "The
# star is red."  The words that belong together then stand at fixed distances, which a model this
# small learns to use in minutes.


def ask_color(scene, rng):
    thing = pick(rng, scene.unique("noun"))
    if thing is None:
        return None
    return f"What color is the {thing.noun}?", f"The {thing.noun} is {thing.color}."


def ask_shape(scene, rng):
    thing = pick(rng, [thing for thing in scene.unique("color") if not thing.is_digit])
    if thing is None:
        return None
    return f"What shape is {thing.color}?", f"The {thing.color} shape is a {thing.kind}."


def ask_digit(scene, rng):
    if scene.digit is None:
        return None
    return "What is the digit?", f"The digit is {scene.digit.kind}."


def ask_position(scene, rng):
    thing = pick(rng, scene.unique("noun"))
    if thing is None:
        return None
    return f"Where is the {thing.noun}?", f"The {thing.noun} is {CELLS[thing.cell]}."


def ask_content(scene, rng):
    """What is in a cell: usually one that is occupied."""
    if rng.random() < 0.8:
        thing = pick(rng, scene.things)
        return (
            f"What is {CELLS[thing.cell]}?",
            f"The {CELLS[thing.cell]} is a {thing.color} {thing.noun}.",
        )
    cell = int(pick(rng, sorted(set(range(9)) - {thing.cell for thing in scene.things})))
    return f"What is {CELLS[cell]}?", f"The {CELLS[cell]} is empty."


def ask_count(scene, rng):
    return "How many things are there?", f"There are {COUNTS[len(scene.things)]}."


# --------------------------------------------------------------------------------------------------
# two images


def ask_which(pair, rng):
    """Which image shows something that only one of them has?"""
    first, second = ({thing.noun for thing in scene.things} for scene in pair)
    value = pick(rng, sorted(first ^ second))
    if value is None:
        return None
    return (
        f"Which image shows the {value}?",
        f"The {value} is in the {'first' if value in first else 'second'}.",
    )


def ask_in_image(pair, rng):
    """A one-image question that says which of the two images it is about."""
    side = int(rng.integers(2))
    asked = pick(rng, [ask_color, ask_shape, ask_digit, ask_position])(pair[side], rng)
    if asked is None:
        return None
    return f"In the {('first', 'second')[side]} image: {asked[0]}", asked[1]


ONE_IMAGE = {
    "color": ask_color,
    "shape": ask_shape,
    "digit": ask_digit,
    "position": ask_position,
    "content": ask_content,
    "count": ask_count,
}
TWO_IMAGES = {"which": ask_which, "in_image": ask_in_image}
# each answered by one thing in one image
LOOKUPS = ("color", "shape", "digit", "position", "content")
ALL_KINDS = [*ONE_IMAGE, *TWO_IMAGES]


def random_scenes(rng: np.random.Generator, images: int) -> list[Scene]:
    """One scene, or two."""
    return [random_scene(rng) for _ in range(images)]


def single_question(
    rng: np.random.Generator, kind: str
) -> tuple[list[Scene], list[tuple[str, str]]]:
    """Fresh scenes and one question of the given kind about them."""
    images = 1 if kind in ONE_IMAGE else 2
    ask = ONE_IMAGE[kind] if images == 1 else TWO_IMAGES[kind]
    while True:
        scenes = random_scenes(rng, images)
        if asked := ask(scenes[0] if images == 1 else scenes, rng):
            return scenes, [asked]


def conversation(
    rng: np.random.Generator, images: int, rounds: int, kinds: tuple[str, ...] = ()
) -> tuple[list[Scene], list[tuple[str, str]]]:
    """Fresh scenes and `rounds` different questions about them, of all kinds for so many images or
    of `kinds`."""
    functions = ONE_IMAGE if images == 1 else TWO_IMAGES
    kinds = list(kinds or functions)
    scenes, asked = single_question(rng, pick(rng, kinds))
    about = scenes[0] if images == 1 else scenes
    for _ in range(8 * rounds):  # a poor scene (one thing in it) has few questions: give up quietly
        if len(asked) == rounds:
            break
        new = functions[pick(rng, kinds)](about, rng)
        if new and new[0] not in [question for question, _ in asked]:
            asked.append(new)
    return scenes, asked
