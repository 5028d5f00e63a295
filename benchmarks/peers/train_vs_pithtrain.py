#!/usr/bin/env python3
"""Training speed of pith beside PithTrain's on one GPU: a workload of `pith bench train`, first there, then here.

    benchmarks/peers/setup_venv.sh VENV && git clone https://github.com/mlc-ai/pith-train
    VENV/bin/python benchmarks/peers/train_vs_pithtrain.py --pithtrain pith-train --workload W2

Both train the Qwen3-30B-A3B shape cut to the workload's layers, in bf16 with fp32 AdamW states, force-balanced routing
and a global-batch balance loss of 1e-3, on token ids drawn uniformly at random. A step is wall time with the GPU
synchronized at both ends, median over --steps after --warmup; PithTrain's garbage collection between steps does not
count. GB are 1e9 bytes of what each allocated. Where FlashAttention 4 is not installed, PithTrain gets cuDNN's
attention; packages that its bf16 Qwen3 only imports (deep_gemm, fla, wandb) are stood in for. The last line is the ratio.
"""
import argparse
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest.mock import MagicMock

REPOSITORY = Path(__file__).resolve().parent.parent.parent
WORKLOADS = {  # layers, sequence length, micro-batch, global batch: those of src/app/bench.cpp
    "W1": (8, 2048, 1, 32), "W2": (8, 4096, 1, 16), "W3": (8, 4096, 2, 32),
    "W4": (6, 4096, 1, 16), "W5": (6, 4096, 2, 32), "W6": (6, 4096, 4, 64),
}
VOCABULARY = 151936


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any module of the packages that are not installed, with any attribute."""

    def __init__(self, packages):
        self.missing = {name for name in packages if importlib.util.find_spec(name) is None}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.missing:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock(name=name)

        module.__getattr__ = attribute


def what_is_missing(args):
    """One line that says it, or None."""
    for package in ("torch", "transformers", "triton", "numpy"):
        if importlib.util.find_spec(package) is None:
            return f"{package} for {sys.executable} (benchmarks/peers/setup_venv.sh DIR installs it)"
    if not (args.pithtrain / "pithtrain/tasks/pretrain_lm.py").exists():
        return f"PithTrain in {args.pithtrain} (git clone https://github.com/mlc-ai/pith-train, then --pithtrain DIR)"
    if not args.pith.exists():
        return f"{args.pith} (make build-cuda)"
    import torch
    if not torch.cuda.is_available():
        return "a GPU that torch can use"


def cudnn_attention(q, k, v, softmax_scale, causal=False, **_):
    import torch.nn.functional as F
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # from [B, S, heads, D]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def write_inputs(args, directory: Path):
    import numpy as np
    layers, sequence, _, batch = WORKLOADS[args.workload]
    config = json.loads((args.pithtrain / "benchmarks/pretraining/qwen3-30b-a3b/model.json").read_text())
    (directory / "model.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    tokens = (args.warmup + args.steps) * batch * sequence + 1
    (directory / "data").mkdir()
    with open(directory / "data/random.bin", "wb") as file:
        np.save(file, np.random.default_rng(1234).integers(VOCABULARY, size=tokens, dtype=np.int32))


def run_pithtrain(args, directory: Path):
    """In a process of its own; the result is the last line."""
    import torch
    from transformers import AutoConfig, Qwen3MoeConfig  # noqa: F401, before it could see a stand-in
    stand_in = StandIn(["deep_gemm", "fla", "wandb", "flash_attn"])
    sys.meta_path.append(stand_in)
    sys.path.insert(0, str(args.pithtrain))
    if "flash_attn" in stand_in.missing:
        import pithtrain.operators.flash_attn_v4 as attention
        attention.flash_attn_func = cudnn_attention
        for backend in ("flash", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{backend}_sdp")(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
    from pithtrain.modules.distributed import setup_distributed
    from pithtrain.modules.logging import setup_logging
    from pithtrain.modules.training import make_adamw_optimizer, make_constant_scheduler, setup_training
    from pithtrain.tasks import pretrain_lm
    sys.meta_path.remove(stand_in)

    cfg = pretrain_lm.PretrainLMCfg()
    t = cfg.training
    _, t.sequence_length, t.micro_batch_size, t.global_batch_size = WORKLOADS[args.workload]
    t.model, t.dataset = directory / "model.json", directory / "data"
    t.optimizer, t.scheduler, t.lr, t.max_steps = make_adamw_optimizer, make_constant_scheduler, 3e-4, args.warmup + args.steps
    t.moe_load_balance_type, t.moe_load_balance_coef, t.benchmark = "global-batch", 1e-3, True
    start = time.perf_counter()
    setup_logging(cfg)
    setup_distributed(cfg)
    setup_training(cfg)
    gc.disable()
    pretrain_lm.gc = types.SimpleNamespace(collect=lambda: None)  # below, where no step is timed
    seconds, first = [], None
    for _ in range(t.max_steps):
        gc.collect()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        pretrain_lm.train_step(cfg)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        first = first or time.perf_counter() - start
    step = statistics.median(seconds[args.warmup:])
    print(json.dumps({"tokens_per_second": t.global_batch_size * t.sequence_length / step,
                      "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "first_step_seconds": first}), flush=True)


def run(name, command, **options):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    if result.returncode or not result.stdout.strip():
        raise SystemExit(f"{name} failed ({result.returncode}):\n{result.stdout[-1000:]}{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="W2")
    parser.add_argument("--pithtrain", type=Path, default=REPOSITORY.parent / "pith-train", help="checkout")
    parser.add_argument("--pith", type=Path, default=REPOSITORY / "build-cuda/pith")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)  # in the process of run_pithtrain
    args = parser.parse_args()
    if args.inputs:
        return run_pithtrain(args, args.inputs)
    if missing := what_is_missing(args):
        parser.exit(2, f"missing: {missing}\n")
    sizes = [f"--steps={args.steps}", f"--warmup={args.warmup}", f"--workload={args.workload}"]
    with tempfile.TemporaryDirectory() as scratch:
        write_inputs(args, Path(scratch))
        one_process = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "15213", "TORCHELASTIC_RUN_ID": "bench"}
        peer = run("PithTrain", [sys.executable, __file__, "--inputs", scratch, "--pithtrain", args.pithtrain, *sizes],
                   env=os.environ | one_process)
    pith = run("pith", [args.pith, "bench", "train", "--device=cuda", *sizes])
    ratio = pith["tokens_per_second"] / peer["tokens_per_second"]
    print(f"{args.workload}, median of {args.steps} steps\n{'':10}{'tokens/s':>10}{'peak GB':>9}{'first step s':>14}")
    for name, r in (("PithTrain", peer), ("pith", pith)):
        print(f"{name:10}{r['tokens_per_second']:10.0f}{r['peak_gb']:9.1f}{r['first_step_seconds']:14.1f}")
    if args.json:
        args.json.write_text(json.dumps({"pith": pith, "pithtrain": peer, "ratio": ratio}, indent=1) + "\n")
    print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
