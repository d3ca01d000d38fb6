#!/usr/bin/env bash
# The CUDA kernels: correctness, then ratios, in under 10 minutes on one GPU. Needs torch >= 2.11 with CUDA, and this
# package, transformers and diffusers importable (no network is used). Results go to ${OUT:-benchmarks/results}.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -c 'import torch, transfusion_hf; print(torch.__version__, torch.cuda.get_device_name(), transfusion_hf.varlen_kernels())'
timeout 240 python3 -m pytest -q tests/test_attention.py -k 'low_precision or kernels'
timeout 300 python3 benchmarks/attention.py --device cuda --output_dir "${OUT:-benchmarks/results}"
