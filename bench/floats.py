#!/usr/bin/env python3
"""Float grids and rounded inputs against auto-round and llm-compressor: KL by modality with
activations rounded as engines round them, on the same samples.

    bench/floats.py [--model demo] [--schemes NVFP4 MXFP4 ...] [--methods rtn auto auto-round ..]
    bench/floats.py --model FOLDER --dataset TEXT --held_out TEXT

Each cell is a process and is kept in --work: a run that was cut off goes on where it stopped. What
is compared are weights: every method's are put into our copy of the model, whose layers then round
their inputs by the same function. All compute in --model_dtype, float32: what bfloat16 rounds on
the way is more than 8 bits damage. Results go to standard output as Markdown and, with --keep, to a
dated file.
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import kept

HERE = Path(__file__).parent
PEER = HERE.parent / ".engines/llmcompressor/bin/python"
OURS: dict[str, dict[str, Any]] = {
    "rtn": {"algorithm": "rtn"},
    "gptq": {"algorithm": "gptq"},
    "auto": {"algorithm": "auto"},
    "auto, smoothquant": {"algorithm": "auto", "equalize": "smoothquant"},
    "auto, hadamard": {"algorithm": "auto", "equalize": "hadamard", "untie_lm_head": True},
}
FLOOR = "inputs alone"  # weights as they are: what their tuning starts from
AUTO_ROUND: dict[str, dict[str, Any]] = {
    "auto-round": {},
    "auto-round alg_ext": {"enable_alg_ext": True},
}
COMPRESSOR: dict[str, dict[str, Any]] = {
    "llm-compressor gptq": {},
    "llm-compressor gptq, mse": {"observer": {"NVFP4": "nvfp4-expanded-mse"}},  # else "mse"
}
_TOKEN = {"act_group_size": -1, "act_sym": True, "act_dynamic": True}
# Our scheme -> what auto-round and llm-compressor are told.
SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "NVFP4": ({"scheme": "NVFP4"}, "NVFP4"),
    "MXFP4": ({"scheme": "MXFP4"}, "MXFP4"),
    "FP8": (
        {"bits": 8, "group_size": -1, "data_type": "fp", "act_bits": 8, "act_data_type": "fp"}
        | _TOKEN,
        "FP8_DYNAMIC",
    ),
    "W8A8": (
        {"bits": 8, "group_size": -1, "sym": True, "act_bits": 8, "act_data_type": "int"} | _TOKEN,
        "W8A8",
    ),
    "W4A8": (
        {"bits": 4, "group_size": 128, "sym": True, "act_bits": 8, "act_data_type": "int"} | _TOKEN,
        "W4A8",
    ),
}
# Schemes of ours alone -> keys of a recipe. Those ending in A16 leave inputs as they are.
ALONE: dict[str, dict[str, Any]] = {
    name: {"scheme": name}
    for name in ("W4AFP8", "FP8_STATIC", "FP8_TENSOR", "FP8_BLOCK", "MXFP8", "NVFP4A16",
                 "MXFP4A16", "W8A16", "W4A16")
} | {
    "FP8A16": {"scheme": "FP8", "act_bits": 16},
    "FP8_BLOCKA16": {"scheme": "FP8_BLOCK", "act_bits": 16},
    "MXFP8A16": {"scheme": "MXFP8", "act_bits": 16},
}  # fmt: skip


def by_auto_round(job: dict[str, Any], prepared: Any) -> None:
    """Our copy of the model holds the weights that auto-round finds, in its own layers."""
    import torch
    from auto_round import AutoRound

    from auto_mmround.model.devices import products

    loaded, model = prepared.loaded, prepared.loaded.model
    lengths = {len(sample.modality_T) for sample in prepared.inputs}
    parts = 1 if len(lengths) == 1 else 8  # samples of one length go side by side
    peer = AutoRound(
        model, loaded.tokenizer, processor=loaded.processor, device_map="cpu",
        dataset=[sample.kwargs for sample in prepared.inputs], nsamples=len(prepared.inputs),
        seqlen=max(lengths), batch_size=8 // parts, gradient_accumulate_steps=parts,
        seed=job["seed"],
        amp=model.dtype != torch.float32,
        **SCHEMES[job["scheme"]][0], **AUTO_ROUND[job["method"]], **job["auto_round"],
    )  # fmt: skip
    with products(model.device, model.dtype):  # as ours have them
        peer.quantize()
    # what it puts around layers rounds inputs, too
    for name, module in list(model.named_modules()):
        if hasattr(module, "orig_layer"):
            model.set_submodule(name, module.orig_layer)


def by_compressor(job: dict[str, Any], prepared: Any) -> None:
    """The same by llm-compressor, in its own environment."""
    from safetensors.torch import load_file, save_file

    from auto_mmround.model.chains import as_dtype

    stem, model = Path(job["result"]).with_suffix(""), prepared.loaded.model
    scheme = {"preset": SCHEMES[job["scheme"]][1]}
    for key, values in COMPRESSOR[job["method"]].items():
        scheme[key] = values.get(job["scheme"], "mse")
    order = {
        "model": str(prepared.loaded.source), "class": type(model).__name__,
        "ignore": [f"re:^(?!({'|'.join(prepared.plan.quantized)})$).*"],
        "dtype": str(model.dtype).removeprefix("torch."), "pipeline": job["pipeline"],
        "scheme": scheme, "dampening": 0.01, "length": 4096, "smoothing": None, "mappings": None,
        "sequential_targets": None,
    } | {part: f"{stem}-{part}" for part in ("samples", "weights", "result")}  # fmt: skip
    samples = {
        f"{i}.{name}": value.contiguous().clone()
        for i, sample in enumerate(prepared.inputs)
        for name, value in as_dtype(sample.kwargs, model.dtype).items()
    }
    save_file(samples, order["samples"])
    Path(f"{stem}-job").write_text(json.dumps(order))
    with open(f"{stem}-log", "w") as log:
        command = [str(PEER), str(HERE / "recipes_peer.py"), f"{stem}-job"]
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(Path(log.name).read_text().strip().splitlines()[-1])
    weights = load_file(order["weights"])
    wanted = {f"{name}.weight" for name in prepared.plan.quantized}
    # it adds 1 to the weights of Gemma's norms and takes it off again, which rounds them
    weights = {name: tensor for name, tensor in weights.items() if tensor.ndim > 1}
    if wanted != weights.keys():
        sys.exit(f"it quantized other layers: {sorted(wanted ^ weights.keys())[:4]}")
    model.load_state_dict(weights, strict=False)
    figures = json.loads(Path(order["result"]).read_text())
    job["peer"] = {"seconds": figures["seconds"], "cpu": figures["cpu_seconds"]}


def by_us(prepared: Any) -> Any:
    """The same by ours; what was found of inputs."""
    from auto_mmround.run.finished import Finished
    from auto_mmround.run.pipeline import quantize

    finished = Finished()
    quantize(prepared.loaded.model, prepared.recipe, prepared.plan, prepared.inputs, finished)
    return finished.codes


def worker(job: dict[str, Any]) -> None:
    """One method; the result goes to a file."""
    from auto_mmround.evaluate.held_out import held_out
    from auto_mmround.evaluate.metrics import measure
    from auto_mmround.model.loading import load
    from auto_mmround.recipe.recipe import from_mapping
    from auto_mmround.run import job as jobs
    from auto_mmround.run.session import Session
    from auto_mmround.run.static_inputs import input_scales

    same = "model", "model_dtype", "dataset", "nsamples", "seqlen", "seed"
    keys = {key: job[key] for key in same}
    keys |= {"device": "cpu", "format": "compressed_tensors"} | OURS.get(job["method"], {})
    recipe = from_mapping(keys | ALONE.get(job["scheme"], {"scheme": job["scheme"]}))
    prepared = jobs.prepare(recipe, jobs.load_model(recipe))
    reference = load(job["model"], dtype=job["model_dtype"])
    model = prepared.loaded.model
    session = Session(model, prepared.recipe, prepared.plan, prepared.inputs)
    started, used = time.perf_counter(), time.process_time()
    if job["method"] in OURS:
        session.served.take(by_us(prepared))
        result = {"cpu": time.process_time() - used}
    else:
        if job["method"] != FLOOR:
            (by_auto_round if job["method"] in AUTO_ROUND else by_compressor)(job, prepared)
        result = {"cpu": time.process_time() - used}
        session.served.measured |= input_scales(session, prepared.plan.weights)
    result["seconds"] = time.perf_counter() - started
    result |= job.get("peer", {})
    longest = {"seqlen": job["seqlen"]} if job["seqlen"] else {}
    rows = held_out(reference, job["held_out"] or job["dataset"], limit=job["rows"], **longest)
    with session.served.rounding(model, prepared.plan.weights):
        (found,) = measure([model], rows, reference=reference.model)
    result |= {"kl": found.kl, "perplexity": found.perplexity, "peak_gb": kept.peak_gb()}
    Path(job["result"]).write_text(json.dumps(result, indent=1))


def tried(job: dict[str, Any]) -> dict[str, Any]:
    """The cell's result, or in one line why there is none. That is kept, too."""
    path = Path(job["result"])
    if path.is_file():
        return json.loads(path.read_text())
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=job["limit"] or None
        )
        lines = done.stderr.strip().splitlines() or ["no output"]
    except subprocess.TimeoutExpired:
        lines = [f"cut off after {job['limit']} s"]
    if not path.is_file():
        path.write_text(json.dumps({"error": lines[-1][:160]}))
    return json.loads(path.read_text())


def cells(result: dict[str, Any]) -> list[str]:
    """KL by modality, perplexity and seconds as text, or what went wrong."""
    if "error" in result:
        return [result["error"], "", "", ""]
    kl = " / ".join(f"{value:.5f}" for value in result["kl"].values())
    figures = (f"{result['perplexity']:.3f}", f"{result['seconds']:.0f}", f"{result['cpu']:.0f}")
    return [f"{kl} ({' / '.join(result['kl'])})", *figures]


def verdicts(found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """For each scheme our KL and seconds as shares of the best peer's, by modality."""
    lines = []
    for scheme in dict.fromkeys(scheme for scheme, _ in found):
        done = {m: r for (s, m), r in found.items() if s == scheme and "kl" in r}
        peers = [r for m, r in done.items() if m in AUTO_ROUND or m in COMPRESSOR]
        if "auto" not in done or not peers:
            continue
        shares = [
            f"{kind} {done['auto']['kl'][kind] / min(peer['kl'][kind] for peer in peers):.2f} x"
            for kind in done["auto"]["kl"]
        ]
        slow = [done[m]["seconds"] for m in AUTO_ROUND if m in done]
        time_ = f"; time {done['auto']['seconds'] / min(slow):.2f} x auto-round" if slow else ""
        aim = 0.7 if scheme in ("NVFP4", "MXFP4") else 0.8
        lines.append(f"- {scheme}: KL {', '.join(shares)} of the best peer (aim {aim}){time_}")
    return lines


def options() -> argparse.Namespace:
    """The command line."""
    parser = kept.options(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--model_dtype", default="float32")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--held_out")
    parser.add_argument("--schemes", nargs="+", default=[*SCHEMES], choices=[*SCHEMES, *ALONE])
    every = [FLOOR, *OURS, *AUTO_ROUND, *COMPRESSOR]
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--rows", type=int, default=128, help="held-out rows of each kind")
    parser.add_argument("--pipeline", default="sequential", help="of llm-compressor")
    parser.add_argument("--auto_round", type=json.loads, default={}, help="its options, JSON")
    parser.add_argument("--limit", type=float, default=0, help="seconds of a cell; 0: no limit")
    parser.add_argument("--work", type=Path, default=Path(".bench/floats"), help="cells; kept")
    return parser.parse_args()


def main() -> None:
    """Every scheme by every method."""
    asked = options()
    if asked.worker:
        worker(json.loads(asked.worker))
        return
    work = kept.work_folder(asked, "schemes", "methods", "limit")
    base = {k: v for k, v in vars(asked).items()
            if k not in ("worker", "schemes", "methods", "keep", "work")}  # fmt: skip
    table = kept.Table("scheme", "method", "KL", "perplexity", "seconds", "processor s")
    found = {}
    label = Path(asked.model).resolve().name
    for scheme, method in product(asked.schemes, asked.methods):
        if scheme in ALONE and (method in AUTO_ROUND or method in COMPRESSOR):
            continue
        name = f"{label}-{scheme}-{method}.json".replace(",", "").replace(" ", "-")
        job = base | {"scheme": scheme, "method": method, "result": str(work / name)}
        found[scheme, method] = tried(job)
        table.add(scheme, method, *cells(found[scheme, method]))
    lines = "\n".join(verdicts(found))
    print(lines)
    kept.keep(asked.keep, "floats", "Float grids and rounded inputs", table, lines, section=label)


if __name__ == "__main__":
    main()
