#!/usr/bin/env bash
# For whoever has a GPU: builds the CUDA passes, proves them and Triton's on the device, and measures. One report in JSON
# and Markdown.
#   benchmarks/gpu_check.sh [--dry-run] [folder of the report]
# --dry-run runs what needs no GPU: the compiler's report of an extension already built, and tiny steps on the CPU.
# Needs Python with torch >= 2.11 for CUDA, nvcc, and this package's test tools; runs from a source tree.
set -euo pipefail
cd "$(dirname "$0")/.."
dry_run=
[ "${1:-}" = --dry-run ] && dry_run=1 && shift
report=$(realpath -m "${1:-gpu_check}")
mkdir -p "$report"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [ -z "$dry_run" ]; then
  echo "== build"
  EFFNET_FAST_CUDA=1 python -m pip install --no-build-isolation -e ".[test]"
fi

echo "== what is built, and what runs here"
python -m effnet_fast.doctor | tee "$report/doctor.txt"

echo "== parity on the device"
python -m pytest -q tests/passes/test_gpu.py | tee "$report/parity.txt"

if [ -z "$dry_run" ]; then
  echo "== compute-sanitizer"
  for checker in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$checker" --error-exitcode 1 \
      python -m pytest -q tests/passes/test_gpu.py -k "small and cuda" | tee "$report/$checker.txt"
  done
fi

echo "== compiler's report"
if python -c 'import sys; from effnet_fast.passes.backend import why_unavailable; sys.exit(why_unavailable("cuda") is not None)'; then
  python -m benchmarks.gpu_report --json "$report/compiler.json" > "$report/compiler.md"
else
  echo "the CUDA passes are not built" | tee "$report/compiler.md"
fi

echo "== throughput and memory"
if [ -z "$dry_run" ]; then
  python -m benchmarks.gpu_train_step --json "$report/throughput.json" | tee "$report/throughput.md"
else
  python -m benchmarks.gpu_train_step --device cpu --backend auto --variants b0 --kinds effnet_fast eager checkpointed \
    --size 32 --batch-size 2 --rounds 1 --warmup 0 --json "$report/throughput.json" | tee "$report/throughput.md"
fi

cat "$report/doctor.txt" "$report/parity.txt" "$report/throughput.md" "$report/compiler.md" > "$report/report.md"
echo "$report/report.md"
