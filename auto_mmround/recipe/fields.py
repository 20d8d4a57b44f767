"""The keys of a recipe: type, default, help, other names, and allowed values."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from auto_mmround.recipe.algorithms import ALGORITHMS, PRESETS
from auto_mmround.recipe.checks import require

ORDERS = ("none", "weight", "group")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
EQUALIZERS = ("none", "smoothquant", "awq", "hadamard")
SCALE_DTYPES = ("fp16", "bf16", "fp32")
CACHES = ("fp8", "fp8_head")


@dataclass(frozen=True)
class Key:
    """Facts on a field of `Recipe` beside its type and default.

    section: of the help. text: the help; without it the field has no flag. names: other names, in
    files and as flags. off: the flag that means False, and its help. choices, least: allowed
    values, besides None.
    """

    section: str
    text: str = ""
    names: tuple[str, ...] = ()
    off: tuple[str, str] | None = None
    choices: Sequence[str] = ()
    least: int | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises UserError for a value outside the choices, or too small."""
        if value is not None:
            fits = not self.choices or value in self.choices
            require(fits, f"{name} = {value!r}: one of {', '.join(self.choices)}")
            require(
                self.least is None or value >= self.least,
                f"{name} = {value}: at least {self.least}",
            )
            require(self.least is None or value < 2**63, f"{name} = {value}: below 2^63")


SECTIONS = ("model", "scheme", "equalization", "tuning", "calibration", "machine", "result")
_model, _scheme, _equalization, _tuning, _calibration, _machine, _result = (
    partial(Key, name) for name in SECTIONS
)


@dataclass(frozen=True)
class Fields:
    """The keys of a recipe, with the original's defaults. The command line is made from them."""

    # fmt: off
    model: Annotated[str, _model(
        "folder, hub name, or `demo` for the model that ships with us",
        names=("model_name", "model_name_or_path", "model_id", "model_path")
    )] = "Qwen/Qwen2-VL-2B-Instruct"
    model_dtype: Annotated[str | None, _model(
        "load the weights as bfloat16, float16 or float32 instead of as stored")] = None
    trust_remote_code: Annotated[bool, _model(
        "run Python code that comes with the model",
        off=("disable_trust_remote_code", "the default here"))] = False

    bits: Annotated[int, _scheme("2 to 8")] = 4
    group_size: Annotated[int, _scheme(
        "columns that share a scale; -1: one per output channel")] = 128
    sym: Annotated[bool, _scheme(off=("asym", "asymmetric: a zero point for each group"))] = True
    data_type: Annotated[str, _scheme(
        "int, or floats: fp8, nvfp4, mxfp4, mxfp8", names=("dtype",))] = "int"
    scale_dtype: Annotated[str, _scheme(
        f"one of {', '.join(SCALE_DTYPES)}", choices=SCALE_DTYPES)] = "fp16"
    act_bits: Annotated[int, _scheme(
        "8: the engine quantizes activations; 4: so with nvfp4, mxfp4; 32: it does not")] = 32
    act_data_type: Annotated[str | None, _scheme(
        "of activations, where not the weights': fp8 beside 4-bit integers")] = None
    act_dynamic: Annotated[bool, _scheme(
        off=("act_static", "fp8: one scale for all inputs of a layer, from calibration"))] = True
    kv_cache_scheme: Annotated[str | None, _scheme(
        "fp8: scales of keys and values for the cache; fp8_head: one a head",
        choices=CACHES)] = None
    target_bits: Annotated[float | None, _scheme(
        "mixed bits: the average with scales and zero points, chosen layer by layer by damage"
    )] = None
    bit_options: Annotated[str | list[int | str], _scheme(
        "for target_bits: bits, or schemes such as NVFP4,FP8")] = "2,3,4,8"
    layer_config: Annotated[dict[str, dict[str, Any]] | None, _scheme()] = None
    fp_layers: Annotated[str, _scheme(
        "comma list of layers that stay in 16 bits: dotted parts of names, or re:REGEX")] = ""
    ignore: Annotated[list[str] | None, _scheme(
        "layers that stay, one word each: names, re:REGEX or classes")] = None
    targets: Annotated[list[str] | None, _scheme(
        "quantize these layers only: names, re:REGEX or classes, e.g. Linear")] = None
    sequential_targets: Annotated[list[str] | None, _scheme(
        "quantize the blocks of these classes, e.g. WhisperDecoderLayer")] = None
    quant_nontext_module: Annotated[bool, _scheme(
        "quantize the vision and audio towers too")] = False
    quant_lm_head: Annotated[bool, _scheme(
        "quantize the output head too, on the KL of the words, if its weight is its own")] = False
    untie_lm_head: Annotated[bool, _scheme(
        "with quant_lm_head, or equalize = hadamard: a head that is the input embedding gets a"
        " weight of its own")] = False
    quant_mtp: Annotated[bool, _scheme(
        "round layers that the model's class does not load (MTP) to 8 bits; otherwise they are"
        " copied")] = False
    to_quant_block_names: Annotated[str | None, _scheme(
        "comma list of regular expressions for the block lists to quantize")] = None

    equalize: Annotated[str, _equalization(
        f"first move magnitude between inputs and weights: {', '.join(EQUALIZERS[:3])}; or turn the"
        " hidden states: hadamard, for MXFP4",
        choices=EQUALIZERS)] = "none"
    smoothing_strength: Annotated[float, _equalization(
        "smoothquant: share of the activations' range that goes into the weights, 0 to 1")] = 0.8
    duo_scaling: Annotated[bool, _equalization(
        off=("disable_duo_scaling", "awq: scales from the activations alone"))] = True
    mappings: Annotated[list[list[Any]] | None, _equalization()] = None

    algorithm: Annotated[str, _tuning(
        "; ".join(f"{name}: {row.text}" for name, row in ALGORITHMS.items()),
        choices=tuple(ALGORITHMS))] = "auto"
    preset: Annotated[str, _tuning(
        "how long the tuner works: light, default or best; iters, lr and batch_size win over it",
        choices=PRESETS)] = "default"
    iters: Annotated[int | None, _tuning(
        "sign steps a block, default 20 with auto, 200 with sign_round; 0 rounds to nearest",
        names=("iter",))] = None
    lr: Annotated[float | None, _tuning(
        "first rate of the offsets; default 0.02 with auto, with best 0.01, with sign_round 1/iters"
    )] = None
    minmax_lr: Annotated[float | None, _tuning(
        "first learning rate of the ranges, or of the scales' factors behind a closed form, which"
        " move at 2 and 3 bits, in NVFP4 and in K types; default lr")] = None
    batch_size: Annotated[int | None, _tuning(
        "samples run together; default 8, with preset light 4", names=("train_bs", "bs"))] = None
    gradient_accumulate_steps: Annotated[int, _tuning("batches a step", least=1)] = 1
    nblocks: Annotated[int, _tuning("consecutive blocks tuned on one loss", least=1)] = 1
    block_size: Annotated[int, _tuning(
        "closed form: columns solved together; changes the time, not the result", least=1)] = 64
    dampening: Annotated[float, _tuning(
        "closed form: share of the mean diagonal added to it",
        names=("damp_percent", "dampening_frac", "percdamp"))] = 0.05
    actorder: Annotated[str, _tuning(
        f"closed form: order of the columns, {', '.join(ORDERS)} (by falling second moment)",
        choices=ORDERS)] = "weight"
    true_sequential: Annotated[bool, _tuning(
        "closed form: a block's layers one after another, inputs from those done before")] = False
    retarget: Annotated[bool, _tuning(
        "closed form: solve for the unquantized model's outputs (GPTAQ); hurt where it was measured"
    )] = False
    fisher: Annotated[bool, _tuning(
        off=("disable_fisher", "auto, gptq: all tokens, channels and modalities count the same")
    )] = True
    enable_minmax_tuning: Annotated[bool, _tuning(
        off=("disable_minmax_tuning", "leave the ranges at smallest and largest value"))] = True
    enable_quanted_input: Annotated[bool, _tuning(
        off=("disable_quanted_input", "tune each block on inputs from the unquantized model")
    )] = True
    not_use_best_mse: Annotated[bool, _tuning(
        "keep the last step's parameters, not the best")] = False
    trim: Annotated[float, _tuning(
        "share of the largest errors that a block's steps do not see, e.g. 0.001 below 4 bits;"
        " default 0")] = 0.0
    polish: Annotated[bool, _tuning(
        "at the end tune scales and norms on the whole model's output; kept if held-out KL falls"
    )] = False
    dynamic_max_gap: Annotated[int, _tuning()] = -1
    amp: Annotated[bool, _tuning(
        off=("disable_amp", "compute in the model's own dtype, not in bfloat16"))] = True
    seed: Annotated[int, _tuning("of sampling and shuffling")] = 42
    adam: Annotated[bool, _tuning("refused")] = False
    enable_norm_bias_tuning: Annotated[bool, _tuning("refused")] = False

    dataset: Annotated[str | None, _calibration(
        "names, files, folders or module:Class, with options, e.g. demo, a.json:num=64,b.txt"
    )] = None
    collator: Annotated[str | None, _calibration(
        "your own way from a row to model inputs, as module:function",
        names=("data_collator",))] = None
    nsamples: Annotated[int, _calibration(
        "how many samples", names=("num_calibration_samples", "calib_size"), least=1)] = 128
    seqlen: Annotated[int | None, _calibration(
        "tokens a text sample; default 2048, with media 512",
        names=("seq_len", "max_seq_length", "max_seq_len"))] = None
    truncation: Annotated[bool | None, _calibration(
        "cut conversations to seqlen (plain text always is)")] = None
    extra_data_dir: Annotated[str | None, _calibration(
        "where images, audio, video lie: a folder, several, or image=DIR,video=DIR,audio=DIR"
    )] = None
    template: Annotated[str | None, _calibration(
        "chat template: a JSON file or a name on the shelf; default by model type")] = None
    processor: Annotated[str | None, _calibration(
        "processor: a registered name or a Python file that registers one")] = None
    on_bad_sample: Annotated[str, _calibration(
        "error: stop at a missing or damaged file; skip: leave it out and count it",
        choices=("error", "skip"))] = "error"
    allow_url: Annotated[bool, _calibration(
        "read media from http(s) addresses in the dataset")] = False

    device: Annotated[str, _machine(
        "0: the first accelerator, else the processor; cpu, hpu, cuda:1, auto",
        names=("devices",))] = "0"
    device_map: Annotated[str | None, _machine(
        "spread the model over all devices of this machine: auto, balanced, sequential"
        " (accelerate)",
        choices=DEVICE_MAPS)] = None
    stream: Annotated[bool | None, _machine(
        "read each block when its turn comes; default where the model takes most of the free"
        " memory",
        off=("no_stream", "keep the whole model in memory"))] = None
    offload_states: Annotated[bool, _machine(
        "keep calibration states in files, which the system holds in memory as it can")] = False
    low_gpu_mem_usage: Annotated[bool, _machine(
        "keep calibration states in host memory, and from Python the model's blocks too")] = False
    enable_torch_compile: Annotated[bool | None, _machine(
        "compile the blocks, once a class; default on accelerators where many are of one class",
        off=("no_torch_compile", "run the blocks as they are"))] = None
    low_cpu_mem_usage: Annotated[bool, _machine()] = False
    low_cpu_mem_mode: Annotated[int, _machine("1, 2: the same as --stream")] = 0
    low_cpu_mem_tmp_dir: Annotated[str | None, _machine(
        "no effect: blocks are read from the model's own files")] = None

    format: Annotated[str, _result(
        "comma list of formats, see `auto-round-mllm formats`")] = "auto_round"
    output_dir: Annotated[str, _result(
        "parent folder; each format gets <model>-w4g128-<format> below it",
        names=("save_dir",))] = "./tmp_autoround"
    engines: Annotated[str, _result(
        "engines that must read what is written, such as transformers,vllm: a format of which one"
        " would load something else is refused")] = "transformers"
    overwrite: Annotated[bool, _result("replace checkpoints that exist there")] = False
    check: Annotated[bool, _result(
        off=("no_check", "do not check and reload what was written, which takes seconds; wrong"
        " ends with exit 1"))] = True
    restart: Annotated[bool, _result("begin anew instead of continuing an unfinished run")] = False
    sample_generation: Annotated[bool, _result(
        "print what the quantized model answers to the first sample")] = False
