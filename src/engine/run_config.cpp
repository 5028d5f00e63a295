#include "engine/run_config.h"

#include <algorithm>
#include <cctype>
#include <string_view>
#include <type_traits>
#include <utility>

#include "core/error.h"
#include "core/file.h"
#include "core/value.h"

namespace pith {
namespace {

#ifdef PITH_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// What a single value must be: a number in [low, high], or one of `words`, separated by " | ".
struct Rule {
  const char* words = "";
  double low = -1e300, high = 1e300;
  const char* expected = "a finite number";
};
constexpr double kLargest = 2e9;  // of any count: the product of two stays inside int64
constexpr double kBelowOne = 1 - 1e-12;
constexpr Rule kAny;
constexpr Rule kPositive{"", 1, kLargest, "an integer from 1 to 2000000000"};
constexpr Rule kCount{"", 0, kLargest, "an integer from 0 to 2000000000"};
constexpr Rule kAmount{"", 0, 1e30, "a finite number, 0 or more"};
constexpr Rule kRatio{"", 0, 1, "a number from 0 to 1"};
constexpr Rule kDecay{"", 0, kBelowOne, "a number, 0 or more and below 1"};

// Every key, once: f(dotted name, member, rule). Reading, printing, checking and suggestions all go
// through here.
template <class Config, class F> void for_each_key(Config& c, F&& f) {
  f("model", c.model, kAny);
  f("tokenizer", c.tokenizer, kAny);
  f("out", c.out, kAny);
  f("device", c.device, Rule{"cpu | cuda | auto"});
  f("dtype", c.dtype, Rule{"bf16 | fp32 | fp64"});
  f("deterministic", c.deterministic, kAny);
  f("resume", c.resume, kAny);

  f("data.train", c.data.train, kAny);
  f("data.validation", c.data.validation, kAny);
  f("data.sequence_length", c.data.sequence_length, kPositive);
  f("data.document_mask", c.data.document_mask, kAny);

  f("train.steps", c.train.steps, kPositive);
  f("train.stop_after", c.train.stop_after, kCount);
  f("train.global_batch_size", c.train.global_batch_size, kPositive);
  f("train.micro_batch_size", c.train.micro_batch_size, kPositive);
  f("train.seed", c.train.seed, Rule{"", 0, 1e19, "an integer, 0 or more"});
  f("train.max_minutes", c.train.max_minutes, kAmount);
  f("train.wgrad_micro_batches", c.train.wgrad_micro_batches, kPositive);
  f("train.main_grad", c.train.main_grad, Rule{"fp32 | bf16"});
  f("train.force_balance", c.train.force_balance, kAny);
  f("train.recompute", c.train.recompute, Rule{"norm | swiglu | gather | stage1"});

  f("optimizer.name", c.optimizer.name, Rule{"adamw | muon"});
  f("optimizer.lr", c.optimizer.lr, kAmount);
  f("optimizer.final_lr", c.optimizer.final_lr, kAmount);
  f("optimizer.schedule", c.optimizer.schedule, Rule{"wsd | cosine | linear | constant"});
  f("optimizer.warmup_ratio", c.optimizer.warmup_ratio, kRatio);
  f("optimizer.decay_ratio", c.optimizer.decay_ratio, kRatio);
  f("optimizer.betas", c.optimizer.betas, kDecay);
  f("optimizer.eps", c.optimizer.eps, Rule{"", 1e-300, 1, "a positive number up to 1"});
  f("optimizer.momentum", c.optimizer.momentum, kDecay);
  f("optimizer.weight_decay", c.optimizer.weight_decay, kAmount);
  f("optimizer.clip_norm", c.optimizer.clip_norm, kAmount);

  f("balance.loss", c.balance.loss, Rule{"none | micro_batch | sequence | global_batch"});
  f("balance.coefficient", c.balance.coefficient, kAmount);
  f("balance.z_loss", c.balance.z_loss, kAmount);
  f("balance.bias_update_rate", c.balance.bias_update_rate, kAmount);
  f("balance.bias_export", c.balance.bias_export, Rule{"refuse | drop"});

  f("eval.every", c.eval.every, kCount);
  f("eval.batches", c.eval.batches, kPositive);

  f("checkpoint.every", c.checkpoint.every, kCount);
  f("checkpoint.keep_last", c.checkpoint.keep_last, kPositive);
  f("checkpoint.background", c.checkpoint.background, kAny);

  f("mesh.pp", c.mesh.pp, kPositive);
  f("mesh.cp", c.mesh.cp, kPositive);
  f("mesh.ep", c.mesh.ep, kPositive);
  f("mesh.shard", c.mesh.shard, Rule{"full | replicate_over_dp"});
  f("mesh.timeout_seconds", c.mesh.timeout_seconds, Rule{"", 1e-3, 1e9, "a positive number"});

  f("profile.steps", c.profile.steps, kPositive);
  f("trace.routing", c.trace.routing, kAny);
  f("trace.replay", c.trace.replay, kAny);
  f("debug.sync", c.debug.sync, kAny);
  f("debug.check_finite", c.debug.check_finite, kAny);
}

void get(const Value& v, bool& out) { out = v.as_bool(); }
void get(const Value& v, int64_t& out) { out = v.as_int(); }
void get(const Value& v, double& out) { out = v.as_real(); }
void get(const Value& v, std::string& out) { out = v.as_string(); }

void get(const Value& v, WeightedCorpus& out) {
  if (v.is(Value::Kind::string)) {
    out = {v.as_string()};
    return;
  }
  if (!v.is(Value::Kind::array) || v.items().size() != 2) {
    v.reject("a corpus prefix or [prefix, weight]");
  }
  out = {v.items()[0].as_string(), v.items()[1].as_real()};
}

void get(const Value& v, std::array<double, 2>& out) {
  if (!v.is(Value::Kind::array) || v.items().size() != 2) v.reject("a list of two numbers");
  out = {v.items()[0].as_real(), v.items()[1].as_real()};
}

// A list; a lone item stands for a list of one.
template <class T> void get(const Value& v, std::vector<T>& out) {
  out.clear();
  if (!v.is(Value::Kind::array)) return get(v, out.emplace_back());
  for (const Value& item : v.items()) get(item, out.emplace_back());
}

template <class T> Value put(const T& v) { return Value(v); }
Value put(const WeightedCorpus& v) { return Value::array({v.prefix, v.weight}); }
Value put(const std::array<double, 2>& v) { return Value::array({v[0], v[1]}); }
template <class T> Value put(const std::vector<T>& list) {
  Value v = Value::array();
  for (const T& item : list) v.push_back(put(item));
  return v;
}

std::string section_of(std::string_view key) {
  const size_t dot = key.find('.');
  return std::string(key.substr(0, dot == key.npos ? 0 : dot));
}
std::string name_in_section(std::string_view key) {
  return std::string(key.substr(key.find('.') + 1));  // npos + 1 == 0: a key without a section
}

std::vector<std::string> known_keys() {
  RunConfig defaults;
  std::vector<std::string> keys;
  for_each_key(defaults, [&](const char* key, auto&, const Rule&) { keys.emplace_back(key); });
  return keys;
}

// Levenshtein distance.
size_t edits(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j < row.size(); ++j) row[j] = j;
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t substituted = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({substituted, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

// "did you mean train.steps?", else what there is at this level.
std::string suggestion(const std::string& key) {
  const std::string section = section_of(key), name = name_in_section(key);
  std::string best, level;
  size_t least = std::max<size_t>(2, name.size() / 3) + 1;
  for (const std::string& k : known_keys()) {
    const bool here = section_of(k) == section;
    if (const size_t d = std::min(edits(key, k), edits(name, name_in_section(k)) + !here);
        d < least) {
      best = k;
      least = d;
    }
    const std::string item = here ? name_in_section(k) : section.empty() ? section_of(k) : "";
    if (!item.empty() && !level.ends_with(" " + item)) level += " " + item;
  }
  return best.empty() ? fmt::format("known here:{}", level) : fmt::format("did you mean {}?", best);
}

// `v` is what stands under `key`, "" for the whole file.
void reject_unknown(const Value& v, const std::string& key = "") {
  const std::vector<std::string> known = known_keys();
  const std::string prefix = key.empty() ? "" : key + ".";
  const auto below = [&](const std::string& k) { return k.starts_with(prefix); };
  if (std::find(known.begin(), known.end(), key) != known.end()) return;
  if (std::none_of(known.begin(), known.end(), below)) {
    fail_input("{}: unknown key; {}", v.where(), suggestion(key));
  }
  if (!v.is(Value::Kind::object)) v.reject(fmt::format("a section, [{}]", key));
  for (const auto& [name, item] : v.members()) reject_unknown(item, prefix + name);
}

// "train.steps=20" as a tree of its own, {train: {steps: 20}}.
Value parse_override(const std::string& text) {
  const std::string place = "command line";
  const size_t equals = text.find('=');
  const std::string key = text.substr(0, equals);
  const auto of_name = [](char c) {
    return std::isalnum(uint8_t(c)) || c == '_' || c == '-' || c == '.';
  };
  if (equals == text.npos || key.empty() || !std::all_of(key.begin(), key.end(), of_name)) {
    fail_input("{}: expected section.key=value, got \"{}\"", place, printable(text));
  }
  const std::string value = text.substr(equals + 1);
  try {
    Value tree = parse_toml(text, place);
    if (tree.members().size() == 1) return tree;
  } catch (const InputError&) {
    if (!value.empty() && std::string_view("\"'[{").find(value[0]) != std::string_view::npos) throw;
  }
  Value word = value;
  word.set_where(fmt::format("{}:1: {}", place, key));
  const std::string section = section_of(key);
  Value tree = Value::object({{name_in_section(key), std::move(word)}});
  return section.empty() ? tree : Value::object({{section, std::move(tree)}});
}

void merge(Value& into, const Value& from) {
  for (const auto& [key, v] : from.members()) {
    Value& target = into[key];
    if (v.is(Value::Kind::object) && target.is(Value::Kind::object)) {
      merge(target, v);
    } else {
      target = v;
    }
  }
}

void check(const char*, bool, const Rule&) {}
template <class T>
requires std::is_arithmetic_v<T>
void check(const char* key, T value, const Rule& rule) {
  const bool ok = double(value) >= rule.low && double(value) <= rule.high;  // false for NaN
  if (!ok) fail_input("{} = {}: expected {}", key, value, rule.expected);
}
void check(const char* key, const std::string& value, const Rule& rule) {
  const auto spaced = [](const std::string& words) { return " | " + words + " | "; };
  const bool word = value.find(' ') == value.npos;
  if (!*rule.words || (word && spaced(rule.words).find(spaced(value)) != value.npos)) return;
  fail_input("{} = \"{}\": expected {}", key, printable(value), rule.words);
}
void check(const char* key, const WeightedCorpus& corpus, const Rule&) {
  if (corpus.prefix.empty()) fail_input("{}: expected a corpus prefix, got \"\"", key);
  if (corpus.weight > 0 && corpus.weight <= 1e30) return;
  fail_input("{}: weight {} of {}: expected a positive number", key, corpus.weight,
             printable(corpus.prefix));
}
template <class List>
requires requires(List list) { list.begin(); }
void check(const char* key, const List& list, const Rule& rule) {
  for (const auto& item : list) check(key, item, rule);
}

// What this build, with its one process on the cpu, does not do yet or at all.
void check_back_end(const RunConfig& c) {
  if (c.dtype == "fp64" && c.device == "cuda") {
    fail_input("dtype = \"fp64\" runs on the cpu only: use device=\"cpu\", or bf16 or fp32");
  }
  if (c.device == "cuda" && !kHasCuda) {
    fail_input("this build has no CUDA back end: use device=\"cpu\"");
  }
  if (c.train.main_grad == "bf16") {
    fail_input("train.main_grad = \"bf16\": the cpu back end has fp32 only");
  }
  if (!c.train.recompute.empty()) {
    fail_input("train.recompute = [\"{}\"]: the cpu back end keeps every activation, use []",
               c.train.recompute[0]);
  }
  const std::pair<const char*, int64_t> mesh[] = {
      {"pp", c.mesh.pp}, {"cp", c.mesh.cp}, {"ep", c.mesh.ep}};
  for (const auto& [name, size] : mesh) {
    if (size == 1) continue;
    fail_input("mesh.{} = {} needs several processes: this build runs one process, use 1", name,
               size);
  }
}

}  // namespace

void RunConfig::validate() const {
  if (model.empty()) fail_input("model is not set: name a config.json or a Hugging Face directory");
  if (out.empty()) fail_input("out is not set: name the directory that the run writes to");
  if (data.train.empty()) {
    fail_input("data.train is empty: name at least one corpus, as [[\"corpus/a\", 1.0]]");
  }
  for_each_key(*this, [](const char* key, const auto& member, const Rule& rule) {
    check(key, member, rule);
  });
  check_back_end(*this);
  if (train.global_batch_size % train.micro_batch_size != 0) {
    fail_input("train.global_batch_size = {} is not a multiple of train.micro_batch_size = {}",
               train.global_batch_size, train.micro_batch_size);
  }
  if (optimizer.warmup_ratio + optimizer.decay_ratio > 1) {
    fail_input("optimizer.warmup_ratio = {} and decay_ratio = {} are more than 1 together",
               optimizer.warmup_ratio, optimizer.decay_ratio);
  }
  if (balance.coefficient > 0 && balance.loss == "none") {
    fail_input("balance.coefficient = {} needs balance.loss, which is \"none\"",
               balance.coefficient);
  }
  if (eval.every > 0 && data.validation.empty()) {
    fail_input("eval.every = {} needs data.validation, which is empty", eval.every);
  }
  if (train.force_balance && !trace.replay.empty()) {
    fail_input("train.force_balance and trace.replay both decide the routing: use one of them");
  }
  if (!trace.routing.empty() && trace.routing == trace.replay) {
    fail_input("trace.routing = \"{}\" would overwrite the trace that trace.replay reads",
               trace.routing);
  }
}

std::string RunConfig::to_toml() const {
  std::string text, section;
  for_each_key(*this, [&](const std::string& key, const auto& member, const Rule&) {
    if (section_of(key) != section) {
      section = section_of(key);
      text += fmt::format("\n[{}]\n", section);
    }
    // Strings, numbers and lists are spelled in JSON as in TOML.
    text += fmt::format("{} = {}\n", name_in_section(key), put(member).json());
  });
  return text;
}

RunConfig load_run_config(const std::string& path, const std::vector<std::string>& overrides) {
  Value tree = parse_toml(read_file(path), path);
  reject_unknown(tree);
  for (const std::string& text : overrides) {
    const Value extra = parse_override(text);
    reject_unknown(extra);
    merge(tree, extra);
  }
  RunConfig config;
  for_each_key(config, [&](const std::string& key, auto& member, const Rule&) {
    const Value* at = &tree;
    if (const std::string section = section_of(key); !section.empty()) at = at->find(section);
    if (at) at = at->find(name_in_section(key));
    if (at) get(*at, member);
  });
  try {
    config.validate();
  } catch (const InputError& e) {
    fail_input("{}: {}", path, e.what());
  }
  return config;
}

}  // namespace pith
