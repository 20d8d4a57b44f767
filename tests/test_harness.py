"""Outside harnesses on tasks fed from local files."""

import base64
import csv
import importlib.util
import json
import ssl

import pytest
import torch
from PIL import Image

from auto_mmround.errors import UserError
from auto_mmround.evaluate import harness
from auto_mmround.evaluate.held_out import HELD_OUT
from auto_mmround.evaluate.metrics import logits_of
from auto_mmround.evaluate.prompts import answer, asked, log_likelihood

TEXTS = (
    "And God said, Let there be",
    "The LORD is my",
    "In the beginning God created the",
    "And he went up into the",
)
CHOICES = ("light", "stone")
TASK = """\
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""

VISUAL_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: {kind}
test_split: test
doc_to_visual: !function pictures.of
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""


def preferred(demo, text):
    """The choice whose tokens the model finds more likely after the text."""
    scores = []
    for choice in CHOICES:
        before = demo.tokenizer(text, return_tensors="pt")["input_ids"].shape[1]
        ids = demo.tokenizer(f"{text} {choice}", return_tensors="pt")["input_ids"]
        logs = logits_of(demo.model, {"input_ids": ids}).log_softmax(-1)
        scores.append(logs[before - 1 : -1].gather(1, ids[0, before:, None]).sum().item())
    return scores.index(max(scores))


@pytest.mark.slow
def test_lm_eval_scores_a_local_task(demo, tmp_path, monkeypatch):
    pytest.importorskip(
        "lm_eval", reason='lm_eval is not installed: pip install "auto_mmround[lm-eval]"'
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": text, "choices": CHOICES, "label": preferred(demo, text)} for text in TEXTS]
    rows[2]["label"] = 1 - rows[2]["label"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    scores = harness.run(
        "lm_eval", str(tmp_path / "words.yaml"), {"reference": demo, "quantized": demo}, None
    )
    (score,) = [score for score in scores if score.metric == "acc"]
    assert (score.benchmark, score.quantized, score.reference, score.count) == (
        "local_words",
        0.75,
        0.75,
        4,
    )
    assert score.recovery == 100 and not score.lower_is_better
    with pytest.raises(UserError, match="no such file"):
        harness.run("lm_eval", str(tmp_path / "none.yaml"), {"quantized": demo}, None)


def pictured(count):
    """Questions on the held-out pictures of the demo model."""
    rows = json.loads((HELD_OUT / "vqa.json").read_text())[:count]
    asked = [row["conversations"][0]["value"].replace("<image>", "").strip() for row in rows]
    return [
        (str(HELD_OUT / "images" / row["image"]), text)
        for row, text in zip(rows, asked, strict=True)
    ]


@pytest.mark.slow
def test_lmms_eval_scores_local_tasks_with_pictures(demo, tmp_path, monkeypatch):
    pytest.importorskip(
        "lmms_eval", reason='lmms_eval is not installed: pip install "auto_mmround[lmms-eval]"'
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = []
    for path, question in pictured(4):
        said = answer(demo, asked(demo, question, [Image.open(path)]))
        rows.append(
            {
                "path": path,
                "question": question,
                "answer": said,
                "choices": [said, "No answer at all."],
            }
        )
    rows[3] |= {"answer": "wrong"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pictures.py").write_text(
        "from PIL import Image\n\ndef of(row):\n    return [Image.open(row['path'])]\n"
    )
    for name, kind, metric in (
        ("spoken", "generate_until", "exact_match"),
        ("chosen", "multiple_choice", "acc"),
    ):
        text = VISUAL_TASK.format(name=name, rows=tmp_path / "rows.jsonl", kind=kind, metric=metric)
        if kind == "multiple_choice":
            text = text.replace('"{{answer}}"', "0")
        else:
            text = text.replace('doc_to_choice: "{{choices}}"\n', "")
        (tmp_path / f"{name}.yaml").write_text(text)
    scores = harness.run(
        "lmms", str(tmp_path / "spoken.yaml"), {"reference": demo, "quantized": demo}, None
    )
    (score,) = [score for score in scores if score.metric == "exact_match"]
    assert (score.benchmark, score.quantized, score.reference, score.count) == (
        "spoken",
        0.75,
        0.75,
        4,
    )
    scores = harness.run("lmms", str(tmp_path / "chosen.yaml"), {"quantized": demo}, 2)
    (score,) = [score for score in scores if score.metric == "acc"]
    assert (score.quantized, score.count) == (1.0, 2)


@pytest.mark.slow
def test_vlmeval_scores_a_local_set(demo, tmp_path):
    # importing it here would change the whole process
    if importlib.util.find_spec("vlmeval") is None:
        pytest.skip('vlmeval is not installed: pip install "auto_mmround[vlmeval]"')
    context = ssl._create_default_https_context
    with (tmp_path / "shapes.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "A", "B", "answer"])
        for i, (path, question) in enumerate(pictured(4)):
            with open(path, "rb") as image:
                data = base64.b64encode(image.read()).decode()
            said = answer(demo, asked(demo, question, [Image.open(path)]))
            table.writerow([i, data, question, said, "No answer at all.", "B" if i == 3 else "A"])
    scores = harness.run(
        "vlmeval", str(tmp_path / "shapes.tsv"), {"reference": demo, "quantized": demo}, None
    )
    (score,) = [score for score in scores if score.metric == "Overall"]
    assert score.benchmark == "shapes" and score.count == 4 and score.quantized == score.reference
    assert 0 <= score.quantized <= 1
    assert ssl._create_default_https_context is context and torch.is_grad_enabled()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes.tsv"]
    with pytest.raises(UserError, match="no such file"):
        harness.run("vlmeval", str(tmp_path / "none.tsv"), {"quantized": demo}, None)


def test_questions_from_outside_are_asked_as_our_own(demo):
    path, question = pictured(1)[0]
    first = asked(demo, question, [Image.open(path)])
    assert answer(demo, first) == answer(
        demo, asked(demo, f"<image>\n{question}", [Image.open(path)])
    )
    said = answer(demo, first)
    likely, greedy = log_likelihood(demo, first, said)
    unlikely, _ = log_likelihood(demo, first, "zebra zebra")
    assert greedy and unlikely < likely < 0


def test_figures_of_a_harness_result():
    found = {
        "results": {
            "words": {"alias": "words", "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,strict": 9}
        },
        "higher_is_better": {"words": {"acc": True, "ppl": False}},
        "n-samples": {"words": {"original": 9, "effective": 4}},
    }
    assert list(harness._rows(found)) == [
        ("words", "", "acc", 0.5, 4, False),
        ("words", "strict", "ppl", 9.0, 4, True),
    ]


@pytest.mark.parametrize("prefix", sorted(harness.HARNESSES))
def test_without_the_package_one_line_says_what_installs_it(prefix):
    if importlib.util.find_spec(harness.HARNESSES[prefix].package) is not None:
        pytest.skip("the package is installed")
    with pytest.raises(UserError, match=r"need the package \w+: pip install .auto_mmround\[\S+\]"):
        harness.require(prefix)
