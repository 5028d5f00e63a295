#include "app/commands.h"
#include "core/safetensors.h"
#include "engine/checkpoint.h"

namespace pith {

std::unique_ptr<LoadedModel> load_model(const std::string& directory, const std::string& dtype,
                                        const std::string& device, int64_t max_positions,
                                        int64_t micro_batch_size, bool training) {
  if (device != "cpu")
    fail_input("--device {}: this build has no CUDA back end, use --device cpu", device);
  auto loaded = std::make_unique<LoadedModel>();
  loaded->context.dtype = parse_dtype(dtype);
  loaded->max_positions = max_positions;
  ModelOptions options;
  options.dtype = loaded->context.dtype;
  options.training = training;
  options.max_positions = max_positions;
  loaded->model = make_model(read_model_config(directory), options);
  Model& model = *loaded->model;
  if (!has_weights(directory)) fail_input("{} has no model.safetensors", directory);
  load_weights(model.params, directory, model.ignored_when_reading());
  TrainConfig train;
  train.micro_batch_size = micro_batch_size;
  loaded->pipeline = std::make_unique<Pipeline>(model, loaded->context, train);
  return loaded;
}

Batch batch_of(const std::vector<int32_t>& tokens, const std::vector<int32_t>& labels,
               int64_t rows) {
  Batch b;
  b.batch = rows;
  b.sequence = int64_t(tokens.size()) / rows;
  std::vector<int32_t> positions;
  for (size_t i = 0; i < tokens.size(); ++i) {
    positions.push_back(int32_t(int64_t(i) % b.sequence));
    b.label_count += labels[i] >= 0;
  }
  const Shape flat{int64_t(tokens.size())};
  b.tokens = Tensor::of<int32_t>(flat, tokens);
  b.labels = Tensor::of<int32_t>(flat, labels);
  b.positions = Tensor::of<int32_t>(flat, positions);
  return b;
}

Batch golden_batch(const Safetensors& golden, int64_t vocabulary) {
  const SafetensorsEntry& entry = golden.entry("input_ids");
  if (entry.shape.size() != 2 || entry.dtype != DType::i64 ||
      golden.entry("labels").shape != entry.shape)
    fail_input("{}: input_ids and labels must be int64 of one shape (B, S)", golden.path());
  const std::vector<int64_t> ids = golden.load("input_ids").to_vector<int64_t>();
  const std::vector<int64_t> labels = golden.load("labels").to_vector<int64_t>();
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= vocabulary || labels[i] >= vocabulary)
      fail_input("{}: id {} with label {} at {} is outside the vocabulary of {}", golden.path(),
                 ids[i], labels[i], i, vocabulary);
  return batch_of({ids.begin(), ids.end()}, {labels.begin(), labels.end()}, entry.shape[0]);
}

}  // namespace pith
