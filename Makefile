# Two commands do everything: `make demo` and `make test`. The first run of either builds .venv.
PYTHON ?= python3
BIN := .venv/bin
ENV := .venv/.ready
GPTQMODEL := .engines/gptqmodel/.ready

ENGINE_TESTS := $(addprefix tests/test_,ask.py checkpoint.py compressed_tensors.py docs.py::test_vllm_lists_what_the_page_says engine_experts.py \
	engine_table.py engine_whisper.py llamacpp.py mlx.py openvino.py peers_files.py verify.py vllm.py whisper.py)

.PHONY: demo test test-all test-engines check docs bench bench-tuner bench-floats bench-whisper bench-recapture bench-padding \
	bench-scale bench-2b bench-mixed bench-recipes test-harnesses fuzz clean

demo: $(ENV) $(GPTQMODEL)  ## quantize the bundled model, export, verify, print the result
	$(BIN)/python scripts/demo.py

test: check  ## everything but the slow tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: check $(GPTQMODEL)  ## the slow tests too
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(ENV)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(ENV)  ## ten minutes of damaged files for every reader
	$(BIN)/python scripts/fuzz.py --minutes 10

docs: $(ENV)  ## figures, and the site in site/; every warning is an error
	$(BIN)/python scripts/docs_figures.py
	$(BIN)/python -m mkdocs build --strict

bench: $(ENV) $(GPTQMODEL)  ## the demo again, its figures kept in bench/results
	$(BIN)/python scripts/demo.py --keep bench/results

bench-tuner: $(ENV)  ## our tuner against auto-round: make bench-tuner MODEL=DIR CALIBRATION=a.txt HELD_OUT=b.txt
	$(BIN)/python bench/tuner.py --model $(MODEL) --calibration $(CALIBRATION) --held_out $(HELD_OUT) --keep bench/results

bench-floats: $(ENV)  ## float grids and rounded inputs against auto-round and llm-compressor: make bench-floats [OPTIONS="--model DIR --dataset .. --held_out .."]
	test -d .engines/llmcompressor || bash scripts/engines.sh llmcompressor
	$(BIN)/python bench/floats.py $(OPTIONS) --keep bench/results

bench-2b: $(ENV)  ## Qwen2-VL-2B's size, real text weights: make bench-2b TEXT=QWEN2.5-1.5B CALIBRATION=a.txt HELD_OUT=b.txt [OPTIONS=..]
	$(BIN)/python bench/two_b.py --text $(TEXT) --dataset $(CALIBRATION) --held_out $(HELD_OUT) $(OPTIONS) --keep bench/results

bench-whisper: $(ENV)  ## word error rate of Whisper base: make bench-whisper MODEL=DIR (apt-get install flite espeak-ng)
	$(BIN)/python bench/whisper.py --model $(MODEL) --keep bench/results

bench-recipes: $(ENV)  ## against llm-compressor: make bench-recipes GEMMA=DIR WHISPER=DIR CALIBRATION=a.txt HELD_OUT=b.txt
	test -d .engines/llmcompressor || bash scripts/engines.sh llmcompressor
	$(BIN)/python bench/recipes.py $(if $(GEMMA),--gemma $(GEMMA) --calibration $(CALIBRATION) --held_out $(HELD_OUT)) \
		$(if $(WHISPER),--whisper $(WHISPER)) --keep bench/results

bench-padding: $(ENV)  ## what padding would cost on 200 samples of 1 to 1,500 tokens
	$(BIN)/python bench/padding.py

bench-recapture: $(ENV)  ## whether text gains from the quantized tower's outputs, on the bundled model
	$(BIN)/python bench/recapture.py --keep bench/results

bench-scale: $(ENV)  ## peak memory of streamed runs against depth: needs 25 GB of disk, deletes what it made
	$(BIN)/python bench/scale.py

bench-mixed: $(ENV)  ## mixed bits against uniform: make bench-mixed [OPTIONS="--model DIR --calibration .. --held_out .."]
	$(BIN)/python bench/mixed.py $(OPTIONS) --keep bench/results

test-harnesses: $(ENV)  ## build the environments of lm-eval, lmms-eval and VLMEvalKit, then their tests
	for name in lm_eval lmms vlmeval; do test -d .engines/$$name || bash scripts/engines.sh $$name; \
		.engines/$$name/bin/python -m pytest -m "slow or not slow" tests/test_harness.py || exit 1; done

test-engines: $(ENV)  ## build every engine (vLLM takes 3.5 GB), then the tests that need one: make test-engines [WHISPER=DIR]
	for engine in autoawq gptqmodel llamacpp llmcompressor mlx openvino vllm; do test -d .engines/$$engine || bash scripts/engines.sh $$engine; done
	$(BIN)/python -m pytest -m slow $(if $(WHISPER),--whisper $(WHISPER)) $(ENGINE_TESTS)

$(ENV): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[auto-round,audio,video,gguf,dev,docs]"
	touch $@

$(GPTQMODEL): scripts/engines.sh $(ENV)
	bash scripts/engines.sh gptqmodel
	touch $@

clean:
	rm -rf .venv .engines .demo build site dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
