// pith eval: loss and perplexity on a corpus, multiple choice, or logits for a golden batch.

#include <filesystem>
#include <sstream>

#include "app/commands.h"
#include "core/safetensors.h"
#include "data/tokenizer.h"
#include "engine/checkpoint.h"
#include "models/config.h"

namespace pith {

namespace fs = std::filesystem;

static int64_t positions_of(const EvalOptions& o, bool as_trained) {
  if (o.sequence_length > 0) return o.sequence_length;
  const std::string run = o.model + "/trainer/run.toml";
  if (as_trained && fs::exists(run))
    return parse_toml(read_file(run), run).at("data").at("sequence_length").as_int();
  return std::min<int64_t>(
      2048, config_size(read_model_config(o.model), {"max_position_embeddings"}, 2048));
}

static void eval_corpus(const EvalOptions& o) {
  const int64_t sequence = positions_of(o, true);
  Session session(o, sequence, o.batch_size, false);
  const Loader loader =
      Loader::sequential({o.data}, sequence, session.model->size.vocabulary, false);
  int64_t end = loader.size();
  if (o.max_batches > 0) end = std::min(end, o.max_batches * o.batch_size);
  double loss = 0, labels = 0;
  for (int64_t row = 0; row < end; row += o.batch_size) {
    const StepSums sums =
        session.pipeline.evaluate(loader.batch(row, std::min(o.batch_size, end - row)));
    loss += sums.loss();
    labels += sums.labels;
  }
  fmt::print("loss {:.6f}  perplexity {:.4f}  tokens {:.0f}\n", loss / labels,
             std::exp(loss / labels), labels);
}

static bool is_white(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

// Log-probability of `choice` after `context`, as lm-evaluation-harness has it: one space between
// the two unless there is white space already, trailing spaces of the context belong to the
// continuation, and the continuation's ids are those of the whole text after as many ids as the
// context alone has.
static double choice_score(Session& session, const Tokenizer& tokenizer, size_t positions,
                           std::string context, const std::string& choice) {
  const bool spaced = (!context.empty() && is_white(context.back())) ||
                      (!choice.empty() && is_white(choice.front()));
  const std::string text = context + (spaced ? "" : " ") + choice;
  while (!context.empty() && is_white(context.back())) context.pop_back();
  std::vector<int32_t> whole = tokenizer.encode(text);
  size_t begin = tokenizer.encode(context).size();
  if (begin == 0) {
    if (!tokenizer.eos_id())
      fail_input("an empty context needs a tokenizer with an end-of-text token");
    whole.insert(whole.begin(), *tokenizer.eos_id());
    begin = 1;
  }
  if (whole.size() <= begin) fail_input("the choice \"{}\" has no tokens", choice);
  // The model sees the last positions + 1 ids, the last of them only as a label.
  const size_t drop = whole.size() - std::min(whole.size(), positions + 1);
  whole.erase(whole.begin(), whole.begin() + int64_t(drop));
  begin -= std::min(begin - 1, drop);
  std::vector<int32_t> labels(whole.begin() + 1, whole.end());
  std::fill_n(labels.begin(), begin - 1, -100);
  whole.pop_back();
  return -session.pipeline.evaluate(batch_of(whole, labels, 1)).loss();
}

static void eval_choices(const EvalOptions& o) {
  const Tokenizer tokenizer(o.model);
  const int64_t positions = positions_of(o, false);
  Session session(o, positions, 1, false);
  std::istringstream lines(read_file(o.choices));
  int64_t questions = 0, right = 0, right_by_length = 0, number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (std::ranges::all_of(line, is_white)) continue;
    const Value question = parse_json(line, fmt::format("{}:{}", o.choices, number));
    const std::vector<Value>& choices = question.at("choices").items();
    const int64_t answer = question.at("answer").as_int();
    if (answer < 0 || answer >= int64_t(choices.size()))
      question.at("answer").reject(fmt::format("an index below {}", choices.size()));
    std::vector<double> score, by_length;
    for (const Value& c : choices) {
      const std::string& text = c.as_string();
      const auto characters =
          std::ranges::count_if(text, [](char c) { return (c & 0xc0) != 0x80; });
      score.push_back(choice_score(session, tokenizer, size_t(positions),
                                   question.at("context").as_string(), text));
      by_length.push_back(score.back() / double(std::max<int64_t>(1, characters)));
    }
    const auto best = [](const std::vector<double>& s) {
      return std::ranges::max_element(s) - s.begin();
    };
    ++questions;
    right += best(score) == answer;
    right_by_length += best(by_length) == answer;
  }
  if (questions == 0) fail_input("{} holds no questions", o.choices);
  fmt::print("accuracy {:.4f}  accuracy_norm {:.4f}  questions {}\n",
             double(right) / double(questions), double(right_by_length) / double(questions),
             questions);
}

static void eval_golden(const EvalOptions& o) {
  if (o.dump.empty()) fail_input("--golden needs --dump OUT");
  const Safetensors golden(o.golden);
  const Batch batch = golden_batch(golden, o.model);
  Session session(o, batch.sequence, batch.batch, false);
  const Tensor logits = session.pipeline.logits({batch});
  const StepSums sums = session.pipeline.evaluate(batch);
  const double loss = sums.loss() / sums.labels;
  const fs::path out = fs::absolute(o.dump), temporary = o.dump + ".tmp.safetensors";
  try {
    SafetensorsWriter writer(out.parent_path(), out.filename().string() + ".tmp", UINT64_MAX);
    writer.add("logits", DType::f32, {batch.batch, batch.sequence, session.model->size.vocabulary});
    writer.add("loss", DType::f32, {1});
    writer.create();
    writer.write("logits", 0, logits);
    writer.write("loss", 0, Tensor::of<double>({1}, std::vector<double>{loss}));
    writer.close();
    fs::rename(temporary, out);
  } catch (const std::exception& e) {
    std::error_code ignored;
    fs::remove(temporary, ignored);
    fail_input("--dump {}: {}", o.dump, e.what());
  }
  fmt::print("loss {:.6f}\n", loss);
}

void run_eval(const EvalOptions& o) {
  const int modes = !o.data.empty() + !o.choices.empty() + !o.golden.empty();
  if (modes != 1)
    fail_input("eval needs one of --data PREFIX, --choices FILE.jsonl, --golden FILE");
  if (!o.data.empty()) return eval_corpus(o);
  return o.choices.empty() ? eval_golden(o) : eval_choices(o);
}

}  // namespace pith
