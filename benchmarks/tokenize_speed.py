#!/usr/bin/env python3
"""Speed of `pith tokenize` against Hugging Face's Rust library `tokenizers`, on the same files with as many threads.

    pip install tokenizers
    benchmarks/tokenize_speed.py --tokenizer examples/tiny/tokenizer.json --input /usr/include/linux [--threads 2]

Checks that every id is equal, then prints both rates. pith's time is the whole command: start, reading the files,
encoding, writing the corpus. The library's is encode_batch_fast alone, with the texts already in memory.
"""

import argparse
import array
import os
import re
import struct
import subprocess
import sys
import tempfile
import time


def read_corpus(prefix):
    with open(prefix + ".idx", "rb") as f:
        index = f.read()
    code, count = index[17], struct.unpack_from("<Q", index, 18)[0]
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    ids = array.array("H" if code == 8 else "i")
    with open(prefix + ".bin", "rb") as f:
        ids.frombytes(f.read())
    at = 0
    for n in lengths:
        yield ids[at:at + n].tolist()
        at += n


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pith", default="build/pith")
    parser.add_argument("--tokenizer", default="examples/tiny/tokenizer.json")
    parser.add_argument("--input", nargs="+", default=["/usr/include/c++", "/usr/include/linux"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # read when the library starts its threads
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    # The files in the order in which pith reads them: explicit ones as given, directories sorted by path.
    files = []
    for path in args.input:
        inside = [os.path.join(d, name) for d, subs, names in os.walk(path) for name in names]
        files += sorted(inside, key=os.fsencode) if os.path.isdir(path) else [path]
    files = [f for f in files if os.path.isfile(f) and not re.search(r"/\.|\.jsonl|\.gz$|\.zst$", f)]

    best = float("inf")
    with tempfile.TemporaryDirectory() as directory:
        for i in range(args.repeat):
            prefix = os.path.join(directory, str(i))
            start = time.perf_counter()
            subprocess.run([args.pith, "tokenize", "--tokenizer", args.tokenizer, "--no-eos", "--workers",
                            str(args.threads), "--output", prefix, "--input", *files], check=True,
                           stdout=subprocess.DEVNULL)
            best = min(best, time.perf_counter() - start)
        ours = list(read_corpus(prefix))

    texts, size = [], 0
    for f in files:
        with open(f, "rb") as stream:
            data = stream.read()
        size += len(data)
        texts.append(data.decode("utf-8", errors="replace"))
    tokenizer = Tokenizer.from_file(args.tokenizer)
    library = float("inf")
    for _ in range(args.repeat):
        start = time.perf_counter()
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        library = min(library, time.perf_counter() - start)
    theirs = [e.ids for e in encodings if e.ids]

    equal = ours == theirs
    print(f"{len(files)} files, {size / 1e6:.1f} MB, {sum(map(len, theirs))} tokens, {args.threads} threads")
    print(f"pith tokenize   {size / best / 1e6:8.2f} MB/s")
    print(f"tokenizers      {size / library / 1e6:8.2f} MB/s")
    print(f"ratio           {library / best:8.2f}")
    print("ids equal" if equal else "IDS DIFFER")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
