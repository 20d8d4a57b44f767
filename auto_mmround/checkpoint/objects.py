"""Tokenizer, processors and generation settings from the user.

Those that differ from the source, or are missing there, are saved. The files of the others are
copied from the source, byte for byte.
"""

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save

from auto_mmround import strict
from auto_mmround.atomic import write_json, write_whole
from auto_mmround.model.loading import NONSENSE

# Files that belong together: if one differs, all are written anew, and older spellings go.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json",
     "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
     "tekken.json"),
    ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"),
    ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)  # fmt: skip
# Notes on how an object was loaded.
ASIDE = {"is_local", "local_files_only", "name_or_path", "transformers_version", "processor_class",
    "backend",
         "_from_model_config"}  # fmt: skip
UNREAD = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError)
Files = Mapping[str, bytes]


def write_objects(
    out: Path,
    source: Path | None,
    copied: Sequence[str],
    *,
    tokenizer: Any = None,
    processor: Any = None,
    image_processor: Any = None,
    generation_config: Any = None,
) -> list[str]:
    """Save new or changed objects over their copies in ``out``; returns all side files' names.

    copied: names of the copies. Tokenizers are saved without truncation and padding. Generation
    settings are written as they are, also where Transformers would refuse to save them.
    """
    names = set(copied)
    for thing in (processor, tokenizer):
        if thing is not None:
            names |= _update(out, _saved(thing), _from_source(thing, source))
    if image_processor is not None and (mine := _saved(image_processor)) != _from_source(
        image_processor, source
    ):
        names |= _pictures(out, mine)
    if generation_config is not None and _settings_differ(generation_config, source):
        write_json(
            out / "generation_config.json",
            json.loads(generation_config.to_json_string(use_diff=True)),
        )
        names.add("generation_config.json")
    return sorted(name for name in names if (out / name).is_file())


def write_code(out: Path, model: Any) -> dict[str, Any]:
    """Save the Python code of a model outside Transformers; returns its entries for config.json."""
    config = copy.deepcopy(model.config)
    for thing in (model.config, model):
        if thing._auto_class is not None:
            custom_object_save(thing, out, config=config)
    return {"auto_map": config.auto_map} if getattr(config, "auto_map", None) else {}


def _saved(thing: Any) -> Files:
    """The files that the object saves, by name.

    For a whole processor, also the part that older readers expect in its own file.
    """
    thing = _untruncated(thing)
    with tempfile.TemporaryDirectory() as scratch:
        thing.save_pretrained(scratch)
        files = [path for path in Path(scratch).rglob("*") if path.is_file()]
        saved = {str(path.relative_to(scratch)): path.read_bytes() for path in files}
    whole = json.loads(saved.get("processor_config.json", b"{}"))
    part = whole.get("image_processor") or whole.get("feature_extractor")
    return saved | (
        {"preprocessor_config.json": strict.dumps(part, indent=2).encode() + b"\n"} if part else {}
    )


def _from_source(thing: Any, source: Path | None) -> Files:
    """The files that the source's own object would save; none if the source has no such object."""
    if source is None:
        return {}
    try:
        # A processor loads the parts that the source names: none of its code runs, nobody is asked.
        quiet = {"trust_remote_code": False} if isinstance(thing, ProcessorMixin) else {}
        return _saved(type(thing).from_pretrained(source, **quiet))
    except UNREAD:
        return {}


def _update(out: Path, mine: Files, theirs: Files) -> set[str]:
    """Write the groups of files in which the two differ; returns their names."""
    differ = {name for name in {*mine, *theirs} if _content(name, mine) != _content(name, theirs)}
    groups = [group for group in GROUPS if differ & set(group)]
    grouped = {name for group in GROUPS for name in group}
    for name in {name for group in groups for name in group} - mine.keys():
        (out / name).unlink(missing_ok=True)
    chosen = {
        name for name in mine if name in differ - grouped or any(name in group for group in groups)
    }
    for name in chosen:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out / name, mine[name])
    return chosen


def _pictures(out: Path, mine: Files) -> set[str]:
    """Write an image processor's own file and its part of the whole one's; returns the names."""
    whole, part = out / "processor_config.json", mine.get("preprocessor_config.json")
    if part is not None and whole.is_file():
        settings = json.loads(whole.read_bytes())
        if "image_processor" in settings:
            write_json(whole, settings | {"image_processor": json.loads(part)})
    for name, content in mine.items():
        write_whole(out / name, content)
    return set(mine)


def _content(name: str, files: Files) -> Any:
    """The content of a file, without notes on how its object was loaded."""
    content = files.get(name)
    if content is None or not name.endswith("_config.json"):
        return content
    return {key: value for key, value in json.loads(content).items() if key not in ASIDE}


def _settings_differ(settings: Any, source: Path | None) -> bool:
    """Whether generation settings differ from the source's file; without it, from the model's."""
    if source is None or not (source / "generation_config.json").is_file():
        return source is None or not settings._from_model_config
    try:
        stated = GenerationConfig.from_pretrained(source)
    except NONSENSE:  # a file that nobody can read is no statement
        return True
    one, other = (
        {k: v for k, v in each.to_dict().items() if k not in ASIDE} for each in (settings, stated)
    )
    return one != other


def _untruncated(thing: Any) -> Any:
    """A copy of a tokenizer or processor that neither truncates nor pads: files hold both."""
    thing = copy.deepcopy(thing)
    backend = getattr(getattr(thing, "tokenizer", thing), "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return thing
