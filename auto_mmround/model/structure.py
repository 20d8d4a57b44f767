"""Stages and blocks, found from the module tree.

A stage is a list of blocks that one hidden state runs through: the layers of a vision tower, of an
audio encoder, of the text model. Candidates are ModuleLists of modules that hold linear weights and
stand in no other such list; whether a forward pass really runs through them one after the other is
seen when inputs are captured (`capture`).
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.errors import UserError
from auto_mmround.families import family_of
from auto_mmround.model.speaking import path_of, speaking, speaking_path

LINEAR = (nn.Linear, Conv1D)
STAGE_OF = {"image": "vision", "audio": "audio"}  # what a tower reads -> name of its stage
READS = {name: kind for kind, name in STAGE_OF.items()}


@dataclass(frozen=True)
class Stage:
    """name: "text", or the modality of the tower. path: dotted name of the block list. depth:
    number of blocks."""

    name: str
    path: str
    depth: int

    @property
    def blocks(self) -> list[str]:
        """Dotted names of the blocks, in order."""
        return [f"{self.path}.{i}" for i in range(self.depth)]


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, module) of every linear layer below ``module``."""
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, LINEAR):
            yield name, child


# What every sparse attention of Transformers calls the module that chooses its tokens.
INDEXER = "indexer"


@dataclass(frozen=True)
class Experts:
    """Expert weights of a mixture: parameter name -> (experts, rows, columns), and the routers that
    choose them.

    Transformers stores all experts of a layer as one parameter of three dimensions.
    """

    fused: dict[str, tuple[int, int, int]]
    routers: dict[str, tuple[int, int]]


def find_experts(model: nn.Module) -> Experts:
    """Fused expert weights, known by their size and what their module says of its experts; routers,
    by one output an expert beside them, or beside the module around them. What chooses the tokens
    that attention sees is a router too: no gradient passes it, and vLLM builds it of plain
    layers."""
    experts = Experts({}, {})
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == INDEXER:
            for name, layer in linears(module, path):
                rows, columns = layer.get_parameter("weight").shape
                experts.routers[name] = rows, columns
        counts = {
            name: count
            for name, child in module.named_children()
            if (count := _expert_count(child))
        }
        for name, count in counts.items():
            prefix = f"{path}.{name}".lstrip(".")
            stacks = _stacks(module.get_submodule(name))
            experts.fused.update({f"{prefix}.{key}": shape for key, shape in stacks.items()})
            beside = dict(_routers(module, path, set(counts), count))
            if path and count not in {rows for rows, _ in beside.values()}:
                outside, _, inner = path.rpartition(".")
                beside |= _routers(model.get_submodule(outside), outside, {inner}, count)
            experts.routers.update(beside)
    return experts


def _expert_count(module: nn.Module) -> int:
    """How many experts a module holds, fused or as a list; 0 if none."""
    if isinstance(module, nn.ModuleList):
        blocks = len({type(block) for block in module}) == 1 and any(
            True for _ in linears(module[0])
        )
        return len(module) if blocks else 0
    return next((shape[0] for shape in _stacks(module).values()), 0)


def _stacks(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """A module's own weights with a matrix of each expert: (experts, rows, columns). They lie in a
    dimension of their own or, in several weights alike, one below the other."""
    said = {n for key, n in vars(module).items() if key.endswith("experts") and type(n) is int}
    own = [(key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)]
    shapes = {key: shape for key, shape in own if len(shape) == 3 and shape[0] in said}
    flat = {key: shape for key, shape in own if len(shape) == 2}
    for count in sorted(said - {0, 1}):
        if not shapes and len(flat) > 1 and len(set(flat.values())) == 1:
            rows, columns = next(iter(flat.values()))
            if rows % count == 0 and rows > count:
                shapes = dict.fromkeys(flat, (count, rows // count, columns))
    return shapes  # type: ignore[return-value]


def _routers(
    module: nn.Module, path: str, experts: set[str], count: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Weights with one output an expert beside the experts, or a single one, which gates the expert
    that all tokens share (engines build neither quantized): a layer, or a module with nothing but
    one."""
    for name, child in module.named_children():
        if name in experts:
            continue
        weights = [(key, p) for key, p in child.named_parameters() if p.ndim == 2]
        if len(weights) == 1 and len(weights[0][1]) in (count, 1):
            full = f"{path}.{name}.{weights[0][0]}".lstrip(".")
            yield full.removesuffix(".weight"), tuple(weights[0][1].shape)  # type: ignore[misc]


def find_stages(model: PreTrainedModel) -> list[Stage]:
    """All stages of the part that predicts text, which comes last. Raises UserError when the model
    has no text blocks."""
    whole = speaking_path(model)
    if whole:
        inner = find_stages(model.get_submodule(whole))  # type: ignore[arg-type]
        return [replace(stage, path=f"{whole}.{stage.path}") for stage in inner]
    family = family_of(model.config.model_type)
    lists = {
        path: blocks
        for path, blocks in _block_lists(model)
        if path.rpartition(".")[2] not in family.connectors
    }
    decoder = family.decoder or path_of(model, _decoder(model))
    # A decoder without blocks of its own (a transducer's, or a head of that name) tells nothing.
    inside = [path for path in lists if _is_inside(path, decoder)] or list(lists)
    if not inside:
        raise UserError(
            f"{type(model).__name__}: found no list of text blocks; see docs/new-model.md"
        )
    # A tower may hang below the decoder (Phi-3-vision); the decoder's own layers are the list
    # nearest to it, and of several as near the one that comes last.
    text = min(reversed(inside), key=lambda path: (path.count("."), -len(lists[path])))
    towers = [
        Stage(_tower_name(model, path), path, len(lists[path])) for path in lists if path != text
    ]
    return [*towers, Stage("text", text, len(lists[text]))]


def _decoder(model: PreTrainedModel) -> nn.Module:
    """What makes the logits: of a model that holds an encoder-decoder, that one's decoder."""
    decoder = model.get_decoder()
    while isinstance(decoder, PreTrainedModel) and (inner := decoder.get_decoder()) is not decoder:
        decoder = inner
    return decoder


def input_weight(model: PreTrainedModel) -> Tensor | None:
    """The table of a model's words; None where it has several, or none that it tells of."""
    try:
        weight = getattr(speaking(model).get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    return weight if isinstance(weight, Tensor) else None


def used_twice(model: nn.Module, stages: Sequence[Stage]) -> set[int]:
    """Ids of parameters that two blocks, or two modules of one, have in common."""
    users: dict[int, set[tuple[str, int]]] = {}
    for block in (block for stage in stages for block in stage.blocks):
        for module in model.get_submodule(block).modules():
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), set()).add((block, id(module)))
    return {weight for weight, places in users.items() if len(places) > 1}


def shared_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that stand in several places."""
    counts = Counter(
        id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)
    )
    return {identity for identity, count in counts.items() if count > 1}


def every_block(model: PreTrainedModel) -> list[str]:
    """Dotted names of the blocks of all stages. Raises UserError as `find_stages` does."""
    return [block for stage in find_stages(model) for block in stage.blocks]


def select_stages(stages: list[Stage], nontext: bool, names: str | None) -> list[Stage]:
    """The stages to quantize: text, with ``nontext`` the towers too, or those whose path matches
    ``names``.

    names: comma-separated regular expressions, as in `to_quant_block_names`; UserError if one
      matches nothing.
    """
    if names is None:
        return [stage for stage in stages if nontext or stage.name == "text"]
    chosen = []
    for pattern in (part.strip() for part in names.split(",")):
        matching = [stage for stage in stages if re.search(pattern, stage.path)]
        if not matching:
            known = ", ".join(stage.path for stage in stages)
            raise UserError(
                f"to_quant_block_names: {pattern!r} matches no list of blocks; this model has"
                f" {known}"
            )
        chosen += matching
    return [stage for stage in stages if stage in chosen]


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    taken: list[str] = []
    for path, module in model.named_modules():
        if (
            not isinstance(module, nn.ModuleList)
            or not len(module)
            or any(_is_inside(path, t) for t in taken)
        ):
            continue
        # Classes may differ (mllama mixes self and cross attention), but each is a block with
        # weights of its own.
        if all(
            not isinstance(block, (*LINEAR, nn.ModuleList)) and any(True for _ in linears(block))
            for block in module
        ):
            taken.append(path)
            yield path, module


def _tower_name(model: PreTrainedModel, path: str) -> str:
    for part, name in family_of(model.config.model_type).towers.items():
        if part in path.split("."):
            return name
    towers = {name: model.get_encoder(modality=kind) for kind, name in STAGE_OF.items()}
    for name, tower in towers.items():
        # A class that answers alike for all it reads does not tell what this one reads.
        own = sum(other is tower for other in towers.values()) == 1
        if own and tower is not model and _is_inside(path, path_of(model, tower)):
            return name
    declared, alone = _declared(model, path)
    if declared and alone:
        return declared
    encoder = model.get_encoder()
    if (
        model.config.is_encoder_decoder
        and encoder is not model
        and _is_inside(path, path_of(model, encoder))
    ):
        return "encoder"
    return declared or "nontext"


def _declared(model: PreTrainedModel, path: str) -> tuple[str | None, bool]:
    """By the input modality that the nearest model around the list declares, if the whole model has
    it too, and if it reads no words; and whether it declares no text beside that."""
    parents = [".".join(path.split(".")[:depth]) for depth in range(path.count("."), 0, -1)]
    for parent in map(model.get_submodule, parents):
        if isinstance(parent, PreTrainedModel):
            told = parent.input_modalities
            kinds = (told,) if isinstance(told, str) else tuple(told)
            # the latter says nothing
            known = kinds[0] in model.input_modalities or model.input_modalities == "text"
            words = "input_ids" in signature(parent.forward).parameters
            name = STAGE_OF.get(kinds[0]) if known and not words else None
            return name, "text" not in kinds
    return None, False


def _is_inside(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")
