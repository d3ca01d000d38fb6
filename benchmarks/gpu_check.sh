#!/usr/bin/env bash
# Everything to know of a GPU in under 10 minutes, without a network: correctness of every backend, kernels against
# compiled flex and dense attention, then training and drawing at the paper's sizes.
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
# One that fails does not keep the others from being seen.
status=0
timeout 150 python3 -m pytest -q tests/test_attention.py -k 'cuda or kernels' 2>&1 |
    tee "${OUT:-benchmarks/results}/gpu_tests.txt" || status=$?
timeout 180 python3 benchmarks/attention.py --device cuda --output_dir "${OUT:-benchmarks/results}" || status=$?
# The report is written after each part; the last one may take longer than is left.
timeout $((560 - SECONDS)) python3 benchmarks/gpu.py --limit_s $((460 - SECONDS)) --output_dir "${OUT:-benchmarks/results}" ||
    status=$?
exit $status
