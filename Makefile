# `make` shows what there is. Everything works on a bare machine with python3 (and its venv module),
# git and make; nvcc is optional, without it the CUDA kernels are not built.
#
#   make test PYTHON=python3.12              another Python for the environment
#   make test TORCH="torch==2.11.0"          another torch (any arguments of pip install)
#   make test-gpu PY=python3                 an environment that is there already
#   make test ARGS="-k topk -x"              arguments for pytest

PYTHON   ?= python3
VENV     ?= .venv
VLLM_ENV ?= .venvs/vllm-cpu
ENGINES_ENV ?= .venvs/engines-cpu
AUDIT    ?= .venvs/audit
DOCS_ENV ?= .venvs/docs
TORCH    ?= torch==2.13.0
ARGS     ?=
JOBS     ?= 2
RESULTS  ?= benchmarks/results/gpu_suite.json
DIST     ?= dist
# What the wheel is checked beside: [PYTHON:]TORCH, each in an environment of its own.
TORCHES  ?= python3.10:torch==2.11.0 python3.12:torch==2.12.1 python3.11:torch==2.13.0 \
            python3.13:torch==2.14.1 python3.12:torch==2.15.0

export DSV4_VLLM_ENV = $(abspath $(VLLM_ENV))
export DSV4_ENGINES_ENV = $(abspath $(ENGINES_ENV))

ifdef PY
  READY :=
else
  PY    := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif
# The tools of the group "docs" in pyproject.toml and no more: neither torch nor the package.
DOCS_PY  := $(DOCS_ENV)/bin/python

# csrc is here so that a changed kernel is rebuilt before the tests run.
CSRC   := $(wildcard csrc/* csrc/bindings/* csrc/include/dsv4/*/*)
# clang_format has no __main__.
CLANG_FORMAT = $(PY) -c "import clang_format; clang_format.clang_format()"
CPPTREE = $(shell git ls-files -co --exclude-standard '*.cu' '*.cuh' 'csrc/bindings/*.h')

.PHONY: help env demo test test-gpu lint format docs check-site audit wheel manylinux check-wheel so clean vllm-env engines-env

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(READY)  ## create .venv with torch, the plugin (editable) and the tools

$(VENV)/.ready: pyproject.toml $(CSRC)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q $(TORCH)
	$(VENV)/bin/python -m pip install -q -e '.[test,dev]'
	touch $@

# Two releases of vLLM without their CUDA stack, for the demo and tests/engines/vllm: some 2 GB, once.
vllm-env:
	$(PYTHON) tests/environments/make_vllm_cpu_env.py --dir $(VLLM_ENV)

# SGLang (four releases) and TokenSpeed (one) in the same way, for tests/engines/sglang and
# tests/engines/tokenspeed: some 2.8 GB, once. Python 3.11 or later.
engines-env:
	$(PYTHON) tests/environments/make_engines_cpu_env.py --dir $(ENGINES_ENV)

demo: vllm-env  ## real vLLM indexer code on this CPU, with the plugin and without it
	$(VLLM_ENV)/bin/python examples/demo_vllm_cpu.py

test: $(READY) vllm-env engines-env  ## every test that needs no GPU; a CUDA device, if there is one, is not used
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: $(READY)  ## the tests that need a CUDA device; without one they fail
	$(PY) -m pytest -m gpu --require-gpu --results $(RESULTS) $(ARGS)

lint: $(READY)  ## ruff, mypy and clang-format, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CPPTREE)

format: $(READY)  ## put everything into the one format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CPPTREE)

$(DOCS_ENV)/.ready: pyproject.toml
	test -x $(DOCS_PY) || $(PYTHON) -m venv $(DOCS_ENV)
	$(DOCS_PY) -m pip install -q --upgrade 'pip>=25.1'
	$(DOCS_PY) -m pip install -q --group docs
	touch $@

# Not --quiet: it hides the warnings from --strict too, which then passes.
docs: $(DOCS_ENV)/.ready  ## build the documentation site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_PY) -m mkdocs build --strict

check-site:  ## open build/site in a Chromium at desktop and phone width: links, pictures, what is too wide
	$(DOCS_PY) tests/docs/check_site.py build/site

audit: $(READY)  ## known vulnerabilities of what the package depends on (pip-audit; needs PyPI)
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install -q pip-audit; }
	$(PY) -c "from importlib.metadata import version as v; [print(n, v(n).split('+')[0], sep='==') \
	  for n in ('torch', 'apache-tvm-ffi')]" > $(AUDIT)/requirements.txt
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip -r $(AUDIT)/requirements.txt

wheel: $(READY)  ## build dist/*.tar.gz and dist/*.whl (with the CUDA kernels where nvcc is found)
	rm -rf $(DIST)
	$(PY) -m build --outdir $(DIST)
	$(MAKE) -s manylinux

# auditwheel reads the versions of the system's symbols that _C.so needs, and names the oldest glibc
# that has them; patchelf, which it asks for, changes nothing, since nothing is to be bundled.
manylinux: $(READY)  ## put the manylinux tag that auditwheel finds on dist/*-linux_*.whl
	@for wheel in $(DIST)/*-linux_*.whl; do \
	  test -f "$$wheel" || { echo "no binary in the wheel: py3-none-any stays"; continue; }; \
	  PATH="$$(dirname $$(command -v $(PY))):$$PATH" $(PY) -m auditwheel repair --only-plat \
	    -w $(DIST) "$$wheel" && rm "$$wheel" || exit 1; \
	done

check-wheel: $(READY)  ## install dist/*.whl beside torch 2.11 to 2.15 in fresh environments and try it
	$(PY) tests/packaging/check_wheel.py $(DIST)/*.whl $(TORCHES)

so:  ## compile dsv4_plugin/_C.so in place; a missing nvcc is an error
	@test -x $(PY) || command -v $(PY) >/dev/null || $(MAKE) env
	DSV4_BUILD_CUDA=1 $(PY) -m pip install -q --no-deps -e .

clean:  ## remove what was built (not .venv and .venvs)
	rm -rf build dist *.egg-info dsv4_plugin/_C.so dsv4_plugin/_version.py
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
