#!/usr/bin/env bash
# make gpu-check: builds, tests and benchmarks on a machine with an NVIDIA GPU, offline, with the Python that has torch.
# A step that fails is reported at the end and does not stop the next: a GPU's time is dear.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: gpu_check.sh OUT}
python=${GPU_PYTHON:-python3}
mkdir -p "$out"
failed=()

step() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  "$@" >"$out/$name.log" 2>&1
  local status=$?
  tail -n 3 "$out/$name.log"
  echo "== $name: exit $status after $((SECONDS - start)) s"
  [ $status -eq 0 ] || failed+=("$name")
}

# The shipped architectures: CMake's "native" would be sm_90, which has none of sm_90a's instructions.
step build env KORE_FAST_NATIVE=1 KORE_FAST_CUDA=1 \
  timeout 240 "$python" setup.py build_ext --inplace
step env "$python" -m kore_fast.cli env
step tests timeout 150 "$python" -m pytest -q -p no:cacheprovider python_tests/ops/test_covariance_gpu.py python_tests/ops/test_covariance.py python_tests/ops/test_nullspace_gpu.py python_tests/ops/test_frozen_lora_gpu.py
step triton timeout 150 "$python" -m pytest -q -p no:cacheprovider python_tests/ops/triton
step benchmarks timeout 200 "$python" -m pytest -q -p no:cacheprovider benchmarks/bench_covariance.py "--rows=$out/rows" --benchmark-json "$out/benchmarks.json"
# Last, as what fits: full decompositions of the peers take their time on a GPU too.
step nullspace timeout 120 "$python" -m pytest -q -p no:cacheprovider benchmarks/bench_nullspace.py "--rows=$out/rows"
step frozen_lora timeout 150 "$python" -m pytest -q -p no:cacheprovider benchmarks/bench_frozen_lora.py "--rows=$out/rows"
step end_to_end timeout 120 "$python" -m pytest -q -p no:cacheprovider benchmarks/bench_end_to_end.py "--rows=$out/rows"
step plots "$python" benchmarks/plot.py "$out/rows"
nvidia-smi >"$out/nvidia-smi.log" 2>&1

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; logs in $out"
  exit 1
fi
echo "all steps passed; rows and logs in $out"
