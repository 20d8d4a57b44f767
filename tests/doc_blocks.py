"""The fenced blocks of the documentation, and what the comment above each says about running it.

    <!-- run -->
    <!-- run: slow; with demo as ./my-model; quantize --iters 1; replace A by demo-text -->
    <!-- not run: why -->

What a `run:` may say, between semicolons: `slow`; `with KIND as PATH` puts something there (`put`
in test_docs.py knows the kinds); `quantize|plan|eval|verify ARGUMENTS` adds to these commands;
`replace A by B`; `by tests/test_x.py`: that file runs it, not test_docs.py. `<!-- page: .. -->`,
once, says it for all blocks of a page that run.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = ("bash", "python")
OURS = ("auto-round-mllm", "auto_round_mllm")
COMMANDS = ("plan", "eval", "verify", "ask", "push", "report", "formats", "families", "completion")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\s*$")
COMMENT = re.compile(r"^ *<!-- (?P<text>.*?) -->\s*$")
# Commands that stand outside a fence escape the tests.
LOOSE = re.compile(r"^ {4,}(auto[-_]round[-_]mllm|pip|python|make|bash) ", re.MULTILINE)


@dataclass
class Mark:
    """What the comment above a block says, and what its page says. run: None where there is no
    comment."""

    run: bool | None = None
    reason: str = ""
    slow: bool = False
    by: str = ""  # the test file that runs it
    places: dict[str, str] = field(default_factory=dict)  # path -> what to put there
    added: dict[str, list[str]] = field(default_factory=dict)  # command -> arguments
    replaced: dict[str, str] = field(default_factory=dict)

    def read(self, text: str) -> None:
        """Lay these instructions over those of the page. Raises ValueError for what nobody
        knows."""
        for part in filter(None, (part.strip() for part in text.split(";"))):
            head, _, rest = part.partition(" ")
            if part == "slow":
                self.slow = True
            elif head == "by":
                self.by = rest
            elif head in ("with", "replace"):
                one, two = re.fullmatch(r"(.+) (?:as|by) (.*)", rest).groups()
                self.places |= {two: one} if head == "with" else {}
                self.replaced |= {one: two} if head == "replace" else {}
            elif head in ("quantize", *COMMANDS):
                self.added[head] = shlex.split(rest)
            else:
                raise ValueError(f"unknown instruction {part!r}")


@dataclass(frozen=True)
class Block:
    """One fenced block. place: "docs/x.md:12"."""

    place: str
    language: str
    code: str
    mark: Mark

    def text(self) -> str:
        """The code as it is run."""
        code = self.code
        for old, new in self.mark.replaced.items():
            code = code.replace(old, new)
        return code

    def commands(self) -> list[list[str]]:
        """The words of every command of a bash block, with what the mark adds."""
        lines = self.text().replace("\\\n", " ").splitlines()
        return [
            self._with_more(words) for line in lines if (words := shlex.split(line, comments=True))
        ]

    def _with_more(self, words: list[str]) -> list[str]:
        named = words[1] if len(words) > 1 and words[1] in COMMANDS else "quantize"
        return words + self.mark.added.get(named, []) if words[0] in OURS else words


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    lines, found, start, shared = page.read_text(encoding="utf-8").splitlines(), [], None, ""
    for i, line in enumerate(lines):
        if (
            start is None
            and (comment := COMMENT.match(line))
            and comment["text"].startswith("page: ")
        ):
            shared = comment["text"].removeprefix("page: ")
        fence = FENCE.match(line)
        if fence and start is None:
            start = i
        elif start is not None and line.strip() == "```":
            opened = FENCE.match(lines[start])
            code = (
                "\n".join(text.removeprefix(opened["indent"]) for text in lines[start + 1 : i])
                + "\n"
            )
            found.append(
                Block(
                    _place(page, start), opened["language"], code, _mark(lines[start - 1], shared)
                )
            )
            start = None
    return found


def outside(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(
        r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def sentences(page: Path) -> Iterator[str]:
    """The prose of a page, sentence by sentence; code and formulas in it count as one word."""
    text = re.sub(r"<!--.*?-->", "", outside(page), flags=re.DOTALL)
    text = re.sub(r"^(\||#| {4}(?! *([-*]|\d+\.) )).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", "Code", text, flags=re.DOTALL)
    for part in re.split(r"\n\s*\n|^ *(?:[-*]|\d+\.) ", text, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.!?·])[)\"*]*\s+(?=[\w(\"*])", " ".join(part.split()))


def _place(page: Path, line: int) -> str:
    return f"{page.relative_to(ROOT)}:{line + 1}"


def _mark(above: str, shared: str) -> Mark:
    comment = COMMENT.match(above)
    text = comment["text"] if comment else ""
    mark = Mark()
    if text.startswith("not run: "):
        mark.run, mark.reason = False, text.removeprefix("not run: ")
    elif re.match(r"run(:|$)", text):
        mark.run = True
        mark.read(shared)
        mark.read(text.removeprefix("run").removeprefix(":"))
    return mark
