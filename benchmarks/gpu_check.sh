#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: build, GPU tests, memory and race checks, benchmarks.
#
#   benchmarks/gpu_check.sh [OUT] [--quick]        OUT: folder for JSON and the log, benchmarks/results/gpu
#
# Needs python3 with a CUDA torch >= 2.11 and pytest, and nvcc; no network. Under 9 minutes (--quick: 4).
# Missing Python packages travel as wheels: where there is a network,
#   python3 -m pip download --no-deps -d wheels scikit-build-core pathspec pybind11 pytest iniconfig pluggy
# and here, first,
#   python3 -m pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=$PWD/site
set -uo pipefail
cd "$(dirname "$0")/.."

out=benchmarks/results/gpu
quick=()
for argument in "$@"; do
  case "$argument" in
    --quick) quick=(--quick) ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "unknown option $argument; allowed: --quick" >&2; exit 2 ;;
    *) out=$argument ;;
  esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt
: >"$log"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
failures=0
summary=()

# stage NAME SECONDS COMMAND...: runs it under a time limit and records the result. The whole run has a limit, too.
total_s=530
stage() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  if [ $((total_s - SECONDS)) -lt "$limit" ]; then
    limit=$((total_s > SECONDS ? total_s - SECONDS : 1))
  fi
  printf '\n==== %s\n' "$name" | tee -a "$log"
  export -f build_with_pip build_with_cmake build_directly package_folder has_module
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log" | tail -n 60
  code=${PIPESTATUS[0]}
  if [ "$code" -eq 0 ]; then
    summary+=("PASS  $name ($((SECONDS - start)) s)")
  else
    summary+=("FAIL  $name (exit $code, $((SECONDS - start)) s; $log)")
    failures=$((failures + 1))
  fi
  return "$code"
}

finish() {
  printf '\n==== summary\n' | tee -a "$log"
  printf '%s\n' "${summary[@]}" | tee -a "$log"
  exit $((failures > 0))
}

has_module() { python3 -c "import $1" 2>/dev/null; }

build_with_pip() {
  python3 -m pip install --no-build-isolation --no-deps --no-index --target "$site" \
    -C cmake.define.FIPS_WITH_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$arch" .
}

package_folder() {
  mkdir -p "$site"
  cp -r python/fips_ext "$site/"
  rm -f "$site"/fips_ext/*.so
}

build_with_cmake() {
  package_folder &&
    cmake -S . -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DFIPS_WITH_CUDA=ON \
      -DCMAKE_CUDA_ARCHITECTURES="$arch" -DPython_EXECUTABLE="$(command -v python3)" \
      -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" &&
    cmake --build "$work/build" --parallel &&
    cmake --install "$work/build" --prefix "$site"
}

# The CUDA kernels alone, without CMake: enough for the GPU tests and benchmarks.
build_directly() {
  local include source pids=() pid
  include=$(python3 -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "include"))')
  package_folder
  for source in csrc/kernels/cuda/*.cu csrc/torch/*_cuda.cpp csrc/torch/schemas.cpp; do
    nvcc -std=c++17 -O3 -Icsrc -isystem "$include" -DTORCH_TARGET_VERSION=0x020b000000000000 \
      -Xcompiler -fPIC,-fvisibility=hidden -gencode "arch=compute_$arch,code=sm_$arch" \
      -c "$source" -o "$work/$(basename "$source").o" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || return 1
  done
  nvcc -shared -cudart static -o "$site/fips_ext/_C.so" "$work"/*.o \
    -Xlinker --no-as-needed -L"$include/../lib" -ltorch -ltorch_cpu
}

if ! has_module torch; then
  echo "python3 ($(command -v python3)) has no torch" >&2
  exit 2
fi
arch=$(python3 -c '
import torch
major, minor = torch.cuda.get_device_capability()
print("90a" if (major, minor) == (9, 0) else f"{major}{minor}")') || exit 2
export site work arch
{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -n 2
  python3 -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
  echo "architecture $arch"
} 2>&1 | tee -a "$log"

if has_module scikit_build_core && has_module pybind11; then
  build=build_with_pip
elif command -v cmake >/dev/null && has_module pybind11; then
  build=build_with_cmake
else
  echo "scikit-build-core or pybind11 is missing (the head of this script says how to bring wheels);" \
    "building the CUDA kernels alone" | tee -a "$log"
  build=build_directly
fi
stage "build ($build)" 200 bash -c "$build" || finish
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

# The tests skip without a GPU or without CUDA kernels; here that must not look like success.
stage "CUDA kernels are registered" 60 python3 -c '
import torch, fips_ext
from fips_ext import _library
_library.require()
assert torch.cuda.is_available(), "no CUDA GPU is visible to torch"
found = torch._C._dispatch_has_kernel_for_dispatch_key("fips::block_sparse_mm", "CUDA")
assert found, "the library has no CUDA kernels"
print(fips_ext.__file__)' || finish

pytest=(python3 -m pytest -q -p no:cacheprovider --no-header tests/ops/test_cuda.py)
if has_module pytest; then
  stage "GPU tests" 120 "${pytest[@]}"
else
  echo "pytest is missing; the head of this script says how to bring it" | tee -a "$log"
  summary+=("FAIL  GPU tests (pytest is missing)")
  failures=$((failures + 1))
fi

if command -v compute-sanitizer >/dev/null && has_module pytest; then
  # Without torch's cache every tensor is its own allocation, so that reads past it show.
  sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9
    --kernel-name kns=block_sparse_mm)
  stage "memcheck" 90 "${sanitize[@]}" --tool memcheck "${pytest[@]}" -k "strided or empty or broken"
  if [ ${#quick[@]} -eq 0 ]; then
    stage "racecheck" 90 "${sanitize[@]}" --tool racecheck "${pytest[@]}" -k "empty or strided"
  fi
else
  summary+=("SKIP  memcheck, racecheck (compute-sanitizer or pytest is missing)")
fi

ceilings_s=150 products_s=80
if [ ${#quick[@]} -gt 0 ]; then
  ceilings_s=45 products_s=30
fi
stage "block_sparse_mm" $((products_s + 40)) python3 benchmarks/bench_block_sparse_mm_cuda.py \
  --out "$out/block_sparse_mm.json" --budget "$products_s" ${quick[@]+"${quick[@]}"}
stage "ceilings" $((ceilings_s + 40)) python3 benchmarks/gpu_ceilings.py \
  --out "$out/ceilings.json" --budget "$ceilings_s" ${quick[@]+"${quick[@]}"}
finish
