#include "engine/trace.h"

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
  for (size_t layer = 0; layer < sums.trace[0].size(); ++layer) {
    for (const std::vector<Routing>& micro_batch : sums.trace) {
      const auto i = micro_batch[layer].ids.to_vector<int32_t>();
      const auto w = micro_batch[layer].weights.to_vector<float>();
      ids.insert(ids.end(), i.begin(), i.end());
      weights.insert(weights.end(), w.begin(), w.end());
    }
  }
  const Shape shape = {layers, batch.batch, batch.sequence, k};
  write_npz(trace_path(directory, step), {{"expert_ids", Tensor::of<int32_t>(shape, ids)},
                                          {"gate_weights", Tensor::of<float>(shape, weights)}});
}

std::vector<Tensor> read_routing_trace(const std::string& directory, int64_t step,
                                       const Model::Size& model, const Batch& batch) {
  const std::string path = trace_path(directory, step);
  const Tensor ids = read_npz(path)["expert_ids"];
  const Shape want = {model.moe_layers, batch.batch, batch.sequence, model.top_k};
  if (!ids || ids.dtype() != DType::i32 || ids.shape() != want)
    fail_input("{}: expert_ids is {}, this run routes int32 {}", path,
               ids ? ids.shape().str() : "missing", want.str());
  std::vector<Tensor> layers;
  for (int64_t l = 0; l < model.moe_layers; ++l)
    layers.push_back(ids.row_range(l, l + 1).reshape({batch.batch * batch.sequence, model.top_k}));
  return layers;
}

}  // namespace pith
