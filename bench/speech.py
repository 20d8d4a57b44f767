#!/usr/bin/env python3
"""Speech by flite and espeak-ng with the words that are said, as sets that calibration and `eval`
read.

    bench/speech.py FOLDER --voices flite-slt flite-rms espeak-ng
                    [--text SENTENCES.txt] [--per_clip 3]
    bench/speech.py FOLDER --voices flite-slt --passages 64

One file a voice, FOLDER/flite-slt.jsonl, with rows {"id", "audio", "text"} and the sound beside it.
--text: one sentence a line. --passages: so many passages of the bundled public-domain corpus
instead. Both programs are in Debian: apt-get install flite espeak-ng.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE.parent / "auto_mmround" / "demo" / "calibration" / "text.jsonl"
PASSAGE = 64  # words, about 20 seconds
COMMANDS = {
    "flite": lambda voice, text, path: ["flite", "-voice", voice, "-t", text, "-o", path],
    "espeak": lambda voice, text, path: [
        "espeak-ng",
        "-v",
        "en" if voice == "ng" else voice,
        "-w",
        path,
        text,
    ],
}


def sentences(path: Path = HERE / "sentences.txt", per_clip: int = 3) -> list[str]:
    """The lines of a text file, so many together."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [" ".join(lines[at : at + per_clip]) for at in range(0, len(lines), per_clip)]


def passages(count: int) -> list[str]:
    """The openings of as many passages of the bundled corpus (King James Bible), cut to what is
    said in one window.

    Passages that follow one another in the corpus come from all over it, and long ones give
    several.
    """
    rows = [
        json.loads(line)["text"].split() for line in CORPUS.read_text(encoding="utf-8").splitlines()
    ]
    found = [
        " ".join(words[at : at + PASSAGE])
        for at in range(0, 5 * PASSAGE, PASSAGE)
        for words in rows
        if len(words) > at
    ]
    if len(found) < count:
        sys.exit(f"the bundled corpus has {len(found)} passages, {count} were asked for")
    return found[:count]


def speak(folder: Path, voice: str, texts: Sequence[str]) -> Path:
    """The set of one voice; it is made once. Exits with a line that says what to install, if a
    program is missing."""
    table = folder / f"{voice}.jsonl"
    if table.is_file() and [
        json.loads(line)["text"] for line in table.read_text().splitlines()
    ] == list(texts):
        return table
    program, _, name = voice.partition("-")
    if program not in COMMANDS:
        sys.exit(
            f"voice {voice}: flite-NAME (flite -lv) or espeak-ng, espeak-NAME (espeak-ng"
            " --voices=en)"
        )
    sounds = folder / voice
    sounds.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, text in enumerate(texts):
        path = sounds / f"{i:03}.wav"
        command = COMMANDS[program](name, text, str(path))
        if shutil.which(command[0]) is None:
            sys.exit(f"{command[0]} is not installed: apt-get install flite espeak-ng")
        subprocess.run(command, check=True)
        rows.append({"id": f"{voice}-{i:03}", "audio": f"{voice}/{path.name}", "text": text})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table


def main() -> None:
    """The sets of all voices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--voices", nargs="+", default=["flite-slt", "flite-rms", "espeak-ng"])
    parser.add_argument("--text", type=Path, default=HERE / "sentences.txt")
    parser.add_argument("--per_clip", type=int, default=3)
    parser.add_argument("--passages", type=int)
    found = parser.parse_args()
    texts = passages(found.passages) if found.passages else sentences(found.text, found.per_clip)
    for voice in found.voices:
        print(speak(found.folder, voice, texts))


if __name__ == "__main__":
    main()
