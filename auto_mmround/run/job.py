"""From a recipe to finished checkpoints: what the command line and the API share."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from auto_mmround.calibration import batches
from auto_mmround.calibration.batches import ModelInput
from auto_mmround.calibration.settings import choose
from auto_mmround.calibration.template import Template, load_template
from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.model import devices
from auto_mmround.model.families import family_of
from auto_mmround.model.loading import Loaded, load
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.journal import journal
from auto_mmround.run.mixed import choose_bits, units
from auto_mmround.run.output import Names, Output, check_formats, folder_name
from auto_mmround.run.pipeline import BlockReport, Watcher, quantize
from auto_mmround.run.plan import Plan, make_plan
from auto_mmround.run.processes import ALONE, Processes

log = logging.getLogger("auto_mmround")


@dataclass(frozen=True)
class Job:
    """A run that is ready to start. recipe: with the values that the data asked for. inputs: empty without tuning."""

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


def load_model(recipe: Recipe, processes: Processes = ALONE) -> Loaded:
    """The recipe's model on the recipe's device, or on this process's one of several."""
    device = devices.resolve(recipe.device, processes.local_rank)
    if recipe.device_map and processes.count > 1:
        raise UserError("device_map spreads the model over all devices of one process; leave one of the two out")
    return load(
        recipe.model, dtype=recipe.model_dtype, device=device, device_map=recipe.device_map,
        remote_code=recipe.trust_remote_code,
    )  # fmt: skip


def prepare(
    recipe: Recipe,
    loaded: Loaded,
    dataset: Any = None,
    image_processor: Any = None,
    on_measured: Callable[[int, int], None] = lambda done, total: None,
) -> Job:
    """Plan the weights and read the calibration samples. ``dataset``: rows in memory instead of the recipe's name.

    Raises UserError for everything that is wrong with the recipe, the patterns, the formats and the samples.
    """
    template = template_for(loaded.model, recipe.template)
    plan = make_plan(loaded.model, recipe)
    if recipe.target_bits is not None:
        units(loaded.model, recipe, plan)  # complains before any sample is read
    check_formats(plan.formats, Names(loaded.model, loaded.source), loaded.source)
    if not recipe.needs_samples:
        return Job(recipe, loaded, plan, (), None, ("weights are rounded to nearest: no calibration",))
    towers = any(stage.name != "text" for stage in plan.stages)
    settings, notes = choose(
        recipe.dataset if dataset is None else dataset,
        template,
        text_only=family_of(loaded.model.config.model_type).text_only,
        quant_nontext_module=towers,
        nsamples=recipe.nsamples,
        batch_size=recipe.batch_size,
        gradient_accumulate_steps=recipe.gradient_accumulate_steps,
        seqlen=recipe.seqlen,
        truncation=recipe.truncation,
    )
    for note in notes:
        log.warning(note)
    recipe = replace(
        recipe,
        dataset=settings.dataset if isinstance(settings.dataset, str) else recipe.dataset,
        nsamples=settings.nsamples,
        seqlen=settings.seqlen,
        truncation=settings.truncation,
        batch_size=settings.batch_size,
        gradient_accumulate_steps=settings.gradient_accumulate_steps,
    )
    inputs, report = batches.build(
        settings.dataset,
        tokenizer=loaded.tokenizer,
        processor=loaded.processor,
        image_processor=image_processor,
        template=template,
        config=loaded.model.config,
        nsamples=settings.nsamples,
        seqlen=settings.seqlen,
        truncation=settings.truncation,
        seed=recipe.seed,
        extra_data_dir=recipe.extra_data_dir,
        allow_url=recipe.allow_url,
        processor_name=recipe.processor,
        on_bad_sample=recipe.on_bad_sample,
    )
    mixed = None
    if recipe.target_bits is not None:
        recipe, plan, mixed = choose_bits(loaded.model, recipe, plan, inputs, on_measured)
    return Job(recipe, loaded, plan, inputs, asdict(report), notes, mixed)


def model_label(recipe: Recipe) -> str:
    """The model's name without its path, for folder names."""
    return Path(recipe.model.rstrip("/")).name or "model"


def run(job: Job, watcher: Watcher | None = None, processes: Processes = ALONE) -> list[Path]:
    """Quantize and write every format at once, block by block; returns the finished folders.

    Nothing is left under a final name, nor a partial folder, when anything goes wrong before the end. Of several
    processes the first one writes.
    """
    if not processes.first:
        quantize(job.loaded.model, job.recipe, job.plan, job.inputs, lambda block, codes: None, processes=processes)
        return []
    names = Names(job.loaded.model, job.loaded.source)
    root, label = Path(job.recipe.output_dir), model_label(job.recipe)
    outputs: list[Output] = []
    try:
        for asked, fmt in zip(job.recipe.formats, job.plan.formats, strict=True):
            out = root / folder_name(label, job.recipe, asked)
            outputs.append(Output(fmt, out, names, job.plan, job.recipe.overwrite))

        def sink(block: str, codes: dict[str, Codes]) -> None:
            for output in outputs:
                output.add(codes)

        blocks = quantize(job.loaded.model, job.recipe, job.plan, job.inputs, sink, watcher, processes)
        record = journal(job.plan, blocks, job.notes, job.calibration, job.mixed)
        return [output.finish(job.recipe, job.loaded.source, record) for output in outputs]
    except BaseException:
        for output in outputs:
            output.discard()
        raise


def save(job: Job, codes: dict[str, Codes], blocks: Sequence[BlockReport], out: Path, format_name: str) -> Path:
    """Write one checkpoint from codes kept in memory, straight into ``out``.

    Raises UserError if the format can't hold what was tuned; name it in the recipe's `format` before tuning.
    """
    fmt = formats.resolve(format_name, set(job.plan.quantized.values()))
    for weight in job.plan.weights:
        if weight.scheme:
            problem = fmt.check(weight.scheme, weight.out_features, weight.in_features)
            if not weight.scheme.sym and weight.scheme.min_zero < fmt.min_zero:
                problem = f"stores no zero point below {fmt.min_zero}"
            if weight.scheme.scale_bits is None and formats.scale_bits([fmt.name], weight.scheme):
                problem = "stores scale * zero as one number"
            if problem:
                raise UserError(f"format {fmt.name} {problem} ({weight.name}); pass format={fmt.name!r} before tuning")
    source = job.loaded.source
    output = Output(fmt, out, Names(job.loaded.model, source), job.plan, job.recipe.overwrite)
    try:
        output.add(codes)
        record = journal(job.plan, blocks, job.notes, job.calibration, job.mixed)
        return output.finish(job.recipe, source, record, tokenizer=job.loaded.tokenizer, processor=job.loaded.processor)
    except BaseException:
        output.discard()
        raise
