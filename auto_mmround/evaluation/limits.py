"""What engines refuse of the formats they read, with their own messages: data for `verify` and for the support matrix.

Measured with the versions in docs/formats.md, vLLM in its build for processors.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from auto_mmround.evaluation.engines import ENGINES
from auto_mmround.recipe.schemes import Scheme


@dataclass(frozen=True)
class Limit:
    """``engine`` refuses ``what`` of these formats: checkpoints whose schemes pass ``test``. message: in its words."""

    engine: str
    formats: tuple[str, ...]
    what: str
    test: Callable[[Collection[Scheme]], bool]
    message: str


def _any(test: Callable[[Scheme], bool]) -> Callable[[Collection[Scheme]], bool]:
    return lambda schemes: any(map(test, schemes))


_KERNEL = "Failed to find a kernel that can implement the"
LIMITS = (
    Limit("transformers", ("auto_gptq",), "several schemes", lambda s: len(s) > 1, "mismatched sizes"),
    Limit(
        "transformers",
        ("compressed_tensors",),
        "several schemes, one of them asymmetric",
        lambda s: len(s) > 1 and not all(scheme.sym for scheme in s),
        "mismatched sizes",
    ),
    Limit(
        "vllm",
        ("auto_gptq",),
        "asymmetric weights",
        _any(lambda s: not s.sym),
        "Unsupported quantization config: bits=4, sym=False",
    ),
    Limit(
        "vllm",
        ("auto_gptq",),
        "other than 4 bits",
        _any(lambda s: s.bits != 4),
        "Marlin does not support weight_bits = uint8b128. Only types = [ScalarType.uint4b8] are supported",
    ),
    Limit(
        "vllm",
        ("auto_round:auto_gptq",),
        "other than 4 bits",
        _any(lambda s: s.bits != 4),
        "INC on CPU: unsupported config INCLayerConfig(bits=8, ..)",
    ),
    Limit(
        "vllm",
        ("compressed_tensors",),
        "other than 4 bits",
        _any(lambda s: s.bits != 4 and s.act_bits == 16 and s.data_type == "int"),
        f"{_KERNEL} WNA16 linear layer. Quant type (uint3b4) not supported by CPUWNA16",
    ),
    Limit(
        "vllm",
        ("compressed_tensors:float",),
        "FP8 in blocks",
        _any(lambda s: s.data_type == "fp8" and s.group_size > 0),
        "CPUFp8W8A8BlockScaledMMKernel requires AMX tile support (Sapphire Rapids or newer)",
    ),
    Limit(
        "vllm",
        ("compressed_tensors:float",),
        "NVFP4",
        _any(lambda s: s.data_type == "nvfp4"),
        "Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported: Marlin FP4 not available",
    ),
    Limit(
        "vllm",
        ("compressed_tensors:float",),
        "MXFP4",
        _any(lambda s: s.data_type == "mxfp4"),
        f"{_KERNEL} MXFP4 linear layer",
    ),
)


def refusal(engine: str, format_name: str, schemes: Collection[Scheme]) -> str | None:
    """Why an engine that reads the format takes no checkpoint with these schemes; None if it takes it."""
    for limit in LIMITS:
        if limit.engine == engine and format_name in limit.formats and limit.test(schemes):
            return f"{engine} takes no {format_name} with {limit.what}: {limit.message}"
    return None


def support(format_name: str) -> dict[str, str]:
    """Engine -> "-" where it does not read the format, else "yes", with the numbers of its limits, counted from 1."""
    root = format_name.partition(":")[0]
    found = {}
    for engine, row in ENGINES.items():
        notes = [str(i) for i, limit in enumerate(LIMITS, 1) if limit.engine == engine and format_name in limit.formats]
        reads = format_name in row.formats or root in row.formats
        found[engine] = " ".join(["yes", *([f"({', '.join(notes)})"] if notes else [])]) if reads else "-"
    return found
