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
  Value parameters;
  std::string type;
  double theta, factor = 1, attention_factor = 1, original_positions = 0;
};

double yarn_attention_factor(const Value& p, double factor) {
  const auto scale = [&](double mscale) { return 0.1 * mscale * std::log(factor) + 1.0; };
  const double mscale = config_real(p, "mscale", 0), all_dim = config_real(p, "mscale_all_dim", 0);
  const bool both = mscale != 0 && all_dim != 0;
  return config_real(p, "attention_factor", both ? scale(mscale) / scale(all_dim) : scale(1));
}

Rope read_rope(const Value& config) {
  const Value p = rope_parameters(config);
  Rope rope{p, p.at("rope_type").as_string(), p.at("rope_theta").as_real()};
  config_only(p, "partial_rotary_factor", 1.0);
  if (rope.type == "default") return rope;
  if (rope.type != "linear" && rope.type != "yarn" && rope.type != "llama3")
    fail_input("{}: rope_type '{}' is not supported: use default, linear, yarn or llama3",
               p.where(), rope.type);
  const double limit = config_real(config, "max_position_embeddings", 0);
  rope.original_positions = config_real(config, "original_max_position_embeddings",
                                        config_real(p, "original_max_position_embeddings", limit));
  if (rope.type != "linear" && rope.original_positions <= 0)
    fail_input("{}: rope_type {} needs original_max_position_embeddings", p.where(), rope.type);
  rope.factor = config_real(p, "factor", rope.type == "yarn" ? limit / rope.original_positions : 0);
  if (!(rope.factor >= 1))
    fail_input("{}: factor is {}: use a number of at least 1", p.where(), rope.factor);
  if (rope.type == "yarn") rope.attention_factor = yarn_attention_factor(p, rope.factor);
  return rope;
}

// `f` is the unscaled frequency of channel pair i.
double yarn_frequency(const Rope& r, int64_t dim, int64_t i, double f) {
  const auto correction = [&](double rotations) {
    return dim * std::log(r.original_positions / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(r.theta));
  };
  double low = correction(config_real(r.parameters, "beta_fast", 32));
  double high = correction(config_real(r.parameters, "beta_slow", 1));
  if (config_flag(r.parameters, "truncate", true)) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, double(dim - 1));
  if (low == high) high += 0.001;
  // 1 for fast pairs, 0 for slow ones.
  const double keep = 1 - std::clamp((double(i) - low) / (high - low), 0.0, 1.0);
  return f / r.factor * (1 - keep) + f * keep;
}

double llama3_frequency(const Rope& r, double f) {
  const double low = config_real(r.parameters, "low_freq_factor", 1),
               high = config_real(r.parameters, "high_freq_factor", 4),
               wavelength = 2 * std::numbers::pi / f;
  if (wavelength < r.original_positions / high) return f;
  if (wavelength > r.original_positions / low) return f / r.factor;
  const double smooth = (r.original_positions / wavelength - low) / (high - low);
  return (1 - smooth) * f / r.factor + smooth * f;
}

}  // namespace

RopeTable make_rope_table(const Value& config, int64_t dim, int64_t positions, DType dtype,
                          Device device) {
  const Rope r = read_rope(config);
  const Shape shape{positions, dim / 2};
  RopeTable table{Tensor(shape, dtype, device, "rope"), Tensor(shape, dtype, device, "rope")};
  if (device == Device::meta) return table;
  std::vector<double> cos(shape.numel()), sin(shape.numel());
  for (int64_t i = 0; i < dim / 2; ++i) {
    const double base = 1.0f / float(std::pow(float(r.theta), float(2 * i) / float(dim)));
    const float frequency = float(r.type == "yarn"     ? yarn_frequency(r, dim, i, base)
                                  : r.type == "llama3" ? llama3_frequency(r, base)
                                                       : base / r.factor);
    for (int64_t p = 0; p < positions; ++p) {
      const float angle = float(p) * frequency;
      cos[p * (dim / 2) + i] = std::cos(double(angle)) * r.attention_factor;
      sin[p * (dim / 2) + i] = std::sin(double(angle)) * r.attention_factor;
    }
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
