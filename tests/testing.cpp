#include "testing.h"

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <filesystem>
#include <stdexcept>

#include "core/error.h"
#include "core/file.h"
#include "core/rng.h"
#include "core/value.h"
#include "data/corpus.h"

namespace pith {

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const InputError& e) {
    return e.what();
  }
  return "(no InputError)";
}

std::string golden_dir() {
  const char* given = std::getenv("PITH_GOLDEN");
  const std::string dir = given ? given : PITH_SOURCE_DIR "/../shared/golden";
  if (!std::filesystem::exists(dir + "/qwen3_moe")) {
    [&] { GTEST_SKIP() << "no golden vectors in " << dir << " (PITH_GOLDEN)"; }();
    // What ends a test without another failure.
    throw testing::AssertionException(
        {testing::TestPartResult::kSkip, __FILE__, __LINE__, "no golden vectors"});
  }
  return dir;
}

TempDir::TempDir() {
  std::string pattern = (std::filesystem::temp_directory_path() / "pith-test-XXXXXX").string();
  if (!mkdtemp(pattern.data())) throw std::runtime_error("mkdtemp failed for " + pattern);
  path = pattern;
}

TempDir::~TempDir() { std::filesystem::remove_all(path); }

Outcome run_pith(const std::string& arguments) {
  const TempDir dir;
  const std::string command =
      std::string(PITH_BINARY) + " " + arguments + " >" + dir / "out" + " 2>" + dir / "err";
  const int status = std::system(command.c_str());
  Outcome o;
  o.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  o.out = read_file(dir / "out");
  o.err = read_file(dir / "err");
  return o;
}

namespace {

// Documents of random length over a vocabulary of 61, with some structure to learn: token i + 1
// often follows token i.
void write_corpus(const std::string& prefix, int64_t documents, uint64_t seed) {
  CorpusWriter writer(prefix, 61);
  uint64_t draw = 0;
  for (int64_t d = 0; d < documents; ++d) {
    std::vector<int32_t> ids(5 + size_t(uniform(seed, draw++) * 40));
    for (size_t i = 0; i < ids.size(); ++i)
      ids[i] = i && uniform(seed, draw++) < 0.7 ? (ids[i - 1] + 1) % 60
                                                : int32_t(uniform(seed, draw++) * 60);
    ids.back() = 60;
    writer.add(ids, std::vector{int32_t(ids.size())});
  }
  writer.finish();
}

}  // namespace

TinyRun::TinyRun() {
  write_corpus(dir / "a", 200, 1);
  write_corpus(dir / "b", 100, 2);
  write_corpus(dir / "v", 40, 3);
  write_file_atomic(dir / "config.json",
                    R"({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2,
    "norm_topk_prob": true, "vocab_size": 61, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false, "initializer_range": 0.05})");
  write_file_atomic(
      dir / "run.toml",
      "model = \"" + dir / "config.json" + "\"\nout = \"unset\"\ndtype = \"fp32\"\n[data]\n" +
          "train = [[\"" + dir / "a" + "\", 0.7], [\"" + dir / "b" + "\", 0.3]]\nvalidation = [\"" +
          dir / "v" + "\"]\nsequence_length = 24\n[train]\nsteps = 20\nglobal_batch_size = 8\n" +
          "micro_batch_size = 2\n[optimizer]\nlr = 5e-3\nfinal_lr = 1e-3\nwarmup_ratio = 0.1\n");
}

std::string TinyRun::arguments(const std::string& out, const std::string& overrides) const {
  return "train " + dir / "run.toml" + " out=" + path(out) + " " + overrides;
}

Outcome TinyRun::train(const std::string& out, const std::string& overrides) const {
  return run_pith(arguments(out, overrides));
}

std::vector<std::map<std::string, std::string>> TinyRun::metrics(const std::string& out) const {
  std::vector<std::map<std::string, std::string>> steps;
  const std::string text = read_file(path(out) + "/metrics.jsonl");
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    const Value line = parse_json(text.substr(begin, end - begin), "metrics.jsonl");
    begin = end + 1;
    std::map<std::string, std::string> step;
    for (const auto& [key, value] : line.members())
      if (key != "tokens_per_second" && key != "sol" && key != "peak_gb" && key != "seconds")
        step[key] = value.json();
    steps.push_back(step);
  }
  return steps;
}

std::vector<double> TinyRun::series(const std::string& out, const std::string& key) const {
  std::vector<double> values;
  for (const auto& step : metrics(out)) values.push_back(std::stod(step.at(key)));
  return values;
}

}  // namespace pith
