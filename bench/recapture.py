#!/usr/bin/env python3
"""Whether text blocks gain from being tuned on what the quantized tower hands them; on the bundled
model.

    bench/recapture.py [--schemes W4g128 W3g128] [--seeds 3] [--keep bench/results]

    clean      every block is tuned on what the untouched model gives it (enable_quanted_input off)
    in stages  blocks are tuned on what the quantized blocks before them in their stage give;
               the text still on the untouched tower
    captured   the default: between the stages the text's inputs are captured again through the
               quantized tower

All three have the same W tower and the same W text, and differ in nothing else. KL is from full
precision on held-out questions about images and texts, at the positions of each modality.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import kept
import torch

from auto_mmround import AutoRoundMLLM
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import measure
from auto_mmround.model.loading import load

WAYS = ("clean", "in stages", "captured")
TOWER, TEXT = "visual", "language_model"  # of the bundled model


def tuned(options: dict[str, Any], seed: int, **more: Any) -> Any:
    """The bundled model, quantized in memory."""
    return AutoRoundMLLM(
        "demo", dataset="demo", device="cpu", seed=seed, **options, **more
    ).quantize()[0]


def model_of(way: str, options: dict[str, Any], seed: int) -> Any:
    """The bundled model, tower and text quantized in one of the ways."""
    if way != "in stages":
        return tuned(
            options, seed, quant_nontext_module=True, enable_quanted_input=way == "captured"
        )
    # Each stage alone, the other untouched; then the tower of one and the text of the other.
    tower = tuned(options, seed, to_quant_block_names=TOWER)
    model = tuned(options, seed, to_quant_block_names=TEXT)
    state = {name: value for name, value in tower.state_dict().items() if TOWER in name.split(".")}
    if not state:
        sys.exit(f"the bundled model has no {TOWER}")
    model.load_state_dict(state, strict=False)
    return model


def times_clean(clean: Sequence[Any], other: Sequence[Any]) -> list[str]:
    """Mean, least and most over the seeds of other / clean; a cell a modality."""
    ratio_SK = torch.tensor(other) / torch.tensor(clean)
    columns = ratio_SK.unbind(1)
    return [f"{k_S.mean():.3f} ({k_S.min():.3f} to {k_S.max():.3f})" for k_S in columns]


def main() -> None:
    """Every scheme, seed and way; then the means."""
    parser = kept.options(__doc__)
    parser.add_argument("--schemes", nargs="+", default=["W4g128", "W3g128"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="clean is always among them"
    )
    parser.add_argument(
        "--limit", type=int, default=96, help="held-out texts, and as many questions about images"
    )
    found = parser.parse_args()
    ways = [way for way in WAYS if way == WAYS[0] or way in found.ways]
    logging.disable(logging.WARNING)
    reference = load("demo")
    inputs = held_out(reference, "demo", limit=found.limit)
    table = kept.Table("scheme", "seed", "way", "KL text", "KL image")
    for scheme in found.schemes:
        options = kept.scheme(scheme) | {"nsamples": found.samples}
        kl: dict[str, list[list[float]]] = {way: [] for way in ways}
        for seed in range(found.seeds):
            for way in ways:
                model = model_of(way, options, seed)
                (figures,) = measure([model], inputs, reference=reference.model)
                kl[way].append([figures.kl["text"], figures.kl["image"]])
                table.add(scheme, seed, way, *(f"{value:.5f}" for value in kl[way][-1]))
        for way in ways:
            table.add(scheme, "all", f"{way}, times clean", *times_clean(kl["clean"], kl[way]))
    kept.keep(found.keep, "recapture", "Recapture on the demo model", table)


if __name__ == "__main__":
    main()
