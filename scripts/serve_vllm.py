#!/usr/bin/env python3
"""vLLM's OpenAI-compatible server on the processor, for trying a checkpoint; run by the engine's
own interpreter.

    bash scripts/engines.sh vllm
    .engines/vllm/bin/python scripts/serve_vllm.py FOLDER --port 8000

Further options are vLLM's own and win over the ones set here. With a graphics card, `vllm serve
FOLDER` does the same.
"""

import os
import runpy
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")  # 4-bit weights with activations as they are
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

# The compiled half of torchvision may not fit a processor-only torch; its import needs two
# operators to exist, not to work. vLLM starts its workers from this file again, and inspects
# classes of models in this process, not in a bare one.
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from vllm.model_executor.models import registry  # noqa: E402

registry._run_in_subprocess = lambda inspect: inspect()

DEFAULTS = [
    "--host",
    "127.0.0.1",
    "--dtype",
    "float16",
    "--enforce-eager",
    "--skip-mm-profiling",
    "--max-num-seqs",
    "4",
]

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: serve_vllm.py FOLDER [options of vLLM's server]")
    sys.argv = ["vllm", "--model", sys.argv[1], *DEFAULTS, *sys.argv[2:]]
    # `vllm serve` asks for metadata of a package named vllm, which the build for processors is not.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
