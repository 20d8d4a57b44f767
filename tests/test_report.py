"""Reports and model cards: what they say, that they need nothing else, and how a real browser shows
them."""

import json
import re
import resource
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browsing import browse, needs_browser
from PIL import Image
from reports import evaluation

from auto_mmround import cli
from auto_mmround.evaluate.scoring import Score
from auto_mmround.model.loading import DEMO
from auto_mmround.report import charts, report
from auto_mmround.report.headline import differing_first, headline, trade
from auto_mmround.report.sizes import sizes

VOID = {"meta", "link", "img", "br", "wbr"}


class Checker(HTMLParser):
    """Balanced tags, and what a page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.references = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.references += [
            value for key, value in attributes if key in ("src", "href", "data", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def checked(page):
    text = page.read_text()
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    return text, checker


@pytest.mark.parametrize("which", ["demo_folder", "full"])
def test_a_page_needs_nothing_but_itself(which, request):
    page = request.getfixturevalue(which) / "report.html"
    text, found = checked(page)
    assert all(reference.startswith("data:") for reference in found.references)
    assert not re.search(r"https?://|url\(|@import|<script|<iframe", text)
    assert page.stat().st_size < 3_000_000 and not list(page.parent.glob("*.partial"))


def test_charts_can_be_read_aloud(full):
    text, found = checked(full / "report.html")
    images = [
        attributes
        for tag, attributes in found.tags
        if tag == "svg" and attributes.get("role") == "img"
    ]
    assert len(images) == 4  # two stages, seconds, memory
    assert text.count("<desc>") == len(images)
    assert all(
        attributes.get("aria-hidden") or attributes.get("role")
        for tag, attributes in found.tags
        if tag == "svg"
    )
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")


def test_answers_of_a_model_are_text_never_markup(full):
    text = (full / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<script" not in text


def test_the_same_figures_as_json(full):
    run, found = (json.loads((full / name).read_text()) for name in ("run.json", "report.json"))
    assert [block["end"] for block in found["blocks"]] == [block["end"] for block in run["blocks"]]
    assert found["damage"]["end"] == pytest.approx(found["damage"]["nearest"] / 2)
    assert [block["name"] for block in found["worst"]] == [
        f"model.language_model.layers.{i}" for i in range(31, 21, -1)
    ]
    assert (
        found["sizes"]["packed"] + found["sizes"]["plain"]
        <= found["sizes"]["weights"]
        < found["sizes"]["source"]
    )
    assert found["evaluation"]["scores"][0]["recovery"] == pytest.approx(97.70, abs=0.005)
    assert found["verify"][1]["reason"] == "does not load" and found["verify"][1]["gap"] is None
    assert found["calibration"]["used"] == 8
    assert found["chosen"]["model"] == "demo" and "seed" not in found["chosen"]


def test_packed_and_plain_bytes_are_those_of_the_tensors(demo_folder):
    from safetensors import safe_open

    wanted = {"packed": 0, "plain": 0}
    with safe_open(demo_folder / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            kind = (
                "packed" if key.rpartition(".")[2] in ("qweight", "qzeros", "scales") else "plain"
            )
            wanted[kind] += tensor.numel() * tensor.element_size()
    sizes = report.collect(demo_folder)["sizes"]
    assert {kind: sizes[kind] for kind in wanted} == wanted


def test_a_newer_evaluation_takes_the_place_of_the_older(tmp_path):
    report.keep_evaluation(tmp_path, evaluation())
    report.keep_evaluation(tmp_path, evaluation(samples=[]))
    assert len(json.loads((tmp_path / "eval.json").read_text())["evaluations"]) == 1
    other = Score("pictures", "test", "exact match", 40.0, 20).as_dict()
    report.keep_evaluation(tmp_path, evaluation(tasks=["vqa"], scores=[other], figures={}))
    found = report.evaluation(tmp_path)
    assert [score["quantized"] for score in found["scores"]] == [3.5246, 40.0]
    assert found["figures"]["quantized"]["kl"] and found["samples"]


def test_eval_of_a_checkpoint_lands_in_its_report(demo_folder, tmp_path, capsys):
    folder = tmp_path / demo_folder.name
    shutil.copytree(demo_folder, folder)
    assert "Damage by modality" not in (folder / "report.html").read_text()
    command = [
        "eval",
        "--model",
        str(folder),
        "--reference",
        "demo",
        "--limit",
        "2",
        "--device",
        "cpu",
    ]
    assert cli.main([*command, "--model_card"]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out.replace("\n", "")
    assert "Damage by modality" in (folder / "report.html").read_text()
    assert "| text | " in (folder / "README.md").read_text()


def test_several_runs_on_one_page(demo_folder, full, tmp_path, capsys):
    page = tmp_path / "deep" / "both.html"
    assert cli.main(["report", str(demo_folder), str(full), "--output", str(page)]) == 0
    text, found = checked(page)
    assert all(reference.startswith("data:") for reference in found.references)
    assert "/".join(full.parts[-2:]) in text and "speech clean (WER)" in text


@pytest.mark.parametrize("damage", ["nothing", "no json"])
def test_a_folder_that_is_no_run_is_one_line(damage, tmp_path, demo_folder, capsys):
    folder = tmp_path / "run"
    if damage == "no json":
        shutil.copytree(demo_folder, folder)
        (folder / "run.json").write_text("{")
    assert cli.main(["report", str(folder)]) == 2
    assert "run.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.json", "[]"),
        ("run.json", "{}"),
        ("run.json", '{"blocks": 3}'),
        ("eval.json", "[]"),
        ("eval.json", '{"evaluations": [{"figures": {"quantized": 1}, "scores": [3]}]}'),
        ("verify.json", '{"verdicts": [7]}'),
    ],
)
def test_records_of_another_form_are_one_line(name, content, tmp_path, demo_folder, capsys):
    """And `eval` says so before it measures."""
    folder = tmp_path / "run"
    shutil.copytree(demo_folder, folder)
    (folder / name).write_text(content)
    for words in (["report"], ["report", str(demo_folder)], ["eval", "--model"]):
        assert cli.main([*words, str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "has not the form that we write" in line and "run" in line


def test_what_was_measured_is_told_though_it_cannot_be_kept(tmp_path, demo_folder, capsys):
    """A full disk, say: a limit on the size of files stands in for it."""
    folder = tmp_path / "run"
    shutil.copytree(demo_folder, folder)
    before = sorted(path.name for path in folder.iterdir())
    words = ["eval", "--model", str(folder), "--limit", "1", "--device", "cpu", "--tasks", "ppl"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert cli.main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr()
    assert "perplexity" in told.out
    assert "eval.json can't be written: File too large" in told.err.replace("\n", "")
    assert sorted(path.name for path in folder.iterdir()) == before


def shoot(page, folder, width, *options):
    """A screenshot; the browser must not complain about anything."""
    shot = folder / f"{page.stem}-{width}.png"
    _, complaints = browse(
        page.as_uri(), folder, *options, f"--window-size={width},2400", f"--screenshot={shot}"
    )
    assert not complaints
    image = Image.open(shot).convert("RGB")
    assert image.size == (width, 2400)
    return image


def count(image, color):
    return sum(number for number, found in image.getcolors(1 << 24) if found == color)


@needs_browser
@pytest.mark.parametrize("width, options", [(390, ("--force-dark-mode",)), (1280, ())])
def test_screenshot(full, width, options, tmp_path):
    image = shoot(full / "report.html", tmp_path, width, *options)
    paper, after = (
        ((0x16, 0x16, 0x15), (0x74, 0xB3, 0xF0))
        if options
        else ((0xFD, 0xFD, 0xFC), (0x0B, 0x62, 0xA8))
    )
    assert count(image, paper) > 0.7 * width * 2400
    assert count(image, after) > 500  # bars and dots are really drawn


@needs_browser
def test_nothing_is_wider_than_a_phone(demo_folder, full, tmp_path):
    # The browser narrows its window to less than 500 pixels only for the screenshot itself, so the
    # page looks then.
    probe = """<script>onresize = () => {
        const d = document.documentElement, fits = d.scrollWidth <= 390 && innerWidth == 390
        d.style.background = document.body.style.background = fits ? 'rgb(0,255,0)' : 'rgb(255,0,0)'
    }</script></body>"""
    for page in (full / "report.html", report.compare([demo_folder, full], tmp_path / "both.html")):
        text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
        (tmp_path / "probe.html").write_text(text.replace("</body>", probe))
        assert shoot(tmp_path / "probe.html", tmp_path, 390).getpixel((1, 1)) == (0, 255, 0)


@needs_browser
def test_it_prints(full, tmp_path):
    page = (full / "report.html").as_uri()
    browse(page, tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"


def test_a_verdict_that_did_not_run_takes_no_place(tmp_path):
    def kept(status, reason=None):
        report.keep_verdicts(tmp_path, [{"engine": "vllm", "status": status, "reason": reason}])
        (row,) = json.loads((tmp_path / "verify.json").read_text())["verdicts"]
        return row["status"], row["reason"]

    assert kept("not run", "not installed") == ("not run", "not installed")
    assert kept("right") == ("right", None)
    assert kept("not run", "not installed") == ("right", None)
    assert kept("wrong", "noise") == ("wrong", "noise")


@pytest.mark.parametrize(
    "recipe, scheme, numbers",
    [
        ({"bits": 4, "act_bits": 32}, "W4A16", "INT4"),
        ({"bits": 8, "act_bits": 8, "data_type": "int"}, "W8A8", "INT8"),
        ({"bits": 8, "act_bits": 8, "data_type": "fp8"}, "FP8", "FP8"),
    ],
)
def test_names_of_schemes(recipe, scheme, numbers):
    assert (report.scheme_label(recipe), report.number_label(recipe)) == (scheme, numbers)


def test_the_page_opens_with_the_answer(demo_folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(demo_folder, tmp_path / "run")
    (folder / report.VERDICTS).unlink(missing_ok=True)  # another test may have asked an engine
    page = report.write(folder).read_text()
    head = page[: page.index("</header>")]
    assert "Damage is not measured yet" in head and "No engine was asked yet" in head
    assert "<code>auto-round-mllm eval</code>" in head and "shrank from" in head
    assert "The files were read back" in head
    kinds = {"text": 0.0005, "image": 0.02}
    found = report.collect(folder) | {
        "verify": [
            {"engine": "vllm", "status": "right", "reason": None},
            {"engine": "mlx", "status": "wrong", "reason": "logits differ"},
        ]
    }
    lines = headline(found, {"quantized": {"kl": kinds}})
    assert "hardly any on text (0.0005), some on image (0.02)" in lines[-4]
    assert lines[-2:] == ["WRONG by mlx: logits differ.", "Proved right by vllm."]
    report.keep_verdicts(folder, found["verify"])
    head = report.write(folder).read_text().partition("</header>")[0]
    assert '<li class="off">WRONG by mlx: logits differ.</li>' in head
    assert "<li>Proved right by vllm.</li>" in head
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    assert cli.main(["report", str(folder), "--open"]) == 0
    assert opened == [(folder / "report.html").resolve().as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    assert cli.main(["report", str(folder), "--open"]) == 2
    assert "no browser" in capsys.readouterr().err


def test_answers_that_differ_come_first():
    rows = [{"answers": {"reference": "a", "quantized": each}} for each in "abac"]
    assert [row["answers"]["quantized"] for row in differing_first(rows)] == ["b", "c", "a", "a"]
    alone = [{"answers": {"quantized": "x"}}, {"answers": {"quantized": "y"}}]
    assert differing_first(alone) == alone


def test_a_comparison_puts_damage_against_size_and_time(demo_folder, tmp_path):
    runs = []
    for i, kl in enumerate((0.002, 0.03)):
        folder = shutil.copytree(demo_folder, tmp_path / f"run{i}")
        figures = {"quantized": {"kl": {"text": kl / 2, "image": kl}}}
        found = report.collect(folder) | {"evaluation": {"figures": figures}}
        runs.append(found | {"seconds": 10.0 * (i + 1)})
    points = trade(runs, "AB", "time")
    assert points == {"A": (0, 10.0, 0.002, "10.0 s"), "B": (1, 20.0, 0.03, "20.0 s")}
    drawn = str(charts.scatter("Damage against time", points))
    assert drawn.count("<circle") == 2 and "A: 0.00200 at 10.0 s" in drawn
    assert len(re.findall(r'x="83.33%"[^>]*>(?:B|20.0 s)<', drawn)) == 2  # a label under its point
    assert not trade(runs[:1], "A", "size")
    bare = report.compare([tmp_path / "run0", tmp_path / "run1"], tmp_path / "both.html")
    text = bare.read_text()
    assert "What the damage buys" not in text and "fewer than two" in text
    assert "Side by side" not in text  # the two are alike
    for i, kl in enumerate((0.002, 0.03)):
        figures = {"quantized": {"kl": {"text": kl / 2, "image": kl}}}
        record = {"scores": [], "figures": figures, "dataset": "demo"}
        kept = json.dumps({"evaluations": [record]})
        (tmp_path / f"run{i}" / "eval.json").write_text(kept)
    text = report.compare(
        [tmp_path / "run0", tmp_path / "run1"], tmp_path / "both.html"
    ).read_text()
    assert text.index("What the damage buys") < text.index("<h2>Figures") and "Side by side" in text


def test_weights_of_openvino_count(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "openvino_language_model.bin").write_bytes(bytes(3000))
    assert sizes(tmp_path, str(DEMO))["weights"] == 3000


def test_no_rule_of_the_page_catches_a_class_by_its_first_letter():
    """`[class^="s"]` once painted `start` black, which nobody sees on a dark page."""
    style = (Path(report.__file__).parent / "pages" / "style.css").read_text()
    assert "class^=" not in style and "svg circle.start { fill: var(--soft); }" in style
