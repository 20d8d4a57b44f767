"""Drawn pictures and the questions about them, for the evidence model.

A picture is a framed board of 84x84 pixels, three cells of 28 on a side. Rows hold a printed word,
a printed number, or coloured shapes in their cells. A cell is one image token (2x2 patches of 14),
and the frame tells a cell which of the nine it is. `features` says what each cell shows, as rows of
a table of `FEATURES`: this is what the tower learns to name, and the table is what the text model
learns to be told.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from demo_scenes import (
    CELLS,
    COLOR_NAMES,
    COLORS,
    COUNTS,
    DIGIT_ROWS,
    SHAPES,
    Scene,
    Thing,
    ask_color,
    ask_position,
    ask_shape,
    draw_thing,
    pick,
)
from PIL import Image, ImageDraw

CELL, SIDE = 28, 3  # pixels; cells on a side
SIZE = CELL * SIDE
FRAME = len(COLORS) + 1  # its index in the palette
# Words of three to six letters that are one token each after a space.
WORDS = """lion tiger bear wolf horse sheep goat cow dog cat bird duck eagle owl fish shark whale frog
snake mouse rabbit fox deer camel apple lemon grape peach pear bread cheese milk honey sugar salt
rice corn soup cake pie egg tea coffee water fire stone sand snow rain wind cloud storm river lake
ocean beach island forest tree leaf flower grass garden farm field road bridge tower castle house
door window table chair lamp clock book paper pen ink box bag cup plate knife fork spoon glass
bottle key lock coin crown sword shield helmet boat ship train truck plane wheel drum piano guitar
flute violin music dance king queen doctor nurse farmer baker pilot judge""".split()
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
    """A printed word (capitals, 14 pixels each) or number (digits, 28 pixels each) in a row."""

    text: str
    color: str
    row: int
    slot: int  # where it starts, in letters or digits
    shift: tuple[int, int]

    @property
    def pitch(self) -> int:
        return CELL if self.text.isdigit() else CELL // 2

    @property
    def columns(self) -> range:
        """Columns of cells that it reaches."""
        last = (self.slot + len(self.text) - 1) * self.pitch
        return range(self.slot * self.pitch // CELL, last // CELL + 1)


@dataclass
class Board(Scene):
    """Things, at most one word and at most one number, each sign in a row of its own."""

    word: Sign | None = None
    number: Sign | None = None
    free: list[int] = field(default_factory=list)  # cells in rows without a sign


def random_sign(rng: np.random.Generator, number: bool, row: int) -> Sign:
    if number:
        text = str(rng.integers(10, 1000))
        jitter, slots = 3, SIDE - len(text) + 1
    else:
        text = str(rng.choice(WORDS))
        jitter, slots = 1, 2 * SIDE - len(text) + 1
    shift = (int(rng.integers(-jitter, jitter + 1)), int(rng.integers(-3, 4)))
    return Sign(text, str(rng.choice(COLOR_NAMES)), row, int(rng.integers(slots)), shift)


def random_board(rng: np.random.Generator) -> Board:
    """Draw a board at random; it shows something."""
    rows = [int(row) for row in rng.permutation(SIDE)]
    word = random_sign(rng, False, rows.pop()) if rng.random() < 0.4 else None
    number = random_sign(rng, True, rows.pop()) if rng.random() < 0.4 else None
    free = sorted(row * SIDE + column for row in rows for column in range(SIDE))
    least = 0 if word or number else 1
    things = []
    for cell in rng.permutation(free)[: rng.integers(least, len(COUNTS))]:
        radius = int(rng.integers(8, 13))
        play = 13 - radius  # how far the centre may move without touching the frame
        x, y = (CELL * (i + 0.5) + rng.uniform(-play, play) for i in (cell % SIDE, cell // SIDE))
        kind, color = str(rng.choice(SHAPES)), str(rng.choice(COLOR_NAMES))
        things.append(Thing(kind, color, int(cell), x, y, radius))
    background, frame = rng.integers(205, 256, 3), rng.integers(60, 160, 3)
    inks = np.array([*COLORS.values()]) + rng.integers(-22, 23, (len(COLORS), 3))
    palette = np.concatenate([background[None], inks, frame[None]]).clip(0, 255).astype(np.uint8)
    return Board(sorted(things, key=lambda thing: thing.cell), palette, word, number, free)


def draw_sign(draw: ImageDraw.ImageDraw, sign: Sign) -> None:
    dot, fill = sign.pitch // 7, COLOR_NAMES.index(sign.color) + 1
    if sign.text.isdigit():
        dot = 3
    y = CELL * (sign.row + 0.5) + sign.shift[1]
    for place, character in enumerate(sign.text):
        x = sign.pitch * (sign.slot + place + 0.5) + sign.shift[0]
        for row, bits in enumerate(BITMAPS[character]):
            for column in range(5):
                if bits >> (4 - column) & 1:
                    left, top = x + (column - 2.5) * dot, y + (row - 3.5) * dot
                    draw.rectangle((left, top, left + dot - 1, top + dot - 1), fill=fill)


def draw_board(board: Board) -> Image.Image:
    """Draw the board as palette indices."""
    image = Image.new("P", (SIZE, SIZE), 0)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIZE - 1, SIZE - 1), outline=FRAME, width=2)
    for thing in board.things:
        draw_thing(draw, thing)
    for sign in filter(None, (board.word, board.number)):
        draw_sign(draw, sign)
    image.putpalette(board.palette.flatten().tolist())
    return image


# --------------------------------------------------------------------------------------------------
# what cells show

# Name of a feature -> the words whose embeddings the text model is first told it with.
FEATURES = {
    **{name: f" {name}" for name in ("shape", "word", "number", "empty")},
    **{f"shape {name}": f" {name}" for name in SHAPES},
    **{f"color {name}": f" {name}" for name in COLOR_NAMES},
    **{f"cell {i}": f" {name}" for i, name in enumerate(CELLS)},
    **{f"count {i}": f" {name}" for i, name in enumerate(COUNTS)},
    **{f"word {name}": f" {name}" for name in WORDS},
    # a digit as seen from the cell of the same number's first, second or third digit
    **{
        f"digit {here} {place} {digit}": f"{digit}" if here == place else ""
        for here in range(SIDE) for place in range(SIDE) for digit in DIGIT_ROWS
    },
}  # fmt: skip
INDEX = {name: i for i, name in enumerate(FEATURES)}


def features(board: Board) -> list[list[int]]:
    """For each of the nine cells, the features that it shows."""
    shown: list[list[str]] = [[] for _ in CELLS]
    for thing in board.things:
        shown[thing.cell] = ["shape", f"shape {thing.kind}", f"color {thing.color}"]
    if sign := board.word:
        for column in sign.columns:
            shown[sign.row * SIDE + column] = ["word", f"word {sign.text}", f"color {sign.color}"]
    if sign := board.number:
        digits = list(enumerate(sign.text))
        for here, _ in digits:
            said = [f"digit {here} {place} {digit}" for place, digit in digits]
            shown[sign.row * SIDE + sign.slot + here] = ["number", f"color {sign.color}", *said]
    common = f"count {len(board.things)}"
    return [
        [INDEX[name] for name in (f"cell {cell}", common, *(names or ["empty"]))]
        for cell, names in enumerate(shown)
    ]


# --------------------------------------------------------------------------------------------------
# questions


def phrase(thing: Thing) -> str:
    return f"a{'n' if thing.color == 'orange' else ''} {thing.color} {thing.kind}"


def ask_content(board: Board, rng):
    """What is in a cell that no sign is near: usually one that is occupied."""
    if not board.free:
        return None
    taken = {thing.cell: thing for thing in board.things}
    empty = [cell for cell in board.free if cell not in taken]
    cells = list(taken) if taken and (not empty or rng.random() < 0.75) else empty
    cell = int(pick(rng, cells))
    name = CELLS[cell]
    seen = phrase(taken[cell]) if cell in taken else "empty"
    return f"What is {name}?", f"The {name} is {seen}."


def ask_count(board, rng):
    count = len(board.things)
    return "How many shapes are there?", f"There {'is' if count == 1 else 'are'} {COUNTS[count]}."


def ask_word(board, rng):
    return board.word and ("What is the word?", f"The word is {board.word.text}.")


def ask_number(board, rng):
    return board.number and ("What is the number?", f"The number is {board.number.text}.")


def ask_ink(board, rng):
    """The colour of a sign."""
    name = pick(rng, [name for name in ("word", "number") if getattr(board, name)])
    return name and (f"What color is the {name}?", f"The {name} is {getattr(board, name).color}.")


def describe(board, rng):
    """All shapes, in reading order."""
    said = " and ".join(f"{phrase(thing)} is {CELLS[thing.cell]}" for thing in board.things)
    return said and ("Describe the shapes.", f"{said.capitalize()}.")


QUESTIONS = {
    "color": ask_color,
    "shape": ask_shape,
    "position": ask_position,
    "content": ask_content,
    "count": ask_count,
    "word": ask_word,
    "number": ask_number,
    "ink": ask_ink,
}
TRAINED = QUESTIONS | {"describe": describe}


def single_question(rng: np.random.Generator, kind: str) -> tuple[Board, tuple[str, str]]:
    """A fresh board and one question of that kind about it."""
    while True:
        board = random_board(rng)
        if asked := QUESTIONS[kind](board, rng):
            return board, asked


def conversation(
    rng: np.random.Generator, rounds: int
) -> tuple[Board, list[tuple[str, str, str]]]:
    """A fresh board and at most `rounds` different questions about it: kind, question, answer."""
    board, asked = random_board(rng), {}
    for kind in rng.permutation([*TRAINED, *TRAINED]):
        if len(asked) < rounds and (new := TRAINED[str(kind)](board, rng)):
            asked.setdefault(new[0], (str(kind), *new))
    return board, list(asked.values())
