#include "models/config.h"

#include <cmath>
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
  if (v && v->json() != wanted.json())
    fail_input("{}: {} = {} is not supported: use {}", config.where(), key, v->json(),
               wanted.json());
}

namespace {

double yarn_mscale(double scale, double mscale) {
  return scale <= 1 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0;
}

double yarn_attention_factor(const Value& p, double factor) {
  if (const Value* given = config_find(p, {"attention_factor"})) return given->as_real();
  const double mscale = config_real(p, "mscale", 0), all_dim = config_real(p, "mscale_all_dim", 0);
  if (mscale != 0 && all_dim != 0)
    return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim);
  return yarn_mscale(factor, 1);
}

}  // namespace

RopeConfig read_rope_config(const Value& config, double default_theta) {
  RopeConfig rope;
  rope.theta = config_real(config, "rope_theta", default_theta);
  const Value* p = config_find(config, {"rope_scaling"});
  if (!p || (p->is(Value::Kind::object) && p->members().empty()))
    p = config_find(config, {"rope_parameters"});
  if (!p) return rope;
  if (!p->is(Value::Kind::object)) p->reject("an object");
  rope.theta = config_real(*p, "rope_theta", rope.theta);
  if (const Value* type = config_find(*p, {"rope_type", "type"})) rope.type = type->as_string();
  if (config_real(*p, "partial_rotary_factor", 1) != 1)
    fail_input("{}: partial_rotary_factor {} is not supported by this architecture: use 1",
               p->where(), config_real(*p, "partial_rotary_factor", 1));
  if (rope.type == "default") return rope;
  if (rope.type != "linear" && rope.type != "yarn" && rope.type != "llama3")
    fail_input("{}: rope_type '{}' is not supported: use default, linear, yarn or llama3",
               p->where(), rope.type);
  const double limit = config_real(config, "max_position_embeddings", 0);
  rope.original_positions = config_real(config, "original_max_position_embeddings",
                                        config_real(*p, "original_max_position_embeddings", limit));
  if (rope.type != "linear" && rope.original_positions <= 0)
    fail_input("{}: rope_type {} needs original_max_position_embeddings", p->where(), rope.type);
  rope.factor =
      config_real(*p, "factor", rope.type == "yarn" ? limit / rope.original_positions : 0);
  if (!(rope.factor >= 1))
    fail_input("{}: factor is {}: use a number of at least 1", p->where(), rope.factor);
  if (rope.type == "yarn") rope.attention_factor = yarn_attention_factor(*p, rope.factor);
  rope.beta_fast = config_real(*p, "beta_fast", 32);
  rope.beta_slow = config_real(*p, "beta_slow", 1);
  rope.low_freq_factor = config_real(*p, "low_freq_factor", 1);
  rope.high_freq_factor = config_real(*p, "high_freq_factor", 4);
  rope.truncate = config_flag(*p, "truncate", true);
  return rope;
}

namespace {

// Share of the unscaled frequency that channel pair i keeps: 1 for fast ones, 0 for slow ones.
double yarn_extrapolation(const RopeConfig& r, int64_t dim, int64_t i) {
  const auto correction = [&](double rotations) {
    return dim * std::log(r.original_positions / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(r.theta));
  };
  double low = correction(r.beta_fast), high = correction(r.beta_slow);
  if (r.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, double(dim - 1));
  if (low == high) high += 0.001;
  return 1 - std::clamp((double(i) - low) / (high - low), 0.0, 1.0);
}

double scaled_frequency(const RopeConfig& r, int64_t dim, int64_t i, double f) {
  if (r.type == "linear") return f / r.factor;
  if (r.type == "yarn") {
    const double keep = yarn_extrapolation(r, dim, i);
    return f / r.factor * (1 - keep) + f * keep;
  }
  if (r.type == "llama3") {
    const double wavelength = 2 * std::numbers::pi / f;
    const double low = r.original_positions / r.low_freq_factor,
                 high = r.original_positions / r.high_freq_factor;
    if (wavelength < high) return f;
    if (wavelength > low) return f / r.factor;
    const double smooth = (r.original_positions / wavelength - r.low_freq_factor) /
                          (r.high_freq_factor - r.low_freq_factor);
    return (1 - smooth) * f / r.factor + smooth * f;
  }
  return f;
}

}  // namespace

RopeTable make_rope_table(const RopeConfig& r, int64_t dim, int64_t positions, DType dtype,
                          Device device) {
  const Shape shape{positions, dim / 2};
  RopeTable table{Tensor(shape, dtype, device, "rope"), Tensor(shape, dtype, device, "rope")};
  if (device == Device::meta) return table;
  std::vector<double> cos(shape.numel()), sin(shape.numel());
  for (int64_t i = 0; i < dim / 2; ++i) {
    const float base = 1.0f / float(std::pow(float(r.theta), float(2 * i) / float(dim)));
    const float frequency = float(scaled_frequency(r, dim, i, base));
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
  const auto copy = [&](const char* from, const char* to) {
    const Value* v = config_find(config, {from});
    if (v && !config_find(config, {to})) config[to] = Value(*v);
  };
  copy("num_experts", "num_local_experts");
  copy("num_local_experts", "num_experts");
  copy("torch_dtype", "dtype");
  copy("dtype", "torch_dtype");
  const Value* v4 = config_find(config, {"rope_scaling"});
  const Value* v5 = config_find(config, {"rope_parameters"});
  if (v5 && !v4) {
    const Value rope = *v5;
    if (const Value* theta = config_find(rope, {"rope_theta"})) config["rope_theta"] = *theta;
    const Value* type = config_find(rope, {"rope_type", "type"});
    config["rope_scaling"] = type && type->as_string() != "default" ? rope : Value();
  } else {
    Value rope = v4 ? *v4 : Value::object({{"rope_type", "default"}});
    if (const Value* type = rope.find("type"); type && !rope.find("rope_type"))
      rope["rope_type"] = Value(*type);
    if (const Value* theta = config_find(config, {"rope_theta"})) rope["rope_theta"] = *theta;
    config["rope_parameters"] = rope;
  }
  return config;
}

}  // namespace pith
