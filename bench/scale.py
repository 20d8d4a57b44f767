"""Does memory grow with depth? `make bench-scale`: random Llamas of equal blocks and different
depth, streamed.

Each model is written shard by shard, quantized in a fresh process (rounded to nearest, then five
sign steps on a few short samples), and deleted. Prints and keeps the largest resident set
(`ru_maxrss`, mapped files included) of each run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import kept
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from auto_mmround.checkpoint.folder import write_config
from auto_mmround.export.shards import ShardWriter
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs

RESULTS = Path(__file__).parent / "results"
WIDTH = dict(
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=8192,
)
ALLOWED_GB, ALLOWED_BLOCKS, ALLOWED_SPREAD = 3.0, 4, 0.10


def config(layers: int) -> LlamaConfig:
    """A Llama of equal blocks of 134 MB."""
    return LlamaConfig(
        **WIDTH, num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        max_position_embeddings=256,
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Of 128 words: w0, w1 .."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2"
    )


def make(folder: Path, gigabytes: float) -> tuple[int, int, int]:
    """Write a random model of about that size; layers, its bytes and those of a block."""
    with torch.device("meta"):
        shapes = {
            key: tensor.shape for key, tensor in LlamaForCausalLM(config(1)).state_dict().items()
        }
    size = {key: 2 * shape.numel() for key, shape in shapes.items()}
    block = sum(count for key, count in size.items() if ".layers.0." in key)
    rest = sum(size.values()) - block
    layers = round((gigabytes * 1e9 - rest) / block)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    values = {
        key: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for key, shape in shapes.items()
    }
    writer = ShardWriter(folder, 2 * 10**9)
    for key, tensor in values.items():
        for i in range(layers) if ".layers.0." in key else (0,):
            writer.add({key.replace(".layers.0.", f".layers.{i}."): tensor})
    writer.finish()
    tokenizer().save_pretrained(folder)
    write_config(folder, json.loads(config(layers).to_json_string(use_diff=False)), None)
    return layers, rest + layers * block, block


def worker(folder: Path) -> None:
    """Quantize in this process; prints seconds and peak memory in GB as JSON."""
    draw = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(3, 120, (1, 32), generator=draw)} for _ in range(4)]
    recipe = Recipe(
        model=str(folder), output_dir=str(folder.parent / "out"), algorithm="sign_round", iters=5,
        nsamples=4,
        seqlen=32, batch_size=4, device="cpu", stream=True,
    )  # fmt: skip
    started = time.perf_counter()
    jobs.run(jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows))
    print(json.dumps({"seconds": time.perf_counter() - started, "peak": kept.peak_gb()}))


def measure(scratch: Path, gigabytes: float) -> dict[str, float]:
    """One model, made, quantized and deleted."""
    folder = scratch / f"llama-{gigabytes:g}GB"
    try:
        layers, size, block = make(folder, gigabytes)
        done = subprocess.run(
            [sys.executable, __file__, "--worker", str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(scratch / "out", ignore_errors=True)
    return {"layers": layers, "size": size / 1e9, "block": block / 1e9, "peak": found["peak"],
            "seconds": found["seconds"]}  # fmt: skip


def main() -> int:
    """Exit status 1 if memory grows with depth or is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path)
    parser.add_argument(
        "--scratch", type=Path, default=Path(".bench/scale"), help="a folder on a disk with room"
    )
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[4.0, 12.0])
    found = parser.parse_args()
    if found.worker:
        worker(found.worker)
        return 0
    runs = []
    table = kept.Table("layers", "model (GB)", "block (GB)", "peak resident (GB)", "seconds")
    for gigabytes in found.gigabytes:
        runs.append(run := measure(found.scratch, gigabytes))
        sizes = (f"{run[key]:.2f}" for key in ("size", "block", "peak"))
        table.add(run["layers"], *sizes, f"{run['seconds']:.0f}")
    peaks = [run["peak"] for run in runs]
    spread = max(peaks) / min(peaks) - 1
    bound = ALLOWED_GB + ALLOWED_BLOCKS * max(run["block"] for run in runs)
    right = spread <= ALLOWED_SPREAD and max(peaks) <= bound
    about = (
        "Random Llamas of equal blocks, W4 g128, rounded to nearest and 5 sign steps on 4 samples"
        " of 32 tokens."
    )
    verdict = (
        f"Peaks differ by {spread:.1%} (allowed {ALLOWED_SPREAD:.0%}); the largest is"
        f" {max(peaks):.2f} GB (allowed {ALLOWED_GB:g} GB + {ALLOWED_BLOCKS} blocks ="
        f" {bound:.2f} GB): {'right' if right else 'WRONG'}."
    )
    print(f"\n{verdict}")
    kept.keep(RESULTS, "scale", "Peak memory of streamed runs", about, table, verdict)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
