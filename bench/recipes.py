#!/usr/bin/env python3
"""Recipes against llm-compressor's: GPTQ, and SmoothQuant + GPTQ at W8A8, with the same settings on
the same samples.

    bench/recipes.py --gemma FOLDER --calibration A.txt --held_out B.txt --whisper FOLDER
                     [--work DIR] [--keep DIR]

Three models: a text model, Whisper (flite and espeak-ng speech, calibration in one voice, test in
two), the bundled one. Each method runs in a process of its own, on one thread, the peer in its
environment (scripts/engines.sh llmcompressor); what is found stays in --work, so a run that is cut
off goes on where it stopped. Run it as `taskset -c 0`, so that ours and the peer share one core's
worth of luck.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kept
import speech
import whisper
from recipes_cases import CASES, METHODS, SAME, SCHEMES, THEIRS
from recipes_tables import tables
from whisper import FULL

HERE = Path(__file__).parent
PEER = HERE.parent / ".engines" / "llmcompressor" / "bin" / "python"
VOICES = ("flite-slt", "espeak-ng")
FIRST_ROW = 40  # of the held-out text: earlier rows served to choose defaults


# --------------------------------------------------------------------------------------------------
# one method


def recipe_of(job: dict[str, Any]) -> Any:
    """Our recipe for a job; llm-compressor's is made of the same values."""
    from auto_mmround.recipe.recipe import from_mapping

    smooth = {"equalize": "smoothquant", "smoothing_strength": 0.8, "mappings": job["mappings"]}
    values = (
        CASES[job["case"]]["recipe"]
        | SCHEMES[job["scheme"]]
        | METHODS.get(job["method"], {"algorithm": "gptq"})
    )
    values |= smooth if job["mappings"] else {}
    return from_mapping(
        values
        | {
            "model": job["model"],
            "device": "cpu",
            "nsamples": job["samples"],
            "model_dtype": job["dtype"],
            "format": "compressed_tensors",
        }
    )


def prepared(job: dict[str, Any]) -> Any:
    """Our `Job`, with the calibration samples."""
    from tuner import tokens

    from auto_mmround.run import job as jobs

    recipe = recipe_of(job)
    loaded = jobs.load_model(recipe)
    rows: Any = job.get("speech")
    if job["case"] == "gemma":
        ids = tokens(loaded.tokenizer, Path(job["calibration"]), job["samples"], recipe.seqlen)
        rows = [{"input_ids": row.tolist()} for row in ids]
    return jobs.prepare(recipe, loaded, rows)


def order_of(job: dict[str, Any], prepared_job: Any) -> dict[str, Any]:
    """What recipes_peer.py is asked; its files lie beside the job's result."""
    stem = Path(job["result"]).with_suffix("")
    case, recipe = CASES[job["case"]], prepared_job.recipe
    return {
        "model": str(prepared_job.loaded.source),
        "class": case["class"],
        "ignore": recipe.ignore,
        "dtype": job["dtype"],
        "pipeline": case.get("pipeline", "sequential"),
        "scheme": {"sym": True} | SCHEMES[job["scheme"]],
        "dampening": recipe.dampening,
        "length": recipe.seqlen,
        "smoothing": recipe.smoothing_strength if job["mappings"] else None,
        "mappings": job["mappings"],
        "sequential_targets": recipe.sequential_targets,
        "samples": f"{stem}-samples.safetensors",
        "weights": f"{stem}-weights.safetensors",
        "result": f"{stem}-peer.json",
    }


def by_peer(job: dict[str, Any], prepared_job: Any) -> dict[str, Any]:
    """llm-compressor's figures; our copy of the model gets the weights that it has found."""
    from safetensors.torch import load_file, save_file

    from auto_mmround.model.chains import as_dtype

    stem, model = Path(job["result"]).with_suffix(""), prepared_job.loaded.model
    order = order_of(job, prepared_job)
    samples = {}
    for i, sample in enumerate(prepared_job.inputs):
        for name, value in as_dtype(sample.kwargs, model.dtype).items():
            samples[f"{i}.{name}"] = value.contiguous().clone()
    save_file(samples, order["samples"])
    Path(f"{stem}-job.json").write_text(json.dumps(order))
    with open(f"{stem}-log.txt", "w") as log:
        command = [str(PEER), str(HERE / "recipes_peer.py"), f"{stem}-job.json"]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    weights = load_file(order["weights"])
    wanted = {f"{name}.weight" for name in prepared_job.plan.quantized}
    others = [name for name in weights if name not in wanted and "norm" not in name]
    if others or not wanted <= weights.keys():
        sys.exit(
            f"{job['case']}: llm-compressor quantized other layers:"
            f" {sorted(wanted ^ weights.keys())[:4]}"
        )
    model.load_state_dict(weights, strict=False)
    for name in ("samples", "weights"):
        Path(order[name]).unlink()
    return json.loads(Path(order["result"]).read_text())


def by_us(prepared_job: Any) -> dict[str, Any]:
    """Our figures; the model in memory holds the dequantized weights afterwards."""
    from auto_mmround.run.finished import Finished
    from auto_mmround.run.pipeline import quantize

    wall, spent = time.perf_counter(), time.process_time()
    quantize(
        prepared_job.loaded.model,
        prepared_job.recipe,
        prepared_job.plan,
        prepared_job.inputs,
        Finished(),
    )
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - spent,
        "peak_gb": kept.peak_gb(),
    }


def watch_activations(prepared_job: Any) -> None:
    """Round the inputs of the quantized layers to 8 bits, a scale a token, as engines do; for ours
    and the peer's."""
    from auto_mmround.numerics.activations import integers_a_token

    for name, scheme in prepared_job.plan.quantized.items():
        layer = prepared_job.loaded.model.get_submodule(name)
        bits = scheme.act_bits
        layer.register_forward_pre_hook(
            lambda _, given, bits=bits: (integers_a_token(given[0], bits), *given[1:])
        )


def text_figures(job: dict[str, Any], prepared_job: Any) -> dict[str, Any]:
    """KL by modality, perplexity, accuracy of answers and of the next token, on held-out data."""
    import torch
    from tuner import tokens

    from auto_mmround.calibration.inputs import TEXT, ModelInput
    from auto_mmround.evaluate.held_out import held_out
    from auto_mmround.evaluate.metrics import measure
    from auto_mmround.run import job as jobs

    loaded, limit = prepared_job.loaded, job["rows"]
    if job["case"] == "demo":
        inputs = held_out(loaded, "demo", limit=job["answers"])
    else:
        ids = tokens(loaded.tokenizer, Path(job["held_out"]), FIRST_ROW + limit, 256)[FIRST_ROW:]
        modality_T, all_T = torch.full((256,), TEXT), torch.ones(256, dtype=torch.bool)
        inputs = [
            ModelInput(str(i), {"input_ids": row[None]}, modality_T, all_T)
            for i, row in enumerate(ids)
        ]
    reference = jobs.load_model(prepared_job.recipe).model
    (found,) = measure([loaded.model], inputs, reference=reference)
    return found.as_dict() | {"next_token": found.hits / found.tokens, "tokens": found.tokens}


def worker(job: dict[str, Any]) -> None:
    """One method; the result goes to a file."""
    import logging

    import torch
    import transformers

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    found = prepared(job)
    result: dict[str, Any] = {}
    if job["method"] != FULL:
        result = by_peer(job, found) if job["method"] == THEIRS else by_us(found)
        if SCHEMES[job["scheme"]]["act_bits"] == 8:
            watch_activations(found)
    with torch.no_grad():
        if job["case"] == "whisper":
            result["voices"] = whisper.by_voice(job, found.loaded)
        else:
            result |= text_figures(job, found)
    Path(job["result"]).write_text(json.dumps(result, indent=1))


# --------------------------------------------------------------------------------------------------
# everything


def jobs_of(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """What there is to run, full precision of each model first."""
    base = {
        "work": str(asked.work),
        "samples": asked.samples,
        "rows": asked.rows,
        "answers": asked.answers,
    }
    base |= {"calibration": asked.calibration, "held_out": asked.held_out, "dtype": asked.dtype}
    models = {"demo": "demo", "gemma": asked.gemma, "whisper": asked.whisper}
    jobs = []
    for case in [case for case in asked.cases if models[case]]:
        job = base | {"case": case, "model": models[case]}
        if case == "whisper":
            texts = speech.sentences(per_clip=6) + held_out_passages(asked.passages)
            job["test"] = {
                voice: str(speech.speak(asked.work / "test", voice, texts)) for voice in VOICES
            }
            said = speech.passages(asked.samples)
            job["speech"] = str(speech.speak(asked.work / "calibration", VOICES[0], said))
        for scheme, method in [("-", FULL), *runs_of(case)]:
            path = asked.work / f"{case}-{scheme}-{method}.json".replace(" ", "-").replace(",", "")
            norms = CASES[case]["norms"] if SCHEMES[scheme]["act_bits"] == 8 else ()
            readers = (
                ["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"],
                ["re:.*gate_proj", "re:.*up_proj"],
            )
            pairs = [[read, f"re:.*{norm}"] for read, norm in zip(readers, norms)] or None
            jobs.append(
                job | {"scheme": scheme, "method": method, "mappings": pairs, "result": str(path)}
            )
    return jobs


def runs_of(case: str) -> list[tuple[str, str]]:
    """(scheme, method) of all that is compared on a model."""
    return [(scheme, m) for scheme, methods in CASES[case]["runs"].items() for m in methods]


def held_out_passages(count: int) -> list[str]:
    """Passages of the bundled held-out text, as long as those of calibration."""
    corpus = speech.CORPUS.parent.parent / "heldout" / "text.jsonl"
    words = [
        json.loads(line)["text"].split() for line in corpus.read_text(encoding="utf-8").splitlines()
    ]
    return [" ".join(row[: speech.PASSAGE]) for row in words[:count]]


def options() -> argparse.Namespace:
    """The command line."""
    parser = kept.options(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--gemma", help="folder of Gemma 3 270M")
    parser.add_argument("--whisper", help="folder of Whisper base")
    parser.add_argument("--calibration", help="text for Gemma")
    parser.add_argument("--held_out", help=f"text for Gemma, used from row {FIRST_ROW} on")
    parser.add_argument("--work", type=Path, default=Path(".bench/recipes"))
    parser.add_argument(
        "--dtype", default="bfloat16", help="of all models; float32 where bfloat16 is emulated"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of 256 tokens")
    parser.add_argument(
        "--answers", type=int, default=100, help="held-out questions of the bundled model"
    )
    parser.add_argument(
        "--passages", type=int, default=30, help="held-out passages spoken, beside the sentences"
    )
    parser.add_argument(
        "--no_runs", action="store_true", help="tables of the results that are there"
    )
    return parser.parse_args()


def main() -> None:
    """Every job that has no result yet, then the tables."""
    asked = options()
    if asked.worker:
        return worker(json.loads(asked.worker))
    if not PEER.is_file():
        sys.exit("llm-compressor is missing: scripts/engines.sh llmcompressor")
    kept.work_folder(asked, "cases", "no_runs")
    found = {}
    for job in jobs_of(asked):
        key, there = (job["case"], job["scheme"], job["method"]), Path(job["result"]).is_file()
        if not there:
            if asked.no_runs:
                continue
            print(*key, flush=True)
        found[key] = kept.result(__file__, job, os.environ | {"OMP_NUM_THREADS": "1"})
    text = tables(found)
    print(text)
    keep(asked, found, text)


def keep(
    asked: argparse.Namespace, found: dict[tuple[str, str, str], dict[str, Any]], text: str
) -> None:
    """The dated file of results."""
    peers = next((found[key]["versions"] for key in found if key[2] == THEIRS), {})
    explained = (
        f"{asked.samples} calibration samples (256 tokens; 64-word passages in one voice for"
        f" Whisper), the same for all. Dampening {SAME['dampening']}, activation order"
        f" {SAME['actorder']} (llm-compressor: static), {asked.dtype}, one thread; `auto` has its"
        " own defaults. W8A8: SmoothQuant 0.8 before GPTQ, inputs rounded to 8 bits, a scale a"
        " token. Seconds are of quantizing alone. KL is from full precision, nats a token; in"
        " brackets the share of full precision's accuracy; intervals of WER are of differences in"
        " points, 95 %, bootstrap over clips. llm-compressor's sequential pipeline fails on"
        " Whisper: its basic one there, in which no layer sees what those before it got wrong."
    )
    wanted = [(case, *run) for case in asked.cases for run in runs_of(case)]
    missing = [" ".join(key) for key in wanted if key not in found]
    parts = [explained, text, f"{THEIRS}: {json.dumps(peers)}"]
    parts += [f"Not run: {', '.join(missing)}."] if missing else []
    kept.keep(asked.keep, "recipes", "Recipes", *parts)


if __name__ == "__main__":
    main()
