#!/usr/bin/env bash
# What the CUDA build needs beside `make setup`: nvcc with cuBLAS, cuDNN and CUPTI headers, which it only looks for, and
# the headers of cudnn-frontend, which it fetches from PyPI into deps/.
set -euo pipefail
cd "$(dirname "$0")/.."
version=1.32.0

command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
if ! command -v nvcc >/dev/null; then
  echo "setup: no nvcc on PATH or in /usr/local/cuda/bin: install the CUDA toolkit 13 (nvcc, cuBLAS, cuDNN, CUPTI)" >&2
  exit 1
fi
[ -e deps/include/cudnn_frontend.h ] && exit 0
python3 -m pip --version >/dev/null 2>&1 || tools/setup.sh python3-pip
echo "fetching the headers of nvidia-cudnn-frontend $version"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
python3 -m pip download -q --no-deps -d "$wheels" "nvidia-cudnn-frontend==$version"
mkdir -p deps
python3 - "$wheels" <<'END'
import glob, sys, zipfile
with zipfile.ZipFile(glob.glob(sys.argv[1] + "/*.whl")[0]) as wheel:
    wheel.extractall("deps", [name for name in wheel.namelist() if name.startswith("include/")])
END
