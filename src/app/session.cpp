// What several subcommands share: a model that runs, batches, and the table of a verdict.

#include <unistd.h>

#include <filesystem>

#include "app/commands.h"

namespace pith {

Session::Session(const ModelArguments& a, int64_t max_positions, int64_t micro_batch_size,
                 bool training, const Value& config)
    : context{.device = parse_device(a.device), .dtype = parse_dtype(a.dtype)},
      model(make_model(config.is_null() ? read_model_config(a.model) : config,
                       {context.dtype, context.device, training, max_positions})),
      pipeline(*model, context, {.micro_batch_size = micro_batch_size}) {
  if (config.is_null()) load_weights(model->params, a.model, model->ignored_when_reading);
}

TemporaryDirectory::TemporaryDirectory()
    : path((std::filesystem::temp_directory_path() / "pith-XXXXXX").string()) {
  if (!::mkdtemp(path.data())) fail("no temporary directory {}", path);
}
TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path, ignored);
}

Batch batch_of(const std::vector<int32_t>& tokens, const std::vector<int32_t>& labels, int64_t rows,
               int64_t first_position) {
  const Shape flat{int64_t(tokens.size())};
  Batch b{.tokens = Tensor::of<int32_t>(flat, tokens), .labels = Tensor::of<int32_t>(flat, labels)};
  b.batch = rows;
  b.sequence = int64_t(tokens.size()) / rows;
  b.label_count = std::ranges::count_if(labels, [](int32_t id) { return id >= 0; });
  b.positions = Tensor(flat, DType::i32, Device::cpu, "values");
  for (int64_t i = 0; i < flat[0]; ++i)
    b.positions.data<int32_t>()[i] = int32_t(first_position + i % b.sequence);
  return b;
}

Batch golden_batch(const Safetensors& golden, const std::string& model) {
  const int64_t vocabulary = read_model_config(model).at("vocab_size").as_int();
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

int report(std::vector<Row> rows) {
  const auto severity = [](const Row& r) {
    const double ratio = r.error / std::max(r.allowed, 1e-300);
    return std::isnan(ratio) ? HUGE_VAL : ratio;
  };
  std::ranges::stable_sort(rows, std::greater(), severity);
  const bool ok = std::ranges::all_of(rows, &Row::ok);
  fmt::print("{:<64} {:>12} {:>12}\n", "worst", "error", "allowed");
  for (size_t i = 0; i < std::min<size_t>(rows.size(), 12); ++i)
    fmt::print("{:<64} {:>12.3e} {:>12.3e}{}\n", printable(rows[i].name, 200), rows[i].error,
               rows[i].allowed, rows[i].ok() ? "" : "  <-");
  fmt::print("{} compared\n{}\n", rows.size(), ok ? "PASS" : "FAIL");
  return ok ? 0 : 1;
}

}  // namespace pith
