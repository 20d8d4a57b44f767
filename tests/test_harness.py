"""Outside harnesses on tasks fed from local files."""

import importlib.util
import json

import pytest

from auto_mmround.errors import UserError
from auto_mmround.evaluation import harness
from auto_mmround.evaluation.metrics import logits_of
from auto_mmround.model.loading import load

TEXTS = ("And God said, Let there be", "The LORD is my", "In the beginning God created the", "And he went up into the")
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


def preferred(loaded, text):
    """The choice whose tokens the model finds more likely after the text."""
    scores = []
    for choice in CHOICES:
        before = loaded.tokenizer(text, return_tensors="pt")["input_ids"].shape[1]
        ids = loaded.tokenizer(f"{text} {choice}", return_tensors="pt")["input_ids"]
        logs = logits_of(loaded.model, {"input_ids": ids}).log_softmax(-1)
        scores.append(logs[before - 1 : -1].gather(1, ids[0, before:, None]).sum().item())
    return scores.index(max(scores))


@pytest.mark.slow
def test_lm_eval_scores_a_local_task(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "auto_mmround[lm-eval]"')
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = load("demo")
    rows = [{"text": text, "choices": CHOICES, "label": preferred(loaded, text)} for text in TEXTS]
    rows[2]["label"] = 1 - rows[2]["label"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    scores = harness.run("lm_eval", str(tmp_path / "words.yaml"), {"reference": loaded, "quantized": loaded}, None)
    (score,) = [score for score in scores if score.metric == "acc"]
    assert (score.benchmark, score.quantized, score.reference, score.count) == ("local_words", 0.75, 0.75, 4)
    assert score.recovery == 100 and not score.lower_is_better
    with pytest.raises(UserError, match="no such file"):
        harness.run("lm_eval", str(tmp_path / "none.yaml"), {"quantized": loaded}, None)


def test_figures_of_a_harness_result():
    found = {
        "results": {"words": {"alias": "words", "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,strict": 9}},
        "higher_is_better": {"words": {"acc": True, "ppl": False}},
        "n-samples": {"words": {"original": 9, "effective": 4}},
    }
    assert list(harness._rows(found)) == [("words", "", "acc", 0.5, 4, False), ("words", "strict", "ppl", 9.0, 4, True)]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_package_one_line_says_what_installs_it():
    with pytest.raises(UserError, match=r"pip install .*lm-eval"):
        harness.require("lm_eval")
