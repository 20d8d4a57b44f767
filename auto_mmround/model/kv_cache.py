"""Keys and values as attention hands them to a cache: which modules do, and how to change them on
their way."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from auto_mmround.errors import UserError
from auto_mmround.model.speaking import speaking
from auto_mmround.model.structure import find_stages

# Engines find attention that has keys and values of its own by these layers.
PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")
# Ends of the names of their scales, behind the attention's.
SCALES = ("k_scale", "v_scale")
CACHES = ("past_key_values", "past_key_value")

# How a configuration calls it that scales belong to all heads, or to one -> their dimensions.
STRATEGIES = {"tensor": 1, "attn_head": 3}

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of keys and values


def cached_attention(model: PreTrainedModel) -> dict[str, str]:
    """Attention modules of the text that hand keys and values to a cache -> a projection in each.

    Raises UserError where there is none that engines keep scales for.
    """
    if speaking(model).config.is_encoder_decoder:
        raise UserError(
            f"kv_cache_scheme: {type(model).__name__} has an encoder and a decoder, and engines no"
            " place for scales of their two caches; leave it out"
        )
    names: dict[str, str] = {}
    for block in find_stages(model)[-1].blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            own = next((part for part in PROJECTIONS if hasattr(module, part)), None)
            if own is not None and _cache_argument(module) is not None:
                names[name] = own
    if not names:
        raise UserError(
            f"kv_cache_scheme: no attention in {type(model).__name__} has a cache and"
            f" {' or '.join(PROJECTIONS)}, where engines keep scales; leave it out"
        )
    return names


def strategy_of(scales: Mapping[str, Tensor]) -> str:
    """The row of STRATEGIES that these scales of keys and values have; "" without any."""
    dims = next((scale.dim() for scale in scales.values()), 0)
    return next((name for name, own in STRATEGIES.items() if own == dims), "")


def fits(strategy: str, scale: Tensor) -> bool:
    """Whether a scale has the form that it has under a strategy."""
    return scale.numel() == 1 if strategy == "tensor" else scale.shape[1:] == (1, 1)


@contextmanager
def changing(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """While open, these attention modules hand on what their change makes of keys and values, (B,
    heads, T, head) each, with a cache and without."""
    with ExitStack() as hooks:
        for name, change in changes.items():
            hooks.callback(change_cached(model.get_submodule(name), change))
        yield


def change_cached(module: nn.Module, change: Change) -> Callable[[], None]:
    """The same for one module, until what is returned is called."""
    argument = _cache_argument(module)
    assert argument is not None
    place = list(inspect.signature(module.forward).parameters).index(argument)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[place] if len(args) > place else kwargs.get(argument)
        stand_in = _OnTheWay(given, change)
        if len(args) > place:
            return (*args[:place], stand_in, *args[place + 1 :]), kwargs
        return args, kwargs | {argument: stand_in}

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _cache_argument(module: nn.Module) -> str | None:
    taken = inspect.signature(module.forward).parameters
    return next((name for name in CACHES if name in taken), None)


class _OnTheWay:
    """Stands for the cache of one call, or for none."""

    def __init__(self, cache: Any, change: Change):
        self._cache, self._change = cache, change

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What attention reads: the cache's own, then these, changed."""
        key, value = self._change(key, value)
        if self._cache is None:
            return key, value
        return self._cache.update(key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(DynamicCache() if self._cache is None else self._cache, name)
