"""Model cards: what they say, and that a README of somebody else stays."""

import re
import shutil
import tomllib

import pytest
import yaml

from auto_mmround.errors import UserError
from auto_mmround.export.formats import FORMATS
from auto_mmround.model.loading import find_folder
from auto_mmround.report import card


def front_matter(text):
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_card_has_the_shape_of_the_released_one(full):
    matter, body = front_matter(card.write(full).read_text())
    assert matter["tags"] == ["w4a16", "int4", "image"] and matter["library_name"] == "transformers"
    assert "| Benchmark | Split | BF16 | W4A16 | Recovery (%) |" in body
    assert "| speech (WER) | clean | 3.4435 | 3.5246 | 97.70% |" in body
    assert "| pictures (exact match) | test | 50.0000 | 45.0000 | 90.00% |" in body
    # the engine that verified, with code
    assert "Qwen2VLForConditionalGeneration.from_pretrained" in body
    assert "vllm" not in body  # the one that did not
    assert "/a/b" not in body  # nor folders of this machine
    recipe = tomllib.loads(re.search(r"```toml\n(.*?)```", body, re.DOTALL)[1])
    assert recipe["model"] == "demo" and "output_dir" not in recipe


def test_code_of_the_card_is_python(full):
    codes = re.findall(r"```python\n(.*?)```", card.write(full).read_text(), re.DOTALL)
    assert codes
    for code in codes:
        compile(code, "card", "exec")
    for kinds in card.CODE.values():
        for language, code in kinds.values():
            filled = code.format(name="a/b", cls="AutoModel", lm="lm", prompt='"x"',
                **FORMATS["compressed_tensors"].card)  # fmt: skip
            assert language == "bash" or compile(filled, "card", "exec")


def test_card_takes_licence_and_base_model_from_the_source(full, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(find_folder("demo"), source)
    (source / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en]\ntags: [x]\n---\n# Source\n"
    )
    folder = tmp_path / "run"
    shutil.copytree(full, folder)
    recipe = (folder / "recipe.toml").read_text().replace('model = "demo"', f'model = "{source}"')
    (folder / "recipe.toml").write_text(recipe)
    matter, body = front_matter(card.write(folder).read_text())
    assert (
        matter["license"] == "mit" and matter["language"] == ["en"] and "base_model" not in matter
    )
    assert str(source) not in body and 'model = "source"' in body
    (folder / "recipe.toml").write_text(recipe.replace(str(source), "maker/model-2b"))
    assert front_matter(card.write(folder).read_text())[0]["base_model"] == "maker/model-2b"


def test_a_readme_of_somebody_else_stays(demo_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(demo_folder, folder)
    (folder / "README.md").write_text("mine")
    with pytest.raises(UserError, match="was not written by"):
        card.write(folder)
    assert (folder / "README.md").read_text() == "mine"
