#!/usr/bin/env bash
# The twin of gpu.sh on a TPU; PyTorch peers are left out.
#
#   benchmarks/tpu.sh OUT_DIR [OMNIGLOT.npz]
set -euo pipefail
JAXMAML_PLATFORM=tpu exec "$(dirname "${BASH_SOURCE[0]}")/gpu.sh" "$@"
