"""Models larger than memory: a block is read from the checkpoint's files when its turn comes, and
dropped after.

Everything but the blocks of the stages stays in memory. Transformers' own reader does the renaming,
stacking and casting, for a block as for a whole model, so a streamed model holds the same bits.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo
from transformers.utils import logging as transformers_logging

from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.quantized import FLOATS
from auto_mmround.model.stored import Stored
from auto_mmround.model.structure import every_block, find_stages

SHARE = 0.6  # of the free memory that a model may take as a whole
Renaming = Callable[[PreTrainedModel, Iterable[str]], Iterator[tuple[str, str, bool]]]


class Slices(Protocol):
    """Tensors of files that are open."""

    def slice(self, key: str) -> Any:
        """Something that gives the tensor when it is asked for ``[...]``."""


class Keyed(Protocol):
    """Tensors of a checkpoint. files: its keys."""

    @property
    def files(self) -> Collection[str]:
        """Keys of the tensors."""

    def reader(self) -> AbstractContextManager[Slices]:
        """What reads them while it is open."""


class Holder(Protocol):
    """Who has the weights of blocks at hand. blocks: those that are read when their turn comes, as
    a pass of the model meets them."""

    blocks: Sequence[str]

    def resident(self, blocks: Sequence[str]) -> AbstractContextManager[None]:
        """While open, the blocks' original weights are in memory, and changes of them stay."""

    def replace(self, block: str, write: Callable[[], None]) -> None:
        """From now on the block has other weights: ``write`` puts them into the resident
        original."""


class InMemory:
    """All weights, always; what was changed is changed."""

    blocks: Sequence[str] = ()

    def resident(self, blocks: Sequence[str]) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def replace(self, block: str, write: Callable[[], None]) -> None:
        """Nothing to do."""


class InTurn:
    """Blocks that are at hand one by one; a subclass says how they come and go.

    A block that is run in a forward pass of the whole model comes then, and stays until the next
    one does.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str]):
        self._model, self.blocks = model, blocks
        self._passing: str | None = None
        self._writers: dict[str, Callable[[], None]] = {}
        # something may stand in for them
        self._blocks = {name: model.get_submodule(name) for name in blocks}
        self._hooks = {name: self._listen(name) for name in blocks}

    @contextmanager
    def resident(self, blocks: Sequence[str]) -> Iterator[None]:
        """See `Holder.resident`. A block that is not one of a stage's is in memory anyway."""
        self._release_passing()
        wanted = [block for block in blocks if block in self._blocks]
        for block in wanted:
            # nothing to fetch, nothing that differs between blocks for a compiler
            self._hooks[block].remove()
        try:
            for block in wanted:
                self._read(block)
            yield
        finally:
            for block in wanted:
                self._release(block, changed=True)
                self._hooks[block] = self._listen(block)

    def replace(self, block: str, write: Callable[[], None]) -> None:
        """See `Holder.replace`."""
        self._writers[block] = write

    def _read(self, block: str) -> None:
        raise NotImplementedError

    def _release(self, block: str, changed: bool = False) -> None:
        raise NotImplementedError

    def _listen(self, block: str) -> RemovableHandle:
        def hook(module: nn.Module, args: Any) -> None:
            if block != self._passing:
                self._release_passing()
                self._passing = block
                try:
                    self._read(block)
                    self._writers.get(block, lambda: None)()
                except BaseException:  # not to be taken for a block that is there
                    self._release_passing()
                    raise

        return self._blocks[block].register_forward_pre_hook(hook, prepend=True)

    def _release_passing(self) -> None:
        if self._passing is not None:
            self._release(self._passing)
            self._passing = None


class Streamed(InTurn):
    """Reads the blocks of a model whose block parameters are on the meta device.

    The parameters of `resident` ones are new objects each time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stored: Keyed,
        names: Mapping[str, str],
        config: LoadStateDictConfig,
    ):
        """stored: the checkpoint's tensors. names: the parameter that each of its keys becomes, or
        a part of."""
        self._stored, self._config = stored, config
        super().__init__(model, every_block(model))
        self._keys: dict[str, list[str]] = {block: [] for block in self.blocks}
        owners = {f"{block}.": block for block in self._keys}
        for key, name in names.items():
            owner = next(
                (block for prefix, block in owners.items() if name.startswith(prefix)), None
            )
            if owner is not None:
                self._keys[owner].append(key)

    def _read(self, block: str) -> None:
        conversions = getattr(self._model, "_weight_conversions", None)
        standing_in = self._model.get_submodule(block)  # what is read belongs to the block itself
        self._model.set_submodule(block, self._blocks[block])
        try:
            with self._stored.reader() as reader, no_progress_bar():
                tensors = {key: reader.slice(key) for key in self._keys[block]}
                convert_and_load_state_dict_in_model(self._model, tensors, self._config)
        finally:
            self._model.set_submodule(block, standing_in)
        self._model._weight_conversions = conversions  # type: ignore[assignment]  # those of the whole model
        self._blocks[block].requires_grad_(False)

    def _release(self, block: str, changed: bool = False) -> None:
        for module in self._blocks[block].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        parameter.to("meta"), requires_grad=False
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to("meta")
        devices.trim_heap()


def fits(
    stored: Stored, device: torch.device, dtype: torch.dtype | None = None, copies: int = 1
) -> bool:
    """Whether so many copies of the weights, in ``dtype`` if one is given, take at most `SHARE` of
    the device's free memory."""
    size = stored.nbytes()
    if dtype is not None and not stored.scales:
        size = size * dtype.itemsize // (stored.dtype() or dtype).itemsize
    return has_room(copies * size, device)


def has_room(size: int, device: torch.device) -> bool:
    """Whether weights of so many bytes take at most `SHARE` of the device's free memory."""
    return size <= SHARE * devices.free_memory(device)


def stored_dtype(stored: Stored, config: Any) -> torch.dtype | None:
    """The dtype that the configuration states, if a model can compute in it, else that of the
    files."""
    return config.dtype if config.dtype in FLOATS.values() else stored.dtype()


def load_streamed(
    cls: Any,
    config: Any,
    stored: Keyed,
    dtype: torch.dtype,
    device: torch.device,
    rename: Renaming,
    whole: bool = False,
) -> tuple[PreTrainedModel, Holder, LoadStateDictInfo]:
    """A model without its blocks, what reads them, and what loading met.

    rename: (key, parameter, ..) for a model and the keys of its files. whole: the blocks are read
    at once and stay. Raises UserError for models whose blocks share weights.
    """
    _set_dtype(config, dtype)
    with ExitStack() as stack:
        for context in cls.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        model: PreTrainedModel = cls(config)
    paths = [] if whole else [stage.path for stage in find_stages(model)]
    shared = [
        name
        for name in model.all_tied_weights_keys
        if any(name.startswith(f"{path}.") for path in paths)
    ]
    if shared:
        raise UserError(
            f"{shared[0]} is shared with other modules: this model can't be streamed, use"
            " --no_stream"
        )
    loading = LoadStateDictConfig(
        device_map={"": device} | dict.fromkeys(paths, "meta"),
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
    )
    with stored.reader() as reader, no_progress_bar():
        slices = {key: reader.slice(key) for key in stored.files}
        info, _ = convert_and_load_state_dict_in_model(model, slices, loading)
    devices.trim_heap()  # of the tensors that were read for the meta device
    loading = replace(loading, device_map={"": device})
    info = model._finalize_model_loading(model, loading, info)
    model.eval().requires_grad_(False)
    if whole:
        return model, InMemory(), info
    names = {key: name for key, name, *_ in rename(model, stored.files)}
    return model, Streamed(model, stored, names, loading), info


def device_of(model: nn.Module) -> torch.device:
    """Where the weights that are in memory lie."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    """As Transformers does: for the whole model and its parts."""
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            getattr(config, name).dtype = dtype


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """While open, Transformers shows no bar of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
