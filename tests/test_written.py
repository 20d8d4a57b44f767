"""What lies beside the tensors of a folder is compared with what the run wrote."""

import json
import shutil

import pytest
from mutations import edit, one, pop, put
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround.recipe.recipe import from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.verify.proof import prove
from auto_mmround.verify.static import check

GLOBAL = "model.layers.1.mlp.down_proj.weight_global_scale"
WEIGHTS = ("config_groups", "group_0", "weights")


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory):
    """A folder of 4-bit floats, whose configuration the tensors say little about."""
    folder = tmp_path_factory.mktemp("nvfp4")
    FAMILIES["llama"].save(folder / "model", tiny_tokenizer())
    values = {"model": str(folder / "model"), "output_dir": str(folder), "device": "cpu"}
    recipe = from_mapping(
        values
        | {"format": "compressed_tensors", "scheme": "NVFP4", "algorithm": "rtn", "seqlen": 12}
        | {"nsamples": 4, "batch_size": 4}
    )
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=FAMILIES["llama"].samples(4))
    (made,) = jobs.run(job, prove=prove)
    assert check(made) == []
    return made


def quantization(*path, **values):
    """A change of the table at this path of the quantization configuration."""

    def change(config):
        table = config["quantization_config"]
        for key in path:
            table = table[key]
        table.update(values)

    return edit("config.json", change)


def swap(tokenizer):
    words = tokenizer["model"]["vocab"]
    words["w5"], words["w6"] = words["w6"], words["w5"]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (quantization(*WEIGHTS, num_bits=8), "quantization_config.config_groups"),
        (quantization(*WEIGHTS, group_size=32), "quantization_config.config_groups"),
        (quantization(*WEIGHTS, symmetric=False), "quantization_config.config_groups"),
        (quantization(*WEIGHTS[:2], input_activations=None), "quantization_config.config_groups"),
        (quantization(format="pack-quantized"), "quantization_config.format"),
        (quantization(ignore=[]), "quantization_config.ignore"),
        (edit("config.json", put(rms_norm_eps=0.5)), "config.json: rms_norm_eps"),
        (edit("config.json", pop("hidden_act")), "config.json: hidden_act"),
        (edit("config.json", put(scale_attn=2)), "config.json: scale_attn"),
        (edit("tokenizer.json", swap), "tokenizer.json"),
        (edit("tokenizer_config.json", put(bos_token="w9")), "tokenizer_config.json"),
        (one(GLOBAL, lambda x: 2 * x), GLOBAL),
    ],
)
def test_changes_are_errors(nvfp4, tmp_path, change, where):
    folder = shutil.copytree(nvfp4, tmp_path / "copy")
    change(folder)
    found = [finding for finding in check(folder) if finding.severity == "error"]
    assert any(where in finding.where for finding in found), found


def test_what_people_change_is_a_warning(nvfp4, tmp_path):
    folder = shutil.copytree(nvfp4, tmp_path / "copy")
    edit("generation_config.json", put(temperature=0.5))(folder)
    (folder / "README.md").write_text("mine")
    (finding,) = check(folder)
    assert (finding.severity, finding.where) == ("warning", "generation_config.json")


def test_only_content_counts(nvfp4, tmp_path):
    folder = shutil.copytree(nvfp4, tmp_path / "copy")
    for name in ("config.json", "tokenizer.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content, indent=7, sort_keys=True))
    assert check(folder) == []


def test_older_records_and_those_of_others(nvfp4, tmp_path):
    folder = shutil.copytree(nvfp4, tmp_path / "copy")
    edit("tokenizer.json", swap)(folder)
    record = json.loads((folder / "run.json").read_text())
    older = {key: value for key, value in record.items() if key != "sums"}
    older["codes"] = {
        name: {key: value for key, value in own.items() if key != "global_scale"}
        for name, own in record["codes"].items()
    }
    (folder / "run.json").write_text(json.dumps(older))
    assert check(folder) == []
    (folder / "run.json").write_text(json.dumps(record | {"sums": {"a": 1}}))
    assert any(finding.where == "run.json" for finding in check(folder))
    (folder / "run.json").write_text(json.dumps(older | {"sums": {"../model/config.json": "0"}}))
    assert not [finding for finding in check(folder) if finding.where.startswith("..")]


def test_checksums_are_of_values(nvfp4):
    sums = json.loads((nvfp4 / "run.json").read_text())["sums"]
    assert {"tokenizer.json", "config.json: hidden_size"} <= sums.keys()
    assert "config.json: quantization_config.format" in sums
    assert not {name for name in sums if name.endswith(".safetensors")}
