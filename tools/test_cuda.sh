#!/usr/bin/env bash
# test_cuda.sh DIRECTORY: the tests of DIRECTORY/pith_tests that check an op, on the GPU, and the golden model through
# DIRECTORY/pith. Ends with one line, "N passed, N failed".
set -uo pipefail
export PITH_TEST_DEVICE=cuda
golden=${PITH_GOLDEN:-$(dirname "$0")/../../shared/golden}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
ops='Attention.shapes:Attention.windows:Attention.documents:QkNormRope.op:QkNormRope.many_tokens:Embedding.Matches*'
ops+=':Experts.GatherRows:Experts.SumRows:Experts.Swiglu*:*Linear.Matches*:Linear.GradientsAdd:Router.MatchesTheDefinition'
ops+=':Router.BalanceLoss:Router.ZLoss:RmsNorm.Matches*:AddRmsNorm.Matches*:AddRmsNorm.GradientsOfAChainAdd:Basic.*'
"$1/pith_tests" --gtest_brief=1 --gtest_filter="$ops" 2>&1 | tee "$log"
passed=$(grep -oP '^\[  PASSED  \] \K[0-9]+' "$log" | tail -1)
failed=$(grep -cP '^\[  FAILED  \] .*\([0-9]+ ms\)$' "$log")
[ -n "$passed" ] || passed=0 failed=$((failed + 1))
for dtype in fp32 bf16; do
  verdict=$("$1/pith" verify --model "$golden/qwen3_moe" --golden "$golden/qwen3_moe/golden.safetensors" --device cuda \
    --dtype $dtype | tail -1)
  echo "golden model, $dtype: $verdict"
  [ "$verdict" = PASS ] && passed=$((passed + 1)) || failed=$((failed + 1))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
