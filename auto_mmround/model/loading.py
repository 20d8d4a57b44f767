"""Load a model with what belongs to it, and map module names to the names in its files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_converters, rename_source_key
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from auto_mmround.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
          "float32": torch.float32, "fp32": torch.float32}  # fmt: skip
DEMO = Path(__file__).parents[1] / "demo" / "model"
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForCausalLM")


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, its processor (None for plain text models) and its folder (None: made in memory)."""

    model: PreTrainedModel
    tokenizer: Any
    processor: Any
    source: Path | None


def find_folder(name: str, offline: bool = False) -> Path:
    """The local folder of a model: `demo`, a folder, or a hub name (downloaded, or taken from the hub's cache).

    offline: look in the cache only.
    Raises UserError if there is none, or if it holds no configuration or no safetensors weights.
    """
    folder = DEMO if name == "demo" else Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"model {name}: no such folder, and not a hub name like Qwen/Qwen2-VL-2B-Instruct")
        folder = _from_hub(name, offline)
    if not (folder / "config.json").is_file():
        raise UserError(f"model {name}: the folder has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model {name}: the folder has no .safetensors weights; other weight files are not read")
    return folder


def _from_hub(name: str, offline: bool) -> Path:
    unread = ["*.bin", "*.pt", "*.pth", "*.onnx*"]
    try:
        return Path(huggingface_hub.snapshot_download(name, ignore_patterns=unread, local_files_only=offline))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, ConnectionError, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            f"model {name}: not in the local cache and the hub can't be read ({reason}); "
            "give a local folder, or --model demo for the model that ships with the project"
        ) from None


def load(
    name: str,
    *,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    device_map: str | None = None,
    remote_code: bool = False,
) -> Loaded:
    """Load model, tokenizer and processor in evaluation mode without gradients. ``dtype`` None keeps the files' dtype.

    device_map: as accelerate knows them; the model is spread over all devices then, instead of lying on ``device``.

    Raises UserError for what `find_folder` refuses, for an unknown dtype, for code that is not allowed to run, for a
    model that is quantized already and for weights that don't fit the model's class.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"model_dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    folder = find_folder(name)
    config = read_config(folder, remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model {name} is quantized already; give the original weights")
    cls = model_class(config, folder)
    try:
        model, info = cls.from_pretrained(
            folder,
            dtype=DTYPES[dtype] if dtype else "auto",
            device_map=device_map,
            trust_remote_code=remote_code,
            output_loading_info=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"model {name} can't be loaded: {' '.join(str(error).split())[:400]}") from None
    absent = sorted(set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]})
    if absent:
        raise UserError(f"model {name}: {len(absent)} weights are missing or of the wrong shape, first {absent[0]}")
    left = {str(place) for place in getattr(model, "hf_device_map", {}).values()} & {"disk"}
    if left:
        raise UserError(f"device_map {device_map}: the model fits in no memory of this machine, it would lie on disk")
    model = (model if device_map else model.to(device)).eval().requires_grad_(False)
    processor = load_processor(folder, remote_code)
    return Loaded(model, load_tokenizer(folder, processor, remote_code), processor, folder)


def read_config(folder: Path, remote_code: bool = False) -> Any:
    """The configuration of a checkpoint folder; UserError if it needs code that is not allowed to run."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {folder}: {' '.join(str(error).split())[:300]}") from None


def model_class(config: Any, folder: Path) -> Any:
    """The class that the configuration names: of Transformers, else of the Python code in the model's folder.

    To be called with a configuration of `read_config`, which has refused code that is not allowed to run.
    """
    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    remote = getattr(config, "auto_map", None) or {}
    for name in AUTO_CLASSES:
        if name in remote:
            return get_class_from_dynamic_module(remote[name], folder)
    raise UserError(f"architecture {config.architectures}: unknown to transformers {transformers.__version__}")


def skeleton(config: Any, folder: Path) -> PreTrainedModel:
    """The model of a configuration without any memory for its weights."""
    with torch.device("meta"):
        return model_class(config, folder)(config)


def load_processor(folder: Path, remote_code: bool = False) -> Any:
    """The processor of a multimodal folder, None where there is none."""
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return None
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=remote_code)
    return processor if hasattr(processor, "tokenizer") else None


def load_tokenizer(folder: Path, processor: Any, remote_code: bool = False) -> Any:
    """The processor's tokenizer, or the folder's own."""
    found = getattr(processor, "tokenizer", None)
    return found or AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)


def parameter_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Name of the parameter in the model -> key in the checkpoint, for keys that hold exactly one parameter.

    Keys that are fused or split on the way are left out.
    """
    return {name: key for key, (name, whole) in loaded_names(model, keys).items() if whole and name is not None}


def loaded_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str | None, bool]]:
    """Key in the checkpoint -> (name of the parameter it ends up in, or None; whether it is the whole of it).

    Transformers renames while loading (`model.layers` -> `model.language_model.layers`); the same tables are applied
    here.
    """
    own = dict.fromkeys(model.state_dict())
    return {key: (name if name in own else None, not converted) for key, name, converted in renamed_keys(model, keys)}


def converted_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Key in the checkpoint -> parameter that it becomes a part of, for the keys that `parameter_names` leaves out."""
    return {key: name for key, name, converted in renamed_keys(model, keys) if converted}


def renamed_keys(model: PreTrainedModel, keys: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """(key in the checkpoint, parameter in the model, whether it is more than renamed on the way)."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    meta = dict.fromkeys(model.state_dict(), True)
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        yield key, name, pattern is not None


def converted_parameters(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Those of the parameters that Transformers splits, fuses or permutes on the way from the checkpoint's tensors."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
    back = [back for t in transforms if isinstance(back := t.reverse_transform(), WeightConverter)]
    return {name for name in names if apply_converters(name, back)[1] is not None}
