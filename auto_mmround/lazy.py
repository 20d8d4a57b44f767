"""Values that are made when they are asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

Fact = TypeVar("Fact")
Value = TypeVar("Value")


class Lazy(Mapping[str, Value], Generic[Fact, Value]):
    """A mapping that makes a value each time it is asked for. facts: key -> what ``make`` gets."""

    def __init__(self, facts: Mapping[str, Fact], make: Callable[[Fact], Value]):
        self.facts, self._make = facts, make

    def __getitem__(self, key: str) -> Value:
        return self._make(self.facts[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)


@dataclass(frozen=True)
class LazyTensor:
    """Makes a tensor when it is asked for ``[...]``, as safetensors' slices do."""

    make: Callable[[], Tensor]

    def __getitem__(self, _: Any) -> Tensor:
        return self.make()
