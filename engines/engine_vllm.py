"""Loads one checkpoint in vLLM on the processor and answers with logits.

The engine's interpreter runs it. It is standalone like `engine_transformers.py`, with the same
request and answer. It uses the inputs "<i>.input_ids" and "<i>.image<j>", uint8 (height, width, 3).
vLLM processes images itself and makes their placeholders; the ids must then equal those of the
request. A speech recogniser gets "<i>.decoder_input_ids" and "<i>.audio0", float32 (T,) at 16 kHz.

"dtype": of vLLM's computation and scales. "new_tokens": number of greedy tokens for each input, as
"<i>.tokens" in the output file. With "ends", ids of tokens that end an answer, there is one input,
and only its tokens are said one by one. "quantized" counts the checkpoint's matrices, since vLLM
fuses them.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from itertools import groupby
from typing import Any

# vLLM's own settings: one process, so that its model can be looked at; W4 weights with activations
# left as they are.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update(SETTINGS)
RATE = 16000
SOUND = 2048  # more than the positions of Whisper's encoder

import torch  # noqa: E402
from engine_main import aloud  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def import_vllm() -> Any:
    """The package, with a torchvision whose compiled half does not fit a processor-only torch.

    The import of that torchvision needs two operators to exist, not to work. vLLM inspects a
    model's class in another process, where they are missing, so here this process does it.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import vllm
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()
    vllm.torchvision_operators = library  # they exist as long as the library object does
    return vllm


def load(vllm: Any, request: dict[str, Any], longest: int, sound: bool) -> tuple[Any, Any]:
    """(vLLM's engine, the torch module inside it).

    sound: some inputs hold sound, which an encoder takes as a whole.
    """
    length = longest + request.get("new_tokens", 0) + 1
    engine = vllm.LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=length,
        # a prompt is never cut into chunks
        max_num_batched_tokens=max(length, SOUND) if sound else length,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_mm_profiling=True,
        disable_log_stats=True,
    )
    return engine, engine.llm_engine.model_executor.driver_worker.worker.model_runner.model


def linear_classes(model: torch.nn.Module) -> tuple[dict[str, int], int]:
    """("class, method" -> number of linear modules, number of quantized matrices in the file)."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
    )

    names, quantized = [], 0
    fused = getattr(model, "packed_modules_mapping", {})
    for name, module in model.named_modules():
        if not isinstance(module, (LinearBase, ParallelLMHead)):
            continue
        method = module.quant_method
        names.append(
            f"{type(module).__name__}, {type(getattr(module, 'scheme', None) or method).__name__}"
        )
        if not isinstance(method, (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)):
            quantized += len(fused.get(name.rpartition(".")[2], [name]))
    return dict(sorted(Counter(names).items())), quantized


def prompts(inputs: dict[str, torch.Tensor], placeholder: int | None) -> dict[str, dict[str, Any]]:
    """vLLM's prompts, one per input; vLLM expands one placeholder for each image itself.

    A sound goes to the encoder, and the ids beside it to the decoder.
    """
    made: dict[str, dict[str, Any]] = {}
    for key in sorted(inputs):
        index, _, part = key.partition(".")
        prompt = made.setdefault(index, {})
        if part == "input_ids":
            runs = groupby(inputs[key].flatten().tolist())
            prompt["prompt_token_ids"] = [
                t for token, run in runs for t in ([token] if token == placeholder else run)
            ]
        elif part == "decoder_input_ids":
            prompt["decoder_prompt"] = {"prompt_token_ids": inputs[key].flatten().tolist()}
        elif part == "audio0":
            data = {"audio": (inputs[key].numpy(), RATE)}
            prompt["encoder_prompt"] = {"prompt": "", "multi_modal_data": data}
        elif part.startswith("image"):
            images = prompt.setdefault("multi_modal_data", {}).setdefault("image", [])
            images.append(Image.fromarray(inputs[key].numpy()))
    return made


def run(
    vllm: Any, engine: Any, model: Any, prompt: dict[str, Any], count: int
) -> tuple[list[int], Any, list[int]]:
    """(prompt ids as vLLM expands them, logits (T, vocabulary) float32, greedy tokens)."""
    hidden: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _, args, output: hidden.append(output))
    wanted = vllm.SamplingParams(
        temperature=0, max_tokens=max(count, 1), ignore_eos=True, detokenize=False
    )
    result = engine.generate([prompt], wanted, use_tqdm=False)[0]
    hook.remove()
    ids = list(result.prompt_token_ids)
    with torch.inference_mode():
        logits = model.compute_logits(hidden[0][: len(ids)]).float()
    return ids, logits, list(result.outputs[0].token_ids[:count])


def spoken(
    vllm: Any, engine: Any, prompt: dict[str, Any], wanted: list[int], most: int
) -> Iterator[int]:
    """The greedy tokens after one prompt. Raises ValueError where vLLM expands the prompt to other
    ids than those wanted, and for log probabilities that are not finite."""
    params = vllm.SamplingParams(
        temperature=0,
        max_tokens=most,
        logprobs=0,  # of the token itself
        ignore_eos=True,
        detokenize=False,
        output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
    )
    # `LLM.generate` and `LLM.enqueue` give whole answers only
    engine.llm_engine.add_request("asked", prompt, params)
    while engine.llm_engine.has_unfinished_requests():
        for made in engine.llm_engine.step():
            if list(made.prompt_token_ids) != wanted:
                raise ValueError(
                    f"the prompt became {len(made.prompt_token_ids)} tokens, not {len(wanted)}"
                )
            (told,) = made.outputs
            chances = (chance for each in told.logprobs or () for chance in each.values())
            if not all(math.isfinite(chance.logprob) for chance in chances):
                raise ValueError("log probabilities are not finite")
            yield from told.token_ids


def answer(request: dict[str, Any]) -> dict[str, Any]:
    vllm = import_vllm()
    inputs = load_file(request["inputs"])
    wanted = {
        key.partition(".")[0]: ids.flatten().tolist()
        for key, ids in inputs.items()
        if key.endswith("input_ids")
    }
    sound = any(key.endswith("audio0") for key in inputs)
    engine, model = load(vllm, request, max(map(len, wanted.values())), sound)
    name = f"vllm-cpu {metadata.version('vllm-cpu')}"
    config = engine.llm_engine.model_config.hf_config
    made = prompts(inputs, getattr(config, "image_token_id", None))
    if "ends" in request:
        said = spoken(vllm, engine, made["0"], wanted["0"], request["new_tokens"])
        return {"engine": name} | aloud(said, request["ends"])
    classes, quantized = linear_classes(model)
    output, problems = {}, []
    for index, prompt in made.items():
        ids, logits, tokens = run(vllm, engine, model, prompt, request.get("new_tokens", 0))
        output[f"{index}.logits"] = logits[None].contiguous()
        output[f"{index}.tokens"] = torch.tensor([tokens], dtype=torch.int64)
        problems += [f"input {index} became {len(ids)} tokens, not {len(wanted[index])}"] * (
            ids != wanted[index]
        )
        problems += [f"logits of input {index} are not finite"] * (
            not bool(torch.isfinite(logits).all())
        )
    save_file(output, request["output"])
    facts = {"engine": name, "classes": classes, "quantized": quantized}
    facts |= {"dtype": request["dtype"], "ok": not problems}
    return facts | ({"error": "; ".join(problems)} if problems else {})
