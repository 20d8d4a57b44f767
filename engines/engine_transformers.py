"""Loads one checkpoint through Transformers' own path and answers with logits.

An engine's interpreter runs it. It is standalone (standard library, torch, safetensors,
transformers), because this package is not installed there.

request: {"model": folder, "inputs": safetensors with tensors "<i>.<kwarg>", "output": safetensors
to write with "<i>.logits" float32, "dtype": "float32", "class": "AutoModelForImageTextToText",
"quantization": {overrides}, "activations": false}. activations: whether layers quantize their
inputs where the checkpoint asks for it.
"""

import json
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# The portable kernels: others are compiled on first use (minutes) or exist for a GPU only.
PORTABLE_BACKEND = {"gptq": "torch", "awq": "torch_awq"}
# auto-round's kernels force float32 models to float16 after loading, rotary tables too; loaded so,
# those stay exact.
LOAD_DTYPE = {"auto-round": "float16"}
PACKAGES = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "auto-round": ("auto-round",),
    "compressed-tensors": ("compressed-tensors",),
}


def load(request: dict[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """(model, loading info, quantization method) by `from_pretrained`, with portable kernels."""
    config = transformers.AutoConfig.from_pretrained(request["model"])
    quantization = getattr(config, "quantization_config", None)
    method = quantization["quant_method"] if quantization else "none"
    if quantization:
        backend = {"backend": PORTABLE_BACKEND[method]} if method in PORTABLE_BACKEND else {}
        config.quantization_config = {**quantization, **backend, **request.get("quantization", {})}
    dtype = getattr(torch, LOAD_DTYPE.get(method, request["dtype"]))
    model, info = getattr(transformers, request["class"]).from_pretrained(
        request["model"],
        config=config,
        dtype=dtype,
        device_map="cpu",
        output_loading_info=True,
        use_safetensors=True,
    )
    return model.eval(), info, method


def linear_classes(model: torch.nn.Module) -> tuple[dict[str, int], int]:
    """(class name -> count of Linear-like modules, number of quantized ones)."""
    # compressed-tensors keeps torch's Linear, gives it a scheme, and unpacks it in the first
    # forward pass. AutoRound's layers of floats have a weight_scale.
    marks = ("qweight", "quantization_scheme", "weight_scale")
    marked = [m for m in model.modules() if any(hasattr(m, mark) for mark in marks)]
    # attention has a scheme too, where the cache has one: of no weights
    schemes = [getattr(m, "quantization_scheme", None) for m in marked]
    quantized = [m for m, s in zip(marked, schemes) if s is None or s.weights is not None]
    linears = {
        id(m): m
        for m in (*quantized, *(m for m in model.modules() if isinstance(m, torch.nn.Linear)))
    }
    return dict(sorted(Counter(type(m).__name__ for m in linears.values()).items())), len(quantized)


def _of_experts_inputs(key: str) -> bool:
    return ".experts." in key and key.endswith(".input_scale")


def decoded_weights(folder: Path, model: torch.nn.Module) -> int:
    """The number of packed weights that loading decoded: all, if the configuration asks for that,
    else those of experts that are no layers in the model. compressed-tensors' stacks hold such.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys += list(file.keys())
    stored = {key.removesuffix(".weight_scale") for key in keys if key.endswith(".weight_scale")}
    if config["quantization_config"].get("dequantize", False):
        return len(stored)
    layers = {name for name, _ in model.named_modules()}
    return sum(".experts." in name for name in stored - layers)


def run_inputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits in float32 as `<i>.logits` for the inputs `<i>.<kwarg>`."""
    samples: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in inputs.items():
        index, _, kwarg = key.partition(".")
        samples.setdefault(index, {})[kwarg] = (
            tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        )
    with torch.inference_mode():
        return {
            f"{index}.logits": model(**kwargs).logits.float().contiguous()
            for index, kwargs in samples.items()
        }


def versions(method: str) -> str:
    names = ("transformers", *PACKAGES.get(method, ()))
    return " + ".join(f"{name} {metadata.version(name)}" for name in names)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    transformers.utils.logging.disable_progress_bar()
    # gptqmodel compiles its decoder: seconds lost for one question
    torch._dynamo.config.disable = True
    model, info, method = load(request)
    loaded = str(model.dtype).removeprefix("torch.")
    if loaded != request["dtype"]:  # the comparison is about weights, so compute as asked
        model = model.to(getattr(torch, request["dtype"]))
    classes, quantized = linear_classes(model)
    if method == "compressed-tensors" or (method != "none" and not quantized):
        quantized += decoded_weights(Path(request["model"]), model)
    missing = sorted(
        [*info["missing_keys"], *(str(key) for key in info.get("mismatched_keys", ()))]
    )
    # Transformers rounds no inputs of experts, so it has no use for their scales
    unexpected = sorted(k for k in info["unexpected_keys"] if not _of_experts_inputs(k))
    # else at the first pass, FP4 in bfloat16 whatever the model computes in
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)
        model = model.to(getattr(torch, request["dtype"]))
    if not request.get("activations", True):
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                module.quantization_enabled = False  # compressed-tensors' own switch
            elif hasattr(module, "qdq_input"):
                module.qdq_input = lambda x: x  # of AutoRound's layers of floats
    logits = run_inputs(model, load_file(request["inputs"]))
    save_file(logits, request["output"])
    broken = [name for name, tensor in logits.items() if not bool(torch.isfinite(tensor).all())]
    problems = [f"parameters were made up: {missing[:3]}"] * bool(missing)
    problems += [f"tensors were not used: {unexpected[:3]}"] * bool(unexpected)
    problems += [f"logits are not finite: {broken[:3]}"] * bool(broken)
    facts = {
        "engine": versions(method),
        "classes": classes,
        "quantized": quantized,
        "dtype": loaded,
    }
    verdict = {"ok": not problems, "missing": missing, "unexpected": unexpected}
    return facts | verdict | ({"error": "; ".join(problems)} if problems else {})
