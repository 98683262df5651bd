#!/usr/bin/env bash
# Every table of gpu.sh on one TPU, without the PyTorch peers.
#
#   benchmarks/tpu.sh OUT_DIR [OMNIGLOT.npz]
set -euo pipefail
JAXMAML_PLATFORM=tpu exec "$(dirname "${BASH_SOURCE[0]}")/gpu.sh" "$@"
