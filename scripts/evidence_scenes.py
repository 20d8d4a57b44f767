"""Drawn pictures and the questions about them, for the evidence model.

A picture is a strip of three framed panels, 336x28 pixels: on the left, in the middle, on the
right. A panel holds a coloured shape, a printed word, a printed number, or nothing, and is four
image tokens wide (a token is 2x2 patches of 14). `features` says what each token is to tell, as
rows of a table of `FEATURES`, each first said with the embedding of a word: so the text model is
told " left red star;". This is what the tower learns to name, and the table is what the text model
learns to be told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from demo_scenes import (
    COLOR_NAMES,
    COLORS,
    COUNTS,
    DIGIT_ROWS,
    SHAPES,
    Scene,
    Thing,
    ask_color,
    ask_shape,
    draw_thing,
    pick,
)
from PIL import Image, ImageDraw

TOKEN = 28  # pixels
WIDE = 4  # tokens of a panel
PLACES = ("left", "middle", "right")
TOKENS = WIDE * len(PLACES)
FRAME = len(COLORS) + 1  # its index in the palette
# Words of three to six letters that are one token each after a space.
WORDS = [
    "lion", "tiger", "bear", "wolf", "horse", "sheep", "goat", "cow", "dog", "cat", "bird", "duck",
    "eagle", "owl", "fish", "shark", "whale", "frog", "snake", "mouse", "rabbit", "fox", "deer",
    "camel", "apple", "lemon", "grape", "peach", "pear", "bread", "cheese", "milk", "honey",
    "sugar", "salt", "rice", "corn", "soup", "cake", "pie", "egg", "tea", "coffee", "water", "fire",
    "stone", "sand", "snow", "rain", "wind", "cloud", "storm", "river", "lake", "ocean", "beach",
    "island", "forest", "tree", "leaf", "flower", "grass", "garden", "farm", "field", "road",
    "bridge", "tower", "castle", "house", "door", "window", "table", "chair", "lamp", "clock",
    "book", "paper", "pen", "ink", "box", "bag", "cup", "plate", "knife", "fork", "spoon", "glass",
    "bottle", "key", "lock", "coin", "crown", "sword", "shield", "helmet", "boat", "ship", "train",
    "truck", "plane", "wheel", "drum", "piano", "guitar", "flute", "violin", "music", "dance",
    "king", "queen", "doctor", "nurse", "farmer", "baker", "pilot", "judge"
]  # fmt: skip
LETTER_ROWS = {  # 5x7 bitmaps, as `DIGIT_ROWS`
    "a": (14, 17, 17, 31, 17, 17, 17), "b": (30, 17, 17, 30, 17, 17, 30),
    "c": (14, 17, 16, 16, 16, 17, 14), "d": (30, 17, 17, 17, 17, 17, 30),
    "e": (31, 16, 16, 30, 16, 16, 31), "f": (31, 16, 16, 30, 16, 16, 16),
    "g": (14, 17, 16, 23, 17, 17, 15), "h": (17, 17, 17, 31, 17, 17, 17),
    "i": (14, 4, 4, 4, 4, 4, 14), "j": (7, 2, 2, 2, 2, 18, 12),
    "k": (17, 18, 20, 24, 20, 18, 17), "l": (16, 16, 16, 16, 16, 16, 31),
    "m": (17, 27, 21, 21, 17, 17, 17), "n": (17, 17, 25, 21, 19, 17, 17),
    "o": (14, 17, 17, 17, 17, 17, 14), "p": (30, 17, 17, 30, 16, 16, 16),
    "q": (14, 17, 17, 17, 21, 18, 13), "r": (30, 17, 17, 30, 20, 18, 17),
    "s": (15, 16, 16, 14, 1, 1, 30), "t": (31, 4, 4, 4, 4, 4, 4),
    "u": (17, 17, 17, 17, 17, 17, 14), "v": (17, 17, 17, 17, 17, 10, 4),
    "w": (17, 17, 17, 21, 21, 21, 10), "x": (17, 17, 10, 4, 10, 17, 17),
    "y": (17, 17, 17, 10, 4, 4, 4), "z": (31, 1, 2, 4, 8, 16, 31),
}  # fmt: skip
BITMAPS = DIGIT_ROWS | LETTER_ROWS


@dataclass(frozen=True)
class Sign:
    """A printed word (capitals, 14 pixels each) or number (digits, 28 pixels each) in a panel."""

    text: str
    color: str
    panel: int
    start: int  # of its first character, in pixels from the panel's left
    shift: tuple[int, int]

    @property
    def pitch(self) -> int:
        return TOKEN if self.text.isdigit() else TOKEN // 2


@dataclass
class Strip(Scene):
    """Things, at most one word and at most one number; a thing's cell is its panel."""

    word: Sign | None = None
    number: Sign | None = None


def random_sign(rng: np.random.Generator, number: bool, panel: int) -> Sign:
    if number:
        text, start = str(rng.integers(10, 1000)), TOKEN
    else:
        text = str(rng.choice(WORDS))
        start = int(rng.integers(1, 8 - len(text))) * TOKEN // 2
    shift = (int(rng.integers(-1, 2)), int(rng.integers(-2, 3)))
    return Sign(text, str(rng.choice(COLOR_NAMES)), panel, start, shift)


def random_strip(rng: np.random.Generator) -> Strip:
    """Draw a strip at random; it shows something."""
    panels = [int(panel) for panel in rng.permutation(len(PLACES))]
    word = random_sign(rng, False, panels.pop()) if rng.random() < 0.4 else None
    number = random_sign(rng, True, panels.pop()) if rng.random() < 0.4 else None
    things = []
    for panel in panels[: rng.integers(0 if word or number else 1, len(panels) + 1)]:
        radius = int(rng.integers(8, 11))
        x = TOKEN * WIDE * (panel + 0.5) + rng.uniform(-10, 10)
        y = TOKEN / 2 + rng.uniform(radius - 11, 11 - radius)
        kind, color = str(rng.choice(SHAPES)), str(rng.choice(COLOR_NAMES))
        things.append(Thing(kind, color, panel, x, y, radius))
    background, frame = rng.integers(205, 256, 3), rng.integers(60, 160, 3)
    inks = np.array([*COLORS.values()]) + rng.integers(-22, 23, (len(COLORS), 3))
    palette = np.concatenate([background[None], inks, frame[None]]).clip(0, 255).astype(np.uint8)
    return Strip(sorted(things, key=lambda thing: thing.cell), palette, word, number)


def draw_sign(draw: ImageDraw.ImageDraw, sign: Sign) -> None:
    dot, fill = 3 if sign.text.isdigit() else 2, COLOR_NAMES.index(sign.color) + 1
    y = TOKEN / 2 + sign.shift[1]
    for place, character in enumerate(sign.text):
        left = TOKEN * WIDE * sign.panel + sign.start
        x = left + sign.pitch * (place + 0.5) + sign.shift[0]
        for row, bits in enumerate(BITMAPS[character]):
            for column in range(5):
                if bits >> (4 - column) & 1:
                    corner = (x + (column - 2.5) * dot, y + (row - 3.5) * dot)
                    other = tuple(value + dot - 1 for value in corner)
                    draw.rectangle((*corner, *other), fill=fill)


def draw_strip(strip: Strip) -> Image.Image:
    """Draw the strip as palette indices. The frame of a panel is as wide as the panel's number."""
    image = Image.new("P", (TOKEN * TOKENS, TOKEN), 0)
    draw = ImageDraw.Draw(image)
    for panel in range(len(PLACES)):
        left, right = TOKEN * WIDE * panel, TOKEN * WIDE * (panel + 1) - 1
        draw.rectangle((left, 0, right, TOKEN - 1), outline=FRAME, width=panel + 1)
    for thing in strip.things:
        draw_thing(draw, thing)
    for sign in filter(None, (strip.word, strip.number)):
        draw_sign(draw, sign)
    image.putpalette(strip.palette.flatten().tolist())
    return image


# --------------------------------------------------------------------------------------------------
# what tokens tell

# Name of a feature -> the word whose embedding the text model is first told it with.
FEATURES = {
    **{f"place {name}": f" {name}" for name in PLACES},
    **{f"color {name}": f" {name}" for name in COLOR_NAMES},
    **{f"shape {name}": f" {name}" for name in SHAPES},
    **{f"word {name}": f" {name}" for name in WORDS},
    **{f"digit {name}": name for name in DIGIT_ROWS},
    **{f"kind {name}": f" {name}" for name in ("word", "number", "empty")},
    "end": ";",
    **{f"count {name}": f" {name}" for name in COUNTS},
    # What else a token knows: nothing is said with it at first.
    **{f"in {name}": "" for name in PLACES},
    **{f"role {kind} {i}": "" for kind in ("shape", "word", "number", "empty") for i in range(4)},
}
INDEX = {name: i for i, name in enumerate(FEATURES)}


def told(strip: Strip) -> list[tuple[str, list[str]]]:
    """Each panel's kind, and what its four tokens say."""
    said: list[tuple[str, list[str]]] = [
        ("empty", [f"place {place}", "kind empty", "end", "end"]) for place in PLACES
    ]
    for thing in strip.things:
        names = [f"place {PLACES[thing.cell]}", f"color {thing.color}", f"shape {thing.kind}"]
        said[thing.cell] = ("shape", [*names, "end"])
    if word := strip.word:
        names = [f"place {PLACES[word.panel]}", "kind word", f"word {word.text}", "end"]
        said[word.panel] = ("word", names)
    if number := strip.number:
        digits = [f"digit {digit}" for digit in number.text]
        said[number.panel] = ("number", ["kind number", *digits, "end"][:WIDE])
    return said


def features(strip: Strip) -> list[list[int]]:
    """For each of the twelve tokens, the features that it tells; ends of panels know the count."""
    count = f"count {COUNTS[len(strip.things)]}"
    return [
        [INDEX[x] for x in (said, f"in {place}", f"role {kind} {i}", count)[: 3 + (said == "end")]]
        for place, (kind, names) in zip(PLACES, told(strip))
        for i, said in enumerate(names)
    ]


CHARACTERS = " abcdefghijklmnopqrstuvwxyz0123456789"


def characters(strip: Strip) -> np.ndarray:
    """What is printed in the left and right half of each token, (12, 2), as places in `CHARACTERS`;
    a digit counts as in the left half."""
    seen = np.zeros(2 * TOKENS, np.int64)
    for sign in filter(None, (strip.word, strip.number)):
        first = (TOKEN * WIDE * sign.panel + sign.start) * 2 // TOKEN
        for place, character in enumerate(sign.text):
            seen[first + place * sign.pitch * 2 // TOKEN] = CHARACTERS.index(character)
    return seen.reshape(TOKENS, 2)


# --------------------------------------------------------------------------------------------------
# questions


def phrase(thing: Thing) -> str:
    return f"a{'n' if thing.color == 'orange' else ''} {thing.color} {thing.kind}"


def at(panel: int) -> str:
    return f"{'in' if PLACES[panel] == 'middle' else 'on'} the {PLACES[panel]}"


def ask_position(strip: Strip, rng):
    thing = pick(rng, strip.unique("noun"))
    return thing and (f"Where is the {thing.noun}?", f"The {thing.noun} is {at(thing.cell)}.")


def ask_content(strip: Strip, rng):
    """What is in a panel without a sign: mostly one with a shape."""
    signs = [sign.panel for sign in (strip.word, strip.number) if sign]
    taken = {thing.cell: thing for thing in strip.things}
    empty = [panel for panel in range(len(PLACES)) if panel not in (*taken, *signs)]
    panels = list(taken) if taken and (not empty or rng.random() < 0.75) else empty
    panel = pick(rng, panels)
    if panel is None:
        return None
    seen = phrase(taken[panel]) if panel in taken else "empty"
    return f"What is {at(panel)}?", f"The {PLACES[panel]} is {seen}."


def ask_count(strip, rng):
    count = len(strip.things)
    said = "is one shape" if count == 1 else f"are {COUNTS[count]} shapes"
    return "How many shapes are there?", f"There {said}."


def ask_word(strip, rng):
    return strip.word and ("What is the word?", f"The word is {strip.word.text}.")


def ask_number(strip, rng):
    return strip.number and ("What is the number?", f"The number is {strip.number.text}.")


QUESTIONS = {
    "color": ask_color,
    "shape": ask_shape,
    "position": ask_position,
    "content": ask_content,
    "count": ask_count,
    "word": ask_word,
    "number": ask_number,
}


def single_question(rng: np.random.Generator, kind: str) -> tuple[Strip, tuple[str, str]]:
    """A fresh strip and one question of that kind about it."""
    while True:
        strip = random_strip(rng)
        if asked := QUESTIONS[kind](strip, rng):
            return strip, asked


def conversation(
    rng: np.random.Generator, rounds: int, kinds: Iterable[str] = QUESTIONS
) -> tuple[Strip, list[tuple[str, str, str]]]:
    """A fresh strip and at most `rounds` different questions about it: kind, question, answer."""
    strip, asked = random_strip(rng), {}
    for kind in rng.permutation([*kinds, *kinds]):
        if len(asked) < rounds and (new := QUESTIONS[str(kind)](strip, rng)):
            asked.setdefault(new[0], (str(kind), *new))
    return strip, list(asked.values())
