"""The one walk: what equalizing, planning and choosing bits push through blocks that hand keys and
values on."""

from dataclasses import replace

import pytest
import torch
from test_streaming import run
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround.model.chains import Chain, Modalities
from auto_mmround.model.fisher import FisherPasses, measure_fisher, spread
from auto_mmround.model.structure import Stage
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import SCHEMES
from auto_mmround.run import estimate as planner
from auto_mmround.run import job as jobs
from auto_mmround.run import loss_weights, pipeline
from auto_mmround.run import session as sessions
from auto_mmround.run.finished import Finished
from auto_mmround.run.processes import Processes
from auto_mmround.run.session import Session

SHARING = ["gemma3n_text", "gemma4"]  # later blocks read what earlier ones leave for them


@pytest.fixture(scope="module", params=SHARING)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    FAMILIES[request.param].save(folder, tiny_tokenizer())
    return FAMILIES[request.param], folder


@pytest.mark.parametrize(
    "changes", [{"equalize": "smoothquant"}, {"equalize": "awq"}, {"target_bits": 6.0}]
)
def test_what_comes_before_tuning_hands_on_what_blocks_share(family, changes, tmp_path):
    kind, folder = family
    run(folder, tmp_path, kind, **changes)


@pytest.mark.parametrize("stream", [False, True])
def test_an_estimate_hands_on_what_blocks_share(family, stream, tmp_path):
    _, folder = family
    recipe = Recipe(
        model=str(folder), output_dir=str(tmp_path), group_size=32, iters=2, nsamples=4, seqlen=24,
        device="cpu",
        stream=stream,
    )  # fmt: skip
    rows = [{"text": " ".join(f"w{(7 * i + j) % 110 + 3}" for j in range(40))} for i in range(8)]
    found = planner.estimate(
        jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows), budget=0.5
    )
    assert found.seconds["text blocks"] > 0


def test_samples_are_taken_of_every_mixture_of_modalities():
    text, image = torch.zeros(10, dtype=torch.long), torch.tensor([0] * 5 + [1] * 5)
    in_turn = [Modalities(image if i % 2 else text) for i in range(16)]
    chosen = spread(in_turn, 80)
    assert len(chosen) == 8 and sum(i % 2 for i in chosen) == 4
    assert spread(in_turn, 10**9) == list(range(16))
    rare = [Modalities(text)] * 15 + [Modalities(image)]
    assert 15 in spread(rare, 20)


def prepared(tmp_path, **changes):
    """A session of 16 samples, and a chain before its first block."""
    folder = tmp_path / "model"
    FAMILIES["llama"].save(folder, tiny_tokenizer())
    recipe = Recipe(
        model=str(folder), output_dir=str(tmp_path), seqlen=24, device="cpu",
        **{"group_size": 32, "nsamples": 16} | changes,
    )  # fmt: skip
    texts = (" ".join(f"w{(7 * i + j) % 110 + 3}" for j in range(40)) for i in range(24))
    rows = [{"text": text} for text in texts][: recipe.nsamples]
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows)
    return Session(job.loaded.model, job.recipe, job.plan, job.inputs)


def test_second_moments_are_taken_over_enough_tokens_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "TOKENS", 4 * 24)
    monkeypatch.setattr(sessions, "PER_COLUMN", 0)
    session = prepared(tmp_path)
    names = [weight.name for weight in session.plan.of_block(session.plan.stages[0].blocks[0])]
    weights = session.weights()
    assert len(session.sampled) == 4
    assert all(sorted(found) == session.sampled for found in weights.fisher.tokens.values())
    (chain,) = session.record(session.plan.stages).values()
    with session.opened(chain.stage.blocks[:1]) as blocks:
        window = sessions.Window(chain.stage.blocks[:1], 0, blocks)
        found = session.moments(chain, window, names, weights, 8)
        pooled = session.moments(chain, window, names, None, 8)
        with session.collecting(chain, window, names, weights) as (collected, begin):
            chain.passed(blocks, 0, 1, None, begin)  # all samples: the others count nothing
    for name, moments in found.items():
        wanted = collected.moments()[name].hessian()
        torch.testing.assert_close(moments.hessian(), wanted, rtol=1e-3, atol=1e-6)
        assert not torch.allclose(moments.hessian(), pooled[name].hessian(), rtol=1e-3)


def test_experts_share_the_tokens_of_all_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "TOKENS", 24)
    monkeypatch.setattr(sessions, "PER_COLUMN", 0)
    session = prepared(tmp_path)
    assert len(session.sampled) == 1
    monkeypatch.setattr(sessions, "is_expert", lambda name: name.endswith("up_proj"))
    assert prepared(tmp_path).sampled == list(range(16))


def test_samples_that_nothing_uses_do_not_pass_the_blocks(tmp_path, monkeypatch):
    """Twenty steps of one sample, each seen twice, eight held out: six of 24 would run for nothing.
    With fewer than 16 all would be held out and trained on."""
    monkeypatch.setattr(sessions, "TOKENS", 4 * 24)
    monkeypatch.setattr(sessions, "PER_COLUMN", 0)
    monkeypatch.setattr(loss_weights, "TEXT_SAMPLE", 3)
    session = prepared(tmp_path, iters=20, nsamples=24)
    assert len(session.used) == 18 and len(session.sampled) == 4
    assert set(session.sampled) < set(session.used)
    totals, passed, advanced = set(), set(), Chain.advanced
    monkeypatch.setattr(
        Chain, "advanced", lambda chain, *rest: passed.add(len(chain)) or advanced(chain, *rest)
    )
    finished = Finished()
    watcher = pipeline.Watcher(captured=lambda done, total: totals.add(total))
    pipeline.quantize(
        session.model, session.recipe, session.plan, session.inputs, finished, watcher
    )
    assert totals == passed == {18} and finished.has(session.plan.stages[0].blocks)
    assert len(prepared(tmp_path, iters=2, nsamples=24).used) == 16
    assert len(prepared(tmp_path, iters=32, nsamples=24).used) == 24
    static = SCHEMES["FP8_STATIC"] | {"format": "compressed_tensors"}
    for whole in ({"algorithm": "sign_round"}, static):
        assert len(prepared(tmp_path, **{"iters": 2, "nsamples": 24} | whole).used) == 24
    monkeypatch.setattr(sessions, "is_expert", lambda name: name.endswith("up_proj"))
    assert len(prepared(tmp_path, iters=2, nsamples=24).used) == 24


def test_a_step_has_as_many_samples_as_were_asked_for(tmp_path, monkeypatch):
    """Each is seen by two steps, but not where one step alone wants more."""
    monkeypatch.setattr(sessions, "TOKENS", 4 * 24)
    monkeypatch.setattr(sessions, "PER_COLUMN", 0)
    for steps in (1, 2, 3):
        session = prepared(tmp_path, iters=steps, batch_size=10, nsamples=24)
        assert len(session.used) == max(10, steps * 10 // 2) + 8


def test_a_tower_gets_all_samples_of_a_mixture(tmp_path, monkeypatch):
    """A share of them by tokens of text may leave the tower too few for its steps."""
    monkeypatch.setattr(sessions, "TOKENS", 24)
    monkeypatch.setattr(sessions, "PER_COLUMN", 0)
    session = prepared(tmp_path, iters=1, batch_size=1, nsamples=24)
    plan = replace(session.plan, stages=(Stage("vision", "tower", 1), *session.plan.stages))
    seen = [replace(s, modality_T=torch.ones_like(s.modality_T)) for s in session.inputs]
    mixture = [*seen[:4], *session.inputs[4:]]
    assert len(replace(session, inputs=seen, plan=plan).used) == 16
    assert len(replace(session, inputs=mixture, plan=plan).used) == 24
    assert len(replace(session, inputs=mixture).used) == 16


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_takes_second_moments_of_samples_that_it_captures(rank, tmp_path, monkeypatch):
    """Of every second sample one process would have all, the other none."""
    monkeypatch.setattr(sessions, "TOKENS", 8 * 24)
    monkeypatch.setattr(sessions, "PER_COLUMN", 0)
    session = replace(prepared(tmp_path), processes=Processes(rank, 2))
    assert len(session.sampled) == 4 and {i % 2 for i in session.sampled} == {rank}
    how = FisherPasses(weighed=session.sampled, share=session.processes.share)
    layers = session.plan.quantized
    found = measure_fisher(
        session.model, session.plan.stages, session.batches, session.modalities, layers, how
    )
    assert all(sorted(tokens) == session.sampled for tokens in found.tokens.values())
