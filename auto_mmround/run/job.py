"""From a recipe to finished checkpoints: what the command line and the API share."""

import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from auto_mmround.atomic import FULL
from auto_mmround.calibration.datasets import load_rows
from auto_mmround.calibration.dotted import collator
from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.calibration.samples import Preparers, Reading, build
from auto_mmround.calibration.settings import Asked, Reads, Settings, choose
from auto_mmround.calibration.template import DEFAULT, Template, load_template
from auto_mmround.checkpoint.folder import check_free, side_files
from auto_mmround.errors import NotProved, UserError
from auto_mmround.export import formats
from auto_mmround.export.format import Format
from auto_mmround.families import FAMILIES, calibrates, family_of
from auto_mmround.model import devices
from auto_mmround.model.head import check_head, untie
from auto_mmround.model.kv_cache import cached_attention
from auto_mmround.model.loading import Loaded, load
from auto_mmround.model.positions import position_limit
from auto_mmround.model.quantized import check_floating
from auto_mmround.model.speaking import speaking
from auto_mmround.model.structure import READS
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.carried import with_carried
from auto_mmround.run.finished import Finished, Unfinished, identity, unfinished
from auto_mmround.run.given import check_apart
from auto_mmround.run.met import StageTrial, met, naming
from auto_mmround.run.mixed import choose_bits, units
from auto_mmround.run.names import Names, check_formats, check_names, check_tuned
from auto_mmround.run.out_of_memory import phase
from auto_mmround.run.output import Prove, Result, check_stated, write_checkpoint
from auto_mmround.run.pipeline import Watcher, quantize
from auto_mmround.run.places import check_places, places
from auto_mmround.run.plan import Plan, make_plan
from auto_mmround.run.processes import ALONE, Processes
from auto_mmround.run.ranges import within_ranges
from auto_mmround.run.record import run_record
from auto_mmround.run.sensitivity import HELPS, WHAT
from auto_mmround.run.session import Session

log = logging.getLogger("auto_mmround")


@dataclass(frozen=True)
class Job:
    """A run that is ready to start. recipe: with the values that the data asked for. inputs: empty
    without tuning."""

    recipe: Recipe
    loaded: Loaded
    plan: Plan
    inputs: Sequence[ModelInput]
    calibration: dict[str, Any] | None
    notes: tuple[str, ...]
    mixed: dict[str, Any] | None = None  # what choosing bits has measured


def template_for(model: PreTrainedModel, name: str | None = None) -> Template:
    """The user's template, or the family's."""
    model_type = model.config.model_type
    return load_template(name, family_of(model_type).template or model_type)


def preparers(loaded: Loaded, template: str | None = None) -> Preparers:
    """What turns rows into inputs of a model. template: the user's instead of the family's."""
    model = loaded.model
    return Preparers(
        loaded.tokenizer, loaded.processor, template_for(model, template), speaking(model).config,
        positions=position_limit(model),
    )  # fmt: skip


def load_model(recipe: Recipe, kept: bool = False, processes: Processes = ALONE) -> Loaded:
    """The recipe's model on the recipe's device, or on this process's one of several. kept: by the
    caller, so it is in memory as a whole, in the host's where the device has no room for it."""
    device = devices.resolve(recipe.device, processes.local_rank)
    for asked, text in (
        (recipe.device_map, "device_map spreads the model over all devices of one process"),
        (recipe.polish, "polish is for one process"),
    ):
        if asked and processes.count > 1:
            raise UserError(f"{text}; leave one of the two out")
    if recipe.kv_cache_scheme is not None:
        formats.check_kv_cache(recipe.formats)
    formats.check_schemes(recipe.formats, recipe.schemes)
    stream = False if kept or recipe.whole_passes else recipe.streams
    loaded = load(
        recipe.model, dtype=recipe.model_dtype, device=device, device_map=recipe.device_map,
        remote_code=recipe.trust_remote_code, stream=stream, may_stay=kept,
        copies=processes.here if device.type == devices.HOST.type else 1,
    )  # fmt: skip
    return untied(recipe, loaded)


def untied(recipe: Recipe, loaded: Loaded) -> Loaded:
    """With an output head of its own, if the recipe wants that."""
    if recipe.untie_lm_head and untie(loaded.model):
        return replace(loaded, given=True, untied=True)
    return loaded


def planned(recipe: Recipe, loaded: Loaded) -> Plan:
    """What becomes of every weight. Raises UserError as `make_plan`, `within_ranges` and
    `check_apart` do."""
    plan = _whole(recipe, loaded, make_plan(loaded.model, recipe))
    others = recipe.polish or recipe.equalize != "none"  # changes more than is quantized
    check_apart(loaded.model, None if others else {f"{name}.weight" for name in plan.quantized})
    return plan


def _whole(recipe: Recipe, loaded: Loaded, plan: Plan) -> Plan:
    """The plan within what scales hold, and with what only the files have."""
    plan = within_ranges(loaded, plan)
    if loaded.source is None:
        return plan
    return with_carried(plan, loaded.model, loaded.source, recipe)


def prepare(
    recipe: Recipe,
    loaded: Loaded,
    dataset: Any = None,
    image_processor: Any = None,
    on_measured: Callable[[int, int], None] = lambda done, total: None,
) -> Job:
    """Plan the weights and read the calibration samples. ``dataset``: rows in memory instead of the
    recipe's name.

    Raises UserError for all that is wrong with the recipe, the patterns, formats and samples.
    """
    check_floating(loaded.model)
    check_head(loaded.model)
    template_for(loaded.model, recipe.template)  # complains of a name that no template has
    if loaded.source is not None:
        side_files(loaded.source)  # complains of what can't be copied
    plan = planned(recipe, loaded)
    if recipe.kv_cache_scheme is not None:
        formats.check_kv_cache(recipe.formats)
        cached_attention(loaded.model)  # complains where there is none
    if recipe.target_bits is not None:
        units(loaded.model, recipe, plan)  # complains before any sample is read
    _say_unread(loaded, _check_writing(loaded, plan, recipe), plan)
    if not recipe.needs_samples:
        return Job(
            recipe, loaded, plan, (), None, ("weights are rounded to nearest: no calibration",)
        )
    chosen = choose_samples(recipe, loaded, plan, dataset)
    recipe, ready = chosen.recipe, preparers(loaded, recipe.template)
    skip = chosen.reading.on_bad_sample == "skip"
    trial = StageTrial(Session(loaded.model, recipe, plan, ()), every=skip)
    inputs, report = build(
        chosen.settings.dataset,
        replace(
            ready, image_processor=image_processor, processor_name=recipe.processor, accept=trial
        ),
        chosen.reading,
    )
    plan = met(plan, trial.reached)
    mixed = None
    if recipe.target_bits is not None:
        with phase(WHAT, HELPS), naming(inputs):
            session = Session(loaded.model, recipe, plan, inputs)
            recipe, plan, mixed = choose_bits(session, on_measured)
        plan = _whole(recipe, loaded, plan)  # other bits need other scales
        check_stated(Names(loaded.model, loaded.source, loaded.given), plan, recipe)
    passed = len(Session(loaded.model, recipe, plan, inputs).used)
    facts = asdict(report) | {"passed": passed}
    return Job(recipe, loaded, plan, inputs, facts, chosen.notes, mixed)


def _check_writing(loaded: Loaded, plan: Plan, recipe: Recipe) -> Names:
    """Complain of what the plan's formats can't write."""
    names = Names(loaded.model, loaded.source, loaded.given)
    check_formats(plan.formats, names, loaded.source)
    check_names(names, plan)
    check_stated(names, plan, recipe)
    return names


def _say_unread(loaded: Loaded, names: Names, plan: Plan) -> None:
    if names.unread:
        count = sum(1 for weight in plan.carried if weight.scheme)
        log.warning(
            "%s does not read %d tensors, first %s: copied as they are%s",
            type(loaded.model).__name__,
            len(names.unread),
            names.unread[0],
            f", but for {count} that are rounded to 8 bits" if count else "",
        )


class Chosen(NamedTuple):
    """What the data ask of a run: its recipe with resolved values, and how samples are read."""

    recipe: Recipe
    settings: Settings
    reading: Reading
    notes: tuple[str, ...]


def choose_samples(recipe: Recipe, loaded: Loaded, plan: Plan, dataset: Any = None) -> Chosen:
    """Raises UserError as `choose` does. dataset: rows in memory instead of the recipe's name."""
    model_type = loaded.model.config.model_type
    towers = [stage.name for stage in plan.stages if stage.name != "text"]
    kinds = calibrates(loaded.model)
    needs = _needs(towers, kinds)
    collate = collator(recipe.collator) if recipe.collator else None
    template = template_for(loaded.model, recipe.template)
    if recipe.template is None and template.model_type == DEFAULT:
        log.info("no template for model type %r: its own chat template is used", model_type)
    settings, notes = choose(
        recipe.dataset if dataset is None else dataset,
        template,
        Reads(
            "text" in kinds,
            bool(towers and needs),
            needs,
            FAMILIES[model_type].calibrates if model_type in FAMILIES else None,
            position_limit(loaded.model),
            some=True,  # of several towers those are quantized that samples reach
        ),
        Asked(
            recipe.nsamples,
            recipe.batch,
            recipe.gradient_accumulate_steps,
            recipe.seqlen,
            recipe.truncation,
        ),
        by_name=collate is None,
        load=partial(load_rows, collate=collate),
    )
    for note in notes:
        log.log(logging.INFO if note in settings.usual else logging.WARNING, note)
    same = ("nsamples", "seqlen", "truncation", "batch_size", "gradient_accumulate_steps")
    values: dict[str, Any] = {name: getattr(settings, name) for name in same}
    if isinstance(settings.dataset, str):
        values["dataset"] = settings.dataset
    recipe = replace(recipe, **values)
    reading = Reading(
        settings.nsamples, settings.seqlen, settings.truncation, recipe.seed,
        recipe.extra_data_dir, recipe.allow_url, on_bad_sample=recipe.on_bad_sample,
        collate=collate,
    )  # fmt: skip
    return Chosen(recipe, settings, reading, notes)


def _needs(towers: Sequence[str], calibrates: Sequence[str]) -> tuple[str, ...]:
    """Kinds of media that the stages to quantize must meet, or without towers the model itself."""
    media = tuple(kind for kind in calibrates if kind != "text")
    kinds = tuple(dict.fromkeys(READS[name] for name in towers if name in READS))
    # An encoder reads what its model is given, which may be words.
    return kinds or media[:1] or (("image",) if "nontext" in towers else ())


def run(
    job: Job,
    watcher: Watcher | None = None,
    processes: Processes = ALONE,
    prove: Prove | None = None,
) -> list[Path]:
    """Quantize and write every format; returns the finished folders. Of several processes the first
    one writes.

    Finished blocks are kept on disk until all is written: after a crash the same job continues
    there, to the same bits. Nothing is left under a final name when anything goes wrong before the
    end. prove: what judges a folder before it gets its name, unless the recipe says no `check`;
    raises NotProved, and keeps the finished blocks, for those wrong.
    """
    model, recipe, source = job.loaded.model, job.recipe, job.loaded.source
    config = (source / "config.json").read_text() if source else model.config.to_json_string()
    known = identity(recipe, config, source, job.inputs)
    work = partial(
        quantize, model, recipe, job.plan, job.inputs, holder=job.loaded.holder, processes=processes
    )
    if not processes.first:
        with (
            tempfile.TemporaryDirectory() as scratch,
            unfinished(Path(scratch) / "blocks", known) as finished,
        ):
            work(finished)
        return []
    place, outs = places(recipe)
    check_places([place, *outs], source)
    with unfinished(place, known, recipe.restart) as finished:
        checked = prove is not None and recipe.check
        targets = zip(job.plan.formats, outs, strict=True)
        pending = {out: fmt for fmt, out in targets if not finished.wrote(out, checked)}
        for out in pending:
            check_free(out, recipe.overwrite or finished.wrote(out))
        names = Names(model, source, job.loaded.given)
        check_names(names, job.plan)
        with naming(job.inputs):
            work(finished, watcher)
        record = _record(job, finished) | {"run": finished.run}
        result = Result(
            names, job.plan, recipe, source, finished.result, record, kv_scales=finished.kv_scales
        )
        (watcher or Watcher()).writing()
        _write(pending, result, finished, prove)
    return outs


def _write(
    pending: Mapping[Path, Format], result: Result, finished: Unfinished, prove: Prove | None
) -> None:
    """All folders that wait. Raises NotProved as `run` does."""
    kept = "the finished blocks are kept, the same command goes on with them"
    writes = [
        phase(f"writing {fmt.name}", kept)(
            partial(
                write_checkpoint, fmt, out, result, prove,
                result.recipe.overwrite or finished.wrote(out),
            )
        )
        for out, fmt in pending.items()
    ]  # fmt: skip
    write_all(writes, f"; the finished blocks are kept in {finished.folder}")


def write_all(writes: Iterable[Callable[[], Path]], note: str = "") -> list[Path]:
    """The folders that are written. All are tried; then raises NotProved if any is wrong. note:
    ends its message."""
    written: list[Path] = []
    failed: list[NotProved] = []
    for write in writes:
        try:
            written.append(write())
        except NotProved as error:
            failed.append(error)
    if failed:
        raise NotProved(
            failed[0].folder, failed[0].findings, [error.folder for error in failed], note
        )
    return written


def _record(job: Job, finished: Finished) -> dict[str, Any]:
    blocks = list(finished.reports.values())
    made = run_record(job.plan, blocks, job.notes, job.calibration, job.mixed, finished.polished)
    return made | {"equalize": job.recipe.equalize}


def holding(job: Job, format_name: str) -> Format:
    """The format of that name. Raises UserError if it can't hold or state what was tuned; name it
    in the recipe's `format` before tuning."""
    fmt = formats.resolve(format_name, job.plan.schemes)
    for weight in job.plan.all:
        if weight.scheme:
            problem = fmt.holds(weight.scheme) or fmt.check(
                weight.scheme, weight.out_features, weight.in_features
            )
            if problem:
                raise UserError(
                    f"format {fmt.name} {problem} ({weight.name}); pass format={fmt.name!r} before"
                    " tuning"
                )
    _check_writing(job.loaded, replace(job.plan, formats=(fmt,)), job.recipe)
    return fmt


def save(
    job: Job,
    finished: Finished,
    out: Path,
    format_name: str,
    objects: Mapping[str, Any] | None = None,
    prove: Prove | None = None,
) -> Path:
    """Write one checkpoint from codes kept in memory, straight into ``out``. objects: see `Result`.

    Raises UserError as `holding` does, and for a full disk. prove: as in `run`.
    """
    fmt = holding(job, format_name)
    loaded, source = job.loaded, job.loaded.source
    names = Names(loaded.model, source, loaded.given)
    check_tuned(names, finished.result)
    if finished.kv_scales:
        formats.check_kv_cache([fmt.name])
    result = Result(
        names, job.plan, job.recipe, source, finished.result, _record(job, finished), objects or {},
        finished.kv_scales,
    )  # fmt: skip
    try:
        return write_checkpoint(fmt, out, result, prove)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"{out}: {error.strerror}; make room and save again") from None
