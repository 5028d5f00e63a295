#include "engine/run_config.h"

#include "core/file.h"
#include "core/value.h"

namespace pith {
namespace {

// What a single value must be: a number in [low, high], or one of `words`, separated by " | ".
struct Rule {
  const char* words = "";
  double low = -1e300, high = 1e300;
  const char* expected = "a finite number";
};
constexpr double kLargest = 2e9;  // of any count: the product of two stays inside int64
constexpr Rule kAny;
constexpr Rule kPositive{"", 1, kLargest, "an integer from 1 to 2000000000"};
constexpr Rule kCount{"", 0, kLargest, "an integer from 0 to 2000000000"};
constexpr Rule kAmount{"", 0, 1e30, "a finite number, 0 or more"};
constexpr Rule kRatio{"", 0, 1, "a number from 0 to 1"};
constexpr Rule kDecay{"", 0, 1 - 1e-12, "a number, 0 or more and below 1"};

// Every key, once: f(dotted name, member, rule). Reading, printing, checking and suggestions all go
// through here.
template <class Config, class F> void for_each_key(Config&& c, F&& f) {
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
  f("train.force_balance", c.balance.force, kAny);
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

bool is_pair(const Value& v) { return v.is(Value::Kind::array) && v.items().size() == 2; }

void get(const Value& v, WeightedCorpus& out) {
  const bool weighted = is_pair(v);
  if (!weighted && !v.is(Value::Kind::string)) v.reject("a corpus prefix or [prefix, weight]");
  out = {(weighted ? v.items()[0] : v).as_string(), weighted ? v.items()[1].as_real() : 1.0};
}

void get(const Value& v, std::array<double, 2>& out) {
  if (!is_pair(v)) v.reject("a list of two numbers");
  out = {v.items()[0].as_real(), v.items()[1].as_real()};
}

// A list; a lone item stands for a list of one.
template <class T> void get(const Value& v, std::vector<T>& out) {
  out.clear();
  if (!v.is(Value::Kind::array)) return get(v, out.emplace_back());
  for (const Value& item : v.items()) get(item, out.emplace_back());
}

template <class T> Value put(const T& v) { return Value(v); }
Value put(const WeightedCorpus& v) { return Value::array({v.first, v.second}); }
Value put(const std::array<double, 2>& v) { return Value::array({v[0], v[1]}); }
template <class T> Value put(const std::vector<T>& list) {
  Value v = Value::array();
  for (const T& item : list) v.push_back(put(item));
  return v;
}

// "train" and "steps" of "train.steps"; "" and "out" of "out".
std::string section_of(const std::string& key) {
  return key.substr(0, key.find('.') == key.npos ? 0 : key.find('.'));
}
std::string name_in_section(const std::string& key) { return key.substr(key.find('.') + 1); }

// How long a stretch of the longer one is left after what both begin and end with.
size_t difference(std::string_view a, std::string_view b) {
  const auto front = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
  const auto back =
      std::mismatch(a.rbegin(), a.rend() - front, b.rbegin(), b.rend() - front).first - a.rbegin();
  return std::max(a.size(), b.size()) - size_t(front + back);
}

// "did you mean train.steps?", else what there is at this level.
std::string suggestion(const std::string& key) {
  const std::string section = section_of(key), name = name_in_section(key);
  std::string best, level;
  size_t least = std::max<size_t>(2, name.size() / 3) + 1;
  for_each_key(RunConfig(), [&](const std::string& k, auto&, const Rule&) {
    const bool here = section_of(k) == section;
    const size_t d = std::min(difference(key, k), difference(name, name_in_section(k)) + !here);
    if (d < least) best = k;
    least = std::min(d, least);
    const std::string item = " " + (here ? name_in_section(k) : section_of(k));
    if ((here || section.empty()) && !level.ends_with(item)) level += item;
  });
  return best.empty() ? "known here:" + level : "did you mean " + best + "?";
}

using Found = std::map<std::string, Value>;  // every dotted key; null where nothing was found

// Puts the known keys of `v`, which stands under `key` ("" for a whole file), in place of what was
// found before.
void collect(const Value& v, const std::string& key, Found& found) {
  const std::string prefix = key.empty() ? "" : key + ".";
  if (found.contains(key))
    found[key] = v;
  else if (std::ranges::none_of(found, [&](auto& k) { return k.first.starts_with(prefix); }))
    fail_input("{}: unknown key; {}", v.where(), suggestion(key));
  else if (!v.is(Value::Kind::object))
    v.reject(fmt::format("a section, [{}]", key));
  else
    for (const auto& [name, item] : v.members()) collect(item, prefix + name, found);
}

// "train.steps=20" as a tree. What is no TOML value is a string.
Value parse_override(const std::string& text) {
  const std::string place = "command line";
  const size_t equals = text.find('=');
  if (equals == text.npos || equals == 0)
    fail_input("{}: expected section.key=value, got \"{}\"", place, printable(text));
  const std::string key = text.substr(0, equals), value = text.substr(equals + 1);
  try {
    Value tree = parse_toml(text, place);
    if (tree.members().size() == 1) return tree;
  } catch (const InputError&) {
    if (!value.empty() && std::string_view("\"'[{").find(value[0]) != value.npos) throw;
  }
  return parse_toml(key + " = " + Value(value).json(), place);
}

template <class... A> void refuse(bool wrong, fmt::format_string<A...> why, A&&... a) {
  if (wrong) fail_input(why, std::forward<A>(a)...);
}

// Against the rule of its key; a list item by item.
template <class T> void check(const char* key, const T& value, const Rule& rule) {
  if constexpr (std::is_arithmetic_v<T>) {
    const bool ok = double(value) >= rule.low && double(value) <= rule.high;  // false for NaN
    refuse(!ok, "{} = {}: expected {}", key, value, rule.expected);
  } else if constexpr (std::is_same_v<T, std::string>) {
    const auto spaced = [](const std::string& words) { return " | " + words + " | "; };
    const bool ok =
        value.find(' ') == value.npos && spaced(rule.words).find(spaced(value)) != value.npos;
    refuse(*rule.words && !ok, "{} = \"{}\": expected {}", key, printable(value), rule.words);
  } else if constexpr (std::is_same_v<T, WeightedCorpus>) {
    const auto& [prefix, weight] = value;
    refuse(prefix.empty(), "{}: expected a corpus prefix, got \"\"", key);
    refuse(!(weight > 0 && weight <= 1e30), "{}: weight {} of {}: expected a positive number", key,
           weight, printable(prefix));
  } else {
    for (const auto& item : value) check(key, item, rule);
  }
}

void check(const RunConfig& c) {
  for_each_key(c,
               [](const char* key, auto& member, const Rule& rule) { check(key, member, rule); });
  for (const auto& [key, size] :
       {std::pair("pp", c.mesh.pp), std::pair("cp", c.mesh.cp), std::pair("ep", c.mesh.ep)})
    refuse(size != 1, "mesh.{} = {} needs several processes: this build runs one process, use 1",
           key, size);
  refuse(c.model.empty(), "model is not set: name a config.json or a Hugging Face directory");
  refuse(c.out.empty(), "out is not set: name the directory that the run writes to");
  refuse(c.data.train.empty(),
         "data.train is empty: name at least one corpus, as [[\"corpus/a\", 1.0]]");
  refuse(c.dtype == "fp64" && c.device == "cuda",
         "dtype = \"fp64\" runs on the cpu only: use device=\"cpu\", or bf16 or fp32");
  const TrainConfig& t = c.train;
  refuse(t.main_grad == "bf16" && (c.dtype != "bf16" || c.device != "cuda"),
         "train.main_grad = \"bf16\" needs dtype = \"bf16\" and device = \"cuda\": use \"fp32\"");
  refuse(t.global_batch_size % t.micro_batch_size != 0,
         "train.global_batch_size = {} is not a multiple of train.micro_batch_size = {}",
         t.global_batch_size, t.micro_batch_size);
  const OptimizerConfig& o = c.optimizer;
  refuse(o.schedule == "wsd" && o.warmup_ratio + o.decay_ratio > 1,
         "optimizer.warmup_ratio = {} and decay_ratio = {} are more than 1 together",
         o.warmup_ratio, o.decay_ratio);
  refuse(c.balance.coefficient > 0 && c.balance.loss == "none",
         "balance.coefficient = {} needs balance.loss, which is \"none\"", c.balance.coefficient);
  refuse(c.eval.every > 0 && c.data.validation.empty(),
         "eval.every = {} needs data.validation, which is empty", c.eval.every);
  refuse(c.balance.force && !c.trace.replay.empty(),
         "train.force_balance and trace.replay both decide the routing: use one of them");
  refuse(!c.trace.routing.empty() && c.trace.routing == c.trace.replay,
         "trace.routing = \"{}\" would overwrite the trace that trace.replay reads",
         c.trace.routing);
}

}  // namespace

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
  RunConfig config;
  Found found;
  for_each_key(config, [&](const char* key, auto&, const Rule&) { found[key]; });
  collect(parse_toml(read_file(path), path), "", found);
  for (const std::string& text : overrides) collect(parse_override(text), "", found);
  for_each_key(config, [&](const char* key, auto& member, const Rule&) {
    if (!found[key].is_null()) get(found[key], member);
  });
  try {
    check(config);
  } catch (const InputError& e) {
    fail_input("{}: {}", path, e.what());
  }
  return config;
}

}  // namespace pith
