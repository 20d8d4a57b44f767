"""Load a model with what belongs to it, and map module names to the names in its files."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.borrowed import made_runnable
from auto_mmround.model.devices import HOST
from auto_mmround.model.keys import renamed_keys
from auto_mmround.model.placement import check_present, placed
from auto_mmround.model.quantized import forget
from auto_mmround.model.speaking import is_several
from auto_mmround.model.stored import Stored, stored_tensors
from auto_mmround.model.streaming import Holder, InMemory, fits, load_streamed, stored_dtype
from auto_mmround.untrusted import (
    ARRAYS,
    INDEX,
    SINGLE,
    impossible,
    one_line,
    read_object,
    weight_files,
)

log = logging.getLogger("auto_mmround")

DEMO = Path(__file__).parents[1] / "demo" / "model"
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForCausalLM")
# Architectures as published -> the class that Transformers has for them.
PUBLISHED = {"Qwen2_5OmniModel": "Qwen2_5OmniForConditionalGeneration"}
# Towers that put a token for the whole picture before its patches.
CLASS_TOKENS = ("clip_vision_model",)
# What Transformers raises for a configuration that makes no sense to it.
NONSENSE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, NameError,
  ArithmeticError, ImportError, MemoryError, AssertionError, SyntaxError, StrictDataclassError
)  # fmt: skip


class Impossible(UserError):
    """A configuration that makes a model nowhere: no other version of a library would read it."""


class Readable(NamedTuple):
    """While open, what libraries raise for a file of the folder that makes no sense to them is a
    UserError. what: is read. The tokenizers library raises `Exception` itself, no narrower class.
    """

    folder: Path
    what: str

    def __enter__(self) -> None:
        """Nothing to open."""

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None and (kind is Exception or issubclass(kind, NONSENSE)):
            raise UserError(
                f"model {self.folder}: its {self.what} can't be read: {one_line(str(error))[:300]}"
            ) from None


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, its processor (None for plain text) and its folder (None: in memory).

    holder: who has the weights of blocks at hand. given: the objects are the user's own, made or
    changed. untied: its head was the embedding. Raises UserError for weights that nobody has.
    """

    model: PreTrainedModel
    tokenizer: Any
    processor: Any
    source: Path | None
    holder: Holder = field(default_factory=InMemory)
    given: bool = False
    untied: bool = False

    def __post_init__(self) -> None:
        if not self.streamed:
            check_present(self.model)

    @property
    def streamed(self) -> bool:
        """Whether blocks are read from the files when their turn comes."""
        return not isinstance(self.holder, InMemory)


def find_folder(name: str, offline: bool = False) -> Path:
    """The local folder of a model: `demo`, a folder, or a hub name (downloaded, or taken from the
    hub's cache).

    offline: look in the cache only.
    Raises UserError if there is none, or if it holds no configuration or no safetensors weights.
    """
    folder = DEMO if name == "demo" else Path(os.path.expanduser(name))
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(
                f"model {name}: no such folder, and not a hub name like Qwen/Qwen2-VL-2B-Instruct"
            )
        folder = _from_hub(name, offline)
    if not (folder / "config.json").is_file():
        raise UserError(f"model {name}: the folder has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model {name}: no .safetensors weights, others are not read: `save_pretrained` it anew"
        )
    read = weight_files(folder)
    if read[0].name == SINGLE and (folder / INDEX).is_file():
        log.warning(
            "model %s: %s is read, as Transformers does; the files of its index are not",
            name,
            SINGLE,
        )
    return folder


def _from_hub(name: str, offline: bool) -> Path:
    unread = ["*.bin", "*.pt", "*.pth", "*.onnx*"]
    try:
        huggingface_hub.snapshot_download(
            name, allow_patterns=list(ARRAYS), local_files_only=offline
        )
        return Path(
            huggingface_hub.snapshot_download(
                name, ignore_patterns=unread, local_files_only=offline
            )
        )
    except (
        LocalEntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        ConnectionError,
        OSError,
    ) as error:
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
    device_map: str | dict[str, Any] | None = None,
    remote_code: bool = False,
    stream: bool | None = False,
    may_stay: bool = False,
    copies: int = 1,
) -> Loaded:
    """Load model, tokenizer and processor in evaluation mode without gradients. ``dtype`` None
    keeps the files' dtype, but for float16 on a processor, which becomes float32.

    device_map: as accelerate knows them; the model is spread over all devices then, instead of
      lying on ``device``.
    stream: leave the blocks of all stages in the files, see `streaming`; None: where the model
    takes most of the free memory, as often as there are ``copies`` of it, one a process. may_stay:
    in host memory, where the device has no room for it.
    Weights in FP8 are decoded while they are read. Raises UserError
    for what `find_folder` refuses, for an unknown dtype, for code that is not allowed to run, for a
    model that is quantized in another way and for weights that don't fit the model's class.
    """
    stated = devices.dtype_of(dtype)
    folder, device = find_folder(name), torch.device(device)
    tensors, config = stored_tensors(folder), read_config(folder, remote_code)
    forget(config)
    if tensors.scales and device_map:
        raise UserError(f"device_map {device_map}: not for weights in FP8; leave it out")
    cls = model_class(config, folder, remote_code)
    own_dtype = stated or stored_dtype(tensors, config) or torch.get_default_dtype()
    if (computed := _as_computed(name, own_dtype, device, device_map)) != own_dtype:
        stated = own_dtype = computed
    streams = stream or (
        stream is None and not device_map and not fits(tensors, device, stated, copies)
    )
    if may_stay and not device_map and not fits(tensors, device, stated):
        device = HOST
    how = _How(own_dtype, device, device_map, streams, remote_code)
    model, holder = _read(name, cls, folder, config, tensors, how)
    made_runnable(model)
    processor = load_processor(folder, remote_code)
    return Loaded(model, load_tokenizer(folder, processor, remote_code), processor, folder, holder)


class _How(NamedTuple):
    """How weights are read: their dtype, and where they come to lie."""

    dtype: torch.dtype
    device: torch.device
    device_map: str | dict[str, Any] | None
    streams: bool
    remote_code: bool


def _read(
    name: str, cls: Any, folder: Path, config: PretrainedConfig, tensors: Stored, how: _How
) -> tuple[PreTrainedModel, Holder]:
    """The model with its weights, and who holds them. Raises UserError where the files don't fit
    the class."""
    merged = (folder / "adapter_config.json").is_file() and not how.device_map
    if merged:  # Transformers would add the adapter, or look for it
        log.warning(
            "%s: adapter_config.json is left aside, the weights are taken as merged", folder
        )
    holder: Holder = InMemory()
    try:
        if how.streams or tensors.scales or merged:
            said = "blocks are read when their turn comes" if how.streams else "read by tensors"
            log.info("%s: %s", name, said)
            model, holder, met = load_streamed(
                cls, config, tensors, how.dtype, how.device, renamed_keys, whole=not how.streams
            )
            absent = sorted(met.missing_keys | {key for key, *_ in met.mismatched_keys})
        else:
            options = _trust(how.remote_code) | {"config": config, "dtype": how.dtype}
            model, absent = _read_whole(cls, folder, how.device_map, options)
    except (*NONSENSE, SafetensorError) as error:
        if devices.out_of_memory(error):
            raise
        raise UserError(f"model {name} can't be loaded: {one_line(str(error))[:400]}") from None
    if absent:
        raise UserError(
            f"model {name}: {len(absent)} weights are missing or of the wrong shape, first"
            f" {absent[0]}"
        )
    if isinstance(holder, InMemory):
        model = (model if how.device_map else model.to(how.device)).eval().requires_grad_(False)  # type: ignore[arg-type]
    return model, holder


def _read_whole(
    cls: Any, folder: Path, device_map: str | dict[str, Any] | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the weights that the files lack or have in another shape."""
    if isinstance(device_map, str):
        remote_code = bool(options.get("trust_remote_code"))
        device_map = placed(
            skeleton(options["config"], folder, remote_code), device_map, options["dtype"]
        )
    model, info = read_by(cls, folder, use_safetensors=True, device_map=device_map, **options)
    return model, sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})


def _as_computed(
    name: str, own_dtype: torch.dtype, device: torch.device, device_map: Any
) -> torch.dtype:
    """float32 for float16 on a processor: few compute in it, and gradients vanish in it."""
    if device.type != "cpu" or device_map or own_dtype != torch.float16:
        return own_dtype
    log.info(
        "%s: float16 weights are loaded as float32; --model_dtype bfloat16 takes half the memory",
        name,
    )
    return torch.float32


def read_by(
    cls: Any, folder: Path | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model and what its loading met. A class of several models is read by Transformers' own
    reader alone: Qwen2.5-Omni's unpickles its voices (`spk_dict.pt`), for which quantizing has no
    use, and loses what loading met."""
    reader: Any = PreTrainedModel if is_several(cls) else cls
    loaded: tuple[PreTrainedModel, dict[str, Any]] = reader.from_pretrained.__func__(
        cls, folder, output_loading_info=True, **options
    )
    return loaded


def _trust(remote_code: bool) -> dict[str, Any]:
    """How Transformers reads a folder that is there already: nothing from the network, save code
    that it may run."""
    return {"trust_remote_code": remote_code, "local_files_only": not remote_code}


def read_config(folder: Path, remote_code: bool = False) -> Any:
    """The configuration of a checkpoint folder; UserError if it makes no sense, or needs code that
    may not run."""
    path = folder / "config.json"
    if wrong := impossible(read_object(path)):
        raise Impossible(f"{path}: {wrong}, which no model has")
    try:
        return AutoConfig.from_pretrained(folder, **_trust(remote_code))
    except NONSENSE as error:
        kind = Impossible if isinstance(error, StrictDataclassError) else UserError
        raise kind(f"model {folder}: {one_line(str(error))[:300]}") from None


def model_class(config: Any, folder: Path, remote_code: bool = False) -> Any:
    """The class that the configuration names: of Transformers, else, if it may run, of the code in
    the model's folder.

    Raises UserError for a name that is no model class, and for code that is not allowed to run.
    """
    stated = config.architectures if isinstance(config.architectures, list) else []
    architectures = [name for name in stated if isinstance(name, str)]
    for architecture in architectures:
        cls = getattr(transformers, PUBLISHED.get(architecture, architecture), None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    remote = getattr(config, "auto_map", None) or {}
    for name in AUTO_CLASSES:
        if name in remote:
            # Transformers asks for permission only where the configuration's own class is remote
            # too.
            if not remote_code:
                raise UserError(
                    f"model {folder} needs Python code that comes with it: --trust_remote_code"
                    " runs it"
                )
            with Readable(folder, "code"):
                return get_class_from_dynamic_module(remote[name], folder)
    raise UserError(
        f"architecture {architectures}: unknown to transformers {transformers.__version__}"
    )


def skeleton(config: Any, folder: Path, remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration without any memory for its weights. Raises UserError where none
    can be built."""
    cls = model_class(config, folder, remote_code)
    try:
        with torch.device("meta"):
            return cls(config)
    except NONSENSE as error:
        if devices.out_of_memory(error):
            raise
        reason = one_line(str(error))[:300]
        kind = Impossible if isinstance(error, (KeyError, ArithmeticError)) else UserError
        raise kind(
            f"model {folder}: no model can be built from its config.json: {reason}"
        ) from None


def load_processor(folder: Path, remote_code: bool = False) -> Any:
    """The processor of a multimodal folder, None where there is none. Raises UserError for one that
    can't be read."""
    if not any(
        (folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")
    ):
        return None
    with Readable(folder, "processor"):
        processor = AutoProcessor.from_pretrained(folder, **_trust(remote_code))
    if not hasattr(processor, "tokenizer"):
        return None
    if getattr(processor, "patch_size", 0) is None:
        _complete(processor, read_config(folder, remote_code))
    return processor


def _complete(processor: Any, config: Any) -> None:
    """Old folders have no `processor_config.json`: how many tokens a picture becomes is told by the
    model's configuration alone. A tower with a class token gives one more."""
    vision = getattr(config, "vision_config", None)
    processor.patch_size = getattr(vision, "patch_size", None)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if getattr(processor, "vision_feature_select_strategy", strategy) is None:
        processor.vision_feature_select_strategy = strategy
    if getattr(processor, "num_additional_image_tokens", None) == 0:
        with_class = getattr(vision, "model_type", "") in CLASS_TOKENS
        processor.num_additional_image_tokens = int(with_class)


def load_tokenizer(folder: Path, processor: Any, remote_code: bool = False) -> Any:
    """The processor's tokenizer, or the folder's own. Raises UserError for one that can't be
    read."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer:
        return tokenizer
    with Readable(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, **_trust(remote_code))
