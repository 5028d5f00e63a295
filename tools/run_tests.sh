#!/usr/bin/env bash
# Runs a test program (gtest arguments may follow) and ends with one line, "N passed, N failed".
set -uo pipefail
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$@" --gtest_brief=1 2>&1 | tee "$log"
status=${PIPESTATUS[0]}

passed=$(grep -oP '^\[  PASSED  \] \K[0-9]+' "$log" | tail -1)
failed=$(grep -cP '^\[  FAILED  \] .*\([0-9]+ ms\)$' "$log")
skipped=$(grep -oP '^\[  SKIPPED \] \K[0-9]+(?= tests?)' "$log" | tail -1)
if [ -z "$passed" ]; then  # the program died; what it printed last says where
  echo "${0##*/}: $1 ended with status $status before its summary" >&2
  passed=0 failed=$((failed + 1))
fi
[ "$status" -ne 0 ] && [ "$failed" -eq 0 ] && failed=1
echo "$passed passed, $failed failed${skipped:+, $skipped skipped}"
exit "$status"
