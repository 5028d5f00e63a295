#!/usr/bin/env bash
# loss_curve.sh PITH EXAMPLE WORK [KEY=VALUE...]: does a second way of computing learn as fp32 on the CPU does? Trains the
# model of EXAMPLE (config.json, tokenizer.json) for 200 steps twice, with one seed and one generated text, in WORK: in
# fp32 on the CPU, and as the keys say (device=cuda dtype=bf16 without any). Prints the mean difference of the last 50
# losses, absolute and signed, in percent; PASS below 0.5 and 0.1. The rate is low: at 5e-4 a change of the last bits
# alone moves the losses of so small a model, whose routes flip, by 0.13%.
set -euo pipefail
pith=$1 example=$2 work=$3
shift 3
[ $# -gt 0 ] || set -- device=cuda dtype=bf16
mkdir -p "$work"

# Words of which some are frequent, and a third of them follow from the word before: what is left to chance keeps the loss
# smooth, where sudden insights would come some steps sooner or later in every run. The same bytes everywhere.
awk 'function random(n) { seed = seed * 16807 % 2147483647; return int(seed / 2147483647 * n) }
  BEGIN {
    seed = 20260101
    consonants = "bcdfghjklmnpqrstvwxz"
    for (i = 0; i < 3000; ++i)
      for (n = random(2); n >= 0; --n)
        word[i] = word[i] substr(consonants, 1 + random(20), 1) substr("aeiou", 1 + random(5), 1)
    for (i = 0; i < 250000; ++i) {
      now = random(3) ? int(3000 ^ (random(1000000) / 1000000)) - 1 : (before * 7 + random(3)) % 3000
      printf "%s%s", word[now], random(12) ? " " : ".\n"
      before = now
    }
  }' >"$work/text.txt"
"$pith" tokenize --tokenizer "$example/tokenizer.json" --output "$work/corpus" --input "$work/text.txt" >"$work/log"
cat >"$work/run.toml" <<END
model = "$example/config.json"
tokenizer = "$example/tokenizer.json"
out = "$work/out"
resume = false
[data]
train = ["$work/corpus"]
sequence_length = 256
[train]
steps = 200
global_batch_size = 8
micro_batch_size = 4
[optimizer]
lr = 2e-4
final_lr = 2e-5
schedule = "cosine"
warmup_ratio = 0.1
[balance]
loss = "micro_batch"
coefficient = 0.01
END
rm -rf "$work/first" "$work/second"
"$pith" train "$work/run.toml" out="$work/first" device=cpu dtype=fp32 >>"$work/log"
"$pith" train "$work/run.toml" out="$work/second" "$@" >>"$work/log"
paste <(grep -oP '"loss":\K[^,}]+' "$work/first/metrics.jsonl") \
  <(grep -oP '"loss":\K[^,}]+' "$work/second/metrics.jsonl") |
  awk '{ first[NR] = $1; second[NR] = $2 }
    END {
      if (NR != 200) { print "FAIL: " NR " losses instead of 200"; exit 1 }
      for (i = 151; i <= 200; ++i) {
        d = (second[i] - first[i]) / first[i] * 2  # percent, of 50
        signed += d
        absolute += d < 0 ? -d : d
      }
      # Not a number is in no range.
      pass = absolute < 0.5 && signed < 0.1 && signed > -0.1
      printf "%s: loss %.3f to %.3f and %.3f; last 50 differ by %.3f%% (signed %+.3f%%)\n", pass ? "PASS" : "FAIL",
        first[1], first[200], second[200], absolute, signed
      exit !pass
    }'
