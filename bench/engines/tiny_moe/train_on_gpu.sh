#!/usr/bin/env bash
# Train on a machine that has a GPU and PyTorch but perhaps no network:
#   bash bench/engines/tiny_moe/train_on_gpu.sh DATA OUT [options of bench.engines.tiny_moe.train]
# DATA is the folder that build_corpus wrote, or a .tar.xz of it. OUT gets model.tar, train.csv and train.log.
set -euo pipefail
data=$1 out=$2
shift 2
if [[ -f $data ]]; then
  work=$(mktemp -d)
  tar xJf "$data" -C "$work"
  data=$(dirname "$(find "$work" -name train.bin)")
fi
mkdir -p "$out"
PYTHONUNBUFFERED=1 python3 -m bench.engines.tiny_moe.train --data "$data" --out "$data/out" "$@" 2>&1 | tee "$out/train.log"
cp "$data/out/train.csv" "$out/"
tar cf "$out/model.tar" -C "$data/out" model
