// The program: one subcommand per group of functions in commands.h. The only catch is in main.

#include <unistd.h>

#include <CLI/CLI.hpp>

#include "app/commands.h"
#include "data/tokenize.h"
#include "engine/plan.h"
#include "engine/train.h"

namespace pith {
namespace {

struct RunArguments {
  std::string file;
  std::vector<std::string> overrides;
  bool dry_run = false;
};

int plan(const RunConfig& run) {
  const Plan p = make_plan(run);
  fmt::print("{}peak_gb {:.6f}\n", p.table, double(p.peak_bytes) / 1e9);
  return 0;
}

int train(const RunArguments& a) {
  const RunConfig run = load_run_config(a.file, a.overrides);
  if (a.dry_run) {
    fmt::print("{}\n", run.to_toml());
    return plan(run);
  }
  train(run);
  return 0;
}

// The command line. A subcommand that was named runs at the end of parsing.
class CommandLine {
 public:
  CommandLine() {
    app_.require_subcommand(1);
    app_.option_defaults()->always_capture_default();
    add_data_and_training();
    add_evaluation();
    add_proofs();
  }

  int run(int argc, char** argv) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      if (error.get_exit_code() == 0) return app_.exit(error);  // --help
      fail_input("{}: {} (pith --help lists the commands)", argc > 1 ? argv[1] : "nothing",
                 error.what());
    }
    return code_;
  }

 private:
  CLI::App* add(const char* name, const char* description, const std::function<int()>& command) {
    CLI::App* sub = app_.add_subcommand(name, description);
    sub->callback([this, command] { code_ = command(); });
    return sub;
  }

  CLI::Option* add_model(CLI::App* sub, ModelArguments& a) {
    sub->add_option("--dtype", a.dtype, "fp64, fp32 or bf16");
    sub->add_option("--device", a.device, "cpu or cuda");
    return sub->add_option("--model", a.model, "Hugging Face directory");
  }

  void add_data_and_training() {
    CLI::App* t = add("tokenize", "text to a token corpus", [this] {
      fmt::print("{}\n", tokenize_corpus(tokenize_).str());
      return 0;
    });
    t->add_option("--tokenizer", tokenize_.tokenizer, "tokenizer.json or a directory")->required();
    t->add_option("--input", tokenize_.inputs, "files, directories or - for stdin")->required();
    t->add_option("--output", tokenize_.output, "prefix of the corpus")->required();
    t->add_option("--glob", tokenize_.globs, "only files matching, inside directories");
    t->add_option("--text-key", tokenize_.text_key, "of .jsonl lines");
    t->add_flag("!--no-eos", tokenize_.eos, "append no end-of-text");
    t->add_option("--workers", tokenize_.workers, "threads, 0 = all cores");

    CLI::App* r = add("train", "train, or continue a run", [this] { return train(run_); });
    CLI::App* p = add("plan", "memory of a run, without allocating it",
                      [this] { return plan(load_run_config(run_.file, run_.overrides)); });
    for (CLI::App* sub : {r, p}) {
      sub->add_option("run", run_.file, "run file (TOML)")->required();
      sub->add_option("overrides", run_.overrides, "section.key=value ...");
    }
    r->add_flag("--dry-run", run_.dry_run, "print the configuration and the memory plan");
  }

  void add_evaluation() {
    CLI::App* e =
        add("eval", "loss, multiple choice, or logits", [this] { return run_eval(eval_); });
    add_model(e, eval_)->required();
    e->add_option("--data", eval_.data, "corpus prefix: loss and perplexity");
    e->add_option("--choices", eval_.choices, "JSON lines with context, choices, answer");
    e->add_option("--golden", eval_.golden, "safetensors with input_ids and labels");
    e->add_option("--dump", eval_.dump, "with --golden: where logits and loss go");
    e->add_option("--sequence-length", eval_.sequence_length,
                  "0 = that of its training, else the model's up to 2048");
    e->add_option("--batch-size", eval_.batch_size, "sequences at once")
        ->check(CLI::PositiveNumber);
    e->add_option("--max-batches", eval_.max_batches, "stop after so many, 0 = all");

    CLI::App* g = add("generate", "text from a model", [this] { return run_generate(generate_); });
    add_model(g, generate_)->required();
    g->add_option("--prompt", generate_.prompt, "text to continue")->required();
    g->add_option("--tokens", generate_.tokens, "at most so many new tokens");
    g->add_option("--temperature", generate_.temperature, "0 = always the likeliest token");
    g->add_option("--top-p", generate_.top_p, "nucleus");
    g->add_option("--seed", generate_.seed, "of the sampling");
  }

  void add_proofs() {
    CLI::App* v = add("verify", "against golden vectors, cases or another checkpoint: PASS or FAIL",
                      [this] { return run_verify(verify_); });
    add_model(v, verify_);
    v->add_option("--golden", verify_.golden, "golden.safetensors");
    v->add_option("--tokenizer", verify_.tokenizer, "tokenizer.json");
    v->add_option("--cases", verify_.cases, "cases.json");
    v->add_option("--checkpoint", verify_.checkpoint, "step directory");
    v->add_option("--against", verify_.against, "step directory");
    v->add_option("--tolerance", verify_.tolerance, "see docs/commands.md");
    add("check", "a model against itself: PASS or FAIL", [this] { return run_check(config_); })
        ->add_option("config", config_, "config.json or a directory")
        ->required();
    add("doctor", "what this machine has and what is missing", run_doctor);
  }

  CLI::App app_{"pith: trains Mixture-of-Experts language models", "pith"};
  int code_ = 0;
  TokenizeOptions tokenize_;
  RunArguments run_;
  EvalOptions eval_;
  GenerateOptions generate_;
  VerifyOptions verify_;
  std::string config_;
};

}  // namespace
}  // namespace pith

int main(int argc, char** argv) {
  // Idle OpenMP threads spin for milliseconds by default, which halves the speed as soon as
  // anything else runs on the machine. The library reads this before main, so the program starts
  // itself again.
  if (!std::getenv("GOMP_SPINCOUNT") && !std::getenv("OMP_WAIT_POLICY")) {
    setenv("GOMP_SPINCOUNT", "1000", 1);
    execv("/proc/self/exe", argv);  // where that is not possible, the program goes on as it is
  }
  pith::install_crash_handler();
  try {
    const int code = pith::CommandLine().run(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout))
      pith::fail_input("the results could not be written to the standard output");
    return code;
  } catch (const std::exception& error) {
    pith::say(stderr, fmt::format("error: {}\n", error.what()));
    return dynamic_cast<const pith::InputError*>(&error) != nullptr ? 2 : 1;
  }
}
