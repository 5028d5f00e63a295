#!/usr/bin/env python3
"""Training speed of pith against transformers + torch eager on the CPU: same model, token ids, batch and threads.

    benchmarks/peers/setup_venv.sh VENV && VENV/bin/python benchmarks/train_vs_transformers.py

One step is forward, backward, gradient clipping and AdamW over one global batch, in micro-batches of equal size on both
sides. Tokens per second are the median over the steps after the warm-up. The last line is the smallest ratio over the
dtypes of pith to the fastest transformers row. Other load on the machine spoils the numbers: `uptime` first.

Rows: sdpa attention with the experts as a Python loop (`eager`) or as torch's grouped matmul (`grouped_mm`);
`batched_mm` copies the weights of an expert for every token, several GB here, and is for decoding. bf16 is run twice:
autocast over fp32 masters, which is what pith does, and all-bf16 weights and moments, less work than pith does.
"""
import argparse
import json
import os
import statistics
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent


def write_corpus(prefix: Path, documents: np.ndarray):
    """A Megatron-LM .bin/.idx pair with one document per row of `documents` (uint16)."""
    count, length = documents.shape
    documents.tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as idx:
        idx.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1))
        np.full(count, length, np.int32).tofile(idx)
        (np.arange(count, dtype=np.int64) * length * 2).tofile(idx)
        np.arange(count + 1, dtype=np.int64).tofile(idx)


def run_transformers(args, tokens, experts, dtype, autocast=False) -> float:
    config = AutoConfig.from_pretrained(args.config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    model.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    speeds = []
    for step in range(args.steps):
        start = time.perf_counter()
        for i in range(0, args.global_batch, args.micro_batch):
            row = step * args.global_batch + i
            ids = torch.from_numpy(tokens[row:row + args.micro_batch].astype(np.int64))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                # shift_labels: as many labels per sequence as in pith
                loss = model(input_ids=ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:].contiguous(),
                             use_cache=False).loss
            (loss * (args.micro_batch / args.global_batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        speeds.append(args.global_batch * args.sequence / (time.perf_counter() - start))
    return statistics.median(speeds[args.warmup:])


def run_pith(args, corpus, directory, dtype) -> float:
    run = directory / f"{dtype}.toml"
    run.write_text(f"""model = "{args.config}"
out = "{directory}/{dtype}"
device = "cpu"
dtype = "{dtype}"
[data]
train = ["{corpus}"]
sequence_length = {args.sequence}
[train]
steps = {args.steps}
global_batch_size = {args.global_batch}
micro_batch_size = {args.micro_batch}
[optimizer]
lr = 1e-3
schedule = "constant"
""")
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    result = subprocess.run([args.pith, "train", run], env=environment, stderr=subprocess.PIPE, text=True,
                            stdout=subprocess.DEVNULL)
    if result.returncode:
        raise SystemExit(f"pith train failed:\n{result.stderr[-2000:]}")
    lines = (directory / dtype / "metrics.jsonl").read_text().splitlines()
    return statistics.median([json.loads(line)["tokens_per_second"] for line in lines][args.warmup:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "examples/tiny/config.json")
    parser.add_argument("--pith", type=Path, default=REPOSITORY / "build/pith")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--global-batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences per forward and backward")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3, help="first steps that do not count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args()
    if args.global_batch % args.micro_batch or args.steps <= args.warmup:
        parser.error("--global-batch must be a multiple of --micro-batch, and --steps more than --warmup")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vocab = json.loads(args.config.read_text())["vocab_size"]
    tokens = np.random.default_rng(0).integers(vocab, size=(args.steps * args.global_batch, args.sequence + 1))
    tokens = tokens.astype(np.uint16)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        write_corpus(corpus, tokens)
        for dtype in args.dtype:
            rows = [(experts, torch.float32, dtype == "bf16") for experts in ("eager", "grouped_mm")]
            if dtype == "bf16":
                rows += [(experts, torch.bfloat16, False) for experts in ("eager", "grouped_mm")]
            for experts, weights, autocast in rows:
                kind = dtype if dtype == "fp32" else "bf16, autocast" if autocast else "bf16, all"
                speed = run_transformers(args, tokens, experts, weights, autocast)
                results.append((dtype, f"transformers, {kind}, {experts} experts", speed))
            results.append((dtype, f"pith, {dtype}", run_pith(args, corpus, Path(scratch), dtype)))
    print(f"{args.config}: batch {args.global_batch} x {args.sequence} in micro-batches of {args.micro_batch}, "
          f"{args.threads} threads, torch {torch.__version__}, median of {args.steps - args.warmup} steps")
    print(f"{'':48}{'tokens/s':>10}{'pith is':>9}")
    ratios = []
    for dtype in args.dtype:
        rows = [(name, speed) for kind, name, speed in results if kind == dtype]
        pith = rows[-1][1]
        for name, speed in rows:
            print(f"{name:48}{speed:10.0f}{pith / speed:8.2f}x")
        ratios.append(pith / max(speed for _, speed in rows[:-1]))
    if args.json:
        table = [{"name": name, "tokens_per_second": speed} for _, name, speed in results]
        args.json.write_text(json.dumps({"results": table, "ratio": min(ratios)}, indent=2) + "\n")
    print(f"ratio {min(ratios):.2f}")


if __name__ == "__main__":
    main()
