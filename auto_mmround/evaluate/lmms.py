"""lmms-eval: our loaded model behind the interface that its evaluator calls.

Imported only if the package is installed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image

from auto_mmround.errors import UserError
from auto_mmround.evaluate.prompts import Prompt, answer, asked, log_likelihood
from auto_mmround.model.loading import Loaded

ANSWER = 1024  # tokens, if a task names no limit


class Ours(lmms):
    """A loaded model. Every answer is greedy, even if a task asks for a temperature."""

    def __init__(self, loaded: Loaded):
        super().__init__()
        self.loaded = loaded

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers, cut before the first of a task's stop texts."""
        answers = []
        for request in requests:
            text, options, visuals, *place = request.args
            said = answer(
                self.loaded,
                self._prompt(text, visuals, place, options.get("max_new_tokens", ANSWER)),
            )
            stops = options.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                said = said.split(stop)[0] if stop else said
            answers.append(said)
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """For a choice, given the question with its media: (loss, whether greedy).

        In spite of the method's name, the package scores the loss that its models return: smaller
        is better. Its evaluator (0.7.3) turns every pair into text unless the pair has its own
        type.
        """
        results = []
        for request in requests:
            text, target, visuals, *place = request.args
            target = target(self._row(place)) if callable(target) else target
            likely, greedy = log_likelihood(
                self.loaded, self._prompt(text, visuals, place, 1), target
            )
            results.append(GenerationResult(text=(-likely, greedy)))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: conversations in rounds."""
        raise UserError("lmms_eval: tasks in several rounds are not supported")

    def _row(self, place: Sequence[Any]) -> Any:
        index, task, split = place
        return self.task_dict[task][split][index]

    def _prompt(self, text: str, visuals: Any, place: Sequence[Any], count: int) -> Prompt:
        media: dict[str, list[Any]] = {"images": [], "videos": [], "audios": []}
        given = visuals(self._row(place)) if visuals else None
        for item in _flat(given):
            if isinstance(item, Image.Image):
                media["images"].append(item)
            elif isinstance(item, Mapping) and "array" in item:
                media["audios"].append(item)
            elif isinstance(item, str | Path):
                media["videos"].append(str(item))
            else:
                raise UserError(
                    f"lmms_eval: media of the type {type(item).__name__} are not supported"
                )
        return asked(self.loaded, text, **media, max_new_tokens=count)


def _flat(given: Any) -> list[Any]:
    if given is None:
        return []
    if isinstance(given, list | tuple):
        return [each for item in given for each in _flat(item)]
    return [given]


def evaluate(
    loaded: Loaded, task: str, manager: TaskManager, limit: int | None
) -> Mapping[str, Any]:
    """The package's own record of one task."""
    results: Mapping[str, Any] = simple_evaluate(
        model=Ours(loaded),
        tasks=[task],
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return results
