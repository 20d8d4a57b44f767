"""What bench/recipes.py compares: schemes, methods, models."""

from typing import Any

SAME = {"dampening": 0.01, "actorder": "weight"}  # of all methods; llm-compressor's own defaults
W4, W3, W4G64 = (
    {"bits": bits, "group_size": size, "act_bits": 16}
    for bits, size in ((4, 128), (3, 128), (4, 64))
)
W8A8 = {"bits": 8, "group_size": -1, "act_bits": 8}
SCHEMES = {"W4g128": W4, "W3g128": W3, "W8A8": W8A8, "W4g64": W4G64, "-": W4}
THEIRS = "llm-compressor"
METHODS: dict[str, dict[str, Any]] = {
    "gptq, no Fisher": {"algorithm": "gptq", "fisher": False} | SAME,
    "gptq": {"algorithm": "gptq"} | SAME,
    "auto": {"algorithm": "auto"},
}
COMPARED = [THEIRS, "gptq, no Fisher", "gptq"]
# Of each model: what both are told, and what is compared. norms: those that SmoothQuant's mappings
# read from.
CASES: dict[str, dict[str, Any]] = {
    "gemma": {
        "class": "AutoModelForCausalLM", "norms": ("input_layernorm", "pre_feedforward_layernorm"),
        "recipe": {"sequential_targets": ["Gemma3DecoderLayer"], "ignore": ["lm_head"],
            "seqlen": 256},
        "runs": {"W4g128": COMPARED, "W3g128": COMPARED, "W8A8": COMPARED[:2]},
    },
    "demo": {
        "class": "Qwen2VLForConditionalGeneration", "norms": ("input_layernorm",
            "post_attention_layernorm"),
        "recipe": {"sequential_targets": ["Qwen2VLDecoderLayer"], "ignore": ["re:.*lm_head",
            "re:.*visual.*"],
                   "seqlen": 256, "dataset": "demo-llava"},
        "runs": {"W4g128": COMPARED, "W3g128": COMPARED, "W8A8": COMPARED[:2]},
    },
    "whisper": {
        "class": "WhisperForConditionalGeneration", "norms": (),
        "recipe": {"sequential_targets": ["WhisperEncoderLayer", "WhisperDecoderLayer"],
            "ignore": ["proj_out"],
                   "seqlen": 448},
        # llm-compressor 0.14's sequential one ends with "No statistics available" on Whisper
        "pipeline": "basic",
        "runs": {"W4g64": [THEIRS, *METHODS]},
    },
}  # fmt: skip
