#include "models/model.h"

namespace pith {

Tensor wide_scalar(const Context& c, double value) {
  return Tensor::of<double>({1}, std::vector{value}).to(master_dtype(c.dtype), "loss").on(c.device);
}

double value_of(const Tensor& scalar) {
  return scalar.device() == Device::meta ? 0 : scalar.to_vector<double>()[0];
}

std::unique_ptr<Model> make_model(const Value& config, const ModelOptions& options) {
  const std::string& type = config.at("model_type").as_string();
  if (type == "qwen3_moe") return make_qwen3_moe(config, options);
  fail_input("{}: model_type '{}' is not supported: use qwen3_moe", config.where(), type);
}

}  // namespace pith
