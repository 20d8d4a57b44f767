"""Quantize multimodal large models to 2-8 bits, export to every engine, prove it right."""

from typing import Any

from auto_mmround.errors import NotProved, UserError

__version__ = "0.1.0"
__all__ = ["AutoRoundMLLM", "NotProved", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, so that `import auto_mmround` and `auto-round-mllm -h` do not wait for torch.
    if name == "AutoRoundMLLM":
        from auto_mmround.api import AutoRoundMLLM

        return AutoRoundMLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
