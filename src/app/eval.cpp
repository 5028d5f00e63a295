// pith eval: loss and perplexity on a corpus, multiple choice, or logits for a golden batch.

#include <sstream>

#include "app/commands.h"
#include "models/config.h"

namespace pith {

namespace fs = std::filesystem;

static int64_t positions_of(const EvalOptions& o, bool as_trained) {
  if (o.sequence_length > 0) return o.sequence_length;
  const std::string run = o.model + "/trainer/run.toml";
  if (as_trained && exists(run))
    return parse_toml(read_file(run), run).at("data").at("sequence_length").as_int();
  return std::min<int64_t>(
      2048, config_size(read_model_config(o.model), {"max_position_embeddings"}, 2048));
}

static void eval_corpus(const EvalOptions& o) {
  const int64_t sequence = positions_of(o, true);
  Session session(o, sequence, o.batch_size, false);
  const Loader loader({{o.data, 1.0}}, sequence, session.model->size.vocabulary, false, {});
  const int64_t most = o.max_batches > 0 ? o.max_batches * o.batch_size : INT64_MAX,
                end = std::min(loader.size(), most);
  double loss = 0, labels = 0;
  for (int64_t row = 0; row < end; row += o.batch_size) {
    const Batch batch = loader.batch(row, std::min(o.batch_size, end - row));
    const StepSums sums = session.pipeline.evaluate(batch);
    loss += sums.loss();
    labels += sums.labels;
  }
  fmt::print("loss {:.6f}  perplexity {:.4f}  tokens {:.0f}\n", loss / labels,
             std::exp(loss / labels), labels);
}

constexpr const char* kWhite = " \n\t\r";

// Log-probability of `choice` after `context`, as lm-evaluation-harness has it: one space between
// the two unless there is white space already, trailing spaces of the context belong to the
// continuation, and the continuation's ids are those of the whole text after as many ids as the
// context alone has.
static double choice_score(Session& session, const Tokenizer& tokenizer, size_t positions,
                           const std::string& context, const std::string& choice) {
  const size_t end = context.find_last_not_of(kWhite) + 1;  // npos + 1 is 0
  const bool spaced = end < context.size() || choice.find_first_of(kWhite) == 0;
  std::vector<int32_t> whole = tokenizer.encode(context + (spaced ? "" : " ") + choice);
  size_t begin = tokenizer.encode(context.substr(0, end)).size();
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
    if (line.find_first_not_of(kWhite) == line.npos) continue;
    const Value question = parse_json(line, fmt::format("{}:{}", o.choices, number));
    const std::vector<Value>& choices = question.at("choices").items();
    const int64_t answer = question.at("answer").as_int();
    if (answer < 0 || answer >= int64_t(choices.size()))
      question.at("answer").reject(fmt::format("an index below {}", choices.size()));
    std::vector<double> score, by_length;
    for (const Value& c : choices) {
      const std::string& text = c.as_string();
      const auto continues = [](char c) { return (c & 0xc0) == 0x80; };
      const auto characters = int64_t(text.size()) - std::ranges::count_if(text, continues);
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
    writer.write("loss", 0, wide_scalar(session.context, loss));
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
  if (!o.data.empty() + !o.choices.empty() + !o.golden.empty() != 1)
    fail_input("eval needs one of --data PREFIX, --choices FILE.jsonl, --golden FILE");
  if (!o.data.empty()) eval_corpus(o);
  if (!o.choices.empty()) eval_choices(o);
  if (!o.golden.empty()) eval_golden(o);
}

}  // namespace pith
