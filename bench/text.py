#!/usr/bin/env python3
"""Two texts of one book for a bench: sections in turn, one to calibrate with and one held out.

    apt-get download debian-handbook && dpkg-deb -x debian-handbook_*.deb book
    bench/text.py book/usr/share/doc/debian-handbook/html/en-US OUT

Reads the pages (.html) in the order of their names; writes OUT/a.txt and OUT/b.txt.
"""

import argparse
import re
from html.parser import HTMLParser
from pathlib import Path

APART = {"script", "style", "head", "title"}  # what no reader reads
LEAST = 400  # characters of a section


class Words(HTMLParser):
    """The text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._inside = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._inside += tag in APART

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag in APART

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.parts.append(data)


def text_of(page: Path) -> str:
    """A page's text; of white space, single spaces and line ends."""
    words = Words()
    words.feed(page.read_text())
    lines = (re.sub(r"\s+", " ", part) for part in "".join(words.parts).split("\n"))
    return re.sub(r"\n\s*\n+", "\n", "\n".join(line.strip() for line in lines)).strip()


def main() -> None:
    """Deal the sections out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", type=Path)
    parser.add_argument("out", type=Path)
    found = parser.parse_args()
    texts = (text_of(page) for page in sorted(found.pages.glob("*.html")))
    sections = [text for text in texts if len(text) >= LEAST]
    found.out.mkdir(parents=True, exist_ok=True)
    for name, first in (("a", 0), ("b", 1)):
        (found.out / f"{name}.txt").write_text("\n\n".join(sections[first::2]))


if __name__ == "__main__":
    main()
