"""A rotation of the hidden states of the text model, folded into its weights: the function stays.

The hidden states that run from block to block are written by embeddings, by the last layers of
attention and MLP, and by what makes tokens of images and sounds. Norms read them. h becomes h R:
writers are multiplied by R, and readers of the norms by R^T behind the norms' gains. A norm that
divides by the root mean square alone does not notice (SliceGPT, arXiv 2401.15024).

Nothing is told by names. Who reads a norm is seen; who writes is guessed. Then it is tried before
any weight changes: each block on a copy in float64, and the whole model.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auto_mmround.errors import UserError
from auto_mmround.modalities import PAD
from auto_mmround.model.chains import Chain, difference, first_call, first_tensor, moved
from auto_mmround.model.fisher import spread
from auto_mmround.model.pairs import as_twin, final_norm, norm_pairs, twin_of
from auto_mmround.model.passes import run_model
from auto_mmround.model.speaking import path_of, speaking, speaking_path
from auto_mmround.model.structure import find_stages, shared_parameters
from auto_mmround.numerics.rotation import SIZE, signs, turned, turned_back
from auto_mmround.run.out_of_memory import phase
from auto_mmround.run.session import Session, Told, Window

log = logging.getLogger("auto_mmround")

WHAT, OFF = "turning the hidden states", "leave equalize = hadamard off"
# Largest relative difference that may be rounding: of a block in float64, whose norms compute in
# float32, and of the whole model's logits.
EXACT = 1e-5
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
PARALLEL = 0.999  # cosine of a token's hidden state with what a layer made
PIECE = 4096  # rows of a weight at a time


@dataclass(frozen=True)
class Gain:
    """A norm that reads the hidden states. It multiplies by offset + weight. readers: the linear
    layers that read it."""

    offset: float
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """What touches the hidden states, by name. writers: the input embedding, and linear layers
    whose output goes into them. norms: what reads them."""

    writers: tuple[str, ...]
    norms: Mapping[str, Gain]


def rotate(session: Session, told: Told = lambda done, total: None) -> Stream:
    """Turn the hidden states of the text model, in place; its function stays, but for rounding.

    Raises UserError for a model whose hidden states are read or written by something else, and
    changes nothing then.
    """
    if not any(w.scheme and w.scheme.data_type == "mxfp4" for w in session.plan.weights):
        log.warning(
            "equalize = hadamard is for MXFP4: with NVFP4 the damage was 1.8 times as large"
            " (docs/tuner.md)"
        )
    if session.plan.carried:
        raise _refused(
            f"{session.plan.carried[0].name}, which the class does not load, may read them"
        )
    few = session.of(spread(session.modalities, 0))  # in each process the same
    with phase(WHAT), few.exactly(), torch.no_grad():
        sign_D = signs(_width(session))
        stream = _stream(few, sign_D, told)
        before = _logits(few)
        with _turning(session.model, stream, sign_D):
            gap = max(map(difference, _logits(few), before))
        if not gap <= ROUNDING[session.dtype]:
            raise _refused(f"turned, they change the model's output by {gap:.1%}")
        _fold(session.model, stream, sign_D)
    log.info("hidden states turned: %d layers write them, %d norms read them",
             len(stream.writers), len(stream.norms))  # fmt: skip
    return stream


def _refused(reason: str) -> UserError:
    return UserError(
        f"equalize = hadamard turns the hidden states of the text model; {reason}; {OFF}"
    )


def _width(session: Session) -> int:
    words: Any = speaking(session.model).get_input_embeddings().weight
    return int(words.shape[-1])


def _logits(session: Session) -> list[Tensor]:
    return [run_model(speaking(session.model), kwargs).logits.float() for kwargs in _given(session)]


def _given(session: Session) -> list[dict[str, Any]]:
    return [moved(kwargs, session.device) for kwargs in session.batches]


def _stream(session: Session, sign_D: Tensor, told: Told) -> Stream:
    """What touches the hidden states of the samples."""
    model, width = session.model, len(sign_D)
    if width % SIZE:
        raise _refused(f"their {width} channels are no multiple of {SIZE}")
    text = find_stages(model)[-1]
    norms, writers = dict[str, Gain](), list[str]()
    head = speaking(model).get_output_embeddings()
    _check(model, [path_of(model, speaking(model).get_input_embeddings()), path_of(model, head)])

    def visit(chain: Chain, window: Window) -> Chain:
        (name,), index, (block,) = window
        with session.exactly():
            own = _of_block(chain, window, width)
            gap = _gap(chain, index, block, own, sign_D)
        if not gap <= EXACT:
            raise _refused(f"turned, they change the output of {name} by {gap:.1%}")
        writers.extend(f"{name}.{part}" for part in own.writers)
        for norm, gain in own.norms.items():
            readers = tuple(f"{name}.{reader}" for reader in gain.readers)
            norms[f"{name}.{norm}"] = Gain(gain.offset, readers)
        return chain.advanced(window.blocks, window.first, 1)

    chain = session.record([text], told, WHAT)[text.path]
    first_hidden = list(chain.hidden)
    session.push(chain, visit)
    found = final_norm(model, head, _given(session)[0])
    if found is None:
        raise _refused("no norm was found before the output head")
    norms[found[0]] = Gain(found[1], (path_of(model, head),))
    stream = Stream((*_sources(session, first_hidden, text.path, head), *writers), norms)
    readers = [reader for gain in norms.values() for reader in gain.readers]
    _check(model, [*stream.writers, *readers])
    return stream


def _gap(chain: Chain, index: int, block: nn.Module, own: Stream, sign_D: Tensor) -> float:
    """How far a block's output for turned hidden states is from the turned output, relative."""
    twin = twin_of(block)
    call, hidden = as_twin(twin, *first_call(chain, index, block))
    wanted = turned(first_tensor(call.run(twin, hidden)), sign_D)
    call, hidden = as_twin(twin, *first_call(chain, index, block))  # a block may fill mappings
    with _turning(twin, own, sign_D):
        return difference(first_tensor(call.run(twin, turned(hidden, sign_D))), wanted)


def _of_block(chain: Chain, window: Window, width: int) -> Stream:
    """What touches them in a block, by names within it."""
    (name,), index, (block,) = window
    if any(calls[index].glue for calls in chain.calls):
        raise _refused(f"the model itself changes them before {name}")
    found = norm_pairs(block, *first_call(chain, index, block))
    for part, reason in found.refused.items():
        if block.get_submodule(part).weight.shape == (width,):
            raise _refused(f"{name}.{part} can't be folded: {reason}")
    norms = {
        pair.source: Gain(pair.offset, pair.readers)
        for pair in found.pairs
        if pair.offset is not None and block.get_submodule(pair.source).weight.shape == (width,)
    }
    for part in norms:
        norm = block.get_submodule(part)
        if isinstance(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None:
            raise _refused(f"{name}.{part} takes their mean off, or adds to them")
    read = {reader for gain in norms.values() for reader in gain.readers}
    writers = tuple(
        part
        for part, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == width and part not in read
    )
    return Stream(writers, norms)


def _check(model: nn.Module, layers: Sequence[str]) -> None:
    """Raises UserError for layers that can't be folded."""
    shared = shared_parameters(model)
    for name in layers:
        layer = model.get_submodule(name)
        if any(id(parameter) in shared for parameter in layer.parameters()):
            raise _refused(
                f"{name} shares its weight with another layer (an output head gets one of its own"
                " by untie_lm_head)"
            )
        if not isinstance(layer, nn.Linear | nn.Embedding):
            raise _refused(f"{name} is a {type(layer).__name__}")


def _sources(
    session: Session, hidden: Sequence[Tensor], blocks: str, head: nn.Module
) -> tuple[str, ...]:
    """The input embedding, and linear layers that make tokens of images and sounds. Each token's
    hidden state before the first block is, up to a factor, a row of what one of them gives."""
    model, width = session.model, _width(session)
    words = path_of(model, speaking(model).get_input_embeddings())
    outside = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.out_features == width
        and layer is not head
        and not name.startswith(f"{blocks}.")
    }
    ran, makers = set[str](), {words: None}
    touching = _touching(model, blocks, width)
    watched = {**touching, words: model.get_submodule(words)}
    for kwargs, own, state in zip(_given(session), session.modalities, hidden, strict=True):
        with _outputs(watched) as outputs:
            run_model(speaking(model), kwargs)
        ran |= outputs.keys()
        rows_TD = state.reshape(-1, width).float()
        if len(own.text_T) == len(rows_TD):
            rows_TD = rows_TD[(own.text_T != PAD).to(rows_TD.device)]
        for name in (words, *sorted(outside.keys() & outputs.keys())):
            made_T = _made_by(rows_TD, outputs[name].reshape(-1, width))
            if made_T.any():
                makers[name] = None
                rows_TD = rows_TD[~made_T]
        if len(rows_TD):
            raise _refused(f"no layer was found that makes {len(rows_TD)} tokens of a sample")
    for name in sorted(touching.keys() - ran):
        if not name.startswith(speaking_path(model)):
            raise _refused(f"{name}, which takes no part in making text, may read them")
        raise _refused(
            f"no calibration sample reaches {name}, which may read or write them: calibrate with"
            " images or sounds, too"
        )
    return tuple(makers)


def _touching(model: nn.Module, blocks: str, width: int) -> dict[str, nn.Module]:
    """What could read or write hidden states outside the blocks, by the shapes of its own
    parameters: a layer of any class, a parameter that a projector multiplies with. Tables aside,
    whose rows are often taken without a call."""
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and not isinstance(module, nn.Embedding)
        and not name.startswith(f"{blocks}.")
        and any(width in parameter.shape for parameter in module.parameters(recurse=False))
    }


def _made_by(rows_TD: Tensor, output_ND: Tensor) -> Tensor:
    """Bool (T,): whether a row points where one of the outputs does."""
    unit = nn.functional.normalize
    alike_TN = unit(rows_TD, dim=-1) @ unit(output_ND.to(rows_TD), dim=-1).t()
    return alike_TN.amax(-1) > PARALLEL if len(output_ND) else alike_TN.new_zeros(len(rows_TD)) > 0


@contextmanager
def _outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While open, the last output of every layer that runs."""
    outputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        return lambda layer, args, output: outputs.update({name: output})

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook_for(name)).remove)
        yield outputs


@contextmanager
def _turning(model: nn.Module, stream: Stream, sign_D: Tensor) -> Iterator[None]:
    """While open, the model runs as if it were folded."""

    def back(gain_D: Tensor) -> Callable[..., Any]:
        return lambda layer, args: (
            turned_back(args[0], sign_D) * gain_D.to(args[0].device),
            *args[1:],
        )

    with ExitStack() as stack:
        for name in stream.writers:
            handle = model.get_submodule(name).register_forward_hook(
                lambda layer, args, output: turned(output, sign_D)
            )
            stack.callback(handle.remove)
        for name, gain in stream.norms.items():
            weight: Any = model.get_submodule(name).weight
            kept = weight.clone()
            stack.callback(weight.copy_, kept)
            weight.fill_(1.0 - gain.offset)
            for reader in gain.readers:
                handle = model.get_submodule(reader).register_forward_pre_hook(
                    back(gain.offset + kept)
                )
                stack.callback(handle.remove)
        yield


def _fold(model: nn.Module, stream: Stream, sign_D: Tensor) -> None:
    """Put the rotation into the weights. A failure leaves the originals, of which there is a copy
    meanwhile."""

    def turn(rows_PD: Tensor) -> Tensor:
        return turned(rows_PD, sign_D)

    with ExitStack() as undo:

        def change(parameter: Any, work: Callable[[Tensor], Tensor]) -> None:
            undo.callback(parameter.copy_, parameter.clone())
            for part in parameter.split(PIECE):
                part.copy_(work(part.float()))

        for name, gain in stream.norms.items():
            norm: Any = model.get_submodule(name)
            gain_D = gain.offset + norm.weight.float()
            for reader in gain.readers:
                layer: Any = model.get_submodule(reader)
                change(layer.weight, partial(_gained, gain_D=gain_D, turn=turn))
            change(norm.weight, partial(torch.full_like, fill_value=1.0 - gain.offset))
        for name in stream.writers:
            writer: Any = model.get_submodule(name)
            linear = isinstance(writer, nn.Linear)
            change(writer.weight.t() if linear else writer.weight, turn)
            if linear and writer.bias is not None:
                change(writer.bias[None], turn)
        undo.pop_all()


def _gained(rows_PD: Tensor, gain_D: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    return turn(rows_PD * gain_D.to(rows_PD.device))
