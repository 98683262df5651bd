#!/usr/bin/env bash
# The stages of gpu.sh on one TPU.
#
#   benchmarks/tpu.sh OUT check|speed|memory|transformer|reproduce [--quick] [--data FILE.npz]
set -euo pipefail
JAXMAML_PLATFORM=tpu exec "$(dirname "${BASH_SOURCE[0]}")/gpu.sh" "$@"
