"""The demo model, tuned to 4 bits, in every engine: what loads, how far logits are, how many
answers are right.

Every row that was run (`make test-engines` runs all) is written into the table of docs/formats.md,
between the marks.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import same_weights
from PIL import Image

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.evaluate.held_out import HELD_OUT, held_out
from auto_mmround.evaluate.scoring import exact_match
from auto_mmround.model.loading import load
from auto_mmround.readers import ENGINES
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify.agreement import Reference, judge, make_reference
from auto_mmround.verify.engines import EngineResult, interpreter, python_of, run_llamacpp
from auto_mmround.verify.engines import ask as ask_engine

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "formats.md"
MARKS = ("<!-- engines: begin -->", "<!-- engines: end -->")
HEADS = [
    *("engine", "format", "weights", "quantized", "inputs", "difference"),
    *("right: engine · weights", "of", "version", "date"),
]
MISSING = [
    name
    for name in ("gptqmodel", "vllm", "llamacpp", "mlx", "openvino")
    if not python_of(name, ROOT).is_file()
]

TIMEOUT = 3600  # seconds; a busy machine must not decide
EVERY = 2  # second question of the held-out 400
TEXTS = 4  # of about 440 tokens each
POINTS = 0.5  # of answer accuracy that an engine may differ by
W4 = "W4 sym g32"
RECIPES = {
    W4: {
        "format": "auto_round,auto_gptq,auto_awq,compressed_tensors,mlx,openvino,gguf:q4_0",
        "group_size": 32,
    },
    "W8A8": {
        "format": "compressed_tensors",
        "bits": 8,
        "act_bits": 8,
        "group_size": -1,
        "iters": 0,
    },
    "W4 asym g32": {"format": "gguf:q4_k", "sym": False, "group_size": 32},
}
ROWS = [
    *(
        ("transformers", W4, name)
        for name in ("auto_round", "auto_gptq", "auto_awq", "compressed_tensors")
    ),
    *(("vllm", W4, name) for name in ("auto_round", "auto_gptq", "auto_awq", "compressed_tensors")),
    ("vllm", "W8A8", "compressed_tensors"),
    ("llamacpp", W4, "gguf:q4_0"),
    ("llamacpp", "W4 asym g32", "gguf:q4_k"),
    ("mlx", W4, "mlx"),
    ("openvino", W4, "openvino"),
]
SPEECH = [
    (engine, "Whisper base, W4 sym g64", "compressed_tensors")
    for engine in ("transformers", "vllm")
]


@dataclass(frozen=True)
class Asked:
    """A held-out sample: a question on images with its answer, or a text. images: files. question:
    as it is written, with places for the images."""

    sample: ModelInput
    images: tuple[Path, ...] = ()
    question: str = ""
    answer: str = ""

    @property
    def content(self) -> list[Any]:
        """Texts and images in order, as chat interfaces take them."""
        texts = self.question.split("<image>")
        pairs = zip(texts, [{"image": str(path)} for path in self.images] + [""], strict=True)
        return [piece for pair in pairs for piece in pair if piece]

    @cached_property
    def raw(self) -> dict[str, Any]:
        """For an engine that processes images itself."""
        pictures = [
            torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in self.images
        ]
        return {"input_ids": self.sample.kwargs["input_ids"]} | {
            f"image{i}": p for i, p in enumerate(pictures)
        }

    def right(self, logits_tV: torch.Tensor) -> list[bool]:
        """A text: every token after the first that is the most likely; a question: whether all of
        its answer's are."""
        wanted_T = self.sample.answer_T[1:]
        hits = (logits_tV.argmax(-1)[:-1] == self.sample.kwargs["input_ids"][0, 1:])[
            wanted_T
        ].tolist()
        return [all(hits)] if self.images else hits


@dataclass(frozen=True)
class Row:
    """One line of the table. measure: what the two shares are, "" for answers that are right."""

    engine: str
    weights: str
    format: str
    result: EngineResult
    facts: dict[str, Any]
    inputs: str
    accuracy: float
    tuned: float
    count: int
    measure: str = ""

    def cells(self) -> list[str]:
        """What people read."""
        layers = next(
            (
                f"{n} {kind}"
                for kind, n in self.result.classes.items()
                if n == self.facts["planned"]
            ),
            "",
        )
        counted = f"{self.facts['layers']} of " if self.facts["layers"] else ""
        found = f"{counted}{self.facts['planned']}"
        layers = found if self.facts["layers"] else layers
        gap = f"{self.facts['max_difference']:.1e} ({self.facts['gap']:.1e})"
        score = f"{self.measure}{100 * self.accuracy:.2f} % · {100 * self.tuned:.2f} %"
        key = [self.engine, self.format, self.weights]
        return [
            *key,
            layers,
            self.inputs,
            gap,
            score,
            str(self.count),
            self.result.engine,
            str(date.today()),
        ]


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    rows = {f"vqa.json#{row['id']}": row for row in json.loads((HELD_OUT / "vqa.json").read_text())}
    made: list[Asked] = []
    samples = held_out(load("demo"), "demo")
    made += [Asked(sample) for sample in samples if sample.id not in rows][:TEXTS]
    for sample in [each for each in samples if each.id in rows][::EVERY]:
        row = rows[sample.id]
        names = [row["image"]] if isinstance(row["image"], str) else row["image"]
        human, assistant = (turn["value"] for turn in row["conversations"])
        made.append(
            Asked(sample, tuple(HELD_OUT / "images" / name for name in names), human, assistant)
        )
    return made


class Runs:
    """Every recipe once: its folders by format, and what the decoded weights make of the
    samples."""

    def __init__(self, out: Path, asked: list[Asked]) -> None:
        self.out, self.asked = out, asked
        self.done: dict[str, tuple[dict[str, Path], int]] = {}
        self.references: dict[tuple[str, bool], Reference] = {}

    def folder(self, weights: str, name: str) -> tuple[Path, int]:
        """(checkpoint, quantized weights)"""
        if weights not in self.done:
            options: Any = RECIPES[weights]
            recipe = Recipe(
                model="demo",
                dataset="demo",
                nsamples=32,
                device="cpu",
                output_dir=str(self.out / weights.replace(" ", "_")),
                **options,
            )
            job = jobs.prepare(recipe, jobs.load_model(recipe))
            folders = dict(zip(options["format"].split(","), jobs.run(job), strict=True))
            state = job.loaded.model.state_dict()
            tuned = {f"{module}.weight": state[f"{module}.weight"] for module in job.plan.quantized}
            for each in folders:
                assert same_weights(folders[each], tuned) == [], each
            self.done[weights] = folders, len(tuned)
        folders, planned = self.done[weights]
        return folders[name], planned

    def reference(self, weights: str, rounding: bool) -> Reference:
        """By the recipe's first format, whose decoded weights are those of all others."""
        if (weights, rounding) not in self.references:
            folder, _ = self.folder(weights, str(RECIPES[weights]["format"]).partition(",")[0])
            model = from_quantized(folder, dtype="float32", activations=rounding).model
            inputs = [each.sample.kwargs for each in self.asked]
            self.references[weights, rounding] = make_reference(folder, model, inputs, rounding)
        return self.references[weights, rounding]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, asked: list[Asked]) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where .engines lies, for OpenVINO's converter
        yield Runs(tmp_path_factory.mktemp("runs"), asked)


def with_rows(page: str, row: Row) -> str:
    """The page with this row in its table; what it holds of other rows stays."""
    before, _, rest = page.partition(MARKS[0])
    table, _, after = rest.partition(MARKS[1])
    old = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.strip().splitlines()[2:]
    ]
    found = {tuple(cells[:3]): cells for cells in [*old, row.cells()]}
    order = [
        key
        for engine, weights, name in [*ROWS, *SPEECH]
        if (key := (engine, name, weights)) in found
    ]
    rows = [HEADS, ["---"] * len(HEADS), *(found[key] for key in order)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}"


def share(samples: list[Asked], logits: Any) -> tuple[float, int]:
    """(share that is right, of how many)"""
    hits = [
        hit
        for each, found in zip(samples, logits, strict=True)
        for hit in each.right(found.reshape(-1, found.shape[-1]))
    ]
    return sum(hits) / len(hits), len(hits)


def part(reference: Reference, chosen: list[int]) -> Reference:
    inputs, logits = (
        [values[i] for i in chosen] for values in (reference.inputs, reference.logits)
    )
    return Reference(reference.folder, reference.model, inputs, logits, reference.activations)


def in_llamacpp(
    folder: Path, reference: Reference, asked: list[Asked]
) -> tuple[EngineResult, Reference, float]:
    """(log probabilities after each text and each question, what they should be, share of answers
    that are right)"""
    texts = [i for i, each in enumerate(asked) if not each.images]
    questions = [i for i, each in enumerate(asked) if each.images]
    result = run_llamacpp(
        folder,
        prompts=[asked[i].sample.kwargs["input_ids"][0].tolist() for i in texts],
        questions=[{"content": asked[i].content} for i in questions],
        python=interpreter("gguf", ROOT),
        timeout=TIMEOUT,
    )
    firsts = [{int(k): v for k, v in answer["logprobs"].items()} for answer in result.answers]
    starts = {i: int(asked[i].sample.answer_T.int().argmax()) for i in questions}
    wanted = part(reference, [*texts, *questions])
    logits = [
        *(reference.logits[i] for i in texts),
        *(reference.logits[i][: starts[i]] for i in questions),
    ]
    wanted = Reference(wanted.folder, wanted.model, wanted.inputs, logits)
    found = replace(result, logprobs=[*result.logprobs, *firsts])
    assert [answer["prompt_tokens"] for answer in result.answers] == [starts[i] for i in questions]
    right = [
        exact_match(answer["text"], asked[i].answer)
        for answer, i in zip(result.answers, questions, strict=True)
    ]
    return found, wanted, sum(right) / len(right)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"scripts/engines.sh builds {', '.join(MISSING)}")
@pytest.mark.parametrize(("engine", "weights", "name"), ROWS, ids=lambda value: str(value))
def test_row(engine: str, weights: str, name: str, runs: Runs) -> None:
    folder, planned = runs.folder(weights, name)
    row = ENGINES[engine]
    reference = runs.reference(weights, row.rounds_inputs)
    chosen = [
        i
        for i, each in enumerate(runs.asked)
        if "image" in row.kinds or not each.images or engine == "llamacpp"
    ]
    samples = [runs.asked[i] for i in chosen]
    if engine == "llamacpp":
        result, wanted, accuracy = in_llamacpp(folder, reference, samples)
    else:
        wanted = part(reference, chosen)
        given = [each.raw for each in samples] if row.own_media else wanted.inputs
        options = {"dtype": row.dtype, "class": type(wanted.model).__name__, "activations": False}
        python = interpreter("auto_round:auto_gptq" if name == "auto_round" else name, ROOT, engine)
        result = ask_engine(engine, folder, given, options, python=python, timeout=TIMEOUT)
    facts = judge(result, wanted, planned) | {"planned": planned}
    assert facts["status"] == "right", facts
    questions = [i for i, each in enumerate(samples) if each.images] or list(range(len(samples)))
    counted = [samples[i] for i in questions]
    tuned, count = share(counted, [reference.logits[chosen[i]] for i in questions])
    if engine != "llamacpp":
        accuracy, _ = share(counted, [result.logits[i] for i in questions])
    inputs = "text, images" if counted[0].images else "text"
    # in whole answers: floats miss the bound itself
    other = abs(round(count * accuracy) - round(count * tuned))
    assert 100 * other <= POINTS * count, (accuracy, tuned)
    made = Row(engine, weights, name, result, facts, inputs, accuracy, tuned, count)
    DOCS.write_text(with_rows(DOCS.read_text(encoding="utf-8"), made), encoding="utf-8")


def test_a_row_replaces_its_own_and_keeps_the_others() -> None:
    def row(engine: str, weights: str, name: str, count: int) -> Row:
        facts = {"planned": 35, "layers": 35, "max_difference": 0.001, "gap": 0.0003}
        return Row(
            engine, weights, name, EngineResult(True, engine="v 1"), facts, "text", 0.9, 0.91, count
        )

    page = f"before\n{MARKS[0]}\n{MARKS[1]}\nafter\n"
    for made in (
        row("vllm", "W8A8", "compressed_tensors", 1),
        row("mlx", W4, "mlx", 2),
        row("mlx", W4, "mlx", 3),
    ):
        page = with_rows(page, made)
    lines = page.splitlines()
    assert (
        lines[0] == "before"
        and lines[-1] == "after"
        and [MARKS[0], MARKS[1]] == [lines[1], lines[-2]]
    )
    assert [line.split(" | ")[7] for line in lines[4:-2]] == ["1", "3"] and "35 of 35" in lines[4]
