#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the suite on our kernels and on PyTorch's, every compiled variant, and the
# throughput comparison. Results land under perf/results/ with the machine's fingerprint.
#     perf/on_gpu.sh [PYTHON]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
results=perf/results
mkdir -p "$results"
status=0
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no GPU here" >&2; exit 2; }
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))')
for candidate in triton-softmax torch-sdpa torch-sdpa-flash torch-sdpa-efficient torch-sdpa-cudnn torch-flex; do
  "$python" -m attnspec check "$candidate" --mechanism softmax_attention --level standard --device cuda \
    --dtype fp32,fp16,bf16 --json "$results/$gpu-$candidate.json" || status=1
done
"$python" -m attnspec.perf.softmax --device cuda --dtype bf16 --json "$results/$gpu-softmax-bf16.json" || status=1
"$python" -m attnspec.perf.softmax --device cuda --dtype fp16 --json "$results/$gpu-softmax-fp16.json" || status=1
exit "$status"
