"""How many tokens a text model has positions for, where it keeps one entry for each and can't run
beyond."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from auto_mmround.errors import UserError
from auto_mmround.model.speaking import speaking
from auto_mmround.model.structure import find_stages, input_weight

# What configurations call the number of positions. It alone is no limit: rotary models run beyond
# it.
CONFIG_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_target_positions",
    "max_sequence_length", "max_seq_len",
    "seq_length",
)  # fmt: skip
# Types that make their bias anew for as many positions as the configuration says, and hold no
# table.
COMPUTED = {"mpt": "max_seq_len"}
SINES = ("positions", "pos_encoding")  # how the names of tables of sines end
OFFSETS = 8  # entries that a table may have beyond its positions, for padding


def position_limit(model: PreTrainedModel) -> int | None:
    """The number of positions of a text model that holds a table of that length (learned or
    computed); None without.

    Found by size: an embedding or a buffer of the text part, beside the one of the vocabulary, as
    long as the configuration says. Some keep their first entries for padding (OPT, RoBERTa).
    """
    model = speaking(model)
    config = model.config.get_text_config(decoder=True)
    if config.model_type in COMPUTED:
        return int(getattr(config, COMPUTED[config.model_type]))
    stated = {
        value
        for key in CONFIG_KEYS
        if isinstance(value := getattr(config, key, None), int) and value > 1
    }
    limits = [
        limit
        for length, offset in _tables(model)
        for claim in stated
        if claim <= length <= claim + OFFSETS
        for limit in [min(claim, length - offset)]
        if limit > 0
    ]
    return min(limits, default=None)


def _tables(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """(entries, first ones that stand for no position) of what might hold positions in the text
    part of a model."""
    stages = find_stages(model)
    text, towers = stages[-1].path, [stage.path for stage in stages[:-1]]
    words = input_weight(model)
    for path, module in model.named_modules():
        if _elsewhere(path, text, towers):
            continue
        if isinstance(module, nn.Embedding) and module.weight is not words:
            padding = -1 if module.padding_idx is None else module.padding_idx
            yield module.num_embeddings, int(getattr(module, "offset", padding + 1))
        for name, buffer in module.named_buffers(recurse=False):
            # Tables of sines (GPT-J, CTRL), and masks as long as they are wide (GPT-Neo).
            if (buffer.ndim == 2 and name.endswith(SINES)) or buffer.ndim == 4:
                yield buffer.shape[-2], 0


def _elsewhere(path: str, text: str, towers: list[str]) -> bool:
    """Whether a module is part of a tower: on its way from where it leaves the text blocks' path
    lies a tower."""
    parts, blocks = path.split("."), text.split(".")
    shared = next(
        (i for i, (a, b) in enumerate(zip(parts, blocks)) if a != b), min(len(parts), len(blocks))
    )
    branch = ".".join(parts[: shared + 1])
    return shared < len(parts) and any(f"{tower}.".startswith(f"{branch}.") for tower in towers)


def room(model: PreTrainedModel, length: int, wanted: int) -> int:
    """How many of `wanted` tokens can follow `length` others. Raises UserError if none can."""
    limit = position_limit(model)
    left = wanted if limit is None else min(wanted, limit - length)
    if left < 1:
        raise UserError(
            f"a prompt of {length} tokens leaves no room for an answer: the model has {limit}"
            " positions"
        )
    return left
