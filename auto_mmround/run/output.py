"""One checkpoint folder of a run: packed weights, then everything else, `config.json` last."""

import json
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from auto_mmround import strict
from auto_mmround.atomic import write_whole
from auto_mmround.checkpoint.folder import (
    commit,
    underway,
    write_config,
    write_side_files,
    wrong_name,
)
from auto_mmround.checkpoint.objects import write_code, write_objects
from auto_mmround.checkpoint.sums import file_sums
from auto_mmround.errors import NotProved
from auto_mmround.export.format import Format, PackedFormat, Whole, WholeFormat
from auto_mmround.export.layout import Layout
from auto_mmround.export.shards import ShardWriter
from auto_mmround.lazy import Lazy
from auto_mmround.model.kv_cache import SCALES, cached_attention, strategy_of
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.files import to_toml
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.carried import carried_codes
from auto_mmround.run.names import Names
from auto_mmround.run.plan import NO_LAYER, Plan
from auto_mmround.run.record import checksum, codes_record


@dataclass(frozen=True)
class Result:
    """What every checkpoint of a run is made of. codes: by module name, in the order they are
    written.

    record: what the run writes down about itself. objects: the user's tokenizer, processors and
    generation settings, by the names that `write_objects` has for them; saved where the source has
    none, or others. kv_scales: of keys and values, see `kv_cache`.
    """

    names: Names
    plan: Plan
    recipe: Recipe
    source: Path | None
    codes: Mapping[str, Codes]
    record: Mapping[str, Any]
    objects: Mapping[str, Any] = field(default_factory=dict)
    kv_scales: Mapping[str, Tensor] = field(default_factory=dict)


# What is wrong with a folder that was written for a format, a line each; nothing: it is proved.
Prove = Callable[[Path, Format, Result], Sequence[str]]


def write_checkpoint(
    fmt: Format,
    out: Path,
    result: Result,
    prove: Prove | None = None,
    overwrite: bool | None = None,
) -> Path:
    """Packed weights, unchanged tensors, side files, recipe, record and configuration; then the
    folder gets its name.

    Nothing is visible under it before it is proved, and nothing is left where writing fails.
    overwrite: instead of the recipe's. Raises NotProved for a folder that is wrong, which is left
    as ``<out>.wrong``.
    """
    overwrite = result.recipe.overwrite if overwrite is None else overwrite
    marked = wrong_name(out)
    with underway(out, overwrite) as partial:
        _fill(partial, fmt, result)
        wrong: Sequence[str] = ()
        if prove is not None and result.recipe.check:
            wrong = [
                line.replace(str(partial), str(marked)) for line in prove(partial, fmt, result)
            ]
            _write_record(
                partial, {"checked": not wrong} | ({"wrong": list(wrong)} if wrong else {})
            )
        commit(partial, marked if wrong else out)
    if wrong:
        raise NotProved(marked, wrong)
    shutil.rmtree(marked, ignore_errors=True)  # of an earlier try
    return out


def _write_record(folder: Path, more: Mapping[str, Any]) -> None:
    """`run.json`, or more of it."""
    path = folder / "run.json"
    record = {**(json.loads(path.read_text()) if path.is_file() else {}), **more}
    write_whole(path, (strict.dumps(record, indent=1) + "\n").encode())


def _fill(folder: Path, fmt: Format, result: Result) -> None:
    names, plan, source = result.names, result.plan, result.source
    # what `verify` compares with
    records: dict[str, dict[str, Any]] = {"codes": {}, "tensors": {}, "kv_cache": {}}
    carried = carried_codes(plan.carried, names.carried, names.stored)
    layout = _layout(result)
    packed = layout.quantized if fmt.packs else {}
    config = names.config()
    config = fmt.model_config(config, layout) if fmt.model_config else config
    made: Mapping[str, Codes] = ChainMap({}, carried, result.codes)  # type: ignore[arg-type]
    # by the checkpoint's names; read one by one where they lie on disk
    by_key = {names.module(n): n for n in (*result.codes, *carried)} if packed else {}
    codes = Lazy(by_key, made.__getitem__)
    without = {f"{name}.weight" for name in packed}
    rest = _recorded(names.unchanged(without, made, apart=fmt.packs), records["tensors"])
    if isinstance(fmt, WholeFormat):
        records["codes"] = {
            key: codes_record(weight, _exact(fmt, weight)) for key, weight in codes.items()
        }
    else:
        writer = ShardWriter(folder)
        if isinstance(fmt, PackedFormat):
            for key, weight in codes.items():
                records["codes"][key] = codes_record(weight)
                writer.add(fmt.pack(key, weight))
        for key, tensor in rest:
            writer.add({key: tensor})
        for key, tensor in _kv_scales(result):
            records["kv_cache"][key] = checksum(tensor)
            writer.add({key: tensor})
        writer.finish()
    config |= write_code(folder, names.model) if source is None else {}
    copied = write_side_files(source, folder) if source is not None else []
    files = write_objects(folder, source, copied, **result.objects)
    (folder / "recipe.toml").write_text(to_toml(result.recipe))
    whole = Whole(codes, rest, config, layout, source)
    own = fmt.write(folder, whole) if isinstance(fmt, WholeFormat) else fmt.config(layout)
    write_config(folder, config, own)
    _write_record(
        folder,
        {
            **result.record,
            "checked": False,
            "files": sorted(files),
            "sums": file_sums(folder, shards=isinstance(fmt, WholeFormat)),
            "unread": names.unread,
            **records,
        },
    )


def check_stated(names: Names, plan: Plan, recipe: Recipe) -> None:
    """Raises UserError if a format has no words for the plan in its configuration: before anything
    is tuned."""
    layout = _layout(Result(names, plan, recipe, None, {}, {}))
    for fmt in plan.formats:
        if not isinstance(fmt, WholeFormat):
            fmt.config(layout)


def _layout(result: Result) -> Layout:
    """What formats are told of the names."""
    names, plan, recipe = result.names, result.plan, result.recipe
    schemes = plan.quantized | {w.name: w.scheme for w in plan.carried if w.scheme}
    kept = [name for name, reason in plan.kept.items() if reason != NO_LAYER]
    return Layout(
        quantized=schemes,
        kept=[*kept, *(w.name for w in plan.carried if w.reason)],
        carried=[w.name for w in plan.carried],
        parts=names.parts(kept),
        blocks=[stage.path for stage in plan.stages],
        checkpoint_name=partial(names.module, apart=names.taken_apart(schemes)),
        default=recipe.scheme,
        details=recipe.details,
        kv_cache=strategy_of(result.kv_scales),
        model_type=names.model.config.model_type,
    )


def _kv_scales(result: Result) -> Iterator[tuple[str, Tensor]]:
    """Scales of keys and values by the names that the checkpoint has for attention."""
    if not result.kv_scales:
        return
    for name, projection in cached_attention(result.names.model).items():
        attention = result.names.module(f"{name}.{projection}").rpartition(".")[0]
        for part in SCALES:
            yield f"{attention}.{part}", result.kv_scales[f"{name}.{part}"]


def _exact(fmt: Format, weight: Codes) -> bool:
    """Whether the file has exactly the values of the codes. A fit to super-blocks changes them."""
    return fmt.scale_range is None or weight.unit_OS2 is not None


def _recorded(
    tensors: Iterator[tuple[str, Tensor]], record: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in tensors:
        record[key] = checksum(tensor)
        yield key, tensor
