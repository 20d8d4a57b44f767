#!/usr/bin/env bash
# Collects what bench/accelerator.py needs on a machine that has PyTorch, Transformers and pytest and no network:
#     scripts/accelerator_wheels.sh FOLDER [PYTHON_VERSION]
# There: python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl, and SITE in PYTHONPATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MAIN_PYTHON="${PYTHON:-.venv/bin/python}"
FOLDER="${1:?scripts/accelerator_wheels.sh FOLDER [PYTHON_VERSION]}"
VERSION="${2:-3.12}"
MOST=40  # MB

fetch() {
    "$MAIN_PYTHON" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --dest "$FOLDER" \
        --implementation cp --python-version "$VERSION" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "$@"
}

mkdir -p "$FOLDER"
"$MAIN_PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$FOLDER" .
fetch --no-deps auto-round==0.16.1 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 requests==2.34.2
fetch pydantic==2.14.3  # with its core, which must be of the same version
size="$(du -sm "$FOLDER" | cut -f1)"
[ "$size" -lt "$MOST" ] || { echo "$FOLDER: $size MB, more than $MOST" >&2; exit 1; }
echo "$FOLDER: $(ls "$FOLDER" | wc -l) wheels, $size MB"
