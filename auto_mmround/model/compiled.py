"""Blocks through torch.compile: one compilation serves all blocks of a class."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from auto_mmround.model.chains import run_plainly

log = logging.getLogger("auto_mmround")


class Compiled:
    """Call it as (block, args, kwargs). Where compiling fails, it says so once and runs blocks as they are.

    The block is an argument of what is compiled, so that its weights are inputs and the next block of its class finds
    the code made. Lengths become symbols once they are seen to vary.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor"):
        self._run: Callable[..., Any] = torch.compile(run_plainly, backend=backend)

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._run(block, args, kwargs)
        except TorchDynamoException as error:
            if self._run is run_plainly:
                raise
            log.warning("torch.compile failed, blocks run uncompiled: %s", str(error).strip().split("\n")[0])
            self._run = run_plainly
            return run_plainly(block, args, kwargs)
