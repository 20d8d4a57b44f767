"""The documentation builds without a warning and needs nothing but itself; its figures are those of
the results; a real browser shows every page, narrow and wide."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browsing import browse, needs_browser

from auto_mmround.flags import COMMANDS
from auto_mmround.recipe.recipe import KEYS

ROOT = Path(__file__).parents[1]
# What a browser fetches by itself, as opposed to what a reader may click.
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(https?:[^"]+)"|<link\b[^>]*\bhref="(https?:[^"]+)"'
)

# Opens page after page in a frame and tells what is wider than it, tables in boxes that scroll
# apart, and every address that pages point to.
WALK = """<!doctype html><meta charset="utf-8"><body><script>
const pages = PAGES, width = WIDTH, found = {}
const frame = document.body.appendChild(document.createElement('iframe'))
frame.style = `width:${width}px;height:2000px;border:0`
const scrolls = e => e && (/auto|scroll/.test(frame.contentWindow.getComputedStyle(e).overflowX)
    || scrolls(e.parentElement))
async function walk() {
    for (const page of pages) {
        await new Promise(done => { frame.onload = done; frame.src = page })
        const d = frame.contentDocument
        await d.fonts.ready
        found[page] = {
            wide: d.documentElement.scrollWidth,
            tables: [...d.querySelectorAll('table')].filter(t =>
                t.getBoundingClientRect().right > width + 1 && !scrolls(t)).length,
            links: [...d.querySelectorAll('a[href], img[src], link[rel=stylesheet], script[src]')]
                .map(e => e.href || e.src),
            ids: [...d.querySelectorAll('[id]')].map(e => e.id),
        }
    }
    const told = document.createElement('pre')
    told.id = 'found'
    told.textContent = JSON.stringify(found)
    document.body.replaceChildren(told)
}
walk()
</script>"""


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_drawn_from_the_results():
    figures = load("docs_figures")
    for name, draw in figures.DRAWN.items():
        assert (figures.FIGURES / name).read_text() == draw(), (
            f"{name}: run scripts/docs_figures.py"
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason='pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_pages_fetch_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not FETCHED.search(page.read_text()), (
            f"{page.relative_to(site)}: {FETCHED.search(page.read_text())[0]}"
        )
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?https?:", sheet.read_text()), sheet


def test_equations_are_mathml_and_pages_from_outside_are_there(site):
    tuner = (site / "tuner.html").read_text()
    assert tuner.count("<math") > 30 and "arithmatex" not in tuner and "\\tilde" not in tuner
    assert "figures/time.svg" in tuner
    assert (site / "bench" / "results" / "index.html").is_file() and (
        site / "contributing.html"
    ).is_file()
    assert "The digit is purple." in (site / "notebook.html").read_text()


def test_the_reference_has_every_flag(site):
    page = (site / "reference" / "flags.html").read_text()
    for name, key in KEYS.items():
        assert not key.text or f"<code>--{name}</code>" in page, name
    assert all(f"Command {name}" in page for name in COMMANDS)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def walked(site: Path, width: int, place: Path):
    """Page -> what `WALK` saw of it, and what the browser complained of."""
    pages = sorted(str(p.relative_to(site)) for p in site.rglob("*.html") if p.name != "404.html")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        (site / "walk.html").write_text(
            WALK.replace("PAGES", json.dumps(pages)).replace("WIDTH", str(width))
        )
        base = f"http://127.0.0.1:{server.server_port}/"
        options = ("--dump-dom", "--virtual-time-budget=200000", "--window-size=1600,2200")
        shown, complaints = browse(f"{base}walk.html", place, *options)
    finally:
        (site / "walk.html").unlink()
        server.shutdown()
        server.server_close()
    told = re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)
    assert told, shown[:500]
    return base, json.loads(unescape(told[1])), complaints


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_every_page(site, width, tmp_path):
    base, found, complaints = walked(site, width, tmp_path)
    assert len(found) > 30 and not complaints
    assert not [page for page, seen in found.items() if seen["wide"] > width]
    assert not [page for page, seen in found.items() if seen["tables"]]
    broken = set()
    for page, seen in found.items():
        for link in seen["links"]:
            if not link.startswith(base):
                continue  # of other sites
            path, part = unquote(urlsplit(link).path)[1:] or "index.html", urlsplit(link).fragment
            if not (site / path).is_file() or (part and part not in found.get(path, seen)["ids"]):
                broken.add((page, link.removeprefix(base)))
    assert not broken
