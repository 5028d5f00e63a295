#!/usr/bin/env bash
# From the compiler's own headers to a language model that writes C++, with the same commands as any
# other run. Each step continues where it was, or sees that it is done: running this again is cheap.
# Arguments go to `pith train`: examples/tiny/demo.sh train.steps=100
set -euo pipefail
cd "$(dirname "$0")/../.."
pith=build/pith
tokenizer=examples/tiny/tokenizer.json
out=runs/tiny
log=$out.log

step() { printf '\n== %s\n' "$*"; }
mkdir -p corpus runs

step "1/3  tokenize the C and C++ headers of this machine; every 20th file is held out"
headers() {
  find "/usr/include/c++/$(g++ -dumpversion)" /usr/include/linux -type f | LC_ALL=C sort
}
mapfile -t train < <(headers | awk 'NR % 20 != 0')
mapfile -t validation < <(headers | awk 'NR % 20 == 0')
$pith tokenize --tokenizer $tokenizer --output corpus/train --input "${train[@]}"
$pith tokenize --tokenizer $tokenizer --output corpus/validation --input "${validation[@]}"

step "2/3  train a mixture-of-experts model on them, from random weights"
$pith train examples/tiny/run.toml "$@" | tee -a $log |
  { grep --line-buffered -E '^step [0-9]*[05]0/|validation_loss' || true; }
before=$(grep -oP '^step 0/.*validation_loss \K\S+' $log | tail -1 || true)
after=$(grep -oP '^step .*validation_loss \K\S+' $log | tail -1 || true)
echo "validation loss $before before, $after after; every step is in $out/metrics.jsonl"

step "3/3  what it writes"
prompt='template <typename _Tp>'
$pith generate --model $out/latest --prompt "$prompt" --tokens 160 --temperature 0.7 --seed 1

step "the model is in $out/latest ($(readlink $out/latest)); transformers opens it as it is:"
cat <<END
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("$out/latest")
  tokenizer = AutoTokenizer.from_pretrained("$out/latest")
  ids = tokenizer("$prompt", return_tensors="pt").input_ids
  print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0]))
END
