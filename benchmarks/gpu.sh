#!/usr/bin/env bash
# The benchmarks on one GPU, in stages of at most eight minutes, on a machine without a network.
#
#   benchmarks/gpu.sh OUT check|speed|peers|memory|transformer|reproduce [--quick] [--data FILE.npz]
#
# It needs jax, flax, optax, chex, orbax, matplotlib, rich and, for the peers, torch. Rows are appended to
# files in the directory OUT as they are measured. The same command goes on where it was stopped, and
# measures nothing twice. `check` proves in a minute that everything runs; --quick makes any stage a check.
# `python benchmarks/reproduce.py export omniglot-5w1s --data-dir DIR --data FILE.npz` writes the file for
# the Omniglot rows of `reproduce` on a machine with tensorflow-datasets.
set -euo pipefail

usage="usage: benchmarks/gpu.sh OUT check|speed|peers|memory|transformer|reproduce [--quick] [--data FILE.npz]"
fail() { echo "error: $*" >&2; exit 2; }

# The command line.
[ $# -ge 2 ] || fail "$usage"
out=$1 stage=$2
shift 2
case "$stage" in
    check | speed | peers | memory | transformer | reproduce) ;;
    *) fail "unknown stage '$stage': $usage" ;;
esac
options=(--resume) data=
while [ $# -gt 0 ]; do
    case "$1" in
        --quick) options+=(--quick) ;;
        --data) [ -f "${2:-}" ] || fail "--data ${2:-} is not a file"; data=$(realpath "$2"); shift ;;
        *) fail "unknown option '$1': $usage" ;;
    esac
    shift
done

# The machine.
python=${PYTHON:-python3}
expected=${JAXMAML_PLATFORM:-gpu}
found=$("$python" -c 'import jax; print(jax.default_backend())' 2>/dev/null) || found="nothing to run on"
[ "$found" = "$expected" ] || fail "JAX finds $found, not a $expected: install the plugin of JAX for it"
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# What a stopped stage has compiled, its repetition reads.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/jaxmaml/compilation}

# run FILE SCRIPT ARGUMENTS...: appends rows to a file in OUT, within the time of the stage.
limit=470 failed=()
run() {
    local file=$1 left=$((limit - SECONDS))
    shift
    echo "== $* ($SECONDS s)"
    if [ $left -le 0 ] || ! timeout "$left" "$python" "benchmarks/$1" "${@:2}" --out "$out/$file" "${options[@]}"; then
        failed+=("$*")
    fi
}

speed() {
    for precision in highest default; do
        JAX_DEFAULT_MATMUL_PRECISION=$precision run "speed-$precision.jsonl" speed.py
    done
    run precision.jsonl precision.py
    run convolution.jsonl convolution.py
}
has_torch() { "$python" -c 'import torch' 2>/dev/null; }
peers() { JAX_DEFAULT_MATMUL_PRECISION=highest run peers.jsonl peers.py "$@"; }
memory() { JAX_DEFAULT_MATMUL_PRECISION=highest run memory.jsonl memory.py; }
transformer() { JAX_DEFAULT_MATMUL_PRECISION=highest run transformer.jsonl transformer.py; }
reproduce() {
    run reproduce.jsonl reproduce.py run sinusoid-5shot --num-test-tasks 2000 --checkpoints "$out/checkpoints"
    if [ -z "$data" ]; then
        echo "no Omniglot rows: --data is not given"
        return
    fi
    for order in exact first; do
        run reproduce.jsonl reproduce.py run omniglot-5w1s --data "$data" --order "$order" \
            --num-test-tasks 2000 --checkpoints "$out/checkpoints"
    done
}
check() {
    options+=(--quick)
    run check.jsonl speed.py
    memory
    transformer
    if has_torch; then peers --work conv-1q-first; fi
    reproduce
}

if [ "$stage" = peers ]; then has_torch || fail "PyTorch is not installed: the stage peers needs it"; fi
"$stage"
if [ ${#failed[@]} -gt 0 ]; then
    printf "failed, or stopped after $limit s; the same command goes on: %s\n" "${failed[@]}" >&2
    exit 1
fi
echo "$stage: done in $SECONDS s"
