"""Mixed bits against uniform ones: KL on held-out data at the same size.

    python bench/mixed.py              the bundled model, towers included
    python bench/mixed.py --model DIR --calibration a.txt:concat=true
                          --held_out b.txt:concat=true --seqlen 256

The same algorithm rounds at the lower and at the higher uniform bits, and mixed between them. What
uniform bits would do at the mixed size is interpolated twice: along a line, which is what a random
mixture of both gives to first order, and along a geometric line, which is what a grid with a
fraction of a bit would give (KL falls by a constant factor a bit); the second is harder to beat.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import kept

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import measure
from auto_mmround.model.chains import Modalities
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import quantize
from auto_mmround.run.sensitivity import Sets


def kl_by_set(model: Any, reference: Any, rows: Sequence[ModelInput]) -> dict[str, float]:
    """Set of samples -> mean KL(reference || model) over all their positions, nats."""
    sets = Sets.by_medium([Modalities(row.modality_T) for row in rows])
    found = {}
    for s, name in enumerate(sets.names):
        members = [row for row, own in zip(rows, sets.of, strict=True) if own == s]
        (metrics,) = measure([model], members, reference=reference)
        found[name] = sum(metrics.kl_sum.values()) / sum(metrics.positions.values())
    return found


def run(recipe: Recipe, loaded: Any, reference: Any, rows: Sequence[ModelInput]) -> dict[str, Any]:
    """Quantize in memory, measure, and put the weights back."""
    started = time.perf_counter()
    job = jobs.prepare(recipe, loaded)
    prepared = time.perf_counter()
    quantize(loaded.model, job.recipe, job.plan, job.inputs, Finished())
    seconds = time.perf_counter() - prepared
    result = {
        "bits": job.plan.bits_per_weight(),
        "choosing": prepared - started,
        "seconds": seconds,
        "kl": kl_by_set(loaded.model, reference, rows),
        "mixed": job.mixed,
    }
    for mine, theirs in zip(loaded.model.parameters(), reference.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    return result


def table(results: dict[str, dict[str, Any]], low: str, high: str, mixed: str) -> list[str]:
    """The lines of a Markdown table, interpolations included."""
    names = list(results[mixed]["kl"])
    lines = [
        f"| | bits a weight | {' | '.join(f'KL, {name}' for name in names)} | seconds to choose |"
        " to quantize |"
    ]
    lines.append("|---" * (len(names) + 4) + "|")
    for title, found in results.items():
        figures = " | ".join(f"{found['kl'][name]:.4g}" for name in names)
        lines.append(
            f"| {title} | {found['bits']:.3f} | {figures} | {found['choosing']:.0f} |"
            f" {found['seconds']:.0f} |"
        )
    bits = [results[title]["bits"] for title in (low, high, mixed)]
    share = (bits[2] - bits[0]) / (bits[1] - bits[0])
    ends = [(results[low]["kl"][name], results[high]["kl"][name]) for name in names]
    made = {
        "linear": [a + share * (b - a) for a, b in ends],
        "geometric": [a ** (1 - share) * b**share for a, b in ends],
    }
    for kind, values in made.items():
        lines.append(
            f"| interpolation, {kind} | {bits[2]:.3f} |"
            f" {' | '.join(f'{value:.4g}' for value in values)} | | |"
        )
    got = [results[mixed]["kl"][name] for name in names]
    for kind, values in made.items():
        change = " | ".join(
            f"{100 * (mine / other - 1):+.0f} %" for mine, other in zip(got, values, strict=True)
        )
        lines.append(f"| mixed against the {kind} one | | {change} | | |")
    return lines


def main() -> None:
    """Three runs on one model; the table is printed, and added to a dated file."""
    parser = kept.options(
        __doc__, "folder for a dated Markdown file, which grows by a section a run"
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="demo")
    parser.add_argument("--held_out", default="demo")
    parser.add_argument("--target_bits", type=float, default=3.5)
    parser.add_argument("--bit_options", default="2,3,4,8")
    parser.add_argument("--uniform", default="3,4", help="the two to interpolate between")
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--algorithm", default="gptq")
    parser.add_argument("--preset", default="light")
    parser.add_argument("--model_dtype", default=None)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=None)
    parser.add_argument("--limit", type=int, default=16, help="held-out samples of each set")
    parser.add_argument("--text_only", action="store_true", help="leave the towers in 16 bits")
    found = parser.parse_args()
    low, high = (int(bits) for bits in found.uniform.split(","))
    recipe = Recipe(
        model=found.model, dataset=found.calibration, group_size=found.group_size,
        algorithm=found.algorithm,
        preset=found.preset, nsamples=found.nsamples, seqlen=found.seqlen,
        bit_options=found.bit_options,
        quant_nontext_module=not found.text_only, model_dtype=found.model_dtype, device="cpu",
    )  # fmt: skip
    loaded, reference = jobs.load_model(recipe), jobs.load_model(recipe).model
    rows = held_out(loaded, found.held_out, limit=found.limit, seqlen=found.seqlen or 4096)
    mixed = f"mixed {found.target_bits:g}"
    wanted: dict[str, dict[str, Any]] = {
        f"uniform {low}": {"bits": low}, f"uniform {high}": {"bits": high},
        mixed: {"target_bits": found.target_bits},
    }  # fmt: skip
    results = {}
    for title, changes in wanted.items():
        results[title] = run(replace(recipe, **changes), loaded, reference, rows)
        print(
            title,
            json.dumps({key: results[title][key] for key in ("bits", "kl", "seconds")}),
            flush=True,
        )
    lines = table(results, f"uniform {low}", f"uniform {high}", mixed)
    print("\n".join(lines))
    keep(found, lines, results[mixed]["mixed"])


def keep(found: argparse.Namespace, lines: Sequence[str], record: dict[str, Any]) -> None:
    """A section of the day's file: the table, and how many weights got how many bits."""
    counts = Counter(layer["bits"] for layer in record["layers"].values())
    chosen = ", ".join(f"{counts[bits]} at {bits}" for bits in sorted(counts))
    size = "one scale a channel" if found.group_size == -1 else f"groups of {found.group_size}"
    settings = f"{found.algorithm}, {size}, symmetric, {found.nsamples} samples"
    parts = f"{settings}. Weights by bits: {chosen}.", "\n".join(lines)
    kept.keep(found.keep, "mixed", "Mixed bits", *parts, section=Path(found.model).name)


if __name__ == "__main__":
    main()
