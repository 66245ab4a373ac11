#!/bin/sh
# Exports RUN to MODEL with the checksums of its files, which pods compare before they serve. A model is never written
# over: pods may have it open, and a rollback needs it. Run again after an interruption, it begins anew.
set -eu

model=${MODEL:?MODEL must name the folder to write, /models/NAME}
run=${RUN:?RUN must name the folder of a run}
PYTHON=${PYTHON:-python}
incoming=$model.incoming

if [ -e "$model" ]; then
    (cd "$model" && sha256sum --check --strict --quiet SHA256SUMS) || {
        echo "error: $model is there and differs from its SHA256SUMS: remove it, or choose another name" >&2
        exit 1
    }
    echo "$model is there and complete: a new version needs a name of its own"
    exit 0
fi
[ -d "$run" ] || {
    echo "error: there is no run $run: RUN must name its folder on the volume" >&2
    exit 1
}
rm -rf "$incoming"
$PYTHON -m tools.export_hf "$run" "$incoming" --dtype "${DTYPE:-bfloat16}"
cd "$incoming"
find . -type f ! -name 'SHA256SUMS*' -printf '%P\0' | sort -z | xargs -0 sha256sum >SHA256SUMS.incoming
mv SHA256SUMS.incoming SHA256SUMS
sync
mv "$incoming" "$model"
echo "$model: $(wc -l <"$model/SHA256SUMS") files"
