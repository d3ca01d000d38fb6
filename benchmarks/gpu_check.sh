#!/usr/bin/env bash
# The CUDA kernels: correctness of every backend, then ratios, in under 10 minutes on one GPU, without a network.
# Needs python3 with torch >= 2.11, pytest and matplotlib. What else is missing or too old travels as wheels:
#
#   pip wheel --no-deps -w .whl . && pip download --no-deps -d .whl transformers==... huggingface_hub==... diffusers==...
#   WHEELS=.whl benchmarks/gpu_check.sh
#
# Results go to ${OUT:-benchmarks/results}.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site"
fi
python3 -c 'import torch, transfusion_hf; print(torch.__version__, torch.cuda.get_device_name(), transfusion_hf.varlen_kernels())'
timeout 280 python3 -m pytest -q tests/test_attention.py -k 'cuda or kernels'
timeout 280 python3 benchmarks/attention.py --device cuda --output_dir "${OUT:-benchmarks/results}"
