"""The big evaluation harnesses through their own packages: each is handed our loaded model by its public interface."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from auto_mmround.errors import UserError
from auto_mmround.evaluation.scoring import Score
from auto_mmround.model.loading import Loaded


@dataclass(frozen=True)
class Harness:
    """run(loaded, task, limit) yields (task, filter, metric, value, samples, lower is better)."""

    package: str
    install: str
    run: Callable[[Loaded, str, int | None], Iterable[tuple[str, str, str, float, int, bool]]]


def lm_eval(loaded: Loaded, task: str, limit: int | None) -> Iterable[tuple[str, str, str, float, int, bool]]:
    """A text task of lm-evaluation-harness, by name or as a .yaml file."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    file = Path(task)
    if file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise UserError(f"lm_eval task {task}: there is no such file")
        manager = TaskManager(include_path=str(file.resolve().parent), include_defaults=False)
        task = yaml.safe_load(file.read_text())["task"]
    else:
        manager = TaskManager()
    if task not in manager.all_tasks:
        raise UserError(f"lm_eval has no task {task!r}: list its names with `lm_eval ls tasks`, or give a .yaml file")
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", device=str(loaded.model.device))
    found = simple_evaluate(model=model, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0)
    yield from _rows(found)


def _rows(found: Mapping[str, Any]) -> Iterable[tuple[str, str, str, float, int, bool]]:
    """The figures of a result in the form that lm-eval and its kin share: `metric,filter` -> value."""
    for name, figures in found["results"].items():
        higher = found.get("higher_is_better", {}).get(name, {})
        samples = found.get("n-samples", {}).get(name, {}).get("effective", 0)
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                split = "" if kind == "none" else kind
                yield name, split, metric, float(value), samples, higher.get(metric) is False


HARNESSES = {"lm_eval": Harness("lm_eval", 'pip install "auto_mmround[lm-eval]"', lm_eval)}


def require(prefix: str) -> None:
    """Raises UserError when the package of a harness is missing."""
    harness = HARNESSES[prefix]
    if importlib.util.find_spec(harness.package) is None:
        raise UserError(f"tasks {prefix}:NAME need the package {harness.package}: {harness.install}")


def run(prefix: str, task: str, models: Mapping[str, Loaded], limit: int | None) -> list[Score]:
    """The scores of one outside task for all models."""
    harness = HARNESSES[prefix]
    figures: dict[tuple[str, str, str, int, bool], dict[str, Any]] = {}
    for role, loaded in models.items():
        for name, split, metric, value, count, lower in harness.run(loaded, task, limit):
            figures.setdefault((name, split, metric, count, lower), {})[role] = value
    return [
        Score(name, split, metric, count=count, lower_is_better=lower, **values)
        for (name, split, metric, count, lower), values in figures.items()
        if "quantized" in values
    ]
