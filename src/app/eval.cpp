// pith eval: loss and perplexity on a corpus, multiple choice, or logits for a golden batch.

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "app/commands.h"
#include "core/file.h"
#include "core/safetensors.h"
#include "data/tokenizer.h"
#include "engine/checkpoint.h"

namespace pith {
namespace {

int64_t positions_of(const std::string& model, int64_t wanted, bool as_trained) {
  if (wanted > 0) return wanted;
  const std::string run = model + "/trainer/run.toml";
  if (as_trained && std::filesystem::exists(run))
    return parse_toml(read_file(run), run).at("data").at("sequence_length").as_int();
  const Value config = read_model_config(model);
  const Value* limit = config.find("max_position_embeddings");
  return std::min<int64_t>(2048, limit && !limit->is_null() ? limit->as_int() : 2048);
}

int eval_corpus(const EvalOptions& o) {
  const int64_t sequence = positions_of(o.model, o.sequence_length, true);
  auto loaded = load_model(o.model, o.dtype, o.device, sequence, o.batch_size, false);
  const Loader loader =
      Loader::sequential({o.data}, sequence, loaded->model->size.vocabulary, false);
  const int64_t limit = o.max_batches > 0 ? o.max_batches * o.batch_size : loader.size();
  double loss = 0, labels = 0;
  for (int64_t row = 0; row < std::min(limit, loader.size()); row += o.batch_size) {
    const int64_t rows = std::min(o.batch_size, std::min(limit, loader.size()) - row);
    const StepSums sums = loaded->pipeline->evaluate(loader.batch(row, rows));
    loss += sums.loss;
    labels += sums.labels;
  }
  fmt::print("loss {:.6f}  perplexity {:.4f}  tokens {:.0f}\n", loss / labels,
             std::exp(loss / labels), labels);
  return 0;
}

int64_t characters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; });
}

bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

// Log-probability of `choice` after `context`, as lm-evaluation-harness has it: one space between
// the two unless there is white space already, trailing spaces of the context belong to the
// continuation, and the continuation's ids are those of the whole text after as many ids as the
// context alone has.
double choice_score(LoadedModel& loaded, const Tokenizer& tokenizer, std::string context,
                    const std::string& choice) {
  const bool spaced = (!context.empty() && is_space(context.back())) ||
                      (!choice.empty() && is_space(choice.front()));
  std::string continuation = (spaced ? "" : " ") + choice;
  while (!context.empty() && is_space(context.back())) {
    continuation.insert(continuation.begin(), context.back());
    context.pop_back();
  }
  std::vector<int32_t> whole = tokenizer.encode(context + continuation);
  size_t begin = tokenizer.encode(context).size();
  if (begin == 0) {
    if (!tokenizer.eos_id())
      fail_input("an empty context needs a tokenizer with an end-of-text token");
    whole.insert(whole.begin(), *tokenizer.eos_id());
    begin = 1;
  }
  if (whole.size() <= begin) fail_input("the choice \"{}\" has no tokens", choice);
  // The model sees the last max_positions + 1 ids, the last of them only as a label.
  const size_t limit = size_t(loaded.max_positions) + 1,
               drop = whole.size() > limit ? whole.size() - limit : 0;
  whole.erase(whole.begin(), whole.begin() + int64_t(drop));
  begin -= std::min(begin - 1, drop);
  const std::vector<int32_t> tokens(whole.begin(), whole.end() - 1);
  std::vector<int32_t> labels(whole.begin() + 1, whole.end());
  std::fill(labels.begin(), labels.begin() + int64_t(begin) - 1, -100);
  return -loaded.pipeline->evaluate(batch_of(tokens, labels, 1)).loss;
}

int eval_choices(const EvalOptions& o) {
  const Tokenizer tokenizer(o.model);
  auto loaded = load_model(o.model, o.dtype, o.device,
                           positions_of(o.model, o.sequence_length, false), 1, false);
  const std::string text = read_file(o.choices);
  int64_t questions = 0, right = 0, right_by_length = 0, line_number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const Value question = parse_json(line, fmt::format("{}:{}", o.choices, line_number));
    const std::vector<Value>& choices = question.at("choices").items();
    const int64_t answer = question.at("answer").as_int();
    if (answer < 0 || answer >= int64_t(choices.size()))
      question.at("answer").reject(fmt::format("an index below {}", choices.size()));
    std::vector<double> score, by_length;
    for (const Value& c : choices) {
      score.push_back(
          choice_score(*loaded, tokenizer, question.at("context").as_string(), c.as_string()));
      by_length.push_back(score.back() / double(std::max<int64_t>(1, characters(c.as_string()))));
    }
    const auto best = [&](const std::vector<double>& s) {
      return std::max_element(s.begin(), s.end()) - s.begin();
    };
    ++questions;
    right += best(score) == answer;
    right_by_length += best(by_length) == answer;
  }
  if (questions == 0) fail_input("{} holds no questions", o.choices);
  fmt::print("accuracy {:.4f}  accuracy_norm {:.4f}  questions {}\n",
             double(right) / double(questions), double(right_by_length) / double(questions),
             questions);
  return 0;
}

int eval_golden(const EvalOptions& o) {
  if (o.dump.empty()) fail_input("--golden needs --dump OUT");
  const Safetensors golden(o.golden);
  const Value config = read_model_config(o.model);
  const Batch batch = golden_batch(golden, config.at("vocab_size").as_int());
  auto loaded = load_model(o.model, o.dtype, o.device, batch.sequence, batch.batch, false);
  const Tensor logits = loaded->pipeline->logits(make_micro_batch(batch, 1, 1, 1));
  const StepSums sums = loaded->pipeline->evaluate(batch);
  const double loss = sums.loss / sums.labels;
  const std::filesystem::path out(o.dump),
      directory = out.has_parent_path() ? out.parent_path() : ".";
  const std::string stem = out.filename().string() + ".tmp";
  SafetensorsWriter writer(directory.string(), stem, uint64_t(1) << 50);
  writer.add("logits", DType::f32, {batch.batch, batch.sequence, loaded->model->size.vocabulary});
  writer.add("loss", DType::f32, {1});
  writer.create();
  writer.write("logits", 0, logits);
  writer.write("loss", 0, Tensor::of<double>({1}, std::vector<double>{loss}));
  writer.close();
  std::filesystem::rename(directory / (stem + ".safetensors"), out);
  fmt::print("loss {:.6f}\n", loss);
  return 0;
}

}  // namespace

int run_eval(const EvalOptions& o) {
  const int modes = !o.data.empty() + !o.choices.empty() + !o.golden.empty();
  if (modes != 1)
    fail_input("eval needs one of --data PREFIX, --choices FILE.jsonl, --golden FILE");
  if (!o.data.empty()) return eval_corpus(o);
  return o.choices.empty() ? eval_golden(o) : eval_choices(o);
}

}  // namespace pith
