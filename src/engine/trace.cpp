#include "engine/trace.h"

#include <filesystem>

#include "engine/npz.h"

namespace pith {
namespace {

std::string trace_path(const std::string& directory, int64_t step) {
  return fmt::format("{}/step-{:08d}.npz", directory, step);
}

}  // namespace

void write_routing_trace(const std::string& directory, int64_t step, const StepSums& sums,
                         const Batch& batch) {
  if (sums.trace.empty() || sums.trace[0].empty()) return;
  const int64_t layers = int64_t(sums.trace[0].size()), k = sums.trace[0][0].ids.dim(1);
  std::vector<int32_t> ids;
  std::vector<float> weights;
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (const std::vector<Routing>& micro_batch : sums.trace) {
      const std::vector<int32_t> i = micro_batch[size_t(layer)].ids.to_vector<int32_t>();
      const std::vector<float> w = micro_batch[size_t(layer)].weights.to_vector<float>();
      ids.insert(ids.end(), i.begin(), i.end());
      weights.insert(weights.end(), w.begin(), w.end());
    }
  }
  std::filesystem::create_directories(directory);
  const std::vector<int64_t> shape = {layers, batch.batch, batch.sequence, k};
  write_npz(trace_path(directory, step),
            {{"expert_ids", shape, ids}, {"gate_weights", shape, weights}});
}

std::vector<Tensor> read_routing_trace(const std::string& directory, int64_t step,
                                       const Model::Size& model, const Batch& batch) {
  const std::string path = trace_path(directory, step);
  const std::vector<int64_t> want = {model.moe_layers, batch.batch, batch.sequence, model.top_k};
  for (const NpyArray& a : read_npz(path)) {
    if (a.name != "expert_ids") continue;
    const auto* ids = std::get_if<std::vector<int32_t>>(&a.data);
    if (!ids || a.shape != want)
      fail_input("{}: expert_ids is {}, this run routes int32 {}", path, Shape(a.shape).str(),
                 Shape(want).str());
    std::vector<Tensor> layers;
    const int64_t rows = batch.batch * batch.sequence, n = rows * model.top_k;
    for (int64_t l = 0; l < model.moe_layers; ++l)
      layers.push_back(Tensor::of<int32_t>({rows, model.top_k},
                                           std::span(*ids).subspan(size_t(l * n), size_t(n))));
    return layers;
  }
  fail_input("{}: has no array expert_ids", path);
}

}  // namespace pith
