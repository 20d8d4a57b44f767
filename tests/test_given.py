"""The Python API with objects: what is exported is the model and the tokenizer that were given, and
they are given back as they were."""

import contextlib
import copy
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_texts, tiny_tokenizer
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from auto_mmround import AutoRoundMLLM
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.run.pipeline import Watcher
from auto_mmround.verify.static import check

TEXTS = tiny_texts(8, 40)
IDS = torch.tensor([list(range(5, 25))])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny models."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("source") / family
            FAMILIES[family].save(made[family], tiny_tokenizer())
        return made[family]

    return folder


def read(folder, family="llama", **options):
    model = getattr(transformers, FAMILIES[family].architecture).from_pretrained(folder, **options)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def quantized(model, tokenizer, **options):
    given = dict(group_size=32, dataset=TEXTS, nsamples=8, seqlen=32, algorithm="rtn", device="cpu")
    autoround = AutoRoundMLLM(model, tokenizer, **given | options)
    autoround.quantize()
    return autoround


def exported(model, tokenizer, out, format="auto_round", **options):
    (folder,) = quantized(model, tokenizer, **options).save_quantized(out, format=format)
    return folder


def holds(folder, model, tokenizer, ids=IDS):
    """The checkpoint is the model in memory, to the bit, and nothing contradicts itself in it."""
    assert not check(folder)
    again = from_quantized(folder, dtype=str(model.dtype).removeprefix("torch."))
    state = again.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(again.model(ids).logits, model(ids).logits)
    assert (
        len(again.tokenizer) == len(tokenizer)
        and again.tokenizer.chat_template == tokenizer.chat_template
    )
    plain = transformers.AutoConfig.from_pretrained(folder).to_dict()
    for key in ("vocab_size", "tie_word_embeddings", "num_hidden_layers", "rope_parameters"):
        assert plain[key] == model.config.to_dict()[key]


def resized(model, tokenizer):
    tokenizer.add_tokens(["<new_a>", "<new_b>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def smaller(model, tokenizer):
    model.resize_token_embeddings(128 - 8)
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    words["model"]["vocab"] = {word: i for word, i in words["model"]["vocab"].items() if i < 120}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(words))


def rope(model, tokenizer):
    model.config.rope_parameters["rope_theta"] = 500.0
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def tuned(model, tokenizer):
    for parameter in (
        model.lm_head.weight,
        model.model.norm.weight,
        model.model.layers[1].mlp.up_proj.weight,
    ):
        parameter.data += 0.1 * torch.randn_like(parameter)


def all_tuned(model, tokenizer):
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)


def tied(model, tokenizer):
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight


def template(model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def pruned(model, tokenizer):
    model.model.layers = model.model.layers[1:]
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1


def stacked_up(model, tokenizer):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.model.layers[2].self_attn.layer_idx = 2
    model.model.layers[2].mlp.down_proj.weight.data *= 0.5
    model.config.num_hidden_layers = 3


def halved(model, tokenizer):
    model.to(torch.bfloat16)
    # loading keeps its angles in float32
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


CHANGES = [resized, smaller, rope, tuned, all_tuned, tied, template, pruned, stacked_up, halved]


@pytest.mark.parametrize("format", ["auto_round", "compressed_tensors", "fake", "mlx"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_exported_as_it_is(folders, tmp_path, change, format):
    torch.manual_seed(0)
    source = folders("llama")
    model, tokenizer = read(source)
    change(model, tokenizer)
    out = exported(model, tokenizer, tmp_path / "out", format)
    holds(out, model, tokenizer)


def test_an_unchanged_model_is_exported_as_its_folder_is(folders, tmp_path):
    source = folders("llama")
    model, tokenizer = read(source)
    (source / "notes.txt").write_text("beside")
    out = exported(model, tokenizer, tmp_path / "out", "fake")
    (source / "notes.txt").unlink()
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "notes.txt").read_text() == "beside"
    assert (
        load_file(out / "model.safetensors").keys()
        == load_file(source / "model.safetensors").keys()
    )


def test_an_untied_head_is_written_and_said(folders, tmp_path):
    source = tmp_path / "tied"
    config = transformers.AutoConfig.for_model(
        "llama", **FAMILIES["llama"].config | {"tie_word_embeddings": True}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    model, tokenizer = read(source)
    # the configuration still says that it is tied
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    out = exported(model, tokenizer, tmp_path / "out")
    again = from_quantized(out).model
    assert again.config.tie_word_embeddings is False
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and not check(out)


@pytest.mark.parametrize(
    "family, kept", [("qwen3_moe", "experts.1"), ("gpt2", "c_attn"), ("gemma3_text", "down_proj")]
)
@pytest.mark.parametrize("format", ["auto_round", "fake"])
def test_other_forms_of_weights_change_too(folders, tmp_path, family, kept, format):
    """Experts that lie stacked in memory, Conv1D, tied heads."""
    torch.manual_seed(0)
    model, tokenizer = read(folders(family), family)
    for parameter in model.parameters():
        if parameter.ndim != 2 or len(parameter) != 128:  # all but the embedding
            parameter.data += 0.05 * torch.randn_like(parameter)
    out = exported(model, tokenizer, tmp_path / "out", format, fp_layers=kept)
    again = from_quantized(out).model
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "change, kept", [(tuned, True), (pruned, True), (resized, True), (all_tuned, False)]
)
def test_what_the_class_does_not_read_comes_from_the_source(
    folders, tmp_path, monkeypatch, change, kept
):
    """Layers for multi-token prediction belong to the weights of the folder, not to any others."""
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"mtp\..*"]
    )
    source = tmp_path / "source"
    shutil.copytree(folders("llama"), source)
    more = {"mtp.0.eh_proj.weight": torch.arange(6.0).reshape(2, 3)}
    save_file(
        load_file(source / "model.safetensors") | more,
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    model, tokenizer = read(source)
    change(model, tokenizer)
    written = load_file(exported(model, tokenizer, tmp_path / "out", "fake") / "model.safetensors")
    assert ("mtp.0.eh_proj.weight" in written) == kept
    assert any("layers.1." in key for key in written) == (change is not pruned)


def test_experts_of_a_new_layer(folders, tmp_path):
    model, tokenizer = read(folders("qwen3_moe"), "qwen3_moe")
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.model.layers[2].self_attn.layer_idx = 2
    model.config.num_hidden_layers = 3
    for format in ("auto_round", "fake"):
        model_again = copy.deepcopy(model)
        out = exported(model_again, tokenizer, tmp_path / format, format)
        assert torch.equal(from_quantized(out).model(IDS).logits, model_again(IDS).logits)
        assert not [finding for finding in check(out) if not finding.where.endswith(".mlp.gate")]


def test_values_that_a_shorter_dtype_does_not_hold_are_kept(folders, tmp_path):
    half = tmp_path / "half"
    model, tokenizer = read(folders("llama"))
    model.to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    model, tokenizer = read(half, dtype=torch.float32)
    model.model.norm.weight.data += 1e-4 * torch.rand(64)
    stored = load_file(exported(model, tokenizer, tmp_path / "out") / "model.safetensors")
    assert torch.equal(stored["model.norm.weight"], model.model.norm.weight)
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16  # unchanged


def test_settings_of_generation(folders, tmp_path):
    """Also those that Transformers refuses to save."""
    for name, model in (("loaded", read(folders("llama"))[0]), ("made", FAMILIES["llama"].build())):
        model.generation_config = transformers.GenerationConfig(
            do_sample=False, temperature=0.7, top_p=0.8
        )
        out = exported(model, tiny_tokenizer(), tmp_path / name)
        assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.7


def test_a_processor_that_was_changed(tmp_path):
    from auto_mmround.model.loading import DEMO

    processor = transformers.AutoProcessor.from_pretrained(DEMO)
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(DEMO)
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 12544}
    processor.chat_template = "{{ messages[0]['content'] }}"
    out = exported(model, processor, tmp_path / "out", group_size=128)  # in the tokenizer's place
    again = transformers.AutoProcessor.from_pretrained(out)
    assert (
        again.image_processor.size["longest_edge"] == 12544
        and again.chat_template == processor.chat_template
    )
    kept = exported(
        transformers.Qwen2VLForConditionalGeneration.from_pretrained(DEMO),
        None,
        tmp_path / "kept",
        group_size=128,
    )
    for path in DEMO.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            assert (kept / path.name).read_bytes() == path.read_bytes(), path.name


def test_code_that_comes_with_a_model_is_kept(tmp_path):
    family = FAMILIES["cogvlm2"]
    source = tmp_path / "source"
    family.save(source, tiny_tokenizer())
    model = transformers.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    all_tuned(model, None)
    out = exported(model, tiny_tokenizer(), tmp_path / "out", format="fake")
    assert (
        "auto_map" in json.loads((out / "config.json").read_text())
        and (out / "cogvlm2.py").is_file()
    )


def test_a_model_changed_after_it_was_quantized(folders, tmp_path):
    model, tokenizer = read(folders("llama"))
    autoround = quantized(model, tokenizer)
    model.resize_token_embeddings(130, mean_resizing=False)
    (out,) = autoround.save_quantized(tmp_path / "resized")
    assert from_quantized(out).model.get_input_embeddings().weight.shape == (130, 64)
    model.model.layers[1].mlp.up_proj.weight.data += 1
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.up_proj: its weight is not what quantize"
    ):
        autoround.save_quantized(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    model.model.layers = model.model.layers[:1]
    with pytest.raises(UserError, match=r"layers\.1\.\S+: its weight is not what"):
        autoround.save_quantized(tmp_path / "cut")


def test_a_folder_with_the_default_name_is_no_source(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(folders("llama"))
    autoround = AutoRoundMLLM(FAMILIES["llama"].build(), tiny_tokenizer(), dataset=TEXTS)
    assert autoround.loaded.source is None


def test_a_folder_is_a_source_by_its_tensors(folders, caplog):
    model, tokenizer = read(folders("llama"))
    model.config.rms_norm_eps = 1e-3
    model.lm_head.weight.data += 1
    assert AutoRoundMLLM(model, tokenizer, dataset=TEXTS).loaded.source == folders("llama")
    all_tuned(model, tokenizer)
    assert (
        AutoRoundMLLM(model, tokenizer, dataset=TEXTS).loaded.source is None
        and "not those of" in caplog.text
    )
    other = FAMILIES["qwen3"].build()
    other.config._name_or_path = str(folders("llama"))
    assert AutoRoundMLLM(other, tokenizer, dataset=TEXTS).loaded.source is None


@pytest.mark.parametrize("bits", [4, 8])
def test_the_quantized_is_not_quantized_again(folders, bits):
    model, tokenizer = read(folders("llama"))
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    autoround = quantized(model, tokenizer, bits=12 - bits)
    for again in (
        autoround,
        AutoRoundMLLM(model, tokenizer, bits=bits, group_size=32, algorithm="rtn", device="cpu"),
    ):
        with pytest.raises(UserError, match="was quantized before"):
            again.quantize()
    model.load_state_dict(original)
    again.quantize()


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family, options", [
    ("llama", {}), ("qwen3_moe", {}), ("llama", {"equalize": "awq"}), ("llama", {"polish": True}),
    ("llama", {"enable_torch_compile": False, "nblocks": 2}),
])  # fmt: skip
def test_the_model_is_given_back_as_it_was(folders, family, options, fails):
    model, tokenizer = read(folders(family), family)
    model.train()
    model.model.layers[0].eval()
    model.config.return_dict = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    model.model.norm.weight.requires_grad_(True)
    model.model.norm.weight.grad = torch.ones(64)

    def state():
        return (
            {name: module.training for name, module in model.named_modules()},
            {name: (p.requires_grad, p.dtype, p.device, p.grad is None, id(p)) for name,
                p in model.named_parameters()},
            {name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks),
                "forward" in vars(m))
             for name, m in model.named_modules()},
            {name: len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ())
             for name, p in model.named_parameters()},
            model.config.to_dict(), torch.is_grad_enabled(), torch.get_default_dtype(),
        )  # fmt: skip

    before = state()
    autoround = AutoRoundMLLM(
        model,
        tokenizer,
        group_size=32,
        dataset=TEXTS,
        nsamples=8,
        seqlen=32,
        iters=2,
        device="cpu",
        **options,
    )

    def stop(block, step, total):
        if (fails and "layers.1" in block) or (fails and options.get("nblocks")):
            raise Stop

    with torch.no_grad():
        before = (*before[:5], False, before[6])
        if fails:
            with pytest.raises(Stop):
                autoround.quantize(Watcher(step=stop))
        else:
            autoround.quantize()
        assert state() == before
    if fails and not options.get("nblocks"):  # the first block is quantized by now
        with pytest.raises(UserError, match="was quantized before"):
            autoround.quantize()


class Layer(nn.Linear):
    """A layer as peft puts it in place of a linear one."""


Layer.__module__ = "peft.tuners.lora.layer"


def test_adapters_must_be_merged(folders):
    model, tokenizer = read(folders("llama"))
    model.model.layers[0].self_attn.q_proj = Layer(64, 64)
    line = r"model\.model\.layers\.0\.self_attn\.q_proj is a Layer of peft: .*merge_and_unload"
    with pytest.raises(UserError, match=line):
        AutoRoundMLLM(model, tokenizer)
    with pytest.raises(UserError, match=r"^model is a Layer of peft: .*merge_and_unload"):
        AutoRoundMLLM(Layer(2, 2), tokenizer)


def test_what_is_left_of_an_adapter_stays_behind(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders("llama"), source)
    (source / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}'
    )
    out = exported(str(source), None, tmp_path / "out")
    assert not (out / "adapter_config.json").exists() and not check(out)


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_a_configuration_that_asks_for_tuples(tmp_path, family):
    source = tmp_path / "source"
    FAMILIES[family].save(source, tiny_tokenizer())
    config = json.loads((source / "config.json").read_text()) | {"return_dict": False}
    (source / "config.json").write_text(json.dumps(config))
    out = exported(source, None, tmp_path / "out", algorithm="auto", iters=1)
    assert json.loads((out / "config.json").read_text())["return_dict"] is False
    assert from_quantized(out).model(IDS).logits.shape == (1, 20, 128)


THING = object()


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage, line", [
    (lambda out: edit(out, "config.json", vocab_size=100),
        "tokenizer.json: its token 'w127' has id 127"),
    (lambda out: edit(out, "config.json", vocab_size=100), "has shape (128, 64)"),
    (lambda out: edit(out, "config.json", tie_word_embeddings=True),
        "lm_head.weight: differs from model.embed_tokens"),
    (lambda out: edit(out, "config.json", rope_theta=5.0), "rope_theta is 5.0"),
    (lambda out: edit(out, "config.json", layer_types=["full_attention"]),
        "layer_types has 1 entries for 2 layers"),
    (lambda out: edit(out, "config.json", eos_token_id=[2, 300]),
        "eos_token_id is 300, the vocabulary has 128"),
    (lambda out: edit(out, "generation_config.json", bos_token_id=128),
        "generation_config.json: bos_token_id is 128"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
@pytest.mark.parametrize("format", ["auto_round", "fake"])
def test_verify_sees_what_does_not_belong_together(folders, tmp_path, damage, line, format):
    out = exported(*read(folders("llama")), tmp_path / "out", format)
    assert not check(out)
    damage(out)
    assert any(line in finding.line() for finding in check(out))


def test_whole_files_hold_the_changed_model(tmp_path):
    """GGUF takes the tokenizer, the configuration and every tensor from what was given."""
    gguf = pytest.importorskip("gguf")
    from auto_mmround.model.loading import DEMO

    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(DEMO)
    processor = transformers.AutoProcessor.from_pretrained(DEMO)
    processor.tokenizer.add_tokens([f"<new_{i}>" for i in range(32)])
    model.resize_token_embeddings(2080, mean_resizing=False)
    model.config.text_config.rms_norm_eps = 1e-3
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-3
    out = exported(model, processor, tmp_path / "out", "gguf:q8_0", bits=8, group_size=32)
    assert not check(out)
    (path,) = out.glob("model-*.gguf")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("tokenizer.ggml.tokens").contents()[2048] == "<new_0>"
    assert (
        abs(reader.get_field("qwen2vl.attention.layer_norm_rms_epsilon").contents() - 1e-3) < 1e-9
    )
    assert (
        next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight").shape[1]
        == 2080
    )


@pytest.mark.parametrize("wrong, line", [
    (dict(model=None), "model is None, expected a model"),
    (dict(model=THING), "model is an object, expected"),
    (dict(model=nn.Linear(2, 2)), "model is a Linear, expected"),
    (dict(tokenizer="x"), "tokenizer is the text 'x'"),
    (dict(tokenizer=THING), "tokenizer is an object"),
    (dict(tokenizer=tiny_tokenizer), None),
    (dict(tokenizer=type(tiny_tokenizer())), "tokenizer is the class"),
    (dict(processor="nobody"), "unknown processor 'nobody'"),
    (dict(processor=THING), "processor is an object"),
    (dict(processor=tiny_tokenizer()), "processor is a second tokenizer"),
    (dict(image_processor="x"), "image_processor is the text 'x'"),
    (dict(dataset=5), "dataset is an int"),
    (dict(dataset=THING), "dataset is an object"),
    (dict(dataset={"train": TEXTS}), "dataset is a dict of train"),
    (dict(dataset=tiny_tokenizer()), "dataset is a TokenizersBackend"),
    (dict(dataset=[{"messages": [THING]}] * 8), "not <object>"),
    (dict(dataset=[{"messages": [{"role": THING, "content": "w4"}]}] * 8), "unknown role <object>"),
    (dict(bits=THING), "bits = <object> is a object"),
    (dict(layer_config={"q_proj": THING}), "layer_config: each entry"),
    (dict(layer_config={"q_proj": {"bits": THING}}), "bits = <object>"),
    (dict(output_dir=THING), "output_dir = <object>"),
    (dict(tokenizer=None, fresh=True), "is text, and there is no tokenizer"),
])  # fmt: skip
def test_wrong_objects_are_told_in_one_line(wrong, line):
    if line is None:
        return
    given = dict(
        model=FAMILIES["llama"].build(),
        tokenizer=tiny_tokenizer(),
        dataset=TEXTS,
        group_size=32,
        nsamples=8,
    )
    wrong = {key: value for key, value in wrong.items() if key != "fresh"}
    with pytest.raises(UserError) as told:
        AutoRoundMLLM(**given | dict(seqlen=32) | wrong).quantize()
    assert (
        line in str(told.value) and "\n" not in str(told.value) and " at 0x" not in str(told.value)
    )


def test_swapped_objects_are_told_apart(folders):
    model, tokenizer = FAMILIES["llama"].build(), tiny_tokenizer()
    with pytest.raises(UserError, match="swapped"):
        AutoRoundMLLM(tokenizer, model)
    assert AutoRoundMLLM(folders("llama"), dataset=TEXTS, device="cpu").loaded.source == folders(
        "llama"
    )
    assert AutoRoundMLLM(model, None, tokenizer, dataset=TEXTS).loaded.tokenizer is tokenizer


FEW = dict(dataset=tiny_texts(4, 30), nsamples=4, seqlen=16, iters=1, group_size=32, device="cpu")


def test_hooks_that_change_what_the_model_gives(folders):
    """No checkpoint holds them. Hooks that only look are left alone, and run."""
    model, tokenizer = read(folders("llama"))
    seen: list[int] = []
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda *_: seen.append(0))
    changing = mlp.register_forward_hook(lambda layer, args, output: output * 1.5)
    mlp.register_forward_hook(lambda *_: seen.append(1))
    before, state = list(mlp._forward_hooks.items()), model.state_dict()
    with pytest.raises(UserError, match=r"forward hooks \(the first on model\.layers\.1\.mlp\)"):
        AutoRoundMLLM(model, tokenizer, **FEW).quantize()
    assert list(mlp._forward_hooks.items()) == before
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    changing.remove()
    seen.clear()
    AutoRoundMLLM(model, tokenizer, **FEW).quantize()
    assert seen[:2] == [0, 1]


def test_a_forward_in_the_place_of_the_class_s(folders):
    """As patches set it on a module: quicker ones are taken, one that changes the output is not."""
    model, tokenizer = read(folders("llama"))
    mlp = model.model.layers[1].mlp
    written, seen = type(mlp).forward, []

    def patched(x):
        seen.append(x.shape)
        return written(mlp, x)

    mlp.forward = patched
    AutoRoundMLLM(model, tokenizer, **FEW).quantize()
    assert seen and vars(mlp)["forward"] is patched
    model, tokenizer = read(folders("llama"))
    mlp = model.model.layers[1].mlp
    mlp.forward = changed = lambda x: 1.5 * written(mlp, x)
    with pytest.raises(
        UserError, match=r"a forward of its own \(the first on model\.layers\.1\.mlp"
    ):
        AutoRoundMLLM(model, tokenizer, **FEW).quantize()
    assert vars(mlp)["forward"] is changed


def test_hooks_that_no_sample_was_tried_with(folders, caplog):
    """Rounding to nearest reads none."""
    model, tokenizer = read(folders("llama"))
    model.model.layers[1].mlp.register_forward_hook(lambda layer, args, output: output * 1.5)
    AutoRoundMLLM(model, tokenizer, **FEW | {"iters": 0}).quantize()
    assert "forward hooks (the first on model.layers.1.mlp); without calibration" in caplog.text


def test_a_compiled_model_is_quantized_as_it_is_written(folders):
    """A compiled call would not notice hooks that came later."""
    plain, tokenizer = read(folders("llama"))
    compiled, _ = read(folders("llama"))

    def fail(*_: object) -> None:
        raise AssertionError("compiled code ran")

    compiled._compiled_call_impl = fail
    compiled.model.layers[0].forward = torch.compile(
        compiled.model.layers[0].forward, backend=lambda *_: fail
    )
    states = [
        AutoRoundMLLM(model, tokenizer, **FEW).quantize()[0].state_dict()
        for model in (plain, compiled)
    ]
    assert all(value.equal(states[1][key]) for key, value in states[0].items())
    assert compiled._compiled_call_impl is fail and "forward" in vars(compiled.model.layers[0])
    with pytest.raises(UserError, match=r"layers\.0 is what torch\.compile returned"):
        plain.model.layers[0] = torch.compile(plain.model.layers[0])
        AutoRoundMLLM(plain, tokenizer)
    with pytest.raises(UserError, match=r"^model is what .* model\._orig_mod"):
        AutoRoundMLLM(torch.compile(compiled), tokenizer)


def test_a_weight_that_is_made_as_the_layer_runs(folders):
    model, tokenizer = read(folders("llama"))
    weight_norm(model.model.layers[0].mlp.up_proj)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj: its weight is made of others"):
        AutoRoundMLLM(model, tokenizer, **FEW).quantize()


def other_dtype(stack):
    stack.callback(torch.set_default_dtype, torch.float32)
    torch.set_default_dtype(torch.float64)


def other_device(stack):
    stack.callback(torch.set_default_device, None)
    torch.set_default_device("meta")


def casting(stack):
    stack.enter_context(torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("setting", [other_dtype, other_device, casting])
def test_settings_of_the_caller_change_nothing(folders, tmp_path, setting):
    options, dtype = dict(algorithm="auto", iters=1, amp=False), torch.bfloat16
    plain = exported(*read(folders("llama"), dtype=dtype), tmp_path / "plain", **options)
    given = read(folders("llama"), dtype=dtype)
    with contextlib.ExitStack() as stack:
        setting(stack)
        before = torch.get_default_dtype(), torch.get_default_device()
        other = exported(*given, tmp_path / "other", **options)
        assert (torch.get_default_dtype(), torch.get_default_device()) == before
    wanted, found = (load_file(each / "model.safetensors") for each in (plain, other))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4A16"])
def test_a_model_in_float64_gets_floats_too(folders, tmp_path, scheme):
    model, tokenizer = read(folders("llama"))
    words = dict(scheme=scheme, group_size=None, format="compressed_tensors", algorithm="auto")
    ours = quantized(model.double(), tokenizer, **words, iters=1)
    (folder,) = ours.save_quantized(tmp_path / "out", format="compressed_tensors")
    read_back = from_quantized(folder).model.state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(read_back[name].double(), model.state_dict()[name])


def one_memory(model):
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    return {"quant_lm_head": True}


def one_row(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data[:1].expand(weight.shape)
    return {}


@pytest.mark.parametrize("change", [one_memory, one_row])
def test_weights_that_share_memory_are_refused(folders, change):
    """Before tuning: written one after the other, the last one wins in silence."""
    model, tokenizer = read(folders("llama"))
    with pytest.raises(UserError, match="shares memory with"):
        quantized(model, tokenizer, **change(model))
