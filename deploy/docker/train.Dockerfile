# What exports a run. From the repository's root:
#   docker build -f deploy/kubernetes/images/export.Dockerfile -t infinitecontext-export .
FROM python:3.11-slim-bookworm
COPY . /src
RUN python3 -m pip install --no-cache-dir -c /src/constraints.txt /src && rm -rf /src
USER 2000:2000
ENTRYPOINT ["python3", "-m", "tools.export_hf"]
