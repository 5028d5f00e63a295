#!/usr/bin/env bash
# Rebuilds a Ninja build directory from nothing and prints what each file cost, slowest first.
set -euo pipefail
directory=$1
ninja -C "$directory" -t clean >/dev/null
rm -f "$directory/.ninja_log"
SECONDS=0
ninja -C "$directory" -j "$(nproc)" --quiet
total=$SECONDS
# .ninja_log: start and end in ms, mtime, output, hash
awk '$4 ~ /\.o$/ { printf "%7.1f s  %s\n", ($2 - $1) / 1000, $4 }' "$directory/.ninja_log" |
  sed -E 's#CMakeFiles/[^/]+\.dir/##; s#\.o$##' | sort -rn
printf '%7d s  everything, %d jobs at a time\n' "$total" "$(nproc)"
