"""An export that was not proved does not look finished: faults put into real runs and real folders
are found."""

import json
from dataclasses import replace
from pathlib import Path

import mixtures
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, TEXT, Tiny, tiny_tokenizer

import auto_mmround
from auto_mmround import AutoRoundMLLM, NotProved, UserError, cli
from auto_mmround.checkpoint.reading import Decoded, Shards
from auto_mmround.export import formats
from auto_mmround.model.loading import load
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.names import Names
from auto_mmround.run.output import Result
from auto_mmround.run.record import checksum
from auto_mmround.verify import proof
from auto_mmround.verify.proof import Filled, prove

LLAMA = replace(FAMILIES["llama"], config=TEXT | {"num_hidden_layers": 3})
NAME = "model-w4g32-auto_gptq"
MIXTURE = dict(num_local_experts=4, num_experts_per_tok=2)
pytestmark = pytest.mark.usefixtures("fast_disk")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("proof") / "model"
    LLAMA.save(folder, tiny_tokenizer())
    return folder


def command(model: Path, out: Path, *more: str) -> list[str]:
    words = f"--model {model} --output_dir {out} --iters 0 --group_size 32 --device cpu".split()
    return [*words, "--format", "auto_gptq", *more]


def wrong_codes(name: str, codes: Codes) -> dict:
    return formats.FORMATS["auto_round:auto_gptq"].pack(
        name, codes._replace(q_OI=codes.q_OI.roll(1, 0))
    )


@pytest.fixture
def broken(monkeypatch):
    """The format auto_gptq, whose packing exchanges rows."""
    monkeypatch.setitem(
        formats.FORMATS, "auto_gptq", replace(formats.FORMATS["auto_gptq"], pack=wrong_codes)
    )


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_what_was_proved_says_so_and_what_was_not_too(model, tmp_path):
    assert cli.main(command(model, tmp_path / "a")) == 0
    assert record(tmp_path / "a" / NAME)["checked"] is True
    assert cli.main(command(model, tmp_path / "b", "--no_check")) == 0
    assert record(tmp_path / "b" / NAME)["checked"] is False
    assert "check = false" in (tmp_path / "b" / NAME / "recipe.toml").read_text()


def test_a_wrong_export_is_marked_and_its_work_is_kept(model, tmp_path, capfd, broken, monkeypatch):
    for _ in range(2):  # the same command again meets what it left
        assert cli.main(command(model, tmp_path)) == 1
        assert names_in(tmp_path) == [f"{NAME}.wrong", "model-w4g32.unfinished"]
    line, again = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("auto-round-mllm:")
    ]
    assert (
        f"{NAME}.wrong is not proved: model.layers.0." in line
        and "unfinished" in line
        and line == again
    )
    found = record(tmp_path / f"{NAME}.wrong")
    assert found["checked"] is False and any(
        "does not decode to what was tuned" in text for text in found["wrong"]
    )
    monkeypatch.undo()
    assert cli.main(command(model, tmp_path)) == 0  # mended: from the finished blocks
    assert names_in(tmp_path) == [NAME] and record(tmp_path / NAME)["checked"] is True


def test_without_the_check_a_marked_run_can_be_finished(model, tmp_path, capfd, broken):
    assert cli.main(command(model, tmp_path)) == 1
    assert cli.main(command(model, tmp_path, "--no_check")) == 0
    assert names_in(tmp_path) == [NAME] and "continuing" in capfd.readouterr().err


def test_the_other_formats_of_a_run_are_written(model, tmp_path, broken):
    assert cli.main([*command(model, tmp_path), "--format", "auto_gptq,auto_round"]) == 1
    assert names_in(tmp_path) == [
        f"{NAME}.wrong",
        "model-w4g32-auto_round",
        "model-w4g32.unfinished",
    ]


def change_part(part, made):
    text = made.model.model
    if part == "act_fn":
        text.layers[1].mlp.act_fn = torch.nn.GELU()
    elif part == "norm":
        text.norm.variance_epsilon *= 2
    elif part == "self_attn":
        text.layers[1].self_attn.scaling *= 2
    elif part == "rotary_emb":
        text.rotary_emb.original_inv_freq *= 1.5
    else:  # read when the model was made
        made.model.config.rope_parameters["rope_theta"] *= 4


@pytest.mark.parametrize("part", ["act_fn", "norm", "self_attn", "rotary_emb", "rope"])
def test_a_model_that_computes_otherwise_than_its_configuration_says(part, model, tmp_path):
    """Every tensor is right, and readers would get another function."""
    named = "rotary_emb" if part == "rope" else part
    line = rf"{named}:? (is|has) .* readers make .*of its config\.json"
    words = dict(iters=0, group_size=32, device="cpu")
    before, behind = load(str(model)), load(str(model))
    change_part(part, before)
    with pytest.raises(UserError, match=line):
        AutoRoundMLLM(before.model, before.tokenizer, **words).quantize()
    ours = AutoRoundMLLM(behind.model, behind.tokenizer, **words)
    ours.quantize()
    change_part(part, behind)
    with pytest.raises(NotProved, match=line):
        ours.save_quantized(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.wrong"]


def more_rows(text):
    text.layers[1].mlp.up_proj.bias = torch.nn.Parameter(torch.ones(96))


def one_layer_less(text):
    text.layers = text.layers[:1]


def a_buffer(text):
    text.register_buffer("mine", torch.ones(3))


def other_shape(text):
    text.norm.weight = torch.nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    "change, line",
    [
        (more_rows, r"layers\.1\.mlp\.up_proj\.bias: readers make no such tensor"),
        (a_buffer, r"model\.mine: readers make no such tensor"),
        (one_layer_less, r"layers\.1\..*: readers make it .*has it not \(and 17 more\)"),
        (other_shape, r"model\.norm\.weight: readers make it of another shape"),
    ],
)
def test_tensors_that_no_reader_makes_are_told_before_tuning(change, line, model):
    """A run of hours ended in a folder that is called wrong."""
    made = load(str(model))
    change(made.model.model)
    with pytest.raises(UserError, match=line):
        AutoRoundMLLM(made.model, made.tokenizer, iters=0, group_size=32, device="cpu").quantize()


def test_a_folder_that_was_there_before_stays(model, tmp_path, monkeypatch):
    assert cli.main(command(model, tmp_path)) == 0
    before = (tmp_path / NAME / "model.safetensors").read_bytes()
    monkeypatch.setitem(
        formats.FORMATS, "auto_gptq", replace(formats.FORMATS["auto_gptq"], pack=wrong_codes)
    )
    assert cli.main(command(model, tmp_path, "--overwrite")) == 1
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == before


def test_one_written_without_the_check_is_not_taken_for_proved(model, tmp_path, broken):
    """A first try without the check left one of two formats; the second tries to prove both."""
    words = [*command(model, tmp_path), "--format", "auto_round,auto_gptq"]
    assert cli.main(words) == 1
    run = tmp_path / "model-w4g32-auto_round" / "run.json"
    run.write_text(json.dumps(record(run.parent) | {"checked": False}))
    assert cli.main(words) == 1
    assert record(run.parent)["checked"] is True


def test_the_python_api_raises_an_error_of_its_own(model, tmp_path, broken):
    ours = AutoRoundMLLM(str(model), iters=0, group_size=32, device="cpu", format="auto_gptq")
    ours.quantize()
    with pytest.raises(auto_mmround.NotProved) as caught:
        ours.save_quantized(tmp_path / "out", format="auto_gptq")
    assert caught.value.folder == tmp_path / "out.wrong" and caught.value.folder.is_dir()
    assert (
        caught.value.findings and "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    )
    unchecked = AutoRoundMLLM(
        str(model), iters=0, group_size=32, device="cpu", format="auto_gptq", check=False
    )
    unchecked.quantize()
    assert unchecked.save_quantized(tmp_path / "out", format="auto_gptq") == [tmp_path / "out"]


class Written:
    """A checkpoint with what it was made of, whose tensors can be changed along with what the run
    recorded of them."""

    def __init__(self, family: str, folder: Path, fmt: str):
        tiny = LLAMA if family == "llama" else FAMILIES[family]
        tiny.save(folder / "model", tiny_tokenizer())
        recipe = Recipe(
            model=str(folder / "model"),
            output_dir=str(folder),
            format=fmt,
            group_size=32,
            iters=0,
            device="cpu",
        )
        self.seen: list[tuple] = []
        job = jobs.prepare(recipe, jobs.load_model(recipe))
        (self.folder,) = jobs.run(
            job, prove=lambda *found: self.seen.append(found) or prove(*found)
        )
        self.fmt, self.result = self.seen[0][1:]
        codes = dict(Parts(self.result, job).items())
        self.result = replace(self.result, codes=codes)

    def change(self, change) -> list[str]:
        file = self.folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        path = self.folder / "run.json"
        found = record(self.folder)
        found["tensors"] = {
            key: checksum(t) for key, t in tensors.items() if key in found["tensors"] or self.plain
        }
        path.write_text(json.dumps(found))
        return prove(self.folder, self.fmt, self.result)

    @property
    def plain(self) -> bool:
        return not self.fmt.packs


# the run's own lie in a folder that is gone by now
def Parts(result: Result, job) -> dict[str, Codes]:
    from auto_mmround.run.finished import Finished
    from auto_mmround.run.pipeline import quantize

    finished = Finished()
    loaded = load(job.recipe.model)
    again = jobs.prepare(job.recipe, loaded)
    quantize(loaded.model, again.recipe, again.plan, again.inputs, finished)
    assert isinstance(result.names, Names)
    return dict(finished.codes)


def exchange(one: str, other: str):
    def change(tensors: dict) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


@pytest.mark.parametrize(
    "family, fmt, change, said",
    [
        (
            "llama",
            "fake",
            exchange(*(f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1))),
            "o_proj",
        ),
        (
            "llama",
            "auto_round",
            exchange(*(f"model.layers.{i}.input_layernorm.weight" for i in (0, 2))),
            "layernorm",
        ),
        ("llama", "auto_round", lambda t: t.pop("model.norm.weight"), "no tensor fills it"),
        (
            "llama",
            "auto_round",
            lambda t: t.update({"model.extra.weight": torch.ones(2)}),
            "none such",
        ),
        (
            "llama",
            "fake",
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1].clone()}),
            "shape",
        ),
        (
            "qwen3_moe",
            "fake",
            exchange(*(f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in (0, 1))),
            "experts",
        ),
        ("gpt2", "fake", exchange(*(f"transformer.h.{i}.mlp.c_fc.weight" for i in (0, 1))), "c_fc"),
    ],
)
def test_faults_that_the_record_does_not_show(family, fmt, change, said, tmp_path):
    written = Written(family, tmp_path, fmt)
    assert prove(written.folder, written.fmt, written.result) == []
    found = written.change(change)
    assert found and any(said in line for line in found), found


def test_a_configuration_that_is_another_model(tmp_path):
    written = Written("llama", tmp_path, "auto_round")
    path = written.folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    path.write_text(json.dumps(config))
    (line,) = prove(written.folder, written.fmt, written.result)
    assert line.startswith("config.json: rope_parameters: is not what the run wrote")


def test_a_reload_holds_one_block(tmp_path):
    written = Written("llama", tmp_path, "auto_round")
    subject = proof.read_subject(written.folder)
    empty = proof._empty(written.folder, written.result.names.model)
    decoded = Decoded(written.folder, torch.float32)
    keys = proof._contents(subject, decoded)
    filled = Filled(empty, keys, [f"model.layers.{i}" for i in range(3)])
    shards, sizes = Shards(), []
    for names in filled.groups(lambda keys: {key: decoded[key](shards) for key in keys}):
        there = [name for name, tensor in empty.state_dict().items() if not tensor.is_meta]
        assert sorted(there) == sorted(names)
        sizes.append(len({name.partition("layers.")[2][:1] for name in names}))
    assert sizes == [1, 1, 1, 1] and not filled.missing() and not filled.unknown()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())


@pytest.mark.parametrize("stream", [True, False])
def test_streamed_runs_are_proved_alike(model, tmp_path, stream):
    words = command(
        model, tmp_path, "--stream" if stream else "--no_stream", "--format", "auto_gptq,fake"
    )
    assert cli.main(words) == 0
    assert record(tmp_path / "model-w4g32-fake")["checked"] is True


@pytest.mark.parametrize("changes", [{"format": "fake"}, {"equalize": "smoothquant"}])
def test_a_source_in_float16_is_loaded_as_float32_and_written_as_it_was(changes, tmp_path):
    """What is written is the model in memory in the source's dtype: that is no fault."""
    LLAMA.build().half().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    recipe = Recipe(
        model=str(tmp_path / "model"), output_dir=str(tmp_path), iters=0, group_size=32,
        nsamples=4, seqlen=12, device="cpu", **changes,
    )  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=LLAMA.samples(4))
    assert job.loaded.model.dtype == torch.float32
    (made,) = jobs.run(job, prove=prove)
    assert record(made)["checked"] is True
    assert load_file(made / "model.safetensors")["model.norm.weight"].dtype == torch.float16


def test_not_proved_is_no_mistake_of_the_user():
    error = NotProved(Path("x.wrong"), ["a: b", "c: d"], [Path("x.wrong"), Path("y.wrong")])
    assert str(error) == "x.wrong is not proved: a: b (and 1 more); the same of y.wrong"
    assert not isinstance(error, auto_mmround.UserError)


GRANITE = TEXT | dict(
    layer_types=["attention", "attention"], num_local_experts=4, num_experts_per_tok=2,
    shared_intermediate_size=32,
    intermediate_size=32,
)  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llama4", "granitemoehybrid"])
@pytest.mark.parametrize("stream", ["--stream", "--no_stream"])
def test_stacks_of_experts_are_written_as_transformers_reads_them(family, stream, tmp_path):
    """`fake` loads anywhere: no parameter is made up, and each holds what was tuned."""
    tiny = FAMILIES.get(family) or Tiny(family, "GraniteMoeHybridForCausalLM", GRANITE)
    tiny.save(tmp_path / "model", tiny_tokenizer())
    assert (
        cli.main([*command(tmp_path / "model", tmp_path / "out", stream), "--format", "fake"]) == 0
    )
    out = tmp_path / "out" / "model-w4g32-fake"
    cls = type(tiny.build())
    loaded, info = cls.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    source = cls.from_pretrained(tmp_path / "model").state_dict()
    stacks = [name for name in source if name.endswith("experts.down_proj")]
    errors = [float((loaded.state_dict()[n] - source[n]).norm() / source[n].norm()) for n in stacks]
    # rounded to 4 bits, not made up and not untouched
    assert errors and all(0.01 < error < 0.2 for error in errors)


def test_stacks_that_no_reader_takes_apart_are_refused_before_tuning(tmp_path, capfd):
    mixtures.build("jetmoe").save_pretrained(tmp_path / "single")
    tiny_tokenizer().save_pretrained(tmp_path / "single")
    words = [*command(tmp_path / "single", tmp_path / "out"), "--format", "auto_round"]
    assert cli.main(words) == 2
    assert "input_linear.weight one by one" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fmt", ["auto_round", "compressed_tensors"])
def test_stacks_that_stay_are_written_as_engines_take_them(fmt, tmp_path):
    """One by one for auto-round, which takes them apart too (`test_engine_experts.py`)."""
    Tiny("granitemoehybrid", "GraniteMoeHybridForCausalLM", GRANITE).save(
        tmp_path / "model", tiny_tokenizer()
    )
    words = [*command(tmp_path / "model", tmp_path / "out"), "--format", fmt]
    assert cli.main([*words, "--ignore", "re:.*experts.*"]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert any(
        k.endswith("experts.0.up_proj.weight") for k in load_file(folder / "model.safetensors")
    )


@pytest.mark.parametrize(
    "family, fmt, more, said",
    [
        (
            "qwen3_moe",
            "auto_gptq",
            ["--engines", "vllm"],
            "transformers takes no auto_gptq with quantized experts: parameters were made up",
        ),
        (
            "qwen3_moe",
            "auto_round",
            [],
            "vllm on processors takes no auto_round:auto_gptq with quantized experts",
        ),
        (
            "qwen3_vl_moe",
            "compressed_tensors",
            ["--engines", "vllm"],
            "transformers takes no compressed_tensors with experts that the source",
        ),
        (
            "kimi_k25",
            "auto_round",
            ["--engines", "vllm"],
            "transformers takes no auto_round:auto_gptq with a tower whose q, k, v",
        ),
        (
            "mixtral",
            "auto_round",
            ["--engines", "vllm"],
            "transformers takes no auto_round:auto_gptq with experts that the checkpoint names",
        ),
        (
            "gpt_oss",
            "auto_round",
            ["--engines", "vllm", "--ignore", "re:.*experts.*"],
            "transformers takes no auto_round:auto_gptq with experts that stay",
        ),
        ("llama", "auto_round", [], None),
    ],
)
def test_what_engines_do_not_load_is_said_at_plan_time(family, fmt, more, said, tmp_path, capsys):
    others = {
        "mixtral": Tiny(
            "mixtral", "MixtralForCausalLM", TEXT | MIXTURE | {"intermediate_size": 32}
        ),
        "gpt_oss": Tiny(
            "gpt_oss", "GptOssForCausalLM", TEXT | MIXTURE | {"layer_types": ["full_attention"] * 2}
        ),
    }
    (others.get(family) or FAMILIES[family]).save(tmp_path / "model", tiny_tokenizer())
    words = [*command(tmp_path / "model", tmp_path / "out"), "--format", fmt, *more]
    for each in (["plan", *words], words):
        assert cli.main(each) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if " takes no " in line]
        assert any(line.startswith(said) for line in lines) if said else not lines


@pytest.mark.parametrize("name", ["auto_round", "auto_gptq", "compressed_tensors", "fake", "mlx"])
def test_tensors_that_the_class_does_not_read_come_along(name, tmp_path, capsys):
    """Layers that predict further tokens, heads of other tasks: whoever trained them wants them
    back."""
    FAMILIES["llama"].save(tmp_path / "model", tiny_tokenizer())
    file = tmp_path / "model" / "model.safetensors"
    extra = {
        "mtp.layers.0.proj.weight": torch.randn(32, 32),
        "model.other_head.weight": torch.randn(8, 8),
    }
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    words = f"--model {tmp_path / 'model'} --iters 0 --group_size 32 --device cpu --format {name}"
    assert cli.main([*words.split(), "--output_dir", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "does not read 2 tensors, first model.other_head.weight" in said
    (folder,) = (tmp_path / "out").glob("*w4g32*")
    written = {
        key: value
        for path in folder.glob("*.safetensors")
        for key, value in load_file(path).items()
    }
    assert all(torch.equal(written[key], value) for key, value in extra.items())
    assert cli.main(["verify", str(folder), "--engine", "none"]) == 0
