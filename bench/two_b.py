#!/usr/bin/env python3
"""A run of real size: the text of Qwen2-VL-2B with real weights, its tower random.

    bench/two_b.py --text QWEN2.5-1.5B --dataset TEXT --held_out TEXT [--samples 128 --tokens 512]

Writes the model, asks `plan` what a run takes, runs `--preset light`, streamed, into four formats,
and verifies them; each is a process of its own, whose seconds, processor seconds and peak memory
are told. auto-round's default tunes the first of the blocks, one in --share, on the same samples;
its time is multiplied by that. KL is measured twice on held-out text: of the whole model, and of
those blocks in a model that is otherwise as it was. Each part is kept in --work, so that a run that
was cut off goes on where it stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kept

HERE = Path(__file__).parent
TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16}  # as published
FORMATS = "auto_round,compressed_tensors,gguf:q4_1,mlx"
SCHEME = {"bits": 4, "group_size": 32, "sym": False}  # what all of them hold


def write_model(text: Path, folder: Path) -> None:
    """The text model in a Qwen2-VL of that size."""
    sys.path.insert(0, str(HERE.parent / "scripts"))
    import evidence_model
    import torch

    model, processor = evidence_model.build(text, TOWER)
    draw = torch.Generator().manual_seed(0)
    for name, values in model.model.visual.named_parameters():
        if values.ndim > 1:
            values.normal_(0, 0.02, generator=draw)
        else:
            values.fill_(1.0 if name.endswith("norm.weight") or "ln_q.weight" in name else 0.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def run(command: list[str], log: Path) -> dict[str, float]:
    """Seconds, processor seconds and peak memory of a process. Exits where it fails."""
    print(" ".join(command), flush=True)
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed: {log.read_text().strip().splitlines()[-1:]}")
    return {
        "seconds": time.perf_counter() - started, "cpu": used.ru_utime + used.ru_stime,
        "peak_gb": used.ru_maxrss / 1e6,
    }  # fmt: skip


def rows_of(asked: argparse.Namespace, path: Path, count: int) -> Any:
    """Token ids (count, tokens), from the start of a text."""
    from transformers import AutoTokenizer
    from tuner import tokens

    return tokens(AutoTokenizer.from_pretrained(asked.text), path, count, asked.tokens)


def write_rows(asked: argparse.Namespace, path: Path) -> None:
    """The calibration rows as texts, each at least as long as a sample."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.text)
    ids = tokenizer(asked.dataset.read_text())["input_ids"]
    size = asked.tokens + 8  # a text that is cut may begin with other tokens
    if len(ids) < asked.samples * size:
        sys.exit(f"{asked.dataset}: {len(ids)} tokens, {asked.samples * size} needed")
    rows = (tokenizer.decode(ids[i * size : (i + 1) * size]) for i in range(asked.samples))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def by_peer(asked: argparse.Namespace, result: Path) -> None:
    """auto-round on the first blocks of the text model; keeps their weights."""
    import torch
    from auto_round import AutoRound
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(asked.text, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(asked.text)
    texts = map(json.loads, (asked.work / "rows.jsonl").read_text().splitlines())
    every = [tokenizer(row["text"])["input_ids"][: asked.tokens] for row in texts]
    count = len(model.model.layers) // asked.share
    started, used = time.perf_counter(), time.process_time()
    peer = AutoRound(
        model, tokenizer, dataset=[torch.tensor([ids]) for ids in every],
        nsamples=asked.samples, seqlen=asked.tokens, batch_size=8, device_map="cpu",
        to_quant_block_names=[[f"model.layers.{i}" for i in range(count)]], **SCHEME,
    )  # fmt: skip
    tuned = peer.quantize()[0]
    took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - used}
    weights = {
        f"{i}.{name}.weight": module.weight.detach().clone()
        for i, block in enumerate(tuned.model.layers[:count])
        for name, module in block.named_modules()
        if getattr(module, "weight", None) is not None
    }
    save_file(weights, result.with_suffix(".safetensors"))
    result.write_text(json.dumps(took))


def damage(asked: argparse.Namespace, result: Path) -> None:
    """KL of ours whole, of our first blocks, and of auto-round's."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from tuner import damage as measured

    from auto_mmround.checkpoint.loader import load_any

    rows = rows_of(asked, asked.held_out, asked.rows)
    original = AutoModelForCausalLM.from_pretrained(asked.text, dtype=torch.bfloat16)
    tuned = AutoModelForCausalLM.from_pretrained(asked.text, dtype=torch.bfloat16)
    ours = load_any(str(exports(asked)["auto_round"])).model.model.language_model
    count, found = len(ours.layers) // asked.share, {}
    with torch.no_grad():
        tuned.model.load_state_dict(ours.state_dict())
        found["ours"] = measured(tuned, original, rows)
        tuned.load_state_dict(original.state_dict())
        for i in range(count):
            tuned.model.layers[i].load_state_dict(ours.layers[i].state_dict())
        found["ours, first blocks"] = measured(tuned, original, rows)
        theirs = load_file(asked.work / "auto-round.safetensors")
        missed = tuned.model.layers[:count].load_state_dict(theirs, strict=False)
        if missed.unexpected_keys:
            sys.exit(f"auto-round left other tensors: {missed.unexpected_keys[:4]}")
        found["auto-round, first blocks"] = measured(tuned, original, rows)
    result.write_text(json.dumps(found))


def exports(asked: argparse.Namespace) -> dict[str, Path]:
    """Format -> folder."""
    names = [name.replace(":", "-") for name in FORMATS.split(",")]
    folders = [path for path in (asked.work / "out").iterdir() if path.is_dir()]
    return {
        name: next(path for path in folders if path.name.endswith(f"-{name}")) for name in names
    }


def part(asked: argparse.Namespace, name: str, do: Callable[[Path], object]) -> dict[str, Any]:
    """What is kept of a part; it is done where nothing is kept."""
    path = asked.work / f"{name}.json"
    if not path.is_file():
        done = do(path)
        if isinstance(done, dict):
            stated = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(done | stated, indent=1))
    return json.loads(path.read_text())


def process(command: list[str]) -> Callable[[Path], dict[str, float]]:
    """A part that is a process."""
    return lambda path: run(command, path.with_suffix(".log"))


def options() -> argparse.Namespace:
    """The command line."""
    parser = kept.options(__doc__)
    for name in ("text", "dataset", "held_out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="held-out rows")
    parser.add_argument("--share", type=int, default=4, help="auto-round tunes one block in that")
    parser.add_argument("--work", type=Path, default=Path(".bench/two_b"), help="parts; kept")
    parser.add_argument("--part", choices=("auto-round", "damage"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Part by part."""
    asked = options()
    kept.work_folder(asked, "part")
    if asked.part:
        {"auto-round": by_peer, "damage": damage}[asked.part](
            asked, asked.work / f"{asked.part}.json"
        )
        return
    rows = asked.work / "rows.jsonl"
    if not rows.is_file():
        write_rows(asked, rows)
    model, out = asked.work / "qwen2-vl-2b", asked.work / "out"
    if not (model / "config.json").is_file():
        write_model(asked.text, model)
    own = [sys.executable, *sys.argv, "--part"]
    cli = [str(Path(sys.executable).with_name("auto-round-mllm"))]
    recipe = [
        "--model", str(model), "--dataset", str(rows), "--preset", "light", "--stream",
        "--nsamples", str(asked.samples), "--seqlen", str(asked.tokens), "--device", "cpu",
        "--group_size", "32", "--asym", "--format", FORMATS, "--output_dir", str(out),
    ]  # fmt: skip
    logged = {"plan": [*cli, "plan", *recipe], "light": [*cli, *recipe]}
    table = kept.Table("part", "seconds", "processor s", "peak GB")
    for name, command in logged.items():
        took = part(asked, name, process(command))
        table.add(name, *shown(took))
    for name, folder in exports(asked).items():
        command = [*cli, "verify", str(folder), "--timeout", "3600"]
        took = part(
            asked, f"verify-{name}", lambda path, c=command: run(c, path.with_suffix(".log"))
        )
        table.add(f"verify {name}", *shown(took))
    took = part(asked, "auto-round", process([*own, "auto-round"]))
    table.add("auto-round, first blocks", *shown(took))
    whole = {key: asked.share * value for key, value in took.items()}
    table.add(f"{asked.share} times that", *shown(whole)[:2], "")
    kl = part(asked, "damage", process([*own, "damage"]))
    lines = [f"- KL {name}: {each['kl']:.4f}, perplexity {each['perplexity']:.3f}"
             for name, each in kl.items() if isinstance(each, dict)]  # fmt: skip
    lines += ["", "Plan:", "", "```", (asked.work / "plan.log").read_text().strip(), "```"]
    print("\n".join(lines))
    kept.keep(asked.keep, "two-b", "A run of real size", table, "\n".join(lines))


def shown(took: dict[str, float]) -> list[str]:
    """Cells of a row."""
    return [f"{took['seconds']:.0f}", f"{took['cpu']:.0f}", f"{took['peak_gb']:.2f}"]


if __name__ == "__main__":
    main()
