"""Arguments of `AutoRoundMLLM`: told apart by type, corrected if that is clear, else refused."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from auto_mmround.errors import UserError

NO_ROWS = (bytes, nn.Module, PreTrainedTokenizerBase, ProcessorMixin, type)
# options that may be given as Path
PATHS = ("extra_data_dir", "template", "processor", "output_dir")


def checked_model(model: Any) -> PreTrainedModel | str:
    """A model, or a folder or hub name. Raises UserError for others, and for unmerged adapters."""
    if isinstance(model, str | Path):
        return str(model)
    if isinstance(model, nn.Module):
        compiled = next(
            (name for name, part in model.named_modules() if hasattr(part, "_orig_mod")), None
        )
        if compiled is not None:
            where = f"model.{compiled}".removesuffix(".")
            raise UserError(
                f"{where} is what torch.compile returned: give what it was made of,"
                f" {where}._orig_mod"
            )
        layer = next(
            (name for name, module in model.named_modules() if _package(module) == "peft"), None
        )
        if layer is not None:
            where = f"model.{layer}".removesuffix(".")
            class_name = type(model.get_submodule(layer)).__name__
            raise UserError(
                f"{where} is a {class_name} of peft: give the model that merge_and_unload() returns"
            )
    if not isinstance(model, PreTrainedModel):
        hint = (
            "; model and tokenizer are swapped"
            if isinstance(model, PreTrainedTokenizerBase)
            else ""
        )
        raise UserError(
            f"model is {_described(model)}, expected a model of Transformers, a folder or a hub"
            f" name{hint}"
        )
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise UserError(
            f"model: {away} is not in memory (device_map has left it elsewhere); load it without"
            " device_map"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(
            "model is quantized already (its config has a quantization_config); give the original"
            " weights"
        )
    return model


def told_apart(tokenizer: Any, processor: Any, image_processor: Any) -> tuple[Any, Any]:
    """(tokenizer, processor). A processor may stand in the tokenizer's place or be its attribute.

    A tokenizer may stand in the processor's place. Raises UserError for other objects.
    """
    if isinstance(processor, PreTrainedTokenizerBase) and (
        tokenizer is None or isinstance(tokenizer, ProcessorMixin)
    ):
        tokenizer, processor = processor, tokenizer
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer, processor = getattr(tokenizer, "tokenizer", None), processor or tokenizer
    processor = processor or getattr(tokenizer, "processor", None)
    for name, thing, example in (
        ("tokenizer", tokenizer, "AutoTokenizer.from_pretrained(..)"),
        ("processor", processor, "AutoProcessor.from_pretrained(..)"),
        ("image_processor", image_processor, "AutoImageProcessor.from_pretrained(..)"),
    ):
        if thing is not None and (not callable(thing) or isinstance(thing, nn.Module | type)):
            raise UserError(f"{name} is {_described(thing)}, expected what {example} returns")
    if isinstance(processor, PreTrainedTokenizerBase):
        raise UserError(
            "processor is a second tokenizer, expected what AutoProcessor.from_pretrained(..)"
            " returns"
        )
    return tokenizer, processor or getattr(tokenizer, "processor", None)


def checked_dataset(dataset: Any) -> Any:
    """A name or path as text, or rows to iterate over. Raises UserError for other objects."""
    if dataset is None or isinstance(dataset, str | Path):
        return None if dataset is None else str(dataset)
    if isinstance(dataset, Mapping):
        parts = ", ".join(map(str, list(dataset)[:4]))
        raise UserError(
            f"dataset is {_described(dataset)} of {parts}: give one of its parts, or a list of rows"
        )
    if not isinstance(dataset, NO_ROWS):
        if isinstance(dataset, Iterable):
            return dataset
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):  # of torch.utils.data
            return [dataset[index] for index in range(len(dataset))]
    raise UserError(
        f"dataset is {_described(dataset)}, expected a name, a path, a list of rows or a DataLoader"
    )


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as recipes have them: devices (also torch.device or number) and paths as text."""
    given = {
        key: value for key, value in options.items() if not (key == "device" and value is None)
    }
    for key, value in given.items():
        if (isinstance(value, Path) and key in PATHS) or (
            key == "device" and (_package(value) == "torch" or type(value) is int)
        ):
            given[key] = str(value)
    return given


def listed(value: Any, name: str) -> list[str]:
    """The names in a comma list, or in a list. Raises UserError for others, and for none."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise UserError(f"{name} is {_described(value)}, expected names with commas, or a list")
    words = [part.strip() for part in parts if part.strip()]
    if not words:
        raise UserError(f"{name} is empty: name at least one")
    return words


def folder_of(value: Any, name: str) -> Path:
    """A folder's path. Raises UserError for what is none."""
    if not isinstance(value, str | Path):
        raise UserError(f"{name} is {_described(value)}, expected a folder")
    if not str(value).strip():
        raise UserError(f"{name} is empty: name a folder, or . for the current one")
    return Path(os.path.expanduser(value))


def _package(thing: Any) -> str:
    return type(thing).__module__.partition(".")[0]


def _described(thing: Any) -> str:
    if thing is None:
        return "None"
    if isinstance(thing, str):
        return f"the text {thing[:80]!r}"
    name = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    article = "the class" if isinstance(thing, type) else "an" if name[0] in "AEIOUaeiou" else "a"
    return f"{article} {name}"
