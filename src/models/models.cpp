#include "models/qwen3_moe.h"

namespace pith {

std::unique_ptr<Model> make_model(const Value& config, const ModelOptions& options) {
  const std::string& type = config.at("model_type").as_string();
  if (type == "qwen3_moe") return std::make_unique<Qwen3Moe>(config, options);
  fail_input("{}: model_type '{}' is not supported: use qwen3_moe", config.where(), type);
}

}  // namespace pith
