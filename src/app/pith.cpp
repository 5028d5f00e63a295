// The program: one subcommand per group of functions in commands.h. The only catch is in main.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "app/commands.h"
#include "core/error.h"
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

void add_run_arguments(CLI::App* command, RunArguments& a) {
  command->add_option("run", a.file, "run file (TOML)")->required();
  command->add_option("overrides", a.overrides, "section.key=value ...");
}

int plan(const RunArguments& a) {
  const RunConfig run = load_run_config(a.file, a.overrides);
  const Plan p = make_plan(run);
  fmt::print("{}peak_gb {:.6f}\n", p.table(), double(p.peak_bytes) / 1e9);
  return 0;
}

int train_command(const RunArguments& a) {
  if (a.dry_run) {
    const RunConfig run = load_run_config(a.file, a.overrides);
    fmt::print("{}\n", run.to_toml());
    return plan(a);
  }
  train(load_run_config(a.file, a.overrides));
  return 0;
}

int tokenize(const TokenizeOptions& o) {
  fmt::print("{}\n", tokenize_corpus(o).str());
  return 0;
}

int dispatch(int argc, char** argv) {
  CLI::App app("pith: trains Mixture-of-Experts language models", "pith");
  app.require_subcommand(1);

  TokenizeOptions tok;
  bool no_eos = false;
  CLI::App* t = app.add_subcommand("tokenize", "text to a token corpus");
  t->add_option("--tokenizer", tok.tokenizer, "tokenizer.json or a directory")->required();
  t->add_option("--input", tok.inputs, "files, directories or - for stdin")->required();
  t->add_option("--output", tok.output, "prefix of the corpus")->required();
  t->add_option("--glob", tok.globs, "only files matching, inside directories");
  t->add_option("--text-key", tok.text_key, "of .jsonl lines")->capture_default_str();
  t->add_flag("--no-eos", no_eos, "append no end-of-text");
  t->add_option("--workers", tok.workers, "threads, 0 = all cores")->capture_default_str();

  RunArguments train_arguments, plan_arguments;
  CLI::App* tr = app.add_subcommand("train", "train, or continue a run");
  add_run_arguments(tr, train_arguments);
  tr->add_flag("--dry-run", train_arguments.dry_run, "print the configuration and the memory plan");
  CLI::App* pl = app.add_subcommand("plan", "memory of a run, without allocating it");
  add_run_arguments(pl, plan_arguments);

  EvalOptions ev;
  CLI::App* e = app.add_subcommand("eval", "loss, multiple choice, or logits");
  e->add_option("--model", ev.model, "Hugging Face directory")->required();
  e->add_option("--data", ev.data, "corpus prefix: loss and perplexity");
  e->add_option("--choices", ev.choices, "JSON lines with context, choices, answer");
  e->add_option("--golden", ev.golden, "safetensors with input_ids and labels");
  e->add_option("--dump", ev.dump, "with --golden: where logits and loss go");
  e->add_option("--dtype", ev.dtype, "fp32 or bf16")->capture_default_str();
  e->add_option("--device", ev.device, "cpu or cuda")->capture_default_str();
  e->add_option("--sequence-length", ev.sequence_length,
                "default: that of its training, else the model's up to 2048");
  e->add_option("--batch-size", ev.batch_size, "sequences at once")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  e->add_option("--max-batches", ev.max_batches, "stop after so many, 0 = all")
      ->capture_default_str();

  GenerateOptions gen;
  CLI::App* g = app.add_subcommand("generate", "text from a model");
  g->add_option("--model", gen.model, "Hugging Face directory")->required();
  g->add_option("--prompt", gen.prompt, "text to continue")->required();
  g->add_option("--tokens", gen.tokens, "at most so many new tokens")->capture_default_str();
  g->add_option("--temperature", gen.temperature, "0 = always the likeliest token")
      ->capture_default_str();
  g->add_option("--top-p", gen.top_p, "nucleus")->capture_default_str();
  g->add_option("--seed", gen.seed, "of the sampling")->capture_default_str();
  g->add_option("--dtype", gen.dtype, "fp32 or bf16")->capture_default_str();
  g->add_option("--device", gen.device, "cpu or cuda")->capture_default_str();

  VerifyOptions ver;
  CLI::App* v = app.add_subcommand(
      "verify", "against golden vectors, cases or another checkpoint: PASS or FAIL");
  v->add_option("--model", ver.model, "Hugging Face directory");
  v->add_option("--golden", ver.golden, "golden.safetensors");
  v->add_option("--tokenizer", ver.tokenizer, "tokenizer.json");
  v->add_option("--cases", ver.cases, "cases.json");
  v->add_option("--checkpoint", ver.checkpoint, "step directory");
  v->add_option("--against", ver.against, "step directory");
  v->add_option("--dtype", ver.dtype, "fp64, fp32 or bf16")->capture_default_str();
  v->add_option("--device", ver.device, "cpu or cuda")->capture_default_str();
  v->add_option("--tolerance", ver.tolerance, "see docs/commands.md");

  std::string check_config;
  CLI::App* c = app.add_subcommand("check", "a model against itself: PASS or FAIL");
  c->add_option("config", check_config, "config.json or a directory")->required();
  CLI::App* d = app.add_subcommand("doctor", "what this machine has and what is missing");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help
    const std::string command = argc > 1 ? argv[1] : "nothing";
    fail_input("{}: {} (pith --help lists the commands)", command, error.what());
  }
  tok.eos = !no_eos;
  if (*t) return tokenize(tok);
  if (*tr) return train_command(train_arguments);
  if (*pl) return plan(plan_arguments);
  if (*e) return run_eval(ev);
  if (*g) return run_generate(gen);
  if (*v) return run_verify(ver);
  if (*c) return run_check(check_config);
  if (*d) return run_doctor();
  return 0;
}

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
    const int code = pith::dispatch(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout))
      pith::fail_input("the results could not be written to the standard output");
    return code;
  } catch (const pith::InputError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
