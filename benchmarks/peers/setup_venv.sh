#!/usr/bin/env bash
# A virtual environment with the peers that pith is compared with: transformers and torch from PyPI.
#   benchmarks/peers/setup_venv.sh DIR      (5 GB, about a minute on a fast line)
# PyPI's torch wheel for x86-64 is the CUDA build. It runs on the CPU, but `import torch` needs the CUDA libraries it was
# linked with (without them: "libcufile.so.0: cannot open shared object file"), so its dependencies are installed too.
set -euo pipefail
dir=${1:?usage: setup_venv.sh DIR}
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet torch==2.11.0 transformers==5.17.0 tokenizers==0.23.2 safetensors numpy tensorboard
"$dir/bin/python" -c '
import torch, transformers
print("torch", torch.__version__, "transformers", transformers.__version__, "threads", torch.get_num_threads())'
