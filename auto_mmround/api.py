"""The Python API, with the names and defaults of the original."""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from auto_mmround.arguments import (
    checked_dataset,
    checked_model,
    folder_of,
    listed,
    plain_options,
    told_apart,
)
from auto_mmround.checkpoint.folder import check_free
from auto_mmround.checkpoint.loader import load_any
from auto_mmround.errors import UserError
from auto_mmround.evaluate import tasks as task_table
from auto_mmround.evaluate.evaluate import keep, record
from auto_mmround.evaluate.prompts import Data
from auto_mmround.export import formats
from auto_mmround.model import devices
from auto_mmround.model.borrowed import borrowed, check_hooks, hooks_of, usual_settings
from auto_mmround.model.devices import HOST
from auto_mmround.model.fisher import spread
from auto_mmround.model.loading import Loaded, find_folder, load_processor, load_tokenizer
from auto_mmround.model.streaming import Holder
from auto_mmround.model.visiting import fits_whole
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.report import report
from auto_mmround.results import Evaluated, Page, Planned, Verified, evaluated, planned, verified
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import Finished, compute_alike, identity, unfinished, weights_sum
from auto_mmround.run.given import is_from
from auto_mmround.run.loss_weights import modalities_of
from auto_mmround.run.met import naming
from auto_mmround.run.out_of_memory import phase
from auto_mmround.run.pipeline import Watcher, quantize
from auto_mmround.run.places import check_places, folder_name, model_label, places
from auto_mmround.run.record import BlockReport, checksum
from auto_mmround.verify.limits import refusals
from auto_mmround.verify.proof import check_rebuilt, prove
from auto_mmround.verify.verify import verify

log = logging.getLogger("auto_mmround")

DEFAULT = Recipe().device  # nobody has named a device

# The marks of quantized models that are still alive. A weight on an 8-bit grid in bfloat16 looks
# like any other, so `quantize` notes what it wrote.
_WRITTEN: WeakKeyDictionary[PreTrainedModel, dict[str, str]] = WeakKeyDictionary()


class AutoRoundMLLM:
    """Quantize a multimodal model that is in memory.

        autoround = AutoRoundMLLM(
            model, tokenizer, bits=4, group_size=128, dataset="NeelNanda/pile-10k"
        )
        autoround.quantize()
        autoround.save_quantized("./tmp_autoround", format="auto_round", inplace=True)

    model: a Transformers model, or a folder or hub name to load. tokenizer: its tokenizer;
    ``tokenizer.processor`` may hold a processor, as in the original. dataset: a name, a file, a
    list of rows or a DataLoader. bits, group_size, sym: 4, 128 and True, or those of a `scheme`.
    layer_config: pattern -> {"bits", "group_size", "sym"}. output_dir: where finished blocks are
    kept until all are done. All other options are those of `Recipe`.
    Unknown ones raise UserError with the nearest name.
    """

    @usual_settings()
    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        tokenizer: Any = None,
        processor: Any = None,
        image_processor: Any = None,
        bits: int | None = None,
        group_size: int | None = None,
        sym: bool | None = None,
        dataset: Any = None,
        **options: Any,
    ):
        model, dataset = checked_model(model), checked_dataset(dataset)
        # one of ours, by its name or file, as on the command line
        if isinstance(processor, str | Path):
            options, processor = options | {"processor": str(processor)}, None
        tokenizer, processor = told_apart(tokenizer, processor, image_processor)
        in_memory = not isinstance(dataset, (str, type(None)))
        values = {  # what is None a `scheme` sets
            "bits": bits,
            "group_size": group_size,
            "sym": sym,
            "dataset": None if in_memory else dataset,
        }
        values = {key: value for key, value in values.items() if value is not None}
        named = None if isinstance(model, str) else getattr(model.config, "_name_or_path", None)
        origin = str(named or "")
        name = model if isinstance(model, str) else origin or "model"
        self.recipe: Recipe = from_mapping(
            values | plain_options(options) | {"model": name}, "AutoRoundMLLM"
        )
        if isinstance(model, str):
            self.loaded = jobs.load_model(self.recipe, kept=True)
            mine = {"tokenizer": tokenizer, "processor": processor}
            self.loaded = replace(
                self.loaded, **{name: thing for name, thing in mine.items() if thing is not None}
            )
        else:
            loaded = _around(model, tokenizer, processor, origin, self.recipe.trust_remote_code)
            self.loaded = jobs.untied(self.recipe, loaded)
        self._rows = dataset if in_memory else None
        self._image_processor = image_processor
        self._objects = {
            "tokenizer": tokenizer,
            "processor": processor,
            "image_processor": image_processor,
        }
        self._done: tuple[jobs.Job, Finished] | None = None
        self._resumes = "output_dir" in options
        self._saved: list[Path] = []

    @usual_settings()
    def plan(self) -> Planned:
        """What becomes of every weight, without tuning. Raises UserError as `quantize` does for
        what is wrong with the recipe."""
        model = self.loaded.model
        if self.recipe.target_bits is None:
            plan = jobs.planned(self.recipe, self.loaded)
        else:  # bits are chosen on samples
            with phase("planning"), self._lent():
                plan = self._job().plan
        return planned(plan, f"{self.recipe.model} ({type(model).__name__})")

    def _job(self) -> jobs.Job:
        return jobs.prepare(self.recipe, self.loaded, self._rows, self._image_processor)

    @usual_settings()
    def quantize(
        self, watcher: Watcher | None = None
    ) -> tuple[PreTrainedModel, dict[str, dict[str, Any]]]:
        """Tune. Returns the model, whose weights now hold the quantized values, and `layer_config`.

        All else in the model is as before, also after a failure. With an ``output_dir``, blocks are
        kept there as they are finished: after a crash the same script goes on from the last one.
        Raises UserError for a model whose weights were quantized before, and for one that is not
        what readers make of its configuration.
        """
        model, marks = self.loaded.model, _marks(self.loaded.model)
        again = next(
            (name for name, mark in _WRITTEN.get(model, {}).items() if marks.get(name) == mark),
            None,
        )
        if again is not None:
            raise UserError(
                f"{again} holds what quantize() wrote: this model was quantized before; load it"
                " anew"
            )
        if self.loaded.given and self.recipe.check:
            check_rebuilt(model)
        if self._resumes:
            compute_alike(places(self.recipe)[0], self.recipe.restart)
        held, hooks = weights_sum(model) if self._resumes else "", hooks_of(model)
        with phase("quantizing"), self._lent() as holder:
            job = self._job()
            few = spread(modalities_of(job.inputs), 0) if hooks else ()
            check_hooks(model, hooks, [job.inputs[i].kwargs for i in few])
            for line in refusals(model, job.plan):
                log.warning(line)
            try:
                with naming(job.inputs), self._kept(job, held) as finished:
                    quantize(model, job.recipe, job.plan, job.inputs, finished, watcher, holder)
                    finished = finished.in_memory()
            finally:
                _WRITTEN[model] = {
                    name: mark for name, mark in _marks(model).items() if marks.get(name) != mark
                }
        self._done = (job, finished)
        return model, self.layer_config

    def _kept(self, job: jobs.Job, held: str) -> AbstractContextManager[Finished]:
        """Where finished blocks go: a folder below the ``output_dir`` that was given, or memory.
        held: a checksum of the model's weights."""
        if not self._resumes:
            return nullcontext(Finished())
        source, model = self.loaded.source, self.loaded.model
        place, _ = places(job.recipe)
        check_places([place], source)
        known = identity(job.recipe, model.config.to_json_string(), source, job.inputs)
        return unfinished(place, known | {"weights": held}, job.recipe.restart)

    def _lent(self) -> AbstractContextManager[Holder]:
        """The model on the device that it is tuned on. Without a word from the user that is where
        it lies, or for a model in host memory an accelerator of this machine. There its blocks come
        one by one where all of it takes too much room, unless something works on the whole."""
        model, recipe = self.loaded.model, self.recipe
        given = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
        if recipe.device == DEFAULT and given != {HOST.type}:
            return borrowed(model)
        device = devices.resolve(recipe.device)
        whole = recipe.whole_passes or not (
            recipe.low_gpu_mem_usage or recipe.streams or not fits_whole(model, device)
        )
        return borrowed(model, device, whole)

    @property
    def reports(self) -> list[BlockReport]:
        """The report of each block: errors, seconds, memory. Raises UserError before `quantize`."""
        if self._done is None:
            raise UserError("call quantize() first")
        return list(self._done[1].reports.values())

    @property
    def layer_config(self) -> dict[str, dict[str, Any]]:
        """Module name -> bits, group_size, sym and data_type; kept layers have 16 bits and a
        reason."""
        if self._done is None:
            raise UserError("call quantize() first")
        plan = self._done[0].plan
        layers: dict[str, dict[str, Any]] = {}
        for weight in plan.all:
            scheme = weight.scheme
            layers[weight.name] = (
                {"bits": 16, "data_type": "float", "reason": weight.reason}
                if scheme is None
                else {
                    "bits": scheme.bits,
                    "group_size": scheme.group_size,
                    "sym": scheme.sym,
                    "data_type": scheme.data_type,
                }
            )
        return layers

    @usual_settings()
    def save_quantized(
        self,
        output_dir: str | Path | None = None,
        format: str | Sequence[str] = "auto_round",
        inplace: bool = True,
    ) -> list[Path]:
        """Write one checkpoint per format, into ``output_dir`` or, if there are several, below it.
        format: a comma list, or a list. Nothing is written unless all of them hold what was tuned.

        ``inplace`` is accepted as in the original; saving never changes the model in memory. Raises
        UserError for a format that one of the recipe's `engines` would load otherwise. Raises
        NotProved for a checkpoint that does not hold the tuned values; it then lies in
        ``<folder>.wrong``. ``check=False`` leaves this check out.
        """
        if self._done is None:
            raise UserError("save_quantized: call quantize() first")
        job, finished = self._done
        root = folder_of(self.recipe.output_dir if output_dir is None else output_dir, "output_dir")
        words = listed(format, "format")
        names = list(dict.fromkeys(formats.get(word).name for word in words))
        label = model_label(self.recipe)
        folders = (
            [root]
            if len(names) == 1
            else [root / folder_name(label, self.recipe, name) for name in names]
        )
        check_places(folders, job.loaded.source)
        if finished.kv_scales:
            formats.check_kv_cache(names)
        targets = [formats.resolve(name, job.plan.schemes) for name in names]
        refusals(self.loaded.model, replace(job.plan, formats=tuple(targets)), self.recipe.read_by)
        for folder, name in zip(folders, names):
            check_free(folder, self.recipe.overwrite)
            jobs.holding(job, name)
        settings = self.loaded.model.generation_config if self.loaded.given else None
        objects = self._objects | {"generation_config": settings}
        saved = jobs.write_all(
            partial(jobs.save, job, finished, out, name, objects, prove)
            for out, name in zip(folders, names)
        )
        for folder in saved:
            report.write(folder)
        self._saved = saved
        return saved

    @usual_settings()
    def evaluate(
        self,
        dataset: str = "demo",
        reference: str | Path | None = None,
        tasks: str | None = None,
        limit: int | None = None,
    ) -> Evaluated:
        """Measure the model in memory, as `auto-round-mllm eval` does a folder.

        reference: the model before quantization, a folder or hub name: adds KL by modality. tasks:
        a comma list; default is ppl, with a reference kl too. The record goes into the folders of
        `save_quantized`, for their reports. Raises UserError for unknown tasks, models or sets.
        """
        wanted = task_table.parse(tasks or ("kl,ppl" if reference else "ppl"), bool(reference))
        data, started, models = Data(dataset, limit=limit), time.perf_counter(), {}
        with phase("evaluating"), self._lent():
            if reference:
                models["reference"] = load_any(str(reference), device=self.loaded.model.device)
            models["quantized"] = self.loaded
            measured = task_table.run(wanted, task_table.Setting(models, data))
        names = {
            "quantized": str(self.recipe.model),
            "reference": str(reference) if reference else None,
        }
        made = record(measured, names, models, data, wanted, time.perf_counter() - started)
        for folder in self._saved:
            keep(folder, made)
        return evaluated(measured.figures, measured.scores, made)

    @usual_settings()
    def verify(self, engines: str | Sequence[str] | None = None) -> Verified:
        """Check what `save_quantized` wrote: the files, then every installed engine that reads
        them, or the ``engines`` named, as a list or a comma list; an empty list, or "none", asks
        none.

        Raises UserError before `save_quantized`, and for engines that can't be asked.
        """
        if engines is not None:
            engines = [] if engines in ("none", [], ()) else listed(engines, "engines")
        results = [verify(folder, engines) for folder in self._folders("verify")]
        for each in results:
            if each.verdicts:
                report.keep_verdicts(each.folder, [asdict(verdict) for verdict in each.verdicts])
                report.write(each.folder)
        return verified(results)

    def report(self) -> Page:
        """The page of the first folder that `save_quantized` wrote, or one that compares several.

        Raises UserError before `save_quantized`.
        """
        folders = self._folders("report")
        if len(folders) == 1:
            return Page(report.write(folders[0]))
        return Page(report.compare(folders, folders[0].parent / "report.html"))

    def _folders(self, what: str) -> list[Path]:
        if not self._saved:
            raise UserError(f"{what}: call save_quantized() first")
        return self._saved


def _around(
    model: PreTrainedModel, tokenizer: Any, processor: Any, origin: str, remote_code: bool
) -> Loaded:
    """The user's objects, with the folder of the model if its weights come from there.

    Missing objects are read from that folder.
    """
    source = _source_of(origin) if origin else None
    if source is not None and not is_from(model, source):
        log.warning(
            "the model's weights are not those of %s, which it names: nothing is taken from there",
            source,
        )
        source = None
    if source is not None and tokenizer is None and processor is None:
        processor = load_processor(source, remote_code)
        tokenizer = load_tokenizer(source, processor, remote_code)
    return Loaded(model, tokenizer, processor, source, given=True)


def _source_of(name: str) -> Path | None:
    """The folder of that name; None if there is none."""
    try:
        return find_folder(name, offline=True)
    except UserError:
        return None


def _marks(model: PreTrainedModel) -> dict[str, str]:
    """Checksums of the first row of every matrix."""
    return {
        name: checksum(parameter[(0,) * (parameter.ndim - 1)])
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.numel()
    }
