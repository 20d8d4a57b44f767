"""The pages' own snippets, run as written with only the names of models and datasets replaced."""

import json
import re
import shlex
from pathlib import Path

import pytest

from auto_mmround import cli
from auto_mmround.calibration.template import parse_template
from auto_mmround.evaluation.loader import from_quantized
from auto_mmround.model.loading import DEMO

ROOT = Path(__file__).parents[1]
DATASET = str(DEMO.parent / "calibration" / "text.jsonl")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def local(text: str) -> str:
    return text.replace("Qwen/Qwen2-VL-2B-Instruct", str(DEMO)).replace("NeelNanda/pile-10k", DATASET)


@pytest.mark.slow
def test_api_snippet_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks("docs/quickstart.md", "python")
    exec(compile(local(snippet), "docs/quickstart.md", "exec"), {})
    assert from_quantized(tmp_path / "tmp_autoround").model.config.model_type == "qwen2_vl"


def test_api_snippet_with_fewer_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks("docs/quickstart.md", "python")
    fast = local(snippet).replace("dataset=dataset)", "dataset=dataset, iters=1, nsamples=8, seqlen=64)")
    assert "iters=1" in fast
    exec(compile(fast, "docs/quickstart.md", "exec"), {})
    assert from_quantized(tmp_path / "tmp_autoround").model.config.model_type == "qwen2_vl"


@pytest.mark.parametrize("page", ["docs/quickstart.md", "README.md"])
def test_command_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = blocks(page, "bash")
    program, *words = shlex.split(local(command).replace("\\\n", " "))
    assert program == "auto-round-mllm"
    extra = ["--iters", "1", "--nsamples", "8", "--seqlen", "64", "--dataset", DATASET]
    assert cli.main([*words, *extra]) == 0
    assert (tmp_path / "tmp_autoround" / "model-w4g128-auto_round" / "config.json").is_file()


def test_template_and_processor_snippets(tmp_path):
    (template,) = blocks("docs/calibration.md", "json")
    assert parse_template(json.loads(template)).processor == "qwen2_vl"
    (processor,) = blocks("docs/calibration.md", "python")
    (tmp_path / "mine.py").write_text(processor)
    (tmp_path / "mine.json").write_text(template)
    command = ["--model", "demo", "--dataset", "demo-llava", "--iters", "1", "--nsamples", "8"]
    command += ["--processor", str(tmp_path / "mine.py"), "--template", str(tmp_path / "mine.json")]
    assert cli.main([*command, "--output_dir", str(tmp_path / "out")]) == 0


def test_pages_link_to_files_that_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
