#!/usr/bin/env python3
"""Word error rate of a quantized Whisper checkpoint in real engines, on sets that speech.py makes.

    bench/whisper_engines.py CHECKPOINT SET.jsonl .. [--engines ours transformers vllm]

`ours` is our own reader, `transformers` the compressed-tensors reader of Transformers, `vllm` vLLM
on the processor (bash scripts/engines.sh vllm). Prints WER by set and engine, and how many
transcripts differ from our reader's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from auto_mmround.calibration import media, roots
from auto_mmround.checkpoint.loader import load_any
from auto_mmround.evaluate.prompts import Data, answer, clips
from auto_mmround.evaluate.scoring import error_rates, normaliser
from auto_mmround.model.loading import Loaded
from auto_mmround.programs import environment_of
from auto_mmround.verify import engines

ROOT = Path(__file__).parents[1]


def by_transformers(folder: Path) -> Loaded:
    """The checkpoint as Transformers itself reads it, with the tokenizer and processor of our
    reader.

    Unpacked when it is loaded: else Transformers does so in the model's first forward pass, and
    `generate` calls the encoder alone before.
    """
    from transformers import CompressedTensorsConfig, WhisperForConditionalGeneration

    loaded = load_any(str(folder), dtype="bfloat16")
    model, info = WhisperForConditionalGeneration.from_pretrained(
        folder,
        dtype="bfloat16",
        output_loading_info=True,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        sys.exit(
            f"{folder}: Transformers misses {info['missing_keys']}, and does not know"
            f" {info['unexpected_keys']}"
        )
    return Loaded(model.eval(), loaded.tokenizer, loaded.processor, folder)


def by_vllm(folder: Path, tables: Sequence[Path], *, timeout: float = 1200) -> dict[str, Any]:
    """What vllm_transcribe.py answers for all clips of the sets. Exits with a line where the engine
    is missing."""
    python = engines.python_of("vllm", ROOT)
    if problem := engines.not_installed(python):
        sys.exit(problem)
    sounds = {}
    for table in tables:
        for line in table.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            sounds[row["id"]] = media.load(
                row["audio"], "audio", roots.parse_roots(None), base=table.parent
            )
    with tempfile.TemporaryDirectory() as place:
        paths = [str(folder.resolve()), f"{place}/sounds.safetensors", f"{place}/answer.json"]
        save_file(sounds, paths[1])
        command = [str(python.absolute()), str(ROOT / "bench" / "vllm_transcribe.py"), *paths]
        subprocess.run(command, env=environment_of(python), check=True, timeout=timeout)
        return json.loads(Path(paths[2]).read_text())


def transcripts(folder: Path, tables: Sequence[Path], engine: str) -> dict[str, str]:
    """Clip -> what the engine heard."""
    if engine == "vllm":
        found = by_vllm(folder, tables)
        print(f"{found['engine']}: {found['quantized']} quantized matrices, {found['classes']}")
        return found["texts"]
    loaded = (
        by_transformers(folder)
        if engine == "transformers"
        else load_any(str(folder), dtype="bfloat16")
    )
    return {
        clip.id: answer(loaded, clip)
        for table in tables
        for clip in clips(loaded, Data(str(table)))
    }


def rates(tables: Sequence[Path], heard: Mapping[str, str]) -> dict[str, float]:
    """Set -> word error rate in percent."""
    found = {}
    for table in tables:
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
        texts = [row["text"] for row in rows]
        found[table.stem] = error_rates(
            texts, [heard[row["id"]] for row in rows], normaliser("en")
        )[0]
    return found


def main() -> None:
    """A table of engines by sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("sets", type=Path, nargs="+")
    parser.add_argument("--engines", nargs="+", default=["ours", "transformers", "vllm"])
    found = parser.parse_args()
    heard = {engine: transcripts(found.checkpoint, found.sets, engine) for engine in found.engines}
    first = heard[found.engines[0]]
    columns = [
        "engine",
        *(f"WER {table.stem}" for table in found.sets),
        f"other than {found.engines[0]}",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for engine, texts in heard.items():
        cells = [f"{rate:.2f}" for rate in rates(found.sets, texts).values()]
        other = sum(
            normaliser("en")(texts[name]) != normaliser("en")(first[name]) for name in first
        )
        print(f"| {engine} | {' | '.join(cells)} | {other} of {len(first)} |")


if __name__ == "__main__":
    main()
