#!/usr/bin/env bash
# bundle.sh PROGRAM... DIRECTORY: the programs and every library of theirs that is not the C library's, to run elsewhere.
# What is linked looks for its libraries beside itself ($ORIGIN).
set -euo pipefail
directory=${*: -1}
mkdir -p "$directory"
for program in "${@:1:$#-1}"; do
  cp "$program" "$directory/"
  ldd "$program" | awk '$3 ~ /^\// { print $3 }' |
    grep -vE '/(libc|libm|libdl|librt|libpthread)\.so' | xargs -I{} cp -Ln {} "$directory/"
done
