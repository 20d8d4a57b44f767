"""Bounded reading of files from others: text, JSON, names of weight files. One line for a fault."""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from auto_mmround import strict
from auto_mmround.errors import UserError

# configurations, indexes, templates, recipes; a large tokenizer.json has 35 MB
SETTINGS_BYTES = 64 << 20
DATASET_BYTES = 4 << 30
LINE = 2000  # characters of a message for the terminal
PATIENCE = 20  # how much longer than its own time a piece of work may take on a busy machine
SAFE, INDEX_END = ".safetensors", ".safetensors.index.json"
SINGLE, INDEX = f"model{SAFE}", f"model{INDEX_END}"
# Configuration keys that say how many modules are built one by one, and the most that is believed:
# building a deeper model would never end.
DEPTHS = {
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "depths", "encoder_layers",
    "decoder_layers", "num_hidden_groups", "vision_depth", "num_nextn_predict_layers",
}  # fmt: skip
DEEPEST = 1000
# Arrays that classes read beside the weights, though they are called like weights: the voices of
# Qwen2.5-Omni, the filters of Qwen-Audio. We copy them and never open them.
ARRAYS = ("spk_dict.pt", "mel_filters.npz")


def read_text(path: Path, what: str, limit: int = SETTINGS_BYTES) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises UserError, which begins with `what`, for
    others."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise UserError(f"{what} is larger than {limit >> 20} MiB")
        return data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{what} can't be read: {error}") from None


def parse_json(text: str, what: str, once: bool = False) -> Any:
    """The value of a JSON text.

    Raises UserError for bad JSON, and for numbers or nesting beyond Python's limits. once: also for
    a key with two values, since another reader may take the other value.
    """
    try:
        return json.loads(text, object_pairs_hook=_once if once else None)
    except ValueError as error:
        raise UserError(f"{what} is not valid JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{what} is not valid JSON for us: it is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    twice = [key for key, value in pairs if values[key] is not value and values[key] != value]
    if twice:
        raise ValueError(f"{twice[0]!r} stands in it twice, with different values")
    return values


def read_object(path: Path, what: str | None = None) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError for any other."""
    what = what or str(path)
    value = parse_json(read_text(path, what), what, once=True)
    if not isinstance(value, dict):
        raise UserError(f"{what} is not valid JSON for us: it holds no object")
    return value


def impossible(config: Any) -> str | None:
    """The first number of a configuration that no model has, at any place, with its key: a depth
    beyond DEEPEST, and what is not finite. Infinity in a list is a bound, such as Mamba's
    `time_step_limit`."""
    config = strict.untagged(config)
    for key, value in config.items() if isinstance(config, dict) else ():
        numbers = value if isinstance(value, list) else [value]
        floats = [n for n in numbers if isinstance(n, float)]
        deep = key in DEPTHS and any(isinstance(n, int | float) and n > DEEPEST for n in numbers)
        endless = isinstance(value, float) and math.isinf(value)
        if deep or endless or any(map(math.isnan, floats)):
            return f"{key} = {str(value)[:80]}"
        for each in numbers:
            if wrong := impossible(each):
                return wrong
    return None


def weight_files(folder: Path) -> list[Path]:
    """The weight files that Transformers reads of a folder, in its order.

    If two files hold a tensor, the later one counts. `config.json` may name the file, or the index,
    as `transformers_weights`. Else it is `model.safetensors`, else the files of
    `model.safetensors.index.json`. Other files are not read. Raises UserError if there are none,
    and for names of anything but safetensors files in the folder.
    """
    config = folder / "config.json"
    named = read_object(config).get("transformers_weights") if config.is_file() else None
    if named is not None and not (
        isinstance(named, str) and is_plain(named) and named.endswith((SAFE, INDEX_END))
    ):
        raise UserError(
            f"{config}: transformers_weights = {str(named)[:200]!r} is no safetensors file of the"
            " folder"
        )
    path = folder / (named or (SINGLE if (folder / SINGLE).is_file() else INDEX))
    if not path.is_file():
        others = sorted(other.name for other in folder.glob(f"*{SAFE}"))
        beside = f"; {others[0]} is not read, rename it if it holds the weights" if others else ""
        raise UserError(
            f"{folder} has no weights: neither {named or f'{SINGLE} nor {INDEX}'}{beside}"
        )
    # one that is not read is checked too: a copy may be half done
    indexes = {path, folder / INDEX} - {folder / SINGLE}
    shards = {
        index: _shards(index)
        for index in indexes
        if index.name.endswith(INDEX_END) and index.is_file()
    }
    return shards.get(path, [path])


def _shards(index: Path) -> list[Path]:
    content = read_object(index)
    weight_map = content.get("weight_map")
    problem = index_problem(weight_map)
    if problem is None:
        shards = [index.with_name(name) for name in sorted(set(weight_map.values()))]  # type: ignore[union-attr]
        gone = [shard.name for shard in shards if not shard.is_file()]
        problem = f"names {gone[0]!r}, which is not in the folder" if gone else no_metadata(content)
    if problem:
        beside = (
            ", or remove the index if model.safetensors is newer"
            if index.with_name(SINGLE).is_file()
            else ""
        )
        raise UserError(f"{index} {problem}: copy the folder again{beside}")
    return shards


def index_problem(shards: Any) -> str | None:
    """The fault of an index's `weight_map` by itself: its form, or a name that is no file of the
    folder."""
    if not isinstance(shards, Mapping) or not shards:
        return "holds no weight_map"
    for name, shard in shards.items():
        if not isinstance(shard, str) or not shard.endswith(SAFE) or not is_plain(shard):
            return (
                f"says that {name!r} lies in {str(shard)[:200]!r}, which is no safetensors file of"
                " the folder"
            )
    return None


def no_metadata(index: Mapping[str, Any]) -> str | None:
    """The fault of an index that Transformers can't read, though it says where all tensors are."""
    here = isinstance(index.get("metadata"), Mapping)
    return None if here else "holds no metadata, without which Transformers reads no index"


def is_plain(name: str) -> bool:
    """Whether a name is the name of a file in a folder, without a path to another folder."""
    return Path(name).name == name and name.isprintable() and len(name) < 256 and "\\" not in name


def belongs(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder after all links are followed.

    The hub's cache keeps the files of a snapshot in `blobs` beside it and links to them.
    """
    home, real = folder.resolve(), path.resolve()
    cached = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    return real.is_relative_to(home) or real.is_relative_to(cached)


def one_line(message: str) -> str:
    """A message for the terminal: one line of bounded length, without control characters."""
    text = " ".join(message[: 4 * LINE].split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= LINE else f"{text[:LINE]} .."


def shown(value: Any) -> str:
    """A value for a message: short, and without the memory address of an object."""
    text = re.sub(r"( object)? at 0x[0-9a-fA-F]+", "", repr(value))
    return text if len(text) <= 80 else f"{text[:80]} .."


@contextmanager
def readable(path: Path, damage: tuple[type[Exception], ...]) -> Iterator[None]:
    """Raises UserError where the body raises what reading a damaged file does."""
    try:
        yield
    except damage as error:
        reason = one_line(str(error))[:200]
        raise UserError(f"{path} cannot be read ({reason}): the file is damaged") from error


class TooLong(Exception):
    """Work on data of others took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLong in the body after so many seconds of a processor, or PATIENCE times as many by
    the clock: other work on the machine is no fault of the data. In threads other than the main
    one, never.

    Data alone can keep some work busy: chat templates, and patterns from a checkpoint's
    configuration.
    """
    import signal
    import threading
    import time

    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    worked, began = time.thread_time(), time.monotonic()

    def stop(_: int, __: FrameType | None) -> None:
        waited = (time.monotonic() - began) / PATIENCE
        if max(time.thread_time() - worked, waited) >= seconds:
            raise TooLong

    def told(dropped: Any) -> None:
        if dropped.exc_type is not TooLong:
            tell(dropped)

    before, tell = signal.signal(signal.SIGALRM, stop), sys.unraisablehook
    # Python drops what a finalizer or a hook of the garbage collector raises, and prints it. So the
    # alarm comes again every second, and what was dropped is not printed.
    sys.unraisablehook = told
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = tell
