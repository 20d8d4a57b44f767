"""Loads one GGUF model in llama.cpp and answers with log probabilities and texts.

The engine's interpreter runs it. It is standalone (standard library and xllamacpp), because this
package is not installed there.

request: {"model": GGUF file, "mmproj": GGUF file or null, "prompts": [token ids or text], "top":
number of next tokens to report, "filler": id of a token of plain text, "questions": [{"content":
[text or {"image": file}], "max_tokens": ..}], "template": of the questions' conversation, null for
the model's own, "context": tokens, "aloud": whether the one question's answer is said piece by
piece, "threads": of the processor}.

answer: {"logprobs": for each prompt {id: log probability} of the next tokens, "answers": [{"text",
"prompt_tokens", "logprobs" of the first token; aloud "text" and "tokens", their number}],
"seconds": that an answer aloud took}. llama.cpp writes its own log to standard error.
"""

import base64
import json
import math
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import xllamacpp
from engine_main import say


def load(request: dict[str, Any], mmproj: str | None = None) -> Any:
    """A server object in this process; it also listens on a free loopback port.

    RuntimeError if it cannot load.
    """
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    if mmproj:
        params.mmproj.path = mmproj
    params.n_ctx = request.get("context", 1024)
    params.n_parallel = 1
    params.verbosity = 4  # the types of the tensors, among others
    params.warmup = False
    if request.get("template"):
        params.chat_template = request["template"]
    params.use_jinja = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request.get("threads", 1)
    return xllamacpp.Server(params)


def first_token(choice: dict[str, Any]) -> dict[str, float]:
    return {str(t["id"]): t["logprob"] for t in choice["logprobs"]["content"][0]["top_logprobs"]}


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    if "choices" not in answer:
        raise RuntimeError(json.dumps(answer))
    return answer


def forced(filler: int | None) -> dict[str, Any]:
    """Make the server generate ``filler``, a token of plain text.

    It reports no values for tokens without text. The values that it reports are the model's own,
    from before this change.
    """
    return {} if filler is None else {"logit_bias": [[filler, 1e4]]}


def next_tokens(
    server: Any, prompt: list[int] | str, top: int, filler: int | None
) -> dict[str, float]:
    """Log probabilities after a prompt."""
    asked = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": top,
        "temperature": 0,
        "cache_prompt": False,
        **forced(filler),
    }
    return first_token(checked(server.handle_completions(asked))["choices"][0])


def part(piece: str | dict[str, str]) -> dict[str, Any]:
    """A piece of a question in the form of the chat interface."""
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    path = Path(piece["image"])
    encoded = base64.b64encode(path.read_bytes()).decode()
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/{path.suffix[1:]};base64,{encoded}"},
    }


def ask(server: Any, question: dict[str, Any], top: int, filler: int | None) -> dict[str, Any]:
    """Greedy answer to one question. One more token is generated only for its values."""
    content = [part(piece) for piece in question["content"]]
    asked = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": question.get("max_tokens", 16),
        "temperature": 0,
        "cache_prompt": False,
        "logprobs": True,
        "top_logprobs": top,
        **(forced(filler) if question.get("max_tokens") == 1 else {}),
    }
    answer = checked(server.handle_chat_completions(asked))
    choice = answer["choices"][0]
    count = answer["usage"]["prompt_tokens"]
    return {
        "text": choice["message"]["content"],
        "prompt_tokens": count,
        "logprobs": first_token(choice),
    }


def answer_aloud(request: dict[str, Any]) -> dict[str, Any]:
    """Says the greedy answer to one question, piece by piece."""
    (question,) = request["questions"]
    server, parts, counts = load(request, request.get("mmproj")), [], []

    def hear(chunk: dict[str, Any]) -> None:
        for choice in checked(chunk)["choices"]:
            if text := choice["delta"].get("content"):
                parts.append(text)
                say(text)
        if usage := chunk.get("usage"):
            counts.append(usage["completion_tokens"])

    asked = {
        "messages": [{"role": "user", "content": [part(p) for p in question["content"]]}],
        "max_tokens": question["max_tokens"],
        "temperature": 0,
        "cache_prompt": False,
        "reasoning_format": "none",  # thoughts are said as they come
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    server.handle_chat_completions(asked, hear)
    seconds = time.perf_counter() - started
    if not counts:
        raise RuntimeError("the answer broke off")
    answers = [{"text": "".join(parts), "tokens": counts[-1]}]
    return {"ok": True, "engine": name(), "answers": answers, "seconds": seconds}


def name() -> str:
    return f"xllamacpp {metadata.version('xllamacpp')}"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if request.get("aloud"):
        return answer_aloud(request)
    prompts, questions = request.get("prompts", ()), request.get("questions", ())
    top, filler = request.get("top", 20), request.get("filler")
    logprobs, answers = [], []
    if prompts:  # with an mmproj file the server takes no token ids
        server = load(request)
        logprobs = [next_tokens(server, prompt, top, filler) for prompt in prompts]
    if questions:
        server = load(request, request.get("mmproj"))
        answers = [ask(server, question, top, filler) for question in questions]
    broken = not all(math.isfinite(x) for found in logprobs for x in found.values())
    facts = {"engine": name(), "logprobs": logprobs, "answers": answers}
    return {"ok": not broken, **facts} | (
        {"error": "log probabilities are not finite"} if broken else {}
    )
