"""Packaging: metadata, the three shelves mapped into the package, console scripts, entry points,
extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
SHELVES = ("templates", "processors", "engines")
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "auto_mmround" / "__init__.py").read_text())[1]

setup(
    name="auto_mmround",
    version=VERSION,
    description=(
        "Quantize multimodal large models to 2-8 bits, export to every engine, prove it right"
    ),
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The shelves stand at the top level, where users look for them, and travel inside the package.
    packages=[
        *find_packages(include=["auto_mmround*"]),
        *(f"auto_mmround.{name}" for name in SHELVES),
    ],
    package_dir={f"auto_mmround.{name}": name for name in SHELVES},
    package_data={
        "auto_mmround.templates": ["*.json"],
        "auto_mmround.report": ["pages/*"],
        "auto_mmround": [
            "py.typed",
            "demo/*.md",
            "demo/model/*",
            "*.json",
            "demo/*/*.json",
            "demo/*/*.jsonl",
            "demo/*/images/*",
        ],
    },
    install_requires=[
        "torch>=2.9",
        "torchvision>=0.24",
        "transformers>=5.20",
        "accelerate>=1.10",
        "datasets>=4.0",
        "psutil>=5.9",
        "safetensors>=0.6",
        "tokenizers>=0.22",
        "pillow>=11",
        "jinja2>=3.1",
        "rich>=14",
        "argcomplete>=3.5",
        "pyyaml>=6",
    ],
    extras_require={
        "auto-round": ["auto-round>=0.16"],
        "gguf": ["gguf>=0.17"],
        "compressed-tensors": ["compressed-tensors>=0.15"],
        "audio": ["soundfile>=0.13"],
        "eval": ["jiwer>=4", "soundfile>=0.13"],
        "lm-eval": ["lm-eval>=0.4.9"],
        "lmms-eval": ["lmms-eval>=0.7"],
        # VLMEvalKit as ModelScope publishes it; the module is named vlmeval, as in the original.
        "vlmeval": ["ms-vlmeval>=0.0.20"],
        "video": ["av>=14"],
        "gaudi": ["habana-frameworks"],
        "docs": [
            "mkdocs-material>=9.7",
            "latex2mathml>=3.78",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "matplotlib>=3.10",
        ],
        "dev": [
            "compressed-tensors>=0.20",
            "jiwer>=4",
            "num2words>=0.5",  # SmolVLM's processor
            "pytest>=9",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.15",
            "mypy>=1.19",
            "build>=1.2",
            "pre-commit>=4",
        ],
    },
    entry_points={
        "console_scripts": [
            "auto-round-mllm=auto_mmround.cli:main",
            "auto_round_mllm=auto_mmround.cli:main",
        ],
        # Other packages add model families here; ours are found on the shelf.
        "auto_mmround.processors": [],
    },
)
