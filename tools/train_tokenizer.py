#!/usr/bin/env python3
"""Trains the byte-level BPE tokenizer of the demo (needs `pip install tokenizers`; not part of the product).

    tools/train_tokenizer.py examples/tiny /usr/include/c++/12 /usr/include/linux

writes DIR/tokenizer.json (compact) and DIR/tokenizer_config.json from every text file under the given directories.
"""

import argparse
import json
import os

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

EOS = "<|endoftext|>"
# The pattern of the Qwen tokenizers: single digits, at most one symbol before a word, line breaks apart.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def texts(roots):
    for root in roots:
        paths = [os.path.join(directory, name) for directory, _, names in os.walk(root) for name in names]
        for path in sorted(filter(os.path.isfile, paths)):
            with open(path, encoding="utf-8", errors="replace") as f:
                yield f.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(args.sources), trainers.BpeTrainer(
        vocab_size=args.vocab_size, special_tokens=[AddedToken(EOS, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))

    os.makedirs(args.output, exist_ok=True)
    with open(os.path.join(args.output, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(json.loads(tokenizer.to_str()), f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")
    with open(os.path.join(args.output, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS,
                   "clean_up_tokenization_spaces": False}, f, indent=2)
        f.write("\n")


if __name__ == "__main__":
    main()
