#!/usr/bin/env python3
"""Does transformers compute what pith computes from the same checkpoint? Last line PASS or FAIL.

    tools/check_hf.py MODEL_DIR [GOLDEN.safetensors] [--pith build/pith] [--tolerance 1e-3]

GOLDEN holds input_ids and labels (B, S) int64, labels already shifted; where it does not exist it is made of random
ids. `pith eval --golden` dumps its logits and loss in fp32 on the CPU; transformers opens the directory with the Auto
classes, in fp32 too, so what is compared is the weights as stored and the formulas. With a tokenizer.json in
MODEL_DIR, AutoTokenizer must give the ids that file gives, and the text back.
"""
import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = 'static inline int add(int a, int b) { return a + b; }  // "naïve" 1234\n'


def random_golden(path: Path, vocab: int):
    tokens = torch.randint(vocab, (2, 65), generator=torch.Generator().manual_seed(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}, path)


def check_tokenizer(model_dir: Path) -> bool:
    if not (model_dir / "tokenizer.json").exists():
        print("tokenizer: none there, not checked")
        return True
    # Without "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json, AutoTokenizer picks the class of the
    # model type, which silently replaces the pre-tokenizer of tokenizer.json by its own: hence the comparison of ids.
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    stored = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    same = ids == stored.encode(TEXT, add_special_tokens=False).ids
    exact = tokenizer.decode(ids) == TEXT
    print(f"tokenizer: {type(tokenizer).__name__}, {len(tokenizer)} tokens, eos {tokenizer.eos_token!r}, "
          f"ids {'as' if same else 'NOT as'} in tokenizer.json, text {'comes' if exact else 'does NOT come'} back")
    return same and exact


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("golden", type=Path, nargs="?")
    parser.add_argument("--pith", type=Path, default=Path("build/pith"))
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        golden = args.golden or Path(scratch) / "golden.safetensors"
        if not golden.exists():
            random_golden(golden, json.loads((args.model / "config.json").read_text())["vocab_size"])
        dump = Path(scratch) / "dump.safetensors"
        subprocess.run([args.pith, "eval", "--model", args.model, "--golden", golden, "--dump", dump,
                        "--dtype", "fp32", "--device", "cpu"], check=True)
        pith, batch = load_file(dump), load_file(golden)
    model, report = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, output_loading_info=True)
    unread = {kind: sorted(names) for kind, names in report.items() if names}
    if unread:
        print(f"transformers did not load everything: {unread}")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    if logits.shape != pith["logits"].shape:
        print(f"logits: transformers {tuple(logits.shape)}, pith {tuple(pith['logits'].shape)}")
        return False
    logit_error = (logits - pith["logits"]).abs().max().item()
    loss_error = abs(loss.item() - pith["loss"].item())
    print(f"logits: max abs difference {logit_error:.2e} of a range {logits.abs().max().item():.2f}")
    print(f"loss: transformers {loss.item():.6f}, pith {pith['loss'].item():.6f}, difference {loss_error:.2e}")
    same = logit_error <= args.tolerance and loss_error <= args.tolerance  # false for nan
    return check_tokenizer(args.model) and same and not unread


if __name__ == "__main__":
    ok = main()
    print("PASS" if ok else "FAIL")
    raise SystemExit(not ok)
