#!/usr/bin/env python3
"""Our tuner against auto-round: same model, samples, token budget and machine, one run after the
other.

    bench/tuner.py --model FOLDER --calibration TEXT.txt --held_out TEXT.txt
                   [--schemes W3g128 W2g64a ...] [--keep DIR]
    bench/tuner.py --model demo --methods rtn gptq sign_round auto
    bench/tuner.py --model EVIDENCE/model --schemes W3g128 --methods rtn auto

The last two have pictures: text and images calibrate, and KL is measured on each. EVIDENCE is what
scripts/join_evidence_model.py wrote (see bench/models/README.md).

Each method runs in a process of its own, which reports its seconds (quantizing only) and peak
memory, then the perplexity of the quantized model on held-out text and its KL divergence from full
precision. A scheme ending in `a` is asymmetric; float schemes (`NVFP4`, ours
alone) leave inputs as they are. Results go to standard output as Markdown and, with
--keep, to a dated file.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import kept

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"algorithm": "rtn"},
    "gptq": {"algorithm": "gptq"},
    "sign_round": {"algorithm": "sign_round"},
    "auto, no Fisher": {"fisher": False},
    "auto": {},
    "auto light": {"preset": "light"},
    "auto best": {"preset": "best"},
    "auto, polish": {"polish": True},
}
# Column -> key of a result, and its form. matmul: see `matmul_share`.
FIGURES = {"seconds": ("seconds", ".1f"), "CPU s": ("cpu", ".0f"), "peak GB": ("peak_gb", ".2f"),
           "perplexity": ("perplexity", ".3f"), "KL": ("kl", ".4f"), "KL image": ("kl_image",
               ".4f"),
           "accuracy": ("accuracy", ".1%"), "matmul": ("share", ".0%")}  # fmt: skip
PEERS: dict[str, dict[str, Any]] = {
    "auto-round": {},
    "auto-round alg_ext": {"enable_alg_ext": True},
}


def tokens(tokenizer: Any, path: Path, count: int, length: int) -> Any:
    """The first ``count`` rows of ``length`` tokens of a text, each opened by a BOS where the
    tokenizer itself puts one."""
    import torch

    first = tokenizer("a")["input_ids"][:1]
    bos = first if first == [tokenizer.bos_token_id] else []
    body = length - len(bos)
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    if len(ids) < count * body:
        sys.exit(f"{path}: {len(ids)} tokens, {count * body} needed")
    return torch.tensor([bos + ids[i * body : (i + 1) * body] for i in range(count)])


def matmul_rate() -> float:
    """What the machine makes of bf16 products, in operations a second: the best of five of 2048 x
    2048 x 2048."""
    import torch

    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds[1:])


def matmul_share(job: dict[str, Any], model: Any, reports: list[Any], rows: Any) -> float:
    """Products with quantized weights during the sign steps (6 operations a weight and token, 2
    where only the held-out error is taken), a second, as a share of what the machine can do;
    attention and all else count as nothing."""
    from auto_mmround.numerics.tuner import held_out_split, looked_at
    from auto_mmround.recipe.recipe import from_mapping

    recipe = from_mapping(METHODS[job["method"]] | job["options"])
    spent = sum(report.steps_seconds for report in reports)
    if not spent:
        return float("nan")
    weights = sum(
        p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2
    )
    looks = sum(looked_at(step, recipe.steps) for step in range(1, recipe.steps + 1))
    tokens = 6 * recipe.batch * recipe.steps + 2 * len(held_out_split(len(rows))[1]) * looks
    return weights * tokens * rows.shape[1] / spent / matmul_rate()


def scheme_of(job: dict[str, Any]) -> dict[str, Any]:
    """Bits, group size and symmetry, of floats their kind too; nothing for full precision."""
    keys = ("bits", "group_size", "sym", "data_type", "act_bits", "format")
    return {key: job[key] for key in keys if key in job}


def named(scheme: str) -> dict[str, Any]:
    """What `W4g128`, `W4g128a` or a float scheme (`NVFP4`) says of the weights; inputs stay."""
    from auto_mmround.recipe.schemes import SCHEMES

    if scheme in SCHEMES:
        return SCHEMES[scheme] | {"act_bits": 32, "format": "compressed_tensors"}
    return kept.scheme(scheme)


def by_peer(
    job: dict[str, Any], model: Any, tokenizer: Any, samples: list[Any], length: int, **options: Any
) -> Any:
    """The model as auto-round leaves it, with dequantized weights."""
    from auto_round import AutoRound

    from auto_mmround.model.devices import products

    options |= scheme_of(job) | PEERS[job["method"]] | job["options"]
    peer = AutoRound(
        model,
        tokenizer,
        dataset=samples,
        nsamples=len(samples),
        seqlen=length,
        device_map="cpu",
        **options,
    )
    with products(model.device, model.dtype):  # as ours have them
        return peer.quantize()[0]


def quantize(job: dict[str, Any], model: Any, tokenizer: Any, rows: Any) -> Any:
    """Run one method on the model in memory; returns the model with dequantized weights, and
    reports of ours."""
    if job["method"] in PEERS:
        return (
            by_peer(
                job, model, tokenizer, [row[None] for row in rows], rows.shape[1], batch_size=8
            ),
            None,
        )
    from auto_mmround import AutoRoundMLLM

    ours = AutoRoundMLLM(
        model, tokenizer, dataset=[{"input_ids": row.tolist()} for row in rows], nsamples=len(rows),
        seqlen=rows.shape[1], device="cpu",
        **scheme_of(job) | METHODS[job["method"]] | job["options"],
    )  # fmt: skip
    return ours.quantize()[0], ours.reports


def damage(model: Any, reference: Any, rows: Any) -> dict[str, float]:
    """Perplexity, and KL from the reference in nats a token, over held-out rows."""
    import torch

    loss = kl = 0.0
    with torch.inference_mode():
        for row in rows:
            ids = row[None]
            got = model(input_ids=ids).logits[0].float().log_softmax(-1)
            want = reference(input_ids=ids).logits[0].float().log_softmax(-1)
            loss -= got[:-1].gather(1, ids[0, 1:, None]).mean().item()
            kl += (want.exp() * (want - got)).sum(-1).mean().item()
    return {"perplexity": float(torch.tensor(loss / len(rows)).exp()), "kl": kl / len(rows)}


def with_pictures(model: str) -> bool:
    """Is it the bundled model, or a folder that has data with pictures beside it?"""
    return model == "demo" or (Path(model).parent / "heldout" / "vqa.json").is_file()


def sets(model: str, folder: str, names: tuple[str, ...]) -> tuple[str, str | None]:
    """A dataset argument and where its media lie: of the bundled model, or of a folder beside the
    model."""
    if model == "demo":
        return "demo", None
    beside = Path(model).parent / folder
    return ",".join(str(beside / name) for name in names), str(beside)


def pictured(job: dict[str, Any]) -> dict[str, Any]:
    """One method on a vision-language model, text and images in its calibration; KL by
    modality."""
    from auto_mmround.evaluate.held_out import held_out
    from auto_mmround.evaluate.metrics import measure
    from auto_mmround.recipe.recipe import Recipe
    from auto_mmround.run import job as jobs
    from auto_mmround.run.finished import Finished
    from auto_mmround.run.pipeline import quantize as run_pipeline

    options = scheme_of(job) | (
        METHODS[job["method"]] | job["options"] if job["method"] in METHODS else {}
    )
    dataset, media = sets(job["model"], "calibration", ("text.jsonl", "llava.json"))
    recipe = Recipe(
        model=job["model"], dataset=dataset, extra_data_dir=media, nsamples=job["samples"],
        device="cpu", **options,
    )  # fmt: skip
    loaded, reference = jobs.load_model(recipe), jobs.load_model(recipe).model
    prepared = jobs.prepare(recipe, loaded)
    started, used = time.perf_counter(), time.process_time()
    model: Any = loaded.model
    if job["method"] in PEERS:
        samples, longest = (
            [s.kwargs for s in prepared.inputs],
            max(len(s.modality_T) for s in prepared.inputs),
        )
        one_by_one = {
            "processor": loaded.processor,
            "batch_size": 1,
            "gradient_accumulate_steps": 8,
        }
        model = by_peer(job, model, loaded.tokenizer, samples, longest, **one_by_one)
    elif job["method"] != "full precision":
        run_pipeline(model, prepared.recipe, prepared.plan, prepared.inputs, Finished())
    result = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - used}
    result |= {"peak_gb": kept.peak_gb()}
    inputs = [
        sample
        for names in ([("",)] if job["model"] == "demo" else [("text.jsonl",), ("vqa.json",)])
        for held, media in [sets(job["model"], "heldout", names)]
        for sample in held_out(loaded, held, extra_data_dir=media, limit=job["held_rows"])
    ]
    (found,) = measure([model], inputs, reference=reference)
    assert found.perplexity is not None and found.accuracy is not None
    return result | {
        "perplexity": found.perplexity, "kl": found.kl["text"], "kl_image": found.kl["image"],
        "accuracy": found.accuracy,
    }  # fmt: skip


def worker(job: dict[str, Any]) -> None:
    """One method in this process; the last line of standard output is its result as JSON."""
    if with_pictures(job["model"]):
        print(json.dumps(pictured(job)))
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    load = {"dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(job["model"], **load).eval()
    rows = tokens(tokenizer, Path(job["calibration"]), job["samples"], job["length"])
    held = tokens(
        tokenizer, Path(job["held_out"]), job["held_from"] + job["held_rows"], job["length"]
    )[job["held_from"] :]
    started = time.perf_counter()
    result: dict[str, Any] = {"seconds": 0.0, "cpu": 0.0, "peak_gb": kept.peak_gb()}
    if job["method"] != "full precision":
        used = time.process_time()
        model, reports = quantize(job, model, tokenizer, rows)
        result["seconds"], result["cpu"] = time.perf_counter() - started, time.process_time() - used
        result["share"] = matmul_share(job, model, reports, rows) if reports else float("nan")
        result["peak_gb"] = kept.peak_gb()
    reference = AutoModelForCausalLM.from_pretrained(job["model"], **load).eval()
    print(json.dumps(result | damage(model, reference, held)))


def cells(result: dict[str, Any]) -> list[str]:
    """A result as text; what was not measured is empty."""
    if "error" in result:
        return [result["error"]]
    values = [(result.get(key, math.nan), form) for key, form in FIGURES.values()]
    return ["" if math.isnan(value) else f"{value:{form}}" for value, form in values]


def run(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """The worker's result, from a file of an earlier run where there is one; else its last line of
    complaint."""
    if path.is_file():
        return json.loads(path.read_text())
    result = kept.answer(__file__, job)
    if "error" not in result:
        path.write_text(json.dumps(result))
    return result


def asked() -> argparse.Namespace:
    """The command line."""
    parser = kept.options(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--held_out")
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=["W4g128", "W3g128", "W2g64", "W4g128a", "W3g128a", "W2g64a"],
    )
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *PEERS])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--held_rows", type=int, default=16)
    parser.add_argument(
        "--held_from", type=int, default=0, help="rows of the held-out text to pass over"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".bench/tuner"), help="results of single runs; kept"
    )
    parser.add_argument(
        "--options", type=json.loads, default={}, help="more options of every method, JSON"
    )
    parser.add_argument("--title", default="tuner", help="of the file that is kept")
    return parser.parse_args()


def main() -> None:
    """Full precision, then every scheme by every method."""
    found = asked()
    if found.worker:
        worker(json.loads(found.worker))
        return
    work = kept.work_folder(found, "schemes", "methods", "title")
    names = ("model", "calibration", "held_out", "samples", "length", "held_rows", "held_from")
    base = {name: getattr(found, name) for name in (*names, "options")}
    schemes: dict[str, dict[str, Any]] = {name: named(name) for name in found.schemes}
    table = kept.Table("scheme", "method", *FIGURES)
    for scheme, values in ({"-": {}} | schemes).items():
        for method in found.methods if values else ["full precision"]:
            job = base | values | {"method": method}
            table.add(scheme, method, *cells(run(job, work / f"{scheme} {method}.json")))
    kept.keep(found.keep, found.title, found.title.capitalize(), table)


if __name__ == "__main__":
    main()
