"""The Python API, with the names and defaults of the original."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from auto_mmround.errors import UserError
from auto_mmround.evaluation import report
from auto_mmround.export import formats
from auto_mmround.model import devices
from auto_mmround.model.loading import Loaded, find_folder
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import Finished
from auto_mmround.run.journal import BlockReport
from auto_mmround.run.output import folder_name
from auto_mmround.run.pipeline import Watcher, quantize


class AutoRoundMLLM:
    """Quantize a multimodal model that is in memory.

        autoround = AutoRoundMLLM(model, tokenizer, bits=4, group_size=128, dataset="NeelNanda/pile-10k")
        autoround.quantize()
        autoround.save_quantized("./tmp_autoround", format="auto_round", inplace=True)

    model: a Transformers model, or a folder or hub name to load. tokenizer: its tokenizer; a processor may hang on it
    as ``tokenizer.processor``, as the original's users write it. dataset: a name, a file, a list of rows or a
    DataLoader. layer_config: pattern -> {"bits", "group_size", "sym"}. All other options are those of `Recipe`;
    unknown ones raise UserError with the nearest name.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: Any = None,
        processor: Any = None,
        image_processor: Any = None,
        bits: int = 4,
        group_size: int = 128,
        sym: bool = True,
        dataset: Any = None,
        **options: Any,
    ):
        in_memory = not isinstance(dataset, (str, type(None)))
        values = {"bits": bits, "group_size": group_size, "sym": sym, "dataset": None if in_memory else dataset}
        options = {key: value for key, value in options.items() if not (key == "device" and value is None)}
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        recipe = from_mapping(values | _strings(options) | {"model": name}, "AutoRoundMLLM")
        if isinstance(model, str):
            self.loaded = jobs.load_model(recipe, stream=False)
        else:
            processor = processor or getattr(tokenizer, "processor", None)
            self.loaded = Loaded(model, tokenizer, processor, _source_of(name))
        self.recipe: Recipe = recipe
        self._rows = dataset if in_memory else None
        self._image_processor = image_processor
        self._done: tuple[jobs.Job, Finished] | None = None

    def quantize(self, watcher: Watcher | None = None) -> tuple[PreTrainedModel, dict[str, dict[str, Any]]]:
        """Tune; returns the model, whose weights now hold the quantized values, and what was done to every layer."""
        model = self.loaded.model
        model.eval().requires_grad_(False)
        if self.recipe.device != "0":
            model.to(devices.resolve(self.recipe.device))  # type: ignore[arg-type]
        job = jobs.prepare(self.recipe, self.loaded, self._rows, self._image_processor)
        finished = Finished()
        quantize(model, job.recipe, job.plan, job.inputs, finished, watcher)
        self._done = (job, finished)
        return model, self.layer_config

    @property
    def reports(self) -> list[BlockReport]:
        """What happened to every block: errors, seconds, memory. Raises UserError before `quantize`."""
        if self._done is None:
            raise UserError("call quantize() first")
        return list(self._done[1].reports.values())

    @property
    def layer_config(self) -> dict[str, dict[str, Any]]:
        """Module name -> bits, group_size, sym and data_type; kept layers have 16 bits and the reason."""
        if self._done is None:
            raise UserError("call quantize() first")
        plan = self._done[0].plan
        found: dict[str, dict[str, Any]] = {}
        for weight in plan.weights:
            scheme = weight.scheme
            found[weight.name] = (
                {"bits": 16, "data_type": "float", "reason": weight.reason}
                if scheme is None
                else {
                    "bits": scheme.bits,
                    "group_size": scheme.group_size,
                    "sym": scheme.sym,
                    "data_type": scheme.data_type,
                }
            )
        return found

    def save_quantized(
        self, output_dir: str | Path | None = None, format: str = "auto_round", inplace: bool = True
    ) -> list[Path]:
        """Write one checkpoint a format. One format goes to ``output_dir`` itself, several to folders below it.

        ``inplace`` is accepted as in the original; the model in memory is never changed by saving.
        """
        if self._done is None:
            raise UserError("save_quantized: call quantize() first")
        job, finished = self._done
        root = Path(output_dir or self.recipe.output_dir)
        names = [formats.get(part.strip()).name for part in format.split(",")]
        label = jobs.model_label(self.recipe)
        folders = [root] if len(names) == 1 else [root / folder_name(label, self.recipe, name) for name in names]
        saved = [jobs.save(job, finished, out, name) for out, name in zip(folders, names)]
        for folder in saved:
            report.write(folder)
        return saved


def _strings(options: dict[str, Any]) -> dict[str, Any]:
    """Devices may be given as torch.device or number, paths as Path."""
    loose = ("device", "extra_data_dir", "template", "processor", "output_dir")
    return {key: str(value) if key in loose and value is not None else value for key, value in options.items()}


def _source_of(name: str) -> Path | None:
    """The folder that a model in memory came from, None if it came from nowhere."""
    try:
        return find_folder(name, offline=True)
    except UserError:
        return None
