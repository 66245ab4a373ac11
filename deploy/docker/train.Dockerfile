# JAX for CUDA 13 and this project: training, evaluation, export. From the repository's root:
#   docker build -f deploy/docker/train.Dockerfile -t infinitecontext-train .
# For CPUs: --build-arg DEVICE=cpu. Give BASE a digest (NAME@sha256:...) for a release: any Debian or Ubuntu with Python.
ARG BASE=python:3.12-slim-bookworm

# What changes rarely is a layer of its own: new code pulls few MB.
FROM ${BASE} AS dependencies
ARG DEVICE=cuda
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt /constraints/cpu.txt
COPY constraints-cuda.txt /constraints/cuda.txt
COPY pyproject.toml /
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/python && python3 -c "import tomllib; \
p = tomllib.load(open('/pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies'].get('${DEVICE}', []), sep='\n')" >/requirements.txt && \
    /opt/pip/bin/pip --python /opt/python/bin/python install --no-cache-dir \
        -c /constraints/${DEVICE}.txt -r /requirements.txt

FROM dependencies AS code
RUN /opt/pip/bin/pip install --no-cache-dir -c /constraints/cpu.txt setuptools
COPY . /src
RUN /opt/pip/bin/pip install --no-cache-dir --no-build-isolation --no-deps --target /opt/infinitecontext /src

FROM ${BASE}
RUN echo 'infinitecontext:x:2000:2000::/tmp:/usr/sbin/nologin' >>/etc/passwd && mkdir --mode=1777 /workspace
COPY --from=dependencies /opt/python /opt/python
COPY --from=code /opt/infinitecontext /opt/infinitecontext
ENV PATH=/opt/python/bin:$PATH PYTHONPATH=/opt/infinitecontext HOME=/tmp
WORKDIR /workspace
USER 2000:2000
ENTRYPOINT ["python3", "-m"]
CMD ["experiments.sft", "--help"]
