"""What the site adds to docs/: the README as its first page, the notebook, the measured results,
equations as MathML.

MathML is made while building, so pages show equations without a script. In the repository, where
the same files are read as they are, links go between folders; here they are turned into links
between pages.
"""

import argparse
import html
import json
import os
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from auto_mmround.flags import COMMANDS, recipe_flags

ROOT = Path(__file__).parents[1]
RESULTS = "bench/results/index.md"
# Files outside docs/ that become pages, by their place in the site.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "bench/LOG.md": "bench/LOG.md",
} | {
    f"bench/results/{path.name}": f"bench/results/{path.name}"
    for path in (ROOT / "bench" / "results").glob("*.md")
}
# page -> notebook
NOTEBOOKS = {"notebook.md": "docs/quickstart.ipynb", "notebook-speech.md": "docs/speech.ipynb"}
REFERENCE = "reference/flags.md"
PLACES = {source: page for page, source in OUTSIDE.items()} | {
    "bench/results": RESULTS,
    **{source: page for page, source in NOTEBOOKS.items()},
}
FENCES = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\(|\bsrc(?:set)?=\")(?!\w+:|#)([^)\s#\"]+)")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def relink(text: str, page: str) -> str:
    """Links of a file of the repository as links of its page; code stays as it is.

    A file that is no page is named, not linked. Links to nothing stay, for the strict build to
    find.
    """
    folder = posixpath.dirname(OUTSIDE.get(page, f"docs/{page}"))

    def turn(match: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(folder, match[2]))
        place = PLACES.get(source) or (
            source.removeprefix("docs/") if source.startswith("docs/") else None
        )
        return (
            match[0]
            if place is None
            else match[1] + posixpath.relpath(place, posixpath.dirname(page) or ".")
        )

    parts = FENCES.split(text)
    return "".join(part if i % 2 else LINK.sub(turn, part) for i, part in enumerate(parts))


def listing() -> str:
    """A page that names all results, newest first."""
    pages = sorted((page for page in OUTSIDE if page.startswith("bench/results/")), reverse=True)
    titles = {page: (ROOT / page).read_text().splitlines()[0].lstrip("# ") for page in pages}
    lines = [f"- [{title}]({posixpath.basename(page)})" for page, title in titles.items()]
    return "\n".join(
        ["# Measured", "", *lines, "- [Log of experiments, the failed ones too](../LOG.md)", ""]
    )


def notebook(source: str) -> str:
    """A notebook as a page: its text, code, and what it printed and drew."""
    parts = []
    for cell in json.loads((ROOT / source).read_text())["cells"]:
        words = "".join(cell["source"])
        parts.append(words if cell["cell_type"] == "markdown" else f"```python\n{words}\n```")
        for output in cell.get("outputs", ()):
            picture = output.get("data", {}).get("image/png")
            printed = "".join(output.get("text", ()))
            parts.append(
                f"![](data:image/png;base64,{picture.strip()})"
                if picture
                else f"```text\n{printed}```"
            )
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """Every flag, from the tables that the command line is made of."""
    lines = ["# Flags", "", "`auto-round-mllm --help_all` prints the same.", ""]
    flags = [row for row in recipe_flags() if row[2]["help"] is not argparse.SUPPRESS]
    for section in dict.fromkeys(row[0] for row in flags):
        lines += [f"## {section.capitalize()}", "", "| flag | |", "|---|---|"]
        rows = [(f"--{name}", options) for title, name, options in flags if title == section]
        lines += [_row(flag, options) for flag, options in rows] + [""]
    for name, command in COMMANDS.items():
        lines += [f"## Command {name}", "", command.text, ""]
        if command.flags:
            lines += ["| flag | |", "|---|---|"]
            lines += [_row(flag, options) for flag, options in command.flags.items()] + [""]
    return "\n".join(lines)


def _row(flag: str, options: Mapping[str, Any]) -> str:
    text = html.escape(options["help"].replace("%%", "%"), quote=False).replace("|", "\\|")
    return f"| `{flag}` | {text} |"


def on_config(config: dict) -> dict:
    """Pages that nobody has put into the navigation yet stand at its end."""
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    if rest := sorted(pages - named):
        config["nav"].append({"More": rest})
    return config


def on_files(files: Files, config: dict) -> Files:
    """Pages from outside docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=os.fspath(ROOT / source)))
    files.append(File.generated(config, RESULTS, content=listing()))
    for page, source in NOTEBOOKS.items():
        files.append(File.generated(config, page, content=notebook(source)))
    files.append(File.generated(config, REFERENCE, content=reference()))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links between pages."""
    return (
        markdown
        if page.file.src_uri in (RESULTS, REFERENCE)
        else relink(markdown, page.file.src_uri)
    )


def on_page_content(content: str, **_) -> str:
    """Equations; those of a line of their own scroll where they are wider than a phone."""

    def drawn(match: re.Match[str]) -> str:
        block = match[1] == "div"
        math = convert(html.unescape(match[2]), display="block" if block else "inline")
        return f'<div style="overflow-x: auto">{math}</div>' if block else math

    return MATH.sub(drawn, content)
