"""Folders of sounds with their transcripts, as people and public sets lay them out, to rows of
`audio` and `text`.

a.wav + a.txt                              a transcript beside each sound
84-121123.trans.txt, transcripts.txt, ..   lists of `name text`, `name<TAB>text` or `name|text`
metadata.csv, validated.tsv                tables with a column of files and a column of texts
"""

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.untrusted import DATASET_BYTES, read_text

log = logging.getLogger("auto_mmround")

SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
LISTS = (".txt", ".tsv", ".csv")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
FILE_COLUMNS = ("file_name", "path", "file", "filename", "audio", "wav")
TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text")


def _table(text: str, delimiter: str) -> Iterator[tuple[str, str]] | None:
    """(file, text) of a table whose first line names its columns; None for one that doesn't."""
    rows = csv.reader(io.StringIO(text), delimiter=delimiter)
    header = [name.strip().lower() for name in next(rows, [])]
    file = next((header.index(name) for name in FILE_COLUMNS if name in header), None)
    said = next((header.index(name) for name in TEXT_COLUMNS if name in header), None)
    if file is None or said is None:
        return None
    return ((row[file], row[said]) for row in rows if len(row) > max(file, said))


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """(name, text) of lines such as `84-121123-0000 GO DO YOU HEAR`, with a tab or bars instead of
    the blank."""
    for line in text.splitlines():
        mark = next((mark for mark in ("\t", "|") if mark in line), None)
        name, _, said = line.strip().partition(mark or " ")
        yield name.strip(), said.rpartition("|")[2].strip() if mark == "|" else said.strip()


def _names(sound: Path, folder: Path) -> Iterator[str]:
    """How a list in `folder` may call a sound, the most exact name first."""
    relative = sound.relative_to(folder)
    yield from (relative.as_posix(), relative.with_suffix("").as_posix(), sound.name, sound.stem)


def transcribed(folder: Path, files: Sequence[Path]) -> list[dict[str, Any]] | None:
    """Rows {id, audio, text} of all sounds among the files of a folder that have a transcript; None
    without a sound.

    audio: path below the folder. Raises UserError when no sound has a transcript.
    """
    files = [path for path in files if path.suffix.lower() in (*SOUNDS, *LISTS)]
    sounds = [path for path in files if path.suffix.lower() in SOUNDS]
    if not sounds:
        return None
    beside = {sound.with_suffix(".txt"): sound for sound in sounds}
    below: dict[Path, list[Path]] = {}
    for sound in sounds:
        for parent in sound.parents[: len(sound.relative_to(folder).parts)]:
            below.setdefault(parent, []).append(sound)
    texts: dict[Path, str] = {}
    for path in files:
        if path in beside:
            texts[beside[path]] = " ".join(_said(path).split())
        elif path.suffix.lower() in LISTS:
            texts |= _listed(path, below.get(path.parent, []))
    told = [sound for sound in sounds if texts.get(sound)]
    if not told:
        raise UserError(
            f"dataset folder {folder} holds {len(sounds)} sounds but no transcripts: put a.txt"
            " beside a.wav, or a transcripts.txt with a line `a.wav text` for each"
        )
    if len(told) < len(sounds):
        log.warning("dataset folder %s: %d of %d sounds have no transcript and are left out",
                    folder, len(sounds) - len(told), len(sounds))  # fmt: skip
    return [
        {"id": sound.stem, "audio": sound.relative_to(folder).as_posix(), "text": texts[sound]}
        for sound in told
    ]


def _listed(path: Path, sounds: list[Path]) -> dict[Path, str]:
    """Sound -> text of one list; `sounds` are those below its folder. A file that is no list gives
    nothing."""
    index: dict[str, Path] = {}
    for sound in sounds:
        for name in _names(sound, path.parent):
            index.setdefault(name, sound)
    text = _said(path)
    try:
        pairs = _table(text, DELIMITERS[path.suffix]) if path.suffix in DELIMITERS else None
        return {index[name]: said for name, said in pairs or _lines(text) if name in index and said}
    except csv.Error as error:
        raise UserError(f"dataset: table {path} can't be read: {error}") from None


def _said(path: Path) -> str:
    return read_text(path, f"dataset: transcript {path}", DATASET_BYTES).removeprefix("\ufeff")
