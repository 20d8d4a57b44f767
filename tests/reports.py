"""A report with everything in it, for the tests of reports and of model cards."""

import json
import shutil

from PIL import Image

from auto_mmround.evaluate.scoring import Score
from auto_mmround.evaluate.tasks import picture
from auto_mmround.report import report


def evaluation(**changes):
    scores = [
        Score(
            "speech",
            "clean",
            "WER",
            3.5246,
            9,
            reference=3.4435,
            baseline=4.0,
            unit="%",
            lower_is_better=True,
        ),
        Score("pictures", "test", "exact match", 45.0, 20, reference=50.0, unit="%"),
    ]
    kl = {"kl": {"text": 0.002, "image": 0.001}, "agreement": {"text": 0.9, "image": 0.95}}
    figures = {
        role: kl | {"positions": {"text": 1000, "image": 50}}
        for role in ("reference", "baseline", "quantized")
    }
    pixel = picture(Image.new("RGB", (8, 8), "red"))
    answers = {"reference": "a cat", "baseline": "a dog", "quantized": "<script>alert(1)</script>"}
    sample = {
        "id": "1",
        "question": "What is it?",
        "expected": "a cat",
        "images": [pixel],
        "answers": answers,
    }
    record = {
        "model": "m", "reference": "full", "baseline": "nearest", "reference_dtype": "BF16",
        "dataset": "set.json",
        "limit": None, "language": None, "tasks": ["kl"],
        "command": "auto-round-mllm eval --model /a/b/m",
        "scores": [score.as_dict() for score in scores], "figures": figures, "samples": [sample],
    }  # fmt: skip
    return record | changes


def filled(demo_folder, folder):
    """A copy with errors of forty blocks in two stages, an evaluation, and verdicts."""
    shutil.copytree(demo_folder, folder)
    run = json.loads((folder / "run.json").read_text())
    names = [f"model.visual.blocks.{i}" for i in range(8)] + [
        f"model.language_model.layers.{i}" for i in range(32)
    ]
    run["blocks"] = [
        {
            "name": name,
            "stage": "vision" if "visual" in name else "text",
            "weights": 7,
            "nearest": 0.02 * (i + 1) ** 2,
        }
        | {"start": 0.012 * (i + 1) ** 2, "end": 0.01 * (i + 1) ** 2, "best_iter": 3}
        for i, name in enumerate(names)
    ]
    run["measured"]["blocks"] = {
        name: {"seconds": 3 + i % 4, "peak_gb": 2 + i / 40} for i, name in enumerate(names)
    }
    run["calibration"] = {
        "asked": 9,
        "used": 8,
        "short": 1,
        "skipped": {"form": ["a"]},
        "tokens": {"text": 900},
    }
    run["calibration"]["notes"] = []
    (folder / "run.json").write_text(json.dumps(run))
    report.keep_evaluation(folder, evaluation())
    right = {
        "engine": "transformers",
        "version": "transformers 5.23.0",
        "status": "right",
        "layers": 35,
        "gap": 0.002,
    }
    wrong = {
        "engine": "vllm",
        "status": "wrong",
        "reason": "does not load",
        "planned": 35,
        "gap": float("nan"),
    }
    report.keep_verdicts(folder, [right | {"planned": 35, "reason": None}, wrong])
    report.write(folder)
    return folder
