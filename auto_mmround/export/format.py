"""What an export format is (`Format`). What it is told about the model: `layout`."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from auto_mmround.export.layout import Layout
from auto_mmround.export.method import Method
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import Scheme


@dataclass(frozen=True)
class Whole:
    """A quantized model as formats see it that write files of their own kind instead of a
    Transformers checkpoint.

    codes: quantized weights by the checkpoint's module name. rest: (checkpoint key, tensor) of
    everything else, to be walked through once. config: the source's `config.json`. source: its
    folder, None for a model made in memory.
    """

    codes: Mapping[str, Codes]
    rest: Iterable[tuple[str, Tensor]]
    config: Mapping[str, Any]
    layout: Layout
    source: Path | None


@dataclass(frozen=True)
class Limit:
    """``engine``, which reads the format, refuses ``what`` of it: checkpoints whose schemes pass
    ``test``. message: in its words, seen with the versions in docs/formats.md, vLLM in its build
    for processors.

    experts: words of `verify.limits.experts_of` that must all be true of the model. families: model
    types, but for ``spared``. fatal: a recipe whose `engines` name the engine is refused, for what
    it would load is not what was tuned.
    """

    engine: str
    what: str
    message: str
    test: Callable[[Collection[Scheme]], bool] = lambda schemes: True
    experts: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    fatal: bool = False

    def hits(self, schemes: Collection[Scheme], experts: Collection[str], family: str) -> bool:
        """Whether a checkpoint is refused."""
        here = family not in self.spared and (not self.families or family in self.families)
        return here and set(self.experts) <= set(experts) and self.test(schemes)


def any_scheme(test: Callable[[Scheme], bool]) -> Callable[[Collection[Scheme]], bool]:
    """For `Limit.test`: one of the schemes passes."""
    return lambda schemes: any(map(test, schemes))


def wrong(what: str, message: str, *experts: str, **of: Any) -> Limit:
    """What Transformers would load otherwise than it was tuned, or not at all."""
    return Limit("transformers", what, message, experts=experts, fatal=True, **of)


# Of mixtures of experts.
MADE_UP = wrong(
    "quantized experts", "parameters were made up: [.. experts.gate_up_proj ..]", "quantized"
)
NO_EXPERTS = Limit(
    "vllm",
    "quantized experts",
    "No .. MoE backend supports the deployment configuration (its kernels want AMX)",
    experts=("quantized",),
)
UNQUANTIZED_EXPERTS = replace(
    NO_EXPERTS, message="Layer model.layers.0.mlp.experts has no parameter 'w2_qweight'"
)
STACKS_ALONE = Limit(
    "vllm",
    "gpt-oss' experts",
    "its loader knows stacks of them, and skips single ones without a word",
    experts=("quantized",),
    families=("gpt_oss",),
    fatal=True,
)
# Layers of another class than Linear.
TURNED = "weights that lie (in, out), as GPT-2's"
# Parts of a weight as GPTQ and AWQ name them, and what each holds.
WORDS = {"qweight": "q", "qzeros": "zero", "scales": "scale", "g_idx": ""}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One export format: functions on weights, and what others must know of it, as data. One of
    this class itself packs nothing, a `PackedFormat` packs tensors, a `WholeFormat` writes files of
    its own kind.

    Weights. check(scheme, out, in): why this weight cannot be held, or None. parts: endings of the
    tensors that make one weight -> what each holds ("q", "scale", "zero", "input_scale" or nothing
    of these); no unquantized Linear has the first. kv_cache: has a place for scales of keys and
    values. min_zero: smallest zero point an asymmetric weight may have. fused_zero: stores scale *
    zero as one float16, which is exact only for scales of 11 - bits significant bits. scale_range:
    holds super-blocks, with such bounds of the scales' integers (`Grid`); what was tuned on another
    grid is fitted once more. act_how: in whose arithmetic engines round MX and NVFP4 inputs
    (`Scheme`). choose(schemes): the format of several under one name that holds them.

    Files. config(layout): the ``quantization_config``, None for none. model_config(source's
    config.json, layout): `config.json` but for that, if readers need more than the source's.

    Readers. method: what its configurations say. told: their keys that tell it from other formats
    of the method -> the values it may have, "" for a key that is not there. engines: those that
    read it -> the environment below `.engines` that can, None for the one this program runs in.
    limits: what they refuse of it. card: words for the code of a model card.
    """

    packs: ClassVar[bool] = False  # weights are stored as codes, not as the model holds them
    name: str
    summary: str
    bits: tuple[int, ...]
    check: Callable[[Scheme, int, int], str | None]
    config: Callable[[Layout], dict[str, Any] | None] = lambda layout: None
    parts: Mapping[str, str] = field(default_factory=dict)
    kv_cache: bool = False
    min_zero: int = 0
    fused_zero: bool = False
    scale_range: tuple[int, int] | None = None
    act_how: str = "compressed_tensors"
    choose: Callable[[Collection[Scheme]], "Format"] | None = None
    model_config: Callable[[Mapping[str, Any], Layout], dict[str, Any]] | None = None
    method: Method | None = None
    told: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    engines: Mapping[str, str | None] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    card: Mapping[str, str] = field(default_factory=dict)

    def packed(self, names: Iterable[str]) -> frozenset[str]:
        """The modules of a checkpoint whose weight is packed in tensors."""
        mark = next((f".{part}" for part in self.parts), None)
        ours = (name for name in names if mark and name.endswith(mark))
        return frozenset(name.removesuffix(mark or "") for name in ours)

    def holds(self, scheme: Scheme) -> str | None:
        """Why codes that were tuned under this scheme cannot be stored, whatever their shape; None
        if they can."""
        rules = (
            (
                self.packs and scheme.scale_range not in (None, self.scale_range),
                "cannot hold what was tuned on the grid of another format",
            ),
            (
                not scheme.sym and self.fused_zero and scheme.scale_bits is None,
                "stores scale * zero as one number",
            ),
            (
                not scheme.sym and scheme.min_zero < self.min_zero,
                f"stores no zero point below {self.min_zero}",
            ),
        )
        size = 8192 * max(scheme.group_size, 1)  # a multiple of all that formats ask for
        broken_rule = next((reason for broken, reason in rules if broken), None)
        return broken_rule or self.check(scheme, size, size)


@dataclass(frozen=True, kw_only=True)
class PackedFormat(Format):
    """Weights as packed tensors among the tensors of a Transformers checkpoint.

    pack(module name, codes): tensors by full name. unpack(module name, tensors, scheme): the exact
    inverse, ValueError on tensors that contradict the scheme. any_float: floating parts may be
    float16, bfloat16 or float32, whatever the scheme says.
    """

    packs: ClassVar[bool] = True
    pack: Callable[[str, Codes], dict[str, Tensor]]
    unpack: Callable[[str, Mapping[str, Tensor], Scheme], Codes]
    parts: Mapping[str, str]
    any_float: bool = False


@dataclass(frozen=True, kw_only=True)
class WholeFormat(Format):
    """Files of another kind than a Transformers checkpoint (GGUF, OpenVINO).

    write(folder, whole): writes them, and returns the ``quantization_config``. read(folder):
    checkpoint key -> decoded tensor of what `write` made, each read when it is asked for.
    exact_rest: tensors that are not quantized are read back to the bit. ready(): raises UserError
    if a program that writing needs is not installed. check_model(config, checkpoint keys, source
    folder): UserError for a model it cannot write. Both are asked before anything is tuned.
    """

    packs: ClassVar[bool] = True
    write: Callable[[Path, Whole], dict[str, Any]]
    read: Callable[[Path], Mapping[str, Tensor]]
    check_model: Callable[[Mapping[str, Any], Iterable[str], Path | None], None]
    exact_rest: bool = True
    ready: Callable[[], object] = lambda: None


def check_integers(
    bits: Iterable[int],
    multiples: tuple[int, int],
    scale_dtypes: Collection[str] = ("fp16",),
    group_sizes: Collection[int] = (),
) -> Callable[[Scheme, int, int], str | None]:
    """`Format.check` of an integer layout. multiples: what out and in features must be multiples
    of. group_sizes: those that readers have kernels for; empty: all."""
    held = sorted(bits)

    def check(scheme: Scheme, out_features: int, in_features: int) -> str | None:
        group = in_features if scheme.group_size == -1 else scheme.group_size
        rules = (
            (
                scheme.data_type != "int",
                f"holds integers, not {scheme.data_type}, which compressed_tensors does",
            ),
            (
                bool(group_sizes) and scheme.group_size not in group_sizes,
                f"has kernels for group sizes {', '.join(map(str, group_sizes))}, not"
                f" {scheme.group_size}",
            ),
            (scheme.act_bits < 16, f"cannot state {scheme.act_bits}-bit activations"),
            (
                scheme.scale_dtype not in scale_dtypes,
                f"stores scales as {' or '.join(scale_dtypes)}, not {scheme.scale_dtype}",
            ),
            (scheme.bits not in held, f"holds {', '.join(map(str, held))} bits, not {scheme.bits}"),
            (
                group < 1 or in_features % group != 0,
                f"{in_features} inputs are no multiple of the group size {group}",
            ),
            (
                in_features % multiples[1] != 0,
                f"{in_features} inputs are no multiple of {multiples[1]}",
            ),
            (
                out_features % multiples[0] != 0,
                f"{out_features} outputs are no multiple of {multiples[0]}",
            ),
        )
        return next((reason for broken, reason in rules if broken), None)

    return check


def differences(scheme: Scheme, base: Scheme) -> dict[str, Any]:
    """The configuration keys in which a module's scheme differs from the default."""
    keys = ("bits", "group_size", "sym")
    return {key: getattr(scheme, key) for key in keys if getattr(scheme, key) != getattr(base, key)}
