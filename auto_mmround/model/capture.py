"""Run the model over the inputs, record how it calls the blocks of its stages, and prove that a
replay is the model.

The proof has two parts, made on the first sample of each kind of input: the captured calls
reproduce the model's own output; and they still do when the first hidden state is disturbed, as it
will be once blocks are quantized. Where the second fails, something that is captured depends on
earlier blocks (a gate between blocks, a second stream): such a stage is `live`, and its inputs are
captured anew after each tuned block.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.chains import TOLERANCE, Chain, Precision, difference
from auto_mmround.model.passes import Inputs
from auto_mmround.model.recorder import Pass, Recorder, disturbed_hidden, run_recording
from auto_mmround.model.standins import UNFIT, idle, rest_of
from auto_mmround.model.streaming import device_of
from auto_mmround.model.structure import Stage

log = logging.getLogger("auto_mmround")


def capture(
    model: nn.Module,
    stages: Sequence[Stage],
    inputs: Sequence[Inputs],
    *,
    precision: Precision = nullcontext,
    store: torch.device | str = "cpu",
    only: Sequence[int] | None = None,
    place: Callable[[Tensor], Tensor] | None = None,
    on_sample: Callable[[int], None] = lambda i: None,
) -> dict[str, Chain]:
    """Run the model over all inputs and record each stage's first hidden state and every block's
    call.

    inputs: keyword arguments of the model, batch dimension 1. store: where what is recorded goes;
    place: where hidden states go instead, see `Chain`. only: indices of the inputs to run, default
    all. The text blocks themselves run for the first sample of each kind only, if the calls are
    shown not to depend on what they do. Returns a chain for each stage that a sample reached, in
    the order given. Raises UserError for a stage whose replay is not the model.
    """
    device = device_of(model)
    chains: dict[str, Chain] = {}
    proven: set[tuple[str, frozenset[str]]] = set()
    # names of inputs -> text blocks that need not run for it
    quiet: dict[frozenset[str], Rests | None] = {}
    for i in range(len(inputs)) if only is None else only:
        kwargs = inputs[i]
        names = frozenset(kwargs)
        recorders = _record(model, stages, kwargs, precision, store, quiet.get(names))
        for stage, recorder in zip(stages, recorders, strict=True):
            _check_order(stage, recorder.passes, i)
            chain = chains.setdefault(stage.path, Chain(stage, device=device, place=place))
            passes = recorder.passes
            if passes and (stage.path, names) not in proven:
                proven.add((stage.path, names))
                given = kwargs, precision
                if stage.name == "text":
                    passes, quiet[names] = _without_blocks(model, chain, recorder, *given, store)
                else:
                    _prove(model, chain, passes, passes, *given)
            for one in passes:
                chain.hidden.append(place(one.first) if place else one.first)
                chain.calls.append(one.calls)
                chain.shared.append(one.shared())
                chain.sample.append(i)
        on_sample(i)
    for chain in chains.values():
        with precision():
            chain.check_batching(model.get_submodule(chain.stage.blocks[0]))
    return {path: chain for path, chain in chains.items() if len(chain)}


def recapture(
    model: nn.Module,
    chain: Chain,
    block: int,
    inputs: Sequence[Inputs],
    precision: Precision = nullcontext,
    at_a_time: int = 1,
) -> Chain:
    """A live chain's inputs of the block with index ``block``, from the model as it is now; they
    lie where the chain's do. at_a_time: samples, always one."""
    store, place = chain.hidden[0].device, chain.place
    stage = replace(chain.stage, depth=block + 1)
    hidden, calls = [], []
    once = len(set(chain.sample)) == len(chain.sample)
    for i in dict.fromkeys(chain.sample):
        recorder = Recorder(model, stage, store, stop=once)
        run_recording(model, inputs[i], [recorder], precision)
        states = [seen.before_last for seen in recorder.passes]
        hidden += [place(state) for state in states] if place else states
        calls += [seen.calls for seen in recorder.passes]
    return replace(chain, hidden=hidden, calls=calls, shared=[{}] * len(hidden))


# block -> what it returns after the hidden state, see `standins.Idle`
Rests = Mapping[str, tuple[Any, ...] | None]


def _record(
    model: nn.Module,
    stages: Sequence[Stage],
    kwargs: Inputs,
    precision: Precision,
    store: torch.device | str,
    quiet: Rests | None = None,
) -> list["Recorder"]:
    """One pass of the whole model, with a recorder for each stage. quiet: blocks that do
    nothing."""
    with idle(model, quiet or {}):
        recorders = [Recorder(model, stage, store) for stage in stages]
        run_recording(model, kwargs, recorders, precision)
    return recorders


def _without_blocks(
    model: nn.Module,
    chain: Chain,
    seen: "Recorder",
    kwargs: Inputs,
    precision: Precision,
    store: torch.device | str,
) -> tuple[list["Pass"], Rests | None]:
    """Record once more while the blocks of the chain's stage do nothing. If a replay of that is the
    model: these passes, and the answers that the blocks gave instead. Else the passes as ``seen``,
    and None. Raises UserError if a replay of those is not the model either."""
    stage = chain.stage
    rests: Rests | None = None
    try:
        if any(one.shared() for one in seen.passes):
            raise ValueError("blocks hand keys and values to later ones")
        rests = {
            stage.blocks[i]: rest_of(output, hidden) for i, (hidden, output) in seen.outputs.items()
        }
        quiet = _record(model, [stage], kwargs, precision, store, rests)[0].passes
        _check_order(stage, quiet, 0)
    except (*UNFIT, UserError) as error:
        if devices.out_of_memory(error):
            raise
        log.info("%s: blocks run for every sample (%s)", stage.path, error)
        rests = None
    if rests is not None and _start_alike(quiet, seen.passes):
        if max(_gaps(model, chain, quiet, seen.passes, kwargs, precision), default=1.0) <= 1.0:
            return quiet, rests
        log.info("%s: blocks run for every sample: what they are given depends on them", stage.path)
    _prove(model, chain, seen.passes, seen.passes, kwargs, precision)
    return seen.passes, None


def _start_alike(passes: Sequence["Pass"], expected: Sequence["Pass"]) -> bool:
    """Whether passes begin with the same hidden states: later ones may read what earlier ones
    gave."""
    ours, own = ([one.first for one in each] for each in (passes, expected))
    return len(ours) == len(own) and all(map(torch.equal, ours, own))


def _check_order(stage: Stage, passes: Sequence[Pass], sample: int) -> None:
    """In each pass each block exactly once, in order; everything else needs code of its own."""
    orders = [one.order for one in passes]
    if all(order == list(range(stage.depth)) for order in orders):
        return
    if len(orders) == 1:
        missing = min(set(range(stage.depth)) - set(orders[0]))
        raise UserError(
            f"{stage.path}: sample {sample} does not run block {missing}; if only samples with an"
            " image or sound run all blocks, calibrate with those alone"
        )
    raise UserError(
        f"{stage.path}: the forward pass does not run each block once and in order (saw"
        f" {orders[0][:6]}...); name the other stages with to_quant_block_names to leave this one"
        " in 16 bits"
    )


def _prove(
    model: nn.Module,
    chain: Chain,
    recorded: Sequence[Pass],
    expected: Sequence[Pass],
    kwargs: Inputs,
    precision: Precision,
) -> None:
    """Replay one sample's passes; UserError if that is not the model, ``live`` if it is only
    undisturbed."""
    exact, disturbed = _gaps(model, chain, recorded, expected, kwargs, precision)
    if not all(bool(own.last.isfinite().all()) for own in expected):
        raise UserError(
            f"{chain.stage.path}: what its last block gives for a sample holds NaN or infinity:"
            " mend the model's weights, try --model_dtype float32 with --disable_amp, or"
            " --algorithm rtn, which needs no samples"
        )
    if not exact <= 1.0:
        raise UserError(
            f"{chain.stage.path}: replaying the blocks misses the model's own output ({exact:.1f}"
            " times what rounding explains): they use something that is not handed to them; name"
            " the other stages with to_quant_block_names to leave this one in 16 bits"
        )
    if not disturbed <= 1.0:
        chain.live = True
        log.info(
            "%s: what blocks are given depends on earlier blocks: captured anew after each",
            chain.stage.path,
        )


def _gaps(
    model: nn.Module,
    chain: Chain,
    recorded: Sequence[Pass],
    expected: Sequence[Pass],
    kwargs: Inputs,
    precision: Precision,
) -> tuple[float, float]:
    """How far a replay of the ``recorded`` calls is from the model, as multiples of `TOLERANCE`:
    as it ran (``expected``) and with its first hidden state disturbed."""
    stage = chain.stage
    blocks = [model.get_submodule(name) for name in stage.blocks]
    calls, shared = [one.calls for one in recorded], [one.shared() for one in recorded]

    def gap(passes: Sequence[Pass]) -> float:
        clean = replace(
            chain, hidden=[one.first for one in passes], calls=calls, shared=shared, batched=False
        )
        with precision(), torch.no_grad():
            replayed = [clean.run_group(blocks, 0, [i]) for i in range(len(passes))]
        gaps = [
            difference(ours.to(own.last.device), own.last)
            for ours, own in zip(replayed, passes, strict=True)
        ]
        return max(gaps) / TOLERANCE[passes[0].last.dtype]

    exact = gap(expected)
    recorder = Recorder(model, stage, expected[0].first.device, disturb=True)
    run_recording(model, kwargs, [recorder], precision)
    disturbed = gap(recorder.passes)
    if _starts_follow(recorder.passes, expected):
        disturbed = float("inf")  # a loop: what a later pass begins with depends on earlier ones
    if max(exact, disturbed) <= 1.0:
        log.debug(
            "%s: %d blocks, run alone, give what the model gives (%.2f of the tolerance; %.2f with"
            " other inputs)",
            stage.path,
            len(blocks),
            exact,
            disturbed,
        )
    return exact, disturbed


def _starts_follow(passes: Sequence[Pass], expected: Sequence[Pass]) -> bool:
    """Whether passes begin otherwise than ``expected`` and disturbed."""
    return any(
        one.first.shape != other.first.shape
        or difference(one.first, disturbed_hidden(other.first)) > TOLERANCE[one.first.dtype]
        for one, other in zip(passes[1:], expected[1:])
    )
