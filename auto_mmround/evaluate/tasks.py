"""The tasks of `eval`, as a table: measure and rows of each. All are local and greedy."""

import base64
import difflib
import importlib.util
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

from PIL import Image

from auto_mmround.calibration.pictures import as_seen
from auto_mmround.errors import UserError
from auto_mmround.evaluate import harness
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import Metrics, measure
from auto_mmround.evaluate.prompts import Data, Prompt, answer, clips, openings, questions
from auto_mmround.evaluate.scoring import (
    Score,
    error_rates,
    exact_match,
    normaliser,
    relaxed_match,
    share,
)
from auto_mmround.model.loading import Loaded
from auto_mmround.model.lockstep import in_turn

SAMPLES = 6  # answers shown side by side
PICTURE = 320  # pixels, the longer side of a picture kept with an answer


@dataclass(frozen=True)
class Setting:
    """Models and data of an evaluation.

    models: by role. `quantized` is the checkpoint, `reference` its source, `baseline` another
    checkpoint to compare with.
    """

    models: Mapping[str, Loaded]
    data: Data
    progress: Callable[[str, int, int], None] = lambda title, done, total: None
    # answers so far, asked only once
    given: dict[tuple[str, str, str, str], str] = field(default_factory=dict)

    @property
    def loaded(self) -> Loaded:
        """The checkpoint. Its tokenizer and processor prepare the inputs of all models."""
        return self.models["quantized"]


@dataclass
class Measured:
    """scores: lines of the recovery table. figures: teacher-forced ones by role. samples: answers
    side by side, with small pictures as data URIs."""

    scores: list[Score] = field(default_factory=list)
    figures: dict[str, Metrics] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        scores = [score.as_dict() for score in self.scores]
        figures = {role: metrics.as_dict() for role, metrics in self.figures.items()}
        return {"scores": scores, "figures": figures, "samples": self.samples}


def teacher_forced(setting: Setting) -> Measured:
    """Perplexity, teacher-forced accuracy, KL and top-1 agreement by modality, from one pass over
    the set."""
    data = setting.data
    inputs = held_out(
        setting.loaded,
        data.dataset,
        template=data.template,
        extra_data_dir=data.extra_data_dir,
        limit=data.limit,
    )
    reference = setting.models.get("reference")
    results = measure(
        [loaded.model for loaded in setting.models.values()],
        inputs,
        reference=reference.model if reference else None,
        on_sample=lambda i: setting.progress("measuring", i + 1, len(inputs)),
        blocks={loaded.model: loaded.holder.blocks for loaded in setting.models.values()},
    )
    metrics_of = dict(zip(setting.models, results, strict=True))
    return Measured(list(forced_scores(metrics_of, data.title)), metrics_of)


def forced_scores(metrics_of: Mapping[str, Metrics], title: str) -> Iterable[Score]:
    """Lines of the recovery table from teacher-forced figures by role."""
    figures = (
        ("perplexity", "", True, lambda m: m.perplexity, lambda m: m.tokens),
        (
            "accuracy, teacher-forced",
            "%",
            False,
            lambda m: m.accuracy and 100 * m.accuracy,
            lambda m: m.answers,
        ),
    )
    for metric, unit, lower, figure, count in figures:
        values = {role: figure(metrics) for role, metrics in metrics_of.items()}
        if values["quantized"] is not None:
            yield Score(
                title,
                "",
                metric,
                count=count(metrics_of["quantized"]),
                unit=unit,
                lower_is_better=lower,
                **values,
            )


def question_answering(setting: Setting) -> Measured:
    """Share of greedy answers to questions on images that match, exactly and relaxed."""
    prompts = questions(setting.loaded, setting.data)
    given = _ask(setting, prompts, "answering")
    scores = []
    for part in _parts(prompts):
        wanted = [prompts[i].expected or "" for i in part]
        for metric, match in (("exact match", exact_match), ("relaxed match", relaxed_match)):
            figures = {
                role: share([texts[i] for i in part], wanted, match)
                for role, texts in given.items()
            }
            scores.append(_score(prompts[part[0]], metric, len(part), figures))
    return Measured(scores)


def speech(setting: Setting) -> Measured:
    """Word and character error rate of transcripts, after Whisper's normaliser."""
    prompts = clips(setting.loaded, setting.data)
    given = _ask(setting, prompts, "transcribing")
    normalise = normaliser(setting.data.language, setting.loaded.tokenizer)
    scores = []
    for part in _parts(prompts):
        said = [prompts[i].expected or "" for i in part]
        rates = {
            role: error_rates(said, [texts[i] for i in part], normalise)
            for role, texts in given.items()
        }
        for k, metric in enumerate(("WER", "CER")):
            figures = {role: pair[k] for role, pair in rates.items()}
            scores.append(_score(prompts[part[0]], metric, len(part), figures, lower=True))
    return Measured(scores)


def side_by_side(setting: Setting) -> Measured:
    """A few answers of all models, spread evenly over the set: on images if there are any, else
    speech, else text."""
    prompts: list[Prompt] = []
    for make in (questions, clips, openings):
        try:
            prompts = make(setting.loaded, setting.data)
            break
        except UserError as error:
            problem = error
    if not prompts:
        raise problem
    count = min(SAMPLES, len(prompts))
    chosen = [prompts[i * len(prompts) // count] for i in range(count)]
    given = _ask(setting, chosen, "sampling")
    return Measured(
        samples=[
            {
                "id": prompt.id,
                "question": prompt.question,
                "expected": prompt.expected,
                "images": [picture(image) for image in prompt.images],
                "answers": {role: texts[i] for role, texts in given.items()},
            }
            for i, prompt in enumerate(chosen)
        ]
    )


@dataclass(frozen=True)
class Task:
    """One row of the table.

    against: it needs a reference model. package: it needs this package of the extra `eval`.
    """

    summary: str
    run: Callable[[Setting], Measured]
    against: bool = False
    package: str | None = None


TASKS = {
    "ppl": Task("perplexity of text, teacher-forced accuracy of answers", teacher_forced),
    "kl": Task(
        "KL divergence to the reference and top-1 agreement, by modality",
        teacher_forced,
        against=True,
    ),
    "vqa": Task("answers on LLaVA-style rows: exact and relaxed match", question_answering),
    "wer": Task(
        "word and character error rate on rows with audio and text", speech, package="jiwer"
    ),
    "samples": Task("answers side by side", side_by_side),
}


def parse(names: str, has_reference: bool) -> list[str]:
    """Task names from a comma list.

    Raises UserError for unknown names, and for tasks whose reference or package is missing.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in wanted:
        prefix, colon, _ = name.partition(":")
        if colon and prefix in harness.HARNESSES:
            harness.require(prefix)
            continue
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            known = ", ".join([*TASKS, *(f"{prefix}:NAME" for prefix in harness.HARNESSES)])
            raise UserError(
                f"unknown task {name!r};"
                f" {f'did you mean {near[0]}?' if near else f'known: {known}'}"
            )
        if TASKS[name].against and not has_reference:
            raise UserError(
                f"task {name} compares with the model before quantization: give --reference"
            )
        package = TASKS[name].package
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f'task {name} needs the package {package}: pip install "auto_mmround[eval]"'
            )
    if not wanted:
        raise UserError(f"tasks is empty: name some of {', '.join(TASKS)}")
    return wanted


def run(names: Sequence[str], setting: Setting) -> Measured:
    """All tasks, those that share a pass once; outside harnesses (`lm_eval:NAME`) last."""
    measured = Measured()
    for job in dict.fromkeys(TASKS[name].run for name in names if name in TASKS):
        made = job(setting)
        measured.scores += made.scores
        measured.figures |= made.figures
        measured.samples += made.samples
    for name in names:
        if name not in TASKS:
            prefix, _, task = name.partition(":")
            measured.scores += harness.run(prefix, task, setting.models, setting.data.limit)
    return measured


def picture(image: Image.Image) -> str:
    """A small copy as a data URI: PNG if that is small, else JPEG."""
    small = as_seen(image)
    small.thumbnail((PICTURE, PICTURE))
    for name, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 80})):
        data = io.BytesIO()
        small.save(data, name, **options)
        if data.tell() < 20_000:
            break
    return f"data:image/{name.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def _ask(setting: Setting, prompts: Sequence[Prompt], title: str) -> dict[str, list[str]]:
    """role -> its answers."""
    total, done = len(prompts) * len(setting.models), 0
    by_role: dict[str, list[str]] = {}
    for role, loaded in setting.models.items():
        keys = [(role, prompt.benchmark, prompt.split, prompt.id) for prompt in prompts]
        left = {key: p for key, p in zip(keys, prompts, strict=True) if key not in setting.given}
        works = [partial(answer, loaded, prompt) for prompt in left.values()]
        inputs = [prompt.kwargs for prompt in left.values()]
        answers = in_turn(loaded.model, loaded.holder.blocks, works, inputs)
        done += len(prompts) - len(left)
        for key, text in zip(left, answers, strict=True):
            setting.given[key] = text
            done += 1
            setting.progress(title, done, total)
        by_role[role] = [setting.given[key] for key in keys]
    return by_role


def _parts(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Indices of the prompts of each set, in order."""
    order = range(len(prompts))
    return [
        list(part)
        for _, part in groupby(order, key=lambda i: (prompts[i].benchmark, prompts[i].split))
    ]


def _score(
    first: Prompt, metric: str, count: int, figures: Mapping[str, float], *, lower: bool = False
) -> Score:
    return Score(
        first.benchmark,
        first.split,
        metric,
        count=count,
        unit="%",
        lower_is_better=lower,
        **figures,
    )
