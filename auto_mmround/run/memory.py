"""Out of memory is no reason to lose a run: fewer samples at a time, then states out of the way, then one line."""

import logging
from collections.abc import Callable
from typing import TypeVar

from auto_mmround.errors import UserError
from auto_mmround.model import devices

log = logging.getLogger("auto_mmround")

T = TypeVar("T")


class BatchSize:
    """How many samples run together: the recipe's number, or a divisor of it once that many did not fit.

    Sums over a batch are taken in more parts then, and mean the same.
    """

    def __init__(self, size: int):
        self.size = size

    def fitting(self, what: str, attempt: Callable[[int], T], relieve: Callable[[], bool]) -> T:
        """The result of ``attempt(size)``, tried again with less until memory suffices.

        relieve: makes room where a single sample is too much; False if it can't. Raises UserError when nothing helps.
        """
        while True:
            try:
                return attempt(self.size)
            except (MemoryError, RuntimeError) as error:
                if not devices.out_of_memory(error):
                    raise
                reason = str(error).strip().split("\n")[0][:200]
            # Here, not in the clause above, where the traceback still holds what the attempt had allocated.
            devices.release_cache()
            if self.size > 1:
                self.size = max(size for size in range(1, self.size) if self.size % size == 0)
                log.warning("%s: out of memory, going on with %d samples at a time", what, self.size)
            elif relieve():
                log.warning("%s: out of memory with a single sample, states of the others are moved away", what)
            else:
                raise UserError(
                    f"{what}: not enough memory for a single sample ({reason}); finished blocks are kept, lower seqlen "
                    "or use a larger machine"
                )
