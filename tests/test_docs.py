"""Every block of code in README.md and docs/ runs as written, or says why not; see doc_blocks.py
for how it is said.

A page is a session: its blocks run in order, in one folder, in one Python. Commands that cannot run
here (models of many gigabytes) are at least understood by our own argument parser.
"""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from doc_blocks import CODE, LOOSE, OURS, PAGES, ROOT, Block, Mark, blocks, outside, sentences
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from auto_mmround import asking, cli, console, export, publish
from auto_mmround.calibration.template import parse_template
from auto_mmround.checkpoint.loader import load_any
from auto_mmround.export import formats
from auto_mmround.families import FAMILIES
from auto_mmround.model.loading import DEMO
from auto_mmround.verify.engines import python_of

CODES = {page: [block for block in blocks(page) if block.language in CODE] for page in PAGES}
BLOCKS = [block for found in CODES.values() for block in found]
# what reads the media of tiny models, for its file; the pages calibrate these with text or not at
# all
MEDIA = {
    "llava": "CLIPImageProcessor", "mllama": "MllamaImageProcessor",
    "whisper": "WhisperFeatureExtractor",
    "qwen2_audio": "WhisperFeatureExtractor",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("fast_disk")


def runs_here(block: Block, slow: bool) -> bool:
    return bool(block.mark.run) and not block.mark.by and (slow or not block.mark.slow)


SESSIONS = [
    pytest.param(
        page, slow, id=f"{page.relative_to(ROOT)}{'-slow' * slow}", marks=[pytest.mark.slow] * slow
    )
    for slow in (False, True)
    for page, found in CODES.items()
    if any(runs_here(block, slow) and block.mark.slow == slow for block in found)
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_every_block_says_whether_it_runs(block):
    assert block.mark.run is not None, (
        f"{block.place}: write `<!-- run -->` or `<!-- not run: why -->` above it"
    )
    assert block.mark.run or len(block.mark.reason) > 10
    if block.mark.by:
        page = block.place.partition(":")[0]
        assert page in (ROOT / block.mark.by).read_text(), f"{block.mark.by} does not know {page}"


def test_no_command_hides_outside_a_block():
    for page in PAGES:
        loose = LOOSE.search(outside(page))
        assert loose is None, f"{page.name}: {loose[0].strip()} .. stands outside a fenced block"
        for block in blocks(page):
            named = block.language or not any(f"{name} " in block.code for name in OURS)
            assert named, f"{block.place}: write ```bash"
        languages = {block.language for block in blocks(page)}
        assert not languages & {"sh", "shell", "console", "py"}, (
            f"{page.name}: {languages}: write bash or python"
        )


def put(kind: str, path: Path) -> None:
    """What a mark's `with KIND as PATH` asks for."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "demo":
        shutil.copytree(DEMO, path)
    elif kind == "quantized":
        assert cli.main(["--model", "demo", "--iters", "0", "--output_dir", f"{path}.parent"]) == 0
        (Path(f"{path}.parent") / "demo-w4g128-auto_round").rename(path)
    elif kind == "words":
        path.write_text(
            "".join(json.dumps({"text": f"w{i} w{2 * i} " * 40}) + "\n" for i in range(16))
        )
    elif kind == "image":
        shutil.copy(DEMO.parent / "heldout" / "images" / "0000.png", path)
    elif (ROOT / kind).is_file():
        shutil.copy(ROOT / kind, path)
    elif kind.startswith("tiny "):
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        special = dict(bos_token="w1", eos_token="w2", pad_token="w0")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
        name = kind.removeprefix("tiny ")
        tiny_models.FAMILIES[name].save(path, tokenizer)
        if name in MEDIA:
            getattr(transformers, MEDIA[name])().save_pretrained(path)
    else:
        raise ValueError(kind)


def command(words: list[str], place: str) -> int:
    assert words[0] in OURS, f"{place}: {words[0]} cannot run here"
    return cli.main(words[1:])


@pytest.mark.parametrize(("page", "slow"), SESSIONS)
def test_page(page, slow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    names: dict[str, object] = {"__name__": "__main__"}
    for block in CODES[page]:
        if not runs_here(block, slow):
            continue
        for path, kind in block.mark.places.items():
            put(kind, tmp_path / path)
        if block.language == "python":
            exec(compile(block.text(), block.place, "exec"), names)
        else:
            for words in block.commands():
                assert command(words, block.place) == 0, f"{block.place}: {' '.join(words)}"


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if not b.mark.run], ids=lambda block: block.place
)
def test_what_is_not_run_is_understood(block, monkeypatch):
    """Only the parser: what comes after it is left out."""
    monkeypatch.chdir(ROOT)
    if block.language == "python":
        ast.parse(block.code, block.place)
        return
    monkeypatch.setattr(asking, "ask_and_show", lambda *args: 0)
    monkeypatch.setattr(publish, "push", lambda *args: "sent")
    for name in (
        "quantize_with_progress",
        "show_plan",
        "evaluate_and_show",
        "verify_and_show",
        "show_report",
    ):
        monkeypatch.setattr(console, name, lambda *args: 0)
    for words in block.commands():
        if words[0] in OURS:
            assert command(words, block.place) == 0, f"{block.place}: {' '.join(words)}"


def test_template_and_processor_of_the_calibration_page(tmp_path):
    found = {block.language: block.code for block in blocks(ROOT / "docs/calibration.md")}
    assert parse_template(json.loads(found["json"])).processor == "qwen2_vl"
    (tmp_path / "mine.py").write_text(found["python"])
    (tmp_path / "mine.json").write_text(found["json"])
    words = ["--model", "demo", "--dataset", "demo-llava", "--iters", "1", "--nsamples", "8"]
    words += ["--processor", str(tmp_path / "mine.py"), "--template", str(tmp_path / "mine.json")]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 0


def test_pages_link_to_files_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", outside(page)):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page):
    found = list(sentences(page))
    assert found and not [sentence for sentence in found if len(sentence.split()) > 30]


def test_sentences_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n\nOne [link](x.md) here. Two `a b c` is\nlong (see $x + 1$). (Three.)"
        "\n\n- four; five\n  goes on\n- six\n\n| a | table |\n\n    indented code"
        "\n\n```bash\nmake\n```\n"
    )
    found = [sentence for sentence in sentences(page) if sentence]
    assert found[:2] == ["One link here.", "Two Code is long (see Code)."]
    assert found[2:] == ["(Three.)", "four; five goes on", "six"]


def test_the_readme_is_a_landing_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    for picture in re.findall(r"!\[[^\]]+\]\((\S+\.svg)\)", readme):
        assert "prefers-color-scheme:dark" in (ROOT / picture).read_text()
    for scheme, named in (("light", ' src="'), ("dark", 'dark)" srcset="')):
        assert f'{named}docs/figures/report-{scheme}.png"' in readme
        assert (ROOT / "docs" / "figures" / f"report-{scheme}.png").is_file()


def test_every_guide_begins_with_the_command_and_ends_with_its_check():
    guides = list((ROOT / "docs" / "guides").glob("*.md"))
    assert len(guides) >= 6
    for guide in guides:
        text, found = guide.read_text(), blocks(guide)
        assert re.match(r"# .*\n\n<!-- .* -->\n```bash\n", text), guide.name
        _, _, check = text.partition("## Check that it worked")
        assert found[-1].code in check and "auto-round-mllm" in found[-1].code, guide.name


def test_the_readme_counts_families_right():
    assert f"{len(FAMILIES)} families are tested" in (ROOT / "README.md").read_text()


def test_marks_are_understood_or_refused():
    mark = Mark()
    mark.read("slow; with tiny llava as a/b; quantize --iters 1; replace x y by z; by x.py")
    assert mark.slow and mark.places == {"a/b": "tiny llava"} and mark.by == "x.py"
    assert mark.added == {"quantize": ["--iters", "1"]} and mark.replaced == {"x y": "z"}
    with pytest.raises(ValueError, match="unknown instruction"):
        mark.read("fast")


def test_the_format_of_the_new_format_page(tmp_path, monkeypatch):
    """The file of docs/new-format.md in the room of the formats, and a run: what is read back is
    what `fake` holds."""
    found = [
        block.code for block in blocks(ROOT / "docs/new-format.md") if block.language == "python"
    ]
    (tmp_path / "nibbles.py").write_text("\n".join(found))
    monkeypatch.setattr(export, "__path__", [*export.__path__, str(tmp_path)])
    for name, fmt in formats.by_name().items():
        monkeypatch.setitem(formats.FORMATS, name, fmt)
    monkeypatch.delitem(sys.modules, "auto_mmround.export.nibbles")
    out = tmp_path / "out"
    assert (
        cli.main(
            [
                "--model",
                "demo",
                "--iters",
                "0",
                "--format",
                "nibbles,fake",
                "--output_dir",
                str(out),
            ]
        )
        == 0
    )
    read, plain = (
        load_any(str(out / f"demo-w4g128-{name}")).model.state_dict()
        for name in ("nibbles", "fake")
    )
    assert read.keys() == plain.keys() and all(torch.equal(read[key], plain[key]) for key in plain)


def test_the_readme_quotes_its_results():
    readme = (ROOT / "README.md").read_text()
    (file,) = re.findall(r"\[held-out data\]\((bench/results/\S+)\)", readme)
    quoted = re.findall(r"^\| \d bits, .*$", readme, re.MULTILINE)
    stored = {
        line.split("|")[1].strip(): line
        for line in (ROOT / file).read_text().splitlines()
        if "|" in line
    }
    assert len(quoted) == 4
    for line in quoted:
        bits, how = re.match(r"\| (\d) bits, (.*?) \|", line).groups()
        row = stored[f"W{bits} {how.replace('rounded', 'round')}"]
        figures = re.findall(r"0\.\d{5}", line)
        assert len(figures) == 2 and all(figure in row for figure in figures), line


FAMILY_PAGES = {
    page.stem: page.read_text()
    for page in (ROOT / "docs" / "families").glob("*.md")
    if page.stem != "index"
}


def says(page: str, engine: str) -> str:
    """The last cell of an engine's row in a page's table."""
    (row,) = [
        line for line in page.splitlines() if line.startswith("|") and engine in line.split("|")[1]
    ]
    return row.rstrip(" |").rpartition("|")[2].strip()


@pytest.mark.parametrize("name", FAMILY_PAGES)
def test_llamacpp_takes_what_the_page_says(name, tmp_path, capsys):
    page = FAMILY_PAGES[name]
    (kind,) = re.findall(r"<!-- page: with (demo|tiny \w+) as ", page)
    put(kind, tmp_path / "model")
    options = (
        "--bits 4 --group_size 32 --iters 0 --format gguf:q4_0 --trust_remote_code --device cpu"
    )
    status = cli.main(
        [
            "--model",
            str(tmp_path / "model"),
            *options.split(),
            "--output_dir",
            str(tmp_path / "out"),
        ]
    )
    error = capsys.readouterr().err
    assert ("no table for" in error) == says(page, "llama.cpp").startswith("no"), error
    # tiny models have a tokenizer that llama.cpp does not know
    assert status == 0 or "GGUF export" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_PAGES)
def test_vllm_lists_what_the_page_says(name):
    packages = python_of("vllm", ROOT).parents[1] / "lib"
    found = list(packages.glob("python*/site-packages/vllm/model_executor/models/registry.py"))
    if not found:
        pytest.skip("scripts/engines.sh vllm installs the engine")
    listed, _, gone = found[0].read_text().partition("_PREVIOUSLY_SUPPORTED_MODELS")
    said = says(FAMILY_PAGES[name], "vLLM")
    classes = re.findall(r"`(\w+)`", said)
    assert bool(classes) == said.startswith("listed")
    assert all(f'"{each}"' in listed and f'"{each}"' not in gone for each in classes)
