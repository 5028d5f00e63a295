#!/usr/bin/env python3
"""Golden vectors from Hugging Face transformers: a random model, its logits, gradients and ten AdamW steps.

    tools/make_golden.py OUT [key=value ...] [--batch B] [--sequence S] [--ignore P] [--seed N] [--v4-config]
    tools/make_golden.py --reproduce GOLDEN_DIR        # recompute an existing directory and compare; PASS or FAIL

key=value overrides a key of config.json (JSON values), e.g. `hidden_size=48 norm_topk_prob=false
'rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}'`; `key=` removes the key, so that the
default of transformers applies. OUT gets config.json, model.safetensors and golden.safetensors:
input_ids, labels (B, S) int64 (labels already shifted, -100 ignored); logits (B, S, V) and loss (1) fp32;
grad.<name> for every tensor of model.safetensors; adamw.loss, adamw.grad_norm (10).
Everything is computed from the files as written, so the directory is consistent by construction.
"""
import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

BASE = dict(  # the smallest sensible Qwen3-MoE; key=value arguments change it
    model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], vocab_size=256, hidden_size=64,
    intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_local_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
    max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def open_model(directory: Path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager")


def cross_entropy(model, ids, labels):
    logits = model(input_ids=ids, use_cache=False).logits
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def compute(directory: Path, ids, labels, dtype=torch.float32) -> dict:
    """The golden tensors of the model in `directory`; attention and experts eager, on the CPU."""
    model = open_model(directory, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    logits, loss = cross_entropy(model, ids, labels)
    loss.backward()
    golden = {"input_ids": ids, "labels": labels, "logits": logits.detach().float(), "loss": loss.detach()[None]}
    # Gradients under the names of the checkpoint: let transformers save a model whose weights are the gradients.
    shadow = open_model(directory, dtype)
    for target, source in zip(shadow.parameters(), model.parameters()):
        target.data = torch.zeros_like(source) if source.grad is None else source.grad.clone()
    with tempfile.TemporaryDirectory() as scratch:
        shadow.save_pretrained(scratch)
        golden |= {f"grad.{name}": g.float() for name, g in load_file(f"{scratch}/model.safetensors").items()}
    losses, norms = [], []
    for _ in range(10):
        optimizer.zero_grad()
        _, loss = cross_entropy(model, ids, labels)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    return golden | {"adamw.loss": torch.tensor(losses), "adamw.grad_norm": torch.tensor(norms)}


def randomize(model, std=0.06):
    """Every tensor random: norms around 1, biases too, so that nothing can be left out unnoticed."""
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * 0.1 + 1 if name.endswith("norm.weight") else torch.randn_like(p) * std


def spell_v4(path: Path):
    """config.json as transformers 4 wrote it: rope_theta, rope_scaling, num_experts, torch_dtype."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")  # the oldest spelling is "type"
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if config.get("num_local_experts") is not None:
        config["num_experts"] = config.pop("num_local_experts")
    config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.51.0", "max_window_layers": 1}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def worst(a: dict, b: dict) -> tuple[float, str]:
    """Largest relative L2 difference over the tensors of b (absolute where b is zero), and its name."""
    def error(x, y):
        return ((x.double() - y.double()).norm() / (y.double().norm() or 1)).item()
    return max((error(a[k], b[k]), k) for k in b)


def make(args):
    torch.manual_seed(args.seed)
    config = dict(BASE)
    for item in args.overrides:
        key, _, value = item.partition("=")
        if value:
            config[key] = json.loads(value)
        else:
            config.pop(key, None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    randomize(model)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    config_file = args.out / "config.json"
    if args.v4_config:
        spell_v4(config_file)
    removed = [item[:-1] for item in args.overrides if item.endswith("=")]
    written = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({k: v for k, v in written.items() if k not in removed}, indent=2) + "\n")
    tokens = torch.randint(model.config.vocab_size, (args.batch, args.sequence + 1))
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    labels[torch.rand(labels.shape) < args.ignore] = -100
    golden = compute(args.out, ids, labels)
    save_file(golden, args.out / "golden.safetensors")
    # How much of the AdamW series is rounding: routing ties flip between fp32 and fp64. Take another seed if large.
    error, name = worst(golden, compute(args.out, ids, labels, torch.float64))
    print(f"{args.out}: loss {golden['loss'].item():.6f}  fp32 against fp64: {error:.1e} ({name})")


def reproduce(directory: Path) -> bool:
    golden = load_file(directory / "golden.safetensors")
    ours = compute(directory, golden["input_ids"], golden["labels"])
    assert ours.keys() == golden.keys(), ours.keys() ^ golden.keys()
    error, name = worst(ours, golden)
    print(f"{directory}: worst relative difference {error:.1e} ({name})")
    return error <= 1e-5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--reproduce", type=Path, metavar="GOLDEN_DIR")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=32)
    parser.add_argument("--ignore", type=float, default=0.1, help="share of labels set to -100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--v4-config", action="store_true", help="write config.json in the spelling of transformers 4")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if arguments.reproduce:
        ok = reproduce(arguments.reproduce)
        print("PASS" if ok else "FAIL")
        raise SystemExit(not ok)
    if not arguments.out:
        parser.error("OUT or --reproduce is needed")
    make(arguments)
