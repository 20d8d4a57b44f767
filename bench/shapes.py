"""Blocks of published sizes: seconds and peak memory by part, and the whole model by count.

`bench/shapes.py qwen2.5-vl-7b` writes a folder of that configuration with random weights and two
layers of text and of the tower each, runs `--preset light` on it, streamed, with images, and
multiplies what a block took by the number of blocks. `--scale 8` divides every width by 8. Seconds
are of the processor, all threads together, so that other work on the machine counts little.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kept
import torch
import transformers
from meter import Meter
from scale import tokenizer
from torch import Tensor

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.checkpoint.folder import write_config
from auto_mmround.export.shards import ShardWriter
from auto_mmround.model.chains import Chain
from auto_mmround.model.structure import find_stages
from auto_mmround.numerics import gptq, scale_search, start
from auto_mmround.numerics.descent import Descent
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run import pipeline
from auto_mmround.run.layers import LayerErrors
from auto_mmround.run.plan import make_plan
from auto_mmround.run.session import Session

# part -> who does it, under what name; search, factor, columns, again and refit are inside of
# solve, signs inside of steps
PARTS: dict[str, tuple[Any, str]] = {
    "capture": (Session, "record"),
    "Fisher": (Session, "fisher"),
    "passes": (Chain, "advanced"),
    "moments": (Session, "moments"),
    "solve": (start, "closed_forms"),
    "- search": (scale_search, "search_scale"),
    "- factor": (gptq.Solver, "__init__"),
    "- columns": (gptq.Solver, "__call__"),
    "- again": (Descent, "__call__"),
    "- refit": (gptq, "refit_scale"),
    "nearest": (pipeline, "mean_error"),
    "steps": (pipeline, "tune_block"),
    "- signs": (Rounding, "step"),
    "errors": (LayerErrors, "note"),
    "write": (jobs, "_write"),
}
QWEN25 = dict(depth=32, hidden_size=1280, num_heads=16, patch_size=14, fullatt_block_indexes=[1])
QWEN3 = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16,
             num_position_embeddings=2304, deepstack_visual_indexes=[0])  # fmt: skip
IDS = dict(image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8)
# name -> (class, text, vision); of the published configurations what decides sizes
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2.5-vl-7b": (
        "Qwen2_5_VLForConditionalGeneration",
        dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
             num_attention_heads=28, num_key_value_heads=4, vocab_size=152064),
        QWEN25 | dict(intermediate_size=3420, out_hidden_size=3584),
    ),
    "llama-3.2-11b-vision": (
        "MllamaForConditionalGeneration",
        dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=40,
             num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
        dict(hidden_size=1280, intermediate_size=5120, attention_heads=16, image_size=560,
             patch_size=14, max_num_tiles=4, supported_aspect_ratios=[[1, 1], [1, 2]]),
    ),
    "qwen2.5-vl-72b": (
        "Qwen2_5_VLForConditionalGeneration",
        dict(hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
             num_attention_heads=64, num_key_value_heads=8, vocab_size=152064),
        QWEN25 | dict(intermediate_size=3456, out_hidden_size=8192),
    ),
    "qwen3-vl-30b-a3b": (
        "Qwen3VLMoeForConditionalGeneration",
        dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
             num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
             num_experts=128, num_experts_per_tok=8, vocab_size=151936),
        QWEN3 | dict(out_hidden_size=2048),
    ),
    # the 8 experts that a token of qwen3-vl-30b-a3b chooses, as one matrix each
    "qwen3-vl-30b-a3b-dense": (
        "Qwen3VLForConditionalGeneration",
        dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
             num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936),
        QWEN3 | dict(out_hidden_size=2048),
    ),
    "qwen3-vl-235b-a22b": (
        "Qwen3VLMoeForConditionalGeneration",
        dict(hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536,
             num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
             num_experts=128, num_experts_per_tok=8, vocab_size=151936),
        QWEN3 | dict(out_hidden_size=4096),
    ),
}  # fmt: skip
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "out_hidden_size",
          "vocab_size")  # fmt: skip
HEADS = ("num_attention_heads", "num_key_value_heads", "num_heads", "attention_heads")


def config_of(found: Any) -> Any:
    """The configuration with so many layers of each kind, its widths divided by ``scale``."""
    layers, scale = found.layers, found.scale
    cls, text, vision = SHAPES[found.shape]
    if found.experts:
        text = text | {"num_experts": found.experts}

    def smaller(part: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(part)
        for key in found:
            if key in WIDTHS:
                found[key] = max(64, found[key] // scale // 64 * 64) if scale > 1 else found[key]
            if key in HEADS:
                found[key] = max(1, found[key] // scale)
        return found

    text, vision = smaller(text) | {"num_hidden_layers": layers}, smaller(vision)
    kind = getattr(transformers, cls).config_class
    if cls.startswith("Mllama"):  # half of the layers read the picture, one in five as published
        vision |= {"num_hidden_layers": layers, "num_global_layers": layers,
                   "intermediate_layers_indices": [0],
                   "vision_output_dim": 2 * vision["hidden_size"]}  # fmt: skip
        text |= {"cross_attention_layers": list(range(1, layers, 2)), "pad_token_id": 0}
        return kind(
            text_config=text, vision_config=vision, image_token_index=IDS["image_token_id"],
            architectures=[cls], dtype="bfloat16", tie_word_embeddings=False,
        )  # fmt: skip
    # positions in three dimensions: halves of a head
    half = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]) // 2
    part = half * 3 // 8
    sections = [half - 2 * part, part, part]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return kind(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision | {"depth": layers}, architectures=[cls],
        dtype="bfloat16", tie_word_embeddings=False, **IDS,
    )  # fmt: skip


def make(folder: Path, config: Any) -> None:
    """Write random weights, cheap ones: slices of one buffer."""
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    draw = torch.Generator().manual_seed(0)
    pool = torch.randn(2**22, generator=draw).mul_(0.02).bfloat16()
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, 2 * 10**9)
    for key, tensor in model.state_dict().items():
        count = tensor.numel()
        values = pool.repeat(-(-count // len(pool)))[:count].reshape(tensor.shape)
        writer.add({key: torch.ones_like(values) if tensor.ndim < 2 else values.clone()})
    writer.finish()
    tokenizer().save_pretrained(folder)
    write_config(folder, json.loads(config.to_json_string(use_diff=False)), None)


def inputs_of(config: Any, samples: int, tokens: int) -> list[ModelInput]:
    """Random words, with a small picture in each sample."""
    draw, found = torch.Generator().manual_seed(1), []
    for i in range(samples):
        ids = torch.randint(10, 120, (1, tokens), generator=draw)
        tiled = config.model_type == "mllama"  # one place, and its tiles beside the text
        ids[0, 1] = IDS["vision_start_token_id"]
        ids[0, 2 : 3 if tiled else 6] = IDS["image_token_id"]
        modality_T = (ids[0] == IDS["image_token_id"]).to(torch.int8)
        kwargs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kwargs |= (tiles if tiled else patches)(config.vision_config, modality_T, draw)
        found.append(ModelInput(str(i), kwargs, modality_T, torch.ones(tokens, dtype=torch.bool)))
    return found


def patches(vision: Any, modality_T: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """A picture of 16 patches, as Qwen's towers read it."""
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "mm_token_type_ids": modality_T[None].int(),
        "pixel_values": torch.randn(16, size, generator=draw),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def tiles(vision: Any, modality_T: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """A picture of one tile among four, as Llama's tower reads it."""
    shape = 1, 1, vision.max_num_tiles, 3, vision.image_size, vision.image_size
    first = torch.tensor([1] + [0] * (vision.max_num_tiles - 1))
    return {
        "pixel_values": torch.randn(shape, generator=draw),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": first[None, None],
        "cross_attention_mask": first.expand(1, len(modality_T), 1, -1).clone(),
    }


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Most bytes that were resident since the last reset; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> int:
    """Prints a table, and keeps it."""
    parser = kept.options(__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--group_size", type=int, default=32)
    parser.add_argument("--experts", type=int, help="so many in place of the published number")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--text_only", action="store_true", help="leave the tower as it is")
    parser.add_argument("--scratch", type=Path, default=Path(".bench/shapes"))
    found = parser.parse_args()
    folder, config = found.scratch / found.shape, config_of(found)
    out = found.scratch / f"{found.shape}-out"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make(folder, config)
        recipe = Recipe(
            model=str(folder), output_dir=str(out), preset="light", device="cpu",
            nsamples=found.samples, seqlen=found.tokens, group_size=found.group_size,
            quant_nontext_module=not found.text_only, stream=True, check=False, overwrite=True,
            restart=True,
        )  # fmt: skip
        loaded = jobs.load_model(recipe)
        inputs = inputs_of(config, found.samples, found.tokens)
        meter = Meter(_reset_peak, _peak, clock=time.process_time)
        plan, started = make_plan(loaded.model, recipe), time.perf_counter()
        with meter.watching(PARTS), meter.part("all"):
            jobs.run(jobs.Job(recipe, loaded, plan, inputs, None, ()))
        print(f"{time.perf_counter() - started:.0f} s by the clock, others on the machine included")
        show(found, meter, loaded.model)
    finally:
        for made in (folder, out):
            shutil.rmtree(made, ignore_errors=True)
    return 0


def show(found: Any, meter: Meter, model: Any) -> None:
    """The table of a run, and the whole model by count."""
    depth = SHAPES[found.shape][1]["num_hidden_layers"]
    blocks = sum(stage.depth for stage in find_stages(model) if stage.name == "text")
    blocks += 0 if found.text_only else found.layers
    print(f"{found.shape}: {found.layers} layers, {found.samples} samples of {found.tokens} tokens")
    table = kept.Table("part", "seconds", "a block", f"{depth} text blocks, minutes", "peak, GB")
    parts = [name for name in PARTS if name in meter.seconds and name[0] != "-"]
    meter.seconds["rest"] = meter.seconds["all"] - sum(meter.seconds[name] for name in parts)
    for name in (*PARTS, "rest", "all"):
        if name in meter.seconds:
            seconds = meter.seconds[name]
            each = seconds / blocks
            cells = f"{seconds:.1f}", f"{each:.1f}", f"{each * depth / 60:.0f}"
            peak = f"{meter.peaks[name] / 1e9:.2f}" if name in meter.peaks else "-"
            table.add(name, *cells, peak)
    block = model.get_submodule(find_stages(model)[-1].blocks[0])
    weights = sum(parameter.numel() for parameter in block.parameters())
    size = f"A text block has {weights / 1e6:.0f} M weights."
    print(size)
    kept.keep(found.keep, "shapes", "Blocks of published sizes", table, size, section=found.shape)


if __name__ == "__main__":
    sys.exit(main())
