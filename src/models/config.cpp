#include "models/config.h"

#include <numbers>

namespace pith {

const Value* config_find(const Value& config, std::initializer_list<const char*> spellings) {
  for (const char* key : spellings)
    if (const Value* v = config.find(key); v && !v->is_null()) return v;
  return nullptr;
}

int64_t config_size(const Value& config, std::initializer_list<const char*> spellings,
                    int64_t fallback) {
  const Value* v = config_find(config, spellings);
  if (!v && fallback > 0) return fallback;
  if (!v) fail_input("{}: the key {} is missing", config.where(), *spellings.begin());
  if (v->as_int() <= 0) v->reject("a positive integer");
  return v->as_int();
}

double config_real(const Value& config, const char* key, double fallback) {
  const Value* v = config_find(config, {key});
  return v ? v->as_real() : fallback;
}

bool config_flag(const Value& config, const char* key, bool fallback) {
  const Value* v = config_find(config, {key});
  return v ? v->as_bool() : fallback;
}

void config_only(const Value& config, const char* key, const Value& wanted) {
  const Value* v = config_find(config, {key});
  if (!v) return;
  const bool number = wanted.is(Value::Kind::real);
  if (number ? v->as_real() != wanted.as_real() : v->json() != wanted.json())
    fail_input("{}: {} = {} is not supported: use {}", config.where(), key, v->json(),
               wanted.json());
}

namespace {

// The rotary settings as transformers 5 spells them; rope_type and rope_theta are always there.
Value rope_parameters(const Value& config) {
  const Value* given = config_find(config, {"rope_scaling", "rope_parameters"});
  Value rope = given ? *given : Value::object();
  const Value* type = config_find(rope, {"rope_type", "type"});
  rope["rope_type"] = type ? Value(*type) : "default";
  const Value* theta = config_find(rope, {"rope_theta"});
  if (!theta) theta = config_find(config, {"rope_theta"});
  rope["rope_theta"] = theta ? Value(*theta) : 10000.0;
  return rope;
}

struct Rope {
  std::vector<float> frequencies;  // of the channel pairs
  double attention_factor = 1;     // of cos and sin
};

double yarn_attention_factor(const Value& p, double factor) {
  const auto scale = [&](double mscale) { return 0.1 * mscale * std::log(factor) + 1.0; };
  const double mscale = config_real(p, "mscale", 0), all_dim = config_real(p, "mscale_all_dim", 0);
  const bool both = mscale != 0 && all_dim != 0;
  return config_real(p, "attention_factor", both ? scale(mscale) / scale(all_dim) : scale(1));
}

Rope read_rope(const Value& config, int64_t dim) {
  const Value p = rope_parameters(config);
  const std::string& type = p.at("rope_type").as_string();
  const bool linear = type == "linear", yarn = type == "yarn", llama3 = type == "llama3";
  config_only(p, "partial_rotary_factor", 1.0);
  if (!linear && !yarn && !llama3 && type != "default")
    fail_input("{}: rope_type '{}' is not supported: use default, linear, yarn or llama3",
               p.where(), type);
  const double theta = p.at("rope_theta").as_real(),
               limit = config_real(config, "max_position_embeddings", 0),
               given = config_real(p, "original_max_position_embeddings", limit),
               original = config_real(config, "original_max_position_embeddings", given),
               factor =
                   type == "default" ? 1 : config_real(p, "factor", yarn ? limit / original : 0);
  if ((yarn || llama3) && original <= 0)
    fail_input("{}: rope_type {} needs original_max_position_embeddings", p.where(), type);
  if (!(factor >= 1)) fail_input("{}: factor is {}: use a number of at least 1", p.where(), factor);

  // Yarn: the pair that makes so many turns in the original positions. The frequencies of pairs
  // below `low` are kept, those above `high` divided.
  const auto pair_of = [&](const char* key, double fallback) {
    const double turns = config_real(p, key, fallback);
    return dim * std::log(original / (turns * 2 * std::numbers::pi)) / (2 * std::log(theta));
  };
  double low = pair_of("beta_fast", 32), high = pair_of("beta_slow", 1);
  if (config_flag(p, "truncate", true)) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, double(dim - 1));
  if (low == high) high += 0.001;

  Rope rope;
  if (yarn) rope.attention_factor = yarn_attention_factor(p, factor);
  for (int64_t i = 0; i < dim / 2; ++i) {
    const double f = 1.0f / float(std::pow(float(theta), float(2 * i) / float(dim)));
    double keep = 0;  // the share of f that is not divided
    if (yarn) keep = 1 - std::clamp((double(i) - low) / (high - low), 0.0, 1.0);
    if (llama3) {
      const double slow = config_real(p, "low_freq_factor", 1),
                   fast = config_real(p, "high_freq_factor", 4),
                   turns = original / (2 * std::numbers::pi / f);
      keep = std::clamp((turns - slow) / (fast - slow), 0.0, 1.0);
    }
    rope.frequencies.push_back(float(f / factor * (1 - keep) + f * keep));
  }
  return rope;
}

}  // namespace

RopeTable make_rope_table(const Value& config, int64_t dim, int64_t positions, DType dtype,
                          Device device) {
  const Rope rope = read_rope(config, dim);
  const Shape shape{positions, dim / 2};
  RopeTable table{Tensor(shape, dtype, device, "rope"), Tensor(shape, dtype, device, "rope")};
  if (device == Device::meta) return table;
  std::vector<double> cos, sin;
  for (int64_t p = 0; p < positions; ++p)
    for (const float frequency : rope.frequencies) {
      const float angle = float(p) * frequency;
      cos.push_back(std::cos(double(angle)) * rope.attention_factor);
      sin.push_back(std::sin(double(angle)) * rope.attention_factor);
    }
  table.cos.copy_from(Tensor::of<double>(shape, cos));
  table.sin.copy_from(Tensor::of<double>(shape, sin));
  return table;
}

Value with_both_spellings(Value config) {
  const Value rope = rope_parameters(config),
              experts = *config_find(config, {"num_experts", "num_local_experts"});
  for (const char* key : {"num_experts", "num_local_experts"}) config[key] = experts;
  config["rope_theta"] = rope.at("rope_theta");
  config["rope_parameters"] = rope;
  if (!config_find(config, {"rope_scaling"}))
    config["rope_scaling"] = rope.at("rope_type").as_string() == "default" ? Value() : rope;
  return config;
}

}  // namespace pith
