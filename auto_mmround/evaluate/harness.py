"""The big evaluation harnesses: each gets our loaded model through its public interface."""

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.evaluate.scoring import Score
from auto_mmround.model.loading import Loaded

# (task, filter, metric, value, samples, lower is better)
Figures = Iterable[tuple[str, str, str, float, int, bool]]
TASK = re.compile(r"""^task:\s*["']?([^\s"'#]+)""", re.MULTILINE)


@dataclass(frozen=True)
class Harness:
    """run(loaded, task, limit): the figures of a task."""

    package: str
    install: str
    run: Callable[[Loaded, str, int | None], Figures]


def lm_eval(loaded: Loaded, task: str, limit: int | None) -> Figures:
    """A text task of lm-evaluation-harness, by name or as a .yaml file."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager, task = _located(TaskManager, task, "lm_eval", "lm_eval ls tasks")
    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        backend="causal",
        device=str(loaded.model.device),
    )
    results = simple_evaluate(
        model=model, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0
    )
    yield from _rows(results)


def lmms_eval(loaded: Loaded, task: str, limit: int | None) -> Figures:
    """A task of lmms-eval with images, video or sound, by name or as a .yaml file."""
    from lmms_eval.tasks import TaskManager

    from auto_mmround.evaluate.lmms import evaluate

    manager, task = _located(TaskManager, task, "lmms", "python -m lmms_eval --tasks list")
    yield from _rows(evaluate(loaded, task, manager, limit))


def _located(make: Callable[..., Any], task: str, prefix: str, command: str) -> tuple[Any, str]:
    """A task manager that knows the task, and its name. Raises UserError for an unknown task."""
    file = Path(task)
    if file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise UserError(f"{prefix} task {task}: there is no such file")
        manager = make(include_path=str(file.resolve().parent), include_defaults=False)
        # only the package reads tags such as !function
        named = TASK.search(file.read_text(encoding="utf-8"))
        task = named[1] if named else file.stem
    else:
        manager = make()
    if task not in manager.all_tasks:
        raise UserError(
            f"{prefix} has no task {task!r}: list its names with `{command}`, or give a .yaml file"
        )
    return manager, task


def vlmeval(loaded: Loaded, task: str, limit: int | None) -> Figures:
    """A set of VLMEvalKit by name, or a .tsv file with its columns."""
    from auto_mmround.evaluate.vlmeval import evaluate

    return evaluate(loaded, task, limit)


def _rows(results: Mapping[str, Any]) -> Figures:
    """The figures of a result of lm-eval or lmms-eval: `metric,filter` -> value."""
    for name, figures in results["results"].items():
        higher = results.get("higher_is_better", {}).get(name, {})
        samples = results.get("n-samples", {}).get(name, {}).get("effective", 0)
        for key, value in figures.items():
            metric, _, filter_name = key.partition(",")
            if filter_name and "_stderr" not in metric and isinstance(value, int | float):
                split = "" if filter_name == "none" else filter_name
                yield name, split, metric, float(value), samples, higher.get(metric) is False


HARNESSES = {
    "lm_eval": Harness("lm_eval", 'pip install "auto_mmround[lm-eval]"', lm_eval),
    "lmms": Harness("lmms_eval", 'pip install "auto_mmround[lmms-eval]"', lmms_eval),
    "vlmeval": Harness("vlmeval", 'pip install "auto_mmround[vlmeval]"', vlmeval),
}


def require(prefix: str) -> None:
    """Raises UserError if the package of a harness is missing."""
    harness = HARNESSES[prefix]
    if importlib.util.find_spec(harness.package) is None:
        raise UserError(f"{prefix} tasks need the package {harness.package}: {harness.install}")


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
