#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the suite on every kernel of ours and on those of other libraries that are
# installed, and the throughput comparisons. Results land under perf/results/ with the machine's fingerprint; a kernel
# that does not conform makes the exit status 1 and is not timed.
#     perf/on_gpu.sh [PYTHON [LEVEL [MECHANISM ...]]]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
level=${2:-standard}
shift $(($# > 2 ? 2 : $#))
results=perf/results
mkdir -p "$results"
status=0
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no GPU here" >&2; exit 2; }
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))')

# What another library offers for a mechanism; what is not installed is named and left out.
others() {
  case $1 in
    softmax_attention) echo torch-sdpa-flash torch-sdpa-efficient torch-sdpa-cudnn torch-sdpa torch-flex-compiled ;;
    gla) echo fla-gla ;;
    gated_delta_rule) echo fla-gated-delta-rule-chunk fla-gated-delta-rule ;;
    lightning_attention) echo fla-lightning-attention-chunk fla-lightning-attention ;;
    fused_neighborhood_attention) echo flex-neighborhood ;;
    music_relative_attention) echo flex-music-relative ;;
  esac
}

mechanisms=${*:-$("$python" -c 'from attnspec.impls import written; from attnspec.spec import mechanisms
print(*(name for name in mechanisms() if any(written(name))))')}
for mechanism in $mechanisms; do
  kernel=$("$python" -c "from attnspec.impls import written; print('attnspec.impls.' + next(written('$mechanism'))[0])"):$mechanism
  contenders=()
  for candidate in "$kernel" $(others "$mechanism"); do
    label=${candidate##*:}
    "$python" -m attnspec check "$candidate" --mechanism "$mechanism" --level "$level" --device cuda \
      --dtype fp32,fp16,bf16 --quiet --json "$results/$gpu-$mechanism-$label.json"
    case $? in
      0) contenders+=(--candidate "$candidate") ;;
      1) status=1 ;;
      *) echo "$mechanism: $candidate could not be judged here" >&2 ;;
    esac
  done
  [ ${#contenders[@]} -gt 0 ] || continue
  against=$(others "$mechanism" | cut -d' ' -f1)
  for direction in forward backward; do
    "$python" -m attnspec bench --mechanism "$mechanism" "${contenders[@]}" --against "${against:-equations}" \
      --device cuda --dtype bf16,fp16 --direction "$direction" --json "$results/$gpu-bench-$mechanism-$direction.json" \
      --markdown "$results/$gpu-bench-$mechanism-$direction.md" || status=1
  done
done
exit "$status"
