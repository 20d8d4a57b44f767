"""Blocks through torch.compile: one compilation serves all blocks of a class."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from auto_mmround.model.chains import run_plainly

log = logging.getLogger("auto_mmround")

T = TypeVar("T")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Compiled:
    """Call it as (block, args, kwargs). Where compiling fails, it says so once and runs blocks as
    they are.

    The block is an argument of what is compiled, so that its weights are inputs and the next block
    of its class finds the code made. Lengths become symbols once they are seen to vary. Code does
    not see hooks that come after it was made, so a block whose modules are watched, as while second
    moments are gathered, is run as it is.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor"):
        self._run: Callable[..., Any] = torch.compile(run_plainly, backend=backend)
        self._backend = backend

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _watched(block):
            return run_plainly(block, args, kwargs)
        return self.or_plainly(lambda: self._run(block, args, kwargs))

    def of(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, compiled; as it is once compiling has failed, which `or_plainly` around
        its caller sees to."""
        code = torch.compile(function, backend=self._backend)

        def call(*args: Any) -> T:
            return (function if self._run is run_plainly else code)(*args)

        return call

    def or_plainly(self, work: Callable[[], T]) -> T:
        """What ``work`` gives; if compiling fails in it, in the backward pass perhaps, once more
        with blocks as they are."""
        try:
            return work()
        except TorchDynamoException as error:
            if self._run is run_plainly:
                raise
            log.warning(
                "torch.compile failed, blocks run uncompiled: %s", str(error).strip().split("\n")[0]
            )
            self._run = run_plainly
        return work()


def _watched(block: nn.Module) -> bool:
    return any(getattr(module, hooks) for module in block.modules() for hooks in HOOKS)
