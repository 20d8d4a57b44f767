"""Transcripts by vLLM on the processor; run by that engine's own interpreter, see
whisper_engines.py.

    .engines/vllm/bin/python bench/vllm_transcribe.py CHECKPOINT SOUNDS.safetensors ANSWER.json

SOUNDS holds float32 (T,) at 16 kHz, one a clip. Greedy, English, without time stamps.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "engines"))

from engine_vllm import import_vllm, linear_classes  # noqa: E402 - it sets vLLM's environment first
from safetensors.numpy import load_file  # noqa: E402

OPENING = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
LONGEST = 160


def main(checkpoint: str, sounds: str, answer: str) -> None:
    """{"texts": by clip, "classes": linear modules by class and method, "quantized", "engine"}."""
    vllm = import_vllm()
    engine = vllm.LLM(
        model=checkpoint, dtype="bfloat16", max_model_len=448, max_num_batched_tokens=2048,
        max_num_seqs=1,
        enforce_eager=True, enable_prefix_caching=False, skip_mm_profiling=True,
        disable_log_stats=True,
        limit_mm_per_prompt={"audio": 1},
    )  # fmt: skip
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    classes, quantized = linear_classes(model)
    wanted = vllm.SamplingParams(temperature=0, max_tokens=LONGEST)
    texts = {}
    for name, sound_T in load_file(sounds).items():
        prompt = {"prompt": OPENING, "multi_modal_data": {"audio": (sound_T, 16000)}}
        texts[name] = engine.generate([prompt], wanted, use_tqdm=False)[0].outputs[0].text
    found = {
        "texts": texts,
        "classes": classes,
        "quantized": quantized,
        "engine": f"vllm {vllm.__version__}",
    }
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
