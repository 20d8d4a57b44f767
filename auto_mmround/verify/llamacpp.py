"""Inputs of a model as llama.cpp takes them: token ids, or text with pictures in it."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from auto_mmround.calibration.inputs import placeholder_ids
from auto_mmround.export.gguf.towers import tower_of
from auto_mmround.modalities import IMAGE
from auto_mmround.verify.agreement import Reference
from auto_mmround.verify.engines import EngineResult, run_llamacpp

# The template writes the text of a conversation alone: the reference's inputs already went through
# the model's own template.
AS_IT_IS = (
    "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
)


def pieces(
    ids: Sequence[int], tokenizer: Any, config: Any, images: Sequence[Path]
) -> list[str | dict[str, str]]:
    """Texts and images, in order, for ids with placeholders.

    llama.cpp puts words around images itself; these are left out. ValueError if the ids hold
    another number of images.
    """
    tower = tower_of(config.model_type, config)
    assert tower is not None  # there are placeholders
    mark = next(token for token, kind in placeholder_ids(config).items() if kind == IMAGE)
    text = tokenizer.decode(ids)
    start = tokenizer.bos_token or ""
    # llama.cpp also puts it there
    if start and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        text = text.removeprefix(start)
    place = re.escape(tokenizer.decode([mark]))
    texts = re.split(tower.seen.replace("IMAGE", f"(?:{place})+"), text)
    if len(texts) != len(images) + 1:
        raise ValueError(f"{len(images)} images, but places for {len(texts) - 1}")
    parts: list[str | dict[str, str]] = [texts[0]]
    for path, after in zip(images, texts[1:], strict=True):
        parts += [{"image": str(path)}, after]
    return [piece for piece in parts if piece]


def ask_llamacpp(
    reference: Reference,
    media: Sequence[Mapping[str, Tensor]] | None,
    tokenizer: Any,
    *,
    python: Path,
    timeout: float,
) -> EngineResult:
    """Log probabilities after every input, in the order of the reference's inputs.

    media: its images, as `Probe.media`. It is an error if llama.cpp makes another number of tokens
    from an image: the two would see different inputs.
    """
    media = media or ()
    with tempfile.TemporaryDirectory() as folder:
        prompts, questions = [], []
        for i, (kwargs, own) in enumerate(zip(reference.inputs, media, strict=True)):
            ids = kwargs["input_ids"].flatten().tolist()
            if not own:
                prompts.append(ids)
                continue
            paths = [Path(folder) / f"{i}.{key}.png" for key in own]
            for path, pixels in zip(paths, own.values(), strict=True):
                Image.fromarray(pixels.numpy()).save(path)
            content = pieces(ids, tokenizer, reference.model.config, paths)
            questions.append({"content": content, "max_tokens": 1})
        result = run_llamacpp(
            reference.folder,
            prompts=prompts,
            questions=questions,
            template=AS_IT_IS,
            python=python,
            timeout=timeout,
        )
    if not result.ok:
        return result
    texts, answers, logprobs = iter(result.logprobs), iter(result.answers), []
    for i, (kwargs, own) in enumerate(zip(reference.inputs, media, strict=True)):
        if not own:
            logprobs.append(next(texts))
            continue
        answer, length = next(answers), kwargs["input_ids"].shape[1]
        if answer["prompt_tokens"] != length:
            text = (
                f"input {i}, with an image, became {answer['prompt_tokens']} tokens, not {length}"
            )
            return replace(result, ok=False, error=text)
        logprobs.append({int(token): value for token, value in answer["logprobs"].items()})
    return replace(result, logprobs=logprobs, answers=())
