#!/bin/sh
# Ends with 0 if the model that serve.yaml names is there, complete, and what was exported. Its last line is what
# `kubectl describe pod` shows.
set -eu

config=${CONFIG:-/etc/vllm/serve.yaml}
message=${TERMINATION_LOG:-/dev/termination-log}

fail() {
    echo "error: $*" | tee "$message" >&2
    exit 1
}

model=$(sed -n 's/^model: *//p' "$config")
[ -n "$model" ] || fail "$config names no model"
[ -d "$model" ] || fail "there is no folder $model: run the export Job (docs/operations.md), or correct model: in serve.yaml"
cd "$model"
[ -s SHA256SUMS ] || fail "$model has no SHA256SUMS, so its export did not end: run the export Job again"
for file in config.json tokenizer.json; do
    grep -q " [ *]$file\$" SHA256SUMS || fail "$model/SHA256SUMS does not list $file: this is no exported model"
done
wrong=$(sha256sum --check --strict --quiet SHA256SUMS 2>&1) || fail "$model is not what was exported: $(echo "$wrong" | head -n 3 | tr '\n' ' ')"
echo "$model: $(wc -l <SHA256SUMS) files are as they were exported"
