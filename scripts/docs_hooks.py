"""What the site adds to docs/: the README as its first page, the measured results, and equations as MathML.

MathML is made while building, so pages show equations without a script. In the repository, where the same files are
read as they are, links go between folders; here they are turned into links between pages.
"""

import html
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = "bench/results/index.md"
# Files outside docs/ that become pages, by their place in the site.
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "bench/LOG.md": "bench/LOG.md"} | {
    f"bench/results/{path.name}": f"bench/results/{path.name}" for path in (ROOT / "bench" / "results").glob("*.md")
}
PLACES = {source: page for page, source in OUTSIDE.items()} | {"bench/results": RESULTS}
FENCES = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def relink(text: str, page: str) -> str:
    """Links of a file of the repository as links of its page; code stays as it is.

    A file that is no page is named, not linked. Links to nothing stay, for the strict build to find.
    """
    folder = posixpath.dirname(OUTSIDE.get(page, f"docs/{page}"))

    def turn(match: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(folder, match[1]))
        place = PLACES.get(source) or (source.removeprefix("docs/") if source.startswith("docs/") else None)
        return match[0] if place is None else "](" + posixpath.relpath(place, posixpath.dirname(page) or ".")

    parts = FENCES.split(text)
    return "".join(part if i % 2 else LINK.sub(turn, part) for i, part in enumerate(parts))


def listing() -> str:
    """A page that names all results, newest first."""
    pages = sorted((page for page in OUTSIDE if page.startswith("bench/results/")), reverse=True)
    titles = {page: (ROOT / page).read_text().splitlines()[0].lstrip("# ") for page in pages}
    lines = [f"- [{title}]({posixpath.basename(page)})" for page, title in titles.items()]
    return "\n".join(["# Measured", "", *lines, "- [Log of experiments, the failed ones too](../LOG.md)", ""])


def on_files(files: Files, config: dict) -> Files:
    """Pages from outside docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=os.fspath(ROOT / source)))
    files.append(File.generated(config, RESULTS, content=listing()))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links between pages."""
    return markdown if page.file.src_uri == RESULTS else relink(markdown, page.file.src_uri)


def on_page_content(content: str, **_) -> str:
    """Equations."""
    return MATH.sub(
        lambda match: convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline"), content
    )
