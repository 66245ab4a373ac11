# vLLM and this project's plugin. From the repository's root:
#   docker build -f deploy/kubernetes/images/serve.Dockerfile -t infinitecontext-serve .
# For CPUs: --build-arg VLLM=vllm/vllm-openai-cpu:v0.32.0. Give a digest (NAME@sha256:...) for a release.
ARG VLLM=vllm/vllm-openai:v0.32.0
FROM ${VLLM}
USER root
COPY . /src
RUN python3 -m pip install --no-cache-dir --no-deps /src && rm -rf /src
USER 2000:2000
ENTRYPOINT ["vllm", "serve"]
