#!/usr/bin/env bash
# bundle.sh PROGRAM... DIRECTORY: the programs and every library of theirs that is not the C library's, to run elsewhere.
# What is linked looks for its libraries beside itself ($ORIGIN). With them goes what tests them there:
# DIRECTORY/test_cuda.sh DIRECTORY.
set -euo pipefail
directory=${*: -1}
mkdir -p "$directory/tiny"
for program in "${@:1:$#-1}"; do
  cp "$program" "$directory/"
  ldd "$program" | awk '$3 ~ /^\// { print $3 }' |
    grep -vE '/(libc|libm|libdl|librt|libpthread)\.so' | xargs -I{} cp -Ln {} "$directory/"
done
tools=$(dirname "$0")
cp "$tools/test_cuda.sh" "$tools/loss_curve.sh" "$directory/"
cp "$tools"/../examples/tiny/{config,tokenizer}.json "$directory/tiny/"
