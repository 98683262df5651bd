#!/usr/bin/env bash
# Every table on one GPU, on a machine without a network. Needs jax, flax, optax and, for the peers,
# torch.
#
#   benchmarks/gpu.sh OUT_DIR [OMNIGLOT.npz]
#
# `python benchmarks/reproduce.py export omniglot-5w1s --data-dir DIR --data OMNIGLOT.npz` writes the
# file on a machine with tensorflow-datasets. There are separate rows for exact float32 products, for
# TF32 ("default") and for a network that computes in bfloat16.
set -euo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT_DIR [OMNIGLOT.npz]}
data=${2:-}
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -n "$data" ]; then data=$(realpath "$data"); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
expected=${JAXMAML_PLATFORM:-gpu}

python - "$expected" <<'PYTHON'
import sys

import jax

found = jax.default_backend()
if found != sys.argv[1]:
    sys.exit(f"error: JAX finds a {found}, not a {sys.argv[1]}: install the extra with its plugin")
print(jax.devices())
PYTHON

failed=()
run() {
    echo "== $*"
    python "$@" || failed+=("$*")
}

for precision in highest default; do
    export JAX_DEFAULT_MATMUL_PRECISION=$precision
    run benchmarks/speed.py --out "$out/speed-$precision.jsonl"
done
export JAX_DEFAULT_MATMUL_PRECISION=highest
run benchmarks/precision.py --out "$out/precision.jsonl"
run benchmarks/convolution.py --out "$out/convolution.jsonl"
run benchmarks/memory.py --out "$out/memory.jsonl"
run benchmarks/transformer.py --out "$out/transformer.jsonl"
if [ "$expected" = gpu ]; then run benchmarks/peers.py --out "$out/peers.jsonl"; fi
if [ -n "$data" ]; then
    for order in exact first; do
        run benchmarks/reproduce.py run omniglot-5w1s --data "$data" --order "$order" \
            --num-test-tasks 2000 --out "$out/reproduce.jsonl"
    done
    run benchmarks/family.py omniglot-5w1s --data "$data" --inner-lrs 0.4 1.0 2.0 --num-outer-steps 6000 \
        --out "$out/family.jsonl"
    run benchmarks/orders.py omniglot-5w1s omniglot-20w1s --data "$data" --num-outer-steps 6000 \
        --out "$out/orders.jsonl"
fi
run benchmarks/orders.py sinusoid-5shot --out "$out/orders.jsonl"
run benchmarks/reproduce.py run sinusoid-5shot --num-test-tasks 2000 --out "$out/reproduce.jsonl"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
