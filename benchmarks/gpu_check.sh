#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: build, GPU tests, memory and race checks, benchmarks, goals.
#
#   benchmarks/gpu_check.sh [OUT] [--quick | --dry-run]     OUT: folder of results, benchmarks/results/gpu
#
# Needs python3 with pytest and a CUDA torch >= 2.11, nvcc and CMake >= 3.24; no network. Under 9 minutes;
# --quick: the few cases that tell most, under 3. --dry-run needs no GPU: every benchmark on tiny shapes on the
# CPU, with the fips_ext that python3 finds. A stage that fails or runs out of time hides no other.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

out=benchmarks/results/gpu
mode=full
for argument in "$@"; do
  case "$argument" in
    --quick | --dry-run) mode=${argument#--} ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "unknown option $argument; allowed: --quick, --dry-run" >&2; exit 2 ;;
    *) out=$argument ;;
  esac
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd) || exit 2
log=$out/log.txt
: >"$log"
failures=0
summary=()
goals_s=15
python=${PYTHON:-python3}
build=$PWD/build/gpu
site=$build/site
if [ "$mode" = quick ]; then total_s=160; else total_s=515; fi  # and goals_s

say() { printf '%s\n' "$*" | tee -a "$log"; }

# stage NAME SECONDS COMMAND...: runs it under its time limit and that of the whole, and records how it went.
stage() {
  local name=$1 limit=$2 start=$SECONDS left=$((total_s - SECONDS)) code
  shift 2
  if [ "$left" -lt 8 ]; then
    summary+=("FAIL  $name (no time was left)")
    failures=$((failures + 1))
    return 1
  fi
  [ "$left" -ge "$limit" ] || limit=$left
  printf '\n==== %s\n' "$name" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log" | tail -n "${lines:-25}"
  code=${PIPESTATUS[0]}
  if [ "$code" -eq 0 ]; then
    summary+=("PASS  $name ($((SECONDS - start)) s)")
  else
    [ "$code" -ne 124 ] || name="$name: out of time"
    summary+=("FAIL  $name (exit $code, $((SECONDS - start)) s)")
    failures=$((failures + 1))
  fi
  return "$code"
}

finish() {
  printf '\n==== summary, %d s\n' "$SECONDS" | tee -a "$log"
  printf '%s\n' "${summary[@]}" | tee -a "$log"
  exit $((failures > 0))
}

has_module() { "$python" -c "import $1" 2>/dev/null; }

# shellcheck disable=SC2329  # stage runs it through bash -c
# The package in $site. What was built before is kept: a second call builds what changed.
build_package() {
  # _host would need Python's headers, and nothing here uses it.
  local options=(-DCMAKE_BUILD_TYPE=Release -DFIPS_WITH_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$arch-real"
    -DFIPS_BUILD_HOST=OFF "-DPython_EXECUTABLE=$(command -v "$python")")
  if command -v ninja >/dev/null; then options+=(-G Ninja); fi
  cmake -S . -B "$build" "${options[@]}" &&
    cmake --build "$build" --parallel "$(nproc)" &&
    rm -rf "$site" && mkdir -p "$site" &&
    cp -r python/fips_ext "$site/" && rm -f "$site"/fips_ext/*.so &&
    cmake --install "$build" --prefix "$site"
}

# bench NAME SECONDS SCRIPT: one benchmark with that budget, and room for a case that is under way.
bench() {
  local options=(--out "$out/$1.json" --budget "$2")
  [ "$mode" = full ] || options+=("--$mode")
  rm -f "$out/$1.json"  # an old file must not be judged as if it were of this run
  stage "benchmark: $1" $(($2 + 25)) "$python" "benchmarks/$3" "${options[@]}"
}

# Those that answer goals come first. Budgets in seconds.
benchmarks() {
  if [ "$mode" = quick ]; then
    local mlp=22 product=16 backward=8 init=12 accuracy=10 ceilings=8
  else
    local mlp=70 product=45 backward=20 init=40 accuracy=20 ceilings=35
  fi
  bench accuracy "$accuracy" bench_accuracy_cuda.py
  bench shared_mlp "$mlp" bench_shared_mlp_cuda.py
  bench block_sparse_mm "$product" bench_block_sparse_mm_cuda.py
  bench backward "$backward" bench_backward_cuda.py
  bench init "$init" bench_init_cuda.py
  [ "$mode" = quick ] || bench tuning 25 tune.py
  bench ceilings "$ceilings" gpu_ceilings.py
  total_s=$((total_s + goals_s))
  lines=200 stage "goals" "$goals_s" "$python" benchmarks/goals.py "$out"
}

# memcheck and racecheck of every kernel. Without torch's cache each tensor is its own allocation, so that
# reads past it show.
sanitize() {
  local tool=$1 limit=$2
  stage "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
    --kernel-name kns=fips --error-exitcode 9 --print-limit 20 "$python" benchmarks/gpu_every_kernel.py
}

if [ "$mode" = dry-run ]; then
  stage "every kernel" 60 "$python" benchmarks/gpu_every_kernel.py --dry-run
  benchmarks
  finish
fi

if ! has_module torch; then
  echo "$python ($(command -v "$python")) has no torch" >&2
  exit 2
fi
arch=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print("90a" if (major, minor) == (9, 0) else f"{major}{minor}")') || exit 2
export -f build_package
export python build site arch
say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)"
say "$(nvcc --version | tail -n 2)"
say "$("$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)')"
say "architecture $arch"

# Triton compiles the rivals' kernels meanwhile; the cache stays with the build.
export TRITON_CACHE_DIR=$build/triton
timeout --kill-after=5 150 "$python" benchmarks/triton_bsr.py >"$out/triton.txt" 2>&1 &
triton=$!

if [ "$mode" = quick ]; then build_s=140; else build_s=220; fi
stage "build" "$build_s" bash -c build_package || { kill "$triton"; finish; }
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

# The tests skip without a GPU or without CUDA kernels; here that must not look like success.
stage "CUDA kernels are registered" 40 "$python" -c '
import torch, fips_ext
from fips_ext import _library
_library.require()
ops = ("block_sparse_mm", "block_sparse_sddmm", "shared_mlp", "shared_mlp_backward", "reconstruction_loss",
       "batched_rsvd", "batched_gram_eigh", "gram_update")
found = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [op for op in ops if not found(f"fips::{op}", "CUDA")]
print(fips_ext.__file__)
assert not missing, f"no CUDA kernels: {missing}"'

stage "every kernel" 60 "$python" benchmarks/gpu_every_kernel.py --coverage

tests=()
for path in tests/ops/test_cuda.py tests/ops/test_cuda_ops.py tests/init/test_cuda_init_ops.py; do
  if [ -e "$path" ]; then tests+=("$path"); fi
done
if has_module pytest; then
  # The emulated twins of a test are for machines without a GPU.
  stage "GPU tests" 75 "$python" -m pytest -q -p no:cacheprovider --no-header -k "not emulated" "${tests[@]}"
else
  summary+=("FAIL  GPU tests (pytest is missing)")
  failures=$((failures + 1))
fi

if ! command -v compute-sanitizer >/dev/null; then
  summary+=("SKIP  memcheck, racecheck (compute-sanitizer is missing)")
elif [ "$mode" = quick ]; then
  sanitize memcheck 35
else
  sanitize memcheck 60
  sanitize racecheck 60
fi

wait "$triton"  # nothing else may run beside a benchmark
benchmarks
finish
