#!/usr/bin/env bash
# test_cuda.sh DIRECTORY [GOLDEN [EXAMPLE]]: what the GPU must hold, with the programs pith and pith_tests of DIRECTORY.
# GOLDEN has the golden vectors ($PITH_GOLDEN, or ../shared/golden beside the repository), EXAMPLE a small model's
# config.json and tokenizer.json (examples/tiny of the repository, or tiny beside this script, as in a bundle).
# One line for each part, PASS, FAIL or SKIP with what is missing; then "N passed, N failed, N skipped". Needs the driver
# and the CUDA libraries, which the programs name if they do not find them; compute-sanitizer where it is installed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
programs=$(cd "$1" && pwd) || exit 2
golden=${2:-${PITH_GOLDEN:-$here/../../shared/golden}}
example=${3:-$here/../examples/tiny}
[ -e "$example/config.json" ] || example=$here/tiny
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0

# part NAME COMMAND...: its last line is the detail; of a failure all that it printed.
part() {
  local name=$1 detail
  shift
  if "$@" >"$work/part" 2>&1; then
    passed=$((passed + 1))
    detail=$(tail -1 "$work/part")
    echo "PASS $name: ${detail#PASS: }"
  else
    failed=$((failed + 1))
    tail -60 "$work/part" | sed 's/^/  | /'
    detail=$(tail -1 "$work/part")
    echo "FAIL $name: ${detail#FAIL: }"
  fi
}
skip() {
  skipped=$((skipped + 1))
  echo "SKIP $1: $2"
}

# tests FILTER [COMMAND THAT RUNS A PROGRAM...]
tests() {
  local filter=$1 names
  shift
  PITH_TEST_DEVICE=cuda "$@" "$programs/pith_tests" --gtest_brief=1 --gtest_filter="$filter" >"$work/tests" 2>&1 &&
    cat "$work/tests" && return
  cat "$work/tests"
  names=$(grep -oP '^\[  FAILED  \] \K\S+(?= \()' "$work/tests" | tr '\n' ' ')
  echo "failed: ${names:-the program itself}"
  return 1
}
golden_model() {
  "$programs/pith" verify --model "$golden/qwen3_moe" --golden "$golden/qwen3_moe/golden.safetensors" --device cuda \
    --dtype "$1"
}
deterministic() {
  local keys="device=cuda dtype=bf16 deterministic=true train.steps=20" run
  for run in a b; do
    "$programs/pith" train "$work/curve/run.toml" out="$work/$run" $keys >/dev/null || return
  done
  "$programs/pith" verify --checkpoint "$work/a/latest" --against "$work/b/latest" || return
  echo "20 steps twice, masters and moments bit-identical"
}
find_sanitizer() {
  local place
  for place in "$(command -v compute-sanitizer)" /usr/local/cuda/bin/compute-sanitizer \
    /usr/local/cuda/compute-sanitizer/compute-sanitizer; do
    [ -x "$place" ] && echo "$place" && return
  done
}

# Suites of ops; of each test what has no GPU in it runs on the CPU.
part "op tests" tests 'Gemm.*:Linear.*:GroupedLinear.*:FlushWgrads.*:Attention.*:QkNormRope.*:Embedding.*:HeadLoss.*:'\
'OrderByExpert.*:Experts.*:Router.*:RmsNorm.*:AddRmsNorm.*:Basic.*:SumOfSquares.*:AdamW.*:Muon.*:Optimizer.*:Init.*'
for dtype in fp32 bf16; do
  if [ -e "$golden/qwen3_moe/golden.safetensors" ]; then
    part "golden model, $dtype" golden_model $dtype
  else
    skip "golden model, $dtype" "no golden vectors in $golden (second argument, or PITH_GOLDEN)"
  fi
done
if [ -e "$example/config.json" ] && [ -e "$example/tokenizer.json" ]; then
  part "loss curve, GPU bf16 and CPU fp32" "$here/loss_curve.sh" "$programs/pith" "$example" "$work/curve"
  part "deterministic=true" deterministic
else
  skip "loss curve, deterministic=true" "no config.json and tokenizer.json in $example (third argument)"
fi
sanitizer=$(find_sanitizer)
if [ -n "$sanitizer" ]; then
  part "compute-sanitizer memcheck" tests 'Linear.*:GroupedLinear.Matches*:FlushWgrads.*:Attention.windows:QkNormRope.op:'\
'Embedding.*:OrderByExpert.*:Experts.*Rows*:Experts.Swiglu*:Router.*:AddRmsNorm.*:AdamW.*:Muon.*' \
    "$sanitizer" --tool memcheck --error-exitcode 1 --print-limit 5
else
  skip "compute-sanitizer memcheck" \
    "not on PATH, in /usr/local/cuda/bin or /usr/local/cuda/compute-sanitizer: apt-get install cuda-sanitizer-13-0"
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
