// Bad input to the real program: one clear line, exit 2, nothing half-written.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>

#include "core/file.h"
#include "testing.h"

namespace pith {
namespace {

namespace fs = std::filesystem;

struct Case {
  std::string name;
  std::function<void(const TinyRun&)> prepare;  // may damage what TinyRun made
  std::function<std::string(const TinyRun&)> arguments;
  std::vector<std::string> says;  // every one must be in the line
};

std::string golden() { return golden_dir() + "/qwen3_moe"; }

// `text` in place of `was` in a file.
void replace_in(const std::string& path, const std::string& was, const std::string& text) {
  std::string s = read_file(path);
  const size_t at = s.find(was);
  ASSERT_NE(at, std::string::npos) << was << " in " << path;
  write_file_atomic(path, s.replace(at, was.size(), text));
}

std::function<std::string(const TinyRun&)> train(const std::string& overrides) {
  return [=](const TinyRun& r) { return r.arguments("x", "train.steps=2 " + overrides); };
}

// A copy of the golden model whose safetensors bytes were changed, to be verified.
Case hostile(const std::string& name, std::function<void(std::string&)> change,
             std::vector<std::string> says) {
  return {name,
          [=](const TinyRun& r) {
            fs::create_directory(r.dir / "m");
            fs::copy(golden() + "/config.json", r.dir / "m/config.json");
            std::string bytes = read_file(golden() + "/model.safetensors");
            change(bytes);
            write_file_atomic(r.dir / "m/model.safetensors", bytes);
          },
          [](const TinyRun& r) {
            return "verify --model " + r.dir / "m" + " --golden " + golden() +
                   "/golden.safetensors";
          },
          says};
}

Case config(const std::string& name, const std::string& was, const std::string& text,
            std::vector<std::string> says) {
  return {name, [=](const TinyRun& r) { replace_in(r.dir / "config.json", was, text); }, train(""),
          says};
}

void nothing(const TinyRun&) {}

std::vector<Case> cases() {
  const auto run_file = [](const std::string& was, const std::string& text) {
    return [=](const TinyRun& r) { replace_in(r.dir / "run.toml", was, text); };
  };
  const auto fixed = [](const std::string& text) { return [=](const TinyRun&) { return text; }; };
  return {
      {"no command", nothing, fixed(""), {"is no command: pith --help lists them"}},
      {"unknown command", nothing, fixed("trian run.toml"), {"trian"}},
      {"unknown option", nothing, fixed("plan run.toml --fast"), {"--fast"}},
      {"no run file",
       nothing,
       fixed("train /nowhere/run.toml"),
       {"/nowhere/run.toml", "No such file"}},
      {"unknown key",
       run_file("steps = 20", "stepz = 20"),
       train(""),
       {"run.toml:", "train.stepz", "train.steps"}},
      {"unknown section", run_file("[train]", "[trane]"), train(""), {"trane"}},
      {"unknown key on the command line", nothing, train("train.warmup=3"), {"train.warmup"}},
      {"wrong type",
       run_file("sequence_length = 24", "sequence_length = \"long\""),
       train(""),
       {"run.toml:", "data.sequence_length", "integer"}},
      {"wrong type on the command line",
       nothing,
       train("train.seed=soon"),
       {"train.seed", "integer"}},
      {"malformed TOML", run_file("[train]", "[train"), train(""), {"run.toml:"}},
      {"TOML that is not UTF-8", run_file("unset", "\xff\xfe"), train(""), {"run.toml"}},
      {"negative size",
       nothing,
       train("train.global_batch_size=-8"),
       {"train.global_batch_size", "-8"}},
      {"micro-batch does not divide",
       nothing,
       train("train.micro_batch_size=3"),
       {"micro_batch_size", "3"}},
      {"unknown word", nothing, train("optimizer.name=sgd"), {"optimizer.name", "sgd", "adamw"}},
      {"unknown schedule", nothing, train("optimizer.schedule=step"), {"schedule", "wsd"}},
      {"unknown dtype", nothing, train("dtype=fp16"), {"fp16", "bf16"}},
      {"no GPU back end", nothing, train("device=cuda"), {"device=\"cpu\""}},
      {"a mesh", nothing, train("mesh.ep=2"), {"mesh.ep"}},
      {"missing corpus", nothing, train("data.train=/nowhere/c"), {"/nowhere/c"}},
      {"corpus too small", nothing, train("data.sequence_length=100000"), {"100001", "tokens"}},
      {"missing model", nothing, train("model=/nowhere/config.json"), {"/nowhere/config.json"}},
      {"token outside the vocabulary",
       [](const TinyRun& r) {
         replace_in(r.dir / "config.json", "\"vocab_size\": 61", "\"vocab_size\": 50");
       },
       train(""),
       {"50", "vocabulary"}},
      {"bias without a tensor",
       nothing,
       train("balance.bias_update_rate=0.1"),
       {"bias_export", "drop"}},
      {"truncated corpus",
       [](const TinyRun& r) { fs::resize_file(r.dir / "a.bin", 100); },
       train(""),
       {"a.bin"}},
      {"truncated index",
       [](const TinyRun& r) { fs::resize_file(r.dir / "a.idx", 60); },
       train(""),
       {"a.idx"}},
      {"no permission to write", nothing, train("out=/proc/x"), {"/proc/x"}},
      {"missing replay", nothing, train("trace.replay=/nowhere"), {"/nowhere/step-00000001.npz"}},
      config("malformed JSON", "\"hidden_size\": 32,", "\"hidden_size\": 32,,",
             {"config.json", ":"}),
      config("JSON that is not UTF-8", "silu", "si\xff\xfelu", {"config.json"}),
      config("missing key", "\"hidden_size\": 32,", "", {"config.json", "hidden_size"}),
      config("wrong kind", "\"hidden_size\": 32", "\"hidden_size\": \"wide\"",
             {"hidden_size", "wide"}),
      config("unsupported activation", "silu", "gelu", {"hidden_act", "gelu", "silu"}),
      config("unsupported architecture", "\"qwen3_moe\"", "\"mixtral\"", {"mixtral", "qwen3_moe"}),
      config("more chosen than experts", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 9",
             {"9", "8"}),
      config("unsupported rope", "\"hidden_act\"",
             "\"rope_scaling\": {\"rope_type\": \"dynamic\", \"factor\": 2}, "
             "\"hidden_act\"",
             {"dynamic", "yarn"}),
      hostile("truncated safetensors", [](std::string& b) { b.resize(b.size() / 2); },
              {"model.safetensors"}),
      hostile("empty safetensors", [](std::string& b) { b.clear(); }, {"model.safetensors"}),
      hostile("header length beyond the file", [](std::string& b) { b[6] = '\x7f'; },
              {"model.safetensors", "header"}),
      hostile("header is not JSON", [](std::string& b) { b[8] = '!'; }, {"model.safetensors"}),
      hostile("wrong shape",
              [](std::string& b) {
                // [256,64] -> [64,256]: as many bytes, another tensor
                const size_t at = b.find("[256,64]");
                ASSERT_NE(at, std::string::npos);
                b.replace(at, 8, "[64,256]");
              },
              {"lm_head.weight", "[64,256]", "[256,64]"}),
      hostile("unread tensor",
              [](std::string& b) {
                const size_t at = b.find("k_norm");
                ASSERT_NE(at, std::string::npos);
                b.replace(at, 6, "x_norm");
              },
              {"_norm"}),
      {"no weights",
       nothing,
       [](const TinyRun& r) { return "generate --prompt x --model " + r.path("."); },
       {"token"}},
      {"eval without a task", nothing, fixed("eval --model " + golden()), {"--data", "--golden"}},
      {"golden that is missing",
       nothing,
       fixed("verify --golden /nowhere --model " + golden()),
       {"/nowhere"}},
      {"half of a pair", nothing, fixed("verify --model " + golden()), {"--golden"}},
      {"malformed choices",
       [](const TinyRun& r) { write_file_atomic(r.dir / "c.jsonl", "{\"context\": \n"); },
       [](const TinyRun& r) {
         return "eval --model " + golden() + " --choices " + r.dir / "c.jsonl";
       },
       {"token"}},
      {"tokenizer that is missing",
       nothing,
       fixed("tokenize --tokenizer /nowhere --input /etc/hostname --output /tmp/x"),
       {"/nowhere"}},
      {"malformed line",
       [](const TinyRun& r) {
         write_file_atomic(r.dir / "t.jsonl", "{\"text\": \"fine\"}\n{\"text\": 3}\n");
       },
       [](const TinyRun& r) {
         return "tokenize --tokenizer " + golden_dir() + "/tokenizer_qwen --input " +
                r.dir / "t.jsonl" + " --output " + r.dir / "t";
       },
       {"t.jsonl:2"}},
      {"input that is missing",
       nothing,
       [](const TinyRun& r) {
         return "tokenize --tokenizer " + golden_dir() +
                "/tokenizer_qwen --input /nowhere --output " + r.dir / "t";
       },
       {"/nowhere"}},
  };
}

TEST(BadInput, OneClearLineExitTwoNothingWritten) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    const TinyRun run;
    c.prepare(run);
    const Outcome o = run_pith(c.arguments(run));
    EXPECT_EQ(o.code, 2) << o.out << o.err;
    // The plan may have printed before; the error is the last line and the only one of its kind.
    const size_t at = o.err.find("error: ");
    ASSERT_NE(at, std::string::npos) << o.err;
    const std::string line = o.err.substr(at);
    EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1) << line;
    for (const std::string& text : c.says)
      EXPECT_NE(line.find(text), std::string::npos) << "no '" << text << "' in " << line;
    if (fs::exists(run.path("x")))
      for (const auto& entry : fs::recursive_directory_iterator(run.path("x"))) {
        EXPECT_EQ(entry.path().string().find("step-"), std::string::npos) << entry.path();
        EXPECT_EQ(entry.path().string().find(".tmp"), std::string::npos) << entry.path();
      }
    for (const char* left : {"t.bin", "t.idx"}) EXPECT_FALSE(fs::exists(run.dir / left));
  }
}

TEST(BadInput, ADumpThatCannotBeReplacedLeavesNothing) {
  const TempDir dir;
  fs::create_directory(dir / "out");
  const Outcome o = run_pith("eval --model " + golden() + " --golden " + golden() +
                             "/golden.safetensors --dump " + dir / "out");
  EXPECT_EQ(o.code, 2) << o.out << o.err;
  EXPECT_EQ(o.err.find("error: --dump " + dir / "out" + ": "), 0u) << o.err;
  EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
  EXPECT_EQ(std::distance(fs::directory_iterator(dir.path), {}), 1);
  EXPECT_TRUE(fs::is_empty(dir / "out"));
}

// A file system of one megabyte: the checkpoint does not fit, the one before stays.
TEST(BadInput, AFullDiskLeavesTheLastCheckpoint) {
  const TinyRun run;
  const std::string small = run.dir / "small";
  fs::create_directory(small);
  if (std::system(("mount -t tmpfs -o size=2500k tmpfs " + small + " 2>/dev/null").c_str()) != 0)
    GTEST_SKIP() << "needs the right to mount a tmpfs";
  const Outcome o = run_pith("train " + run.dir / "run.toml" + " out=" + small +
                             "/x checkpoint.every=1 "
                             "checkpoint.keep_last=100");
  EXPECT_EQ(o.code, 2) << o.out << o.err;
  EXPECT_NE(o.err.find("No space left"), std::string::npos) << o.err;
  int temporary = 0, complete = 0;
  for (const auto& entry : fs::directory_iterator(small + "/x")) {
    temporary += entry.path().string().find(".tmp") != std::string::npos;
    complete += entry.path().filename().string().rfind("step-", 0) == 0;
  }
  EXPECT_EQ(temporary, 0);
  EXPECT_GE(complete, 1);
  const Outcome e =
      run_pith("verify --checkpoint " + small + "/x/latest --against " + small + "/x/latest");
  EXPECT_EQ(e.code, 0) << e.out << e.err;
  std::system(("umount " + small).c_str());
}

}  // namespace
}  // namespace pith
