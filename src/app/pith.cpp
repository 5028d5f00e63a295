// The program: one subcommand per group of functions in commands.h. The only catch is in main.

#include <CLI/CLI.hpp>

#include "app/commands.h"
#include "data/tokenize.h"
#include "engine/train.h"

namespace pith {

// Subcommands run at the end of parsing; the static variables are what it fills.
static int exit_code = 0;

static CLI::Option* add_model(CLI::App* sub, ModelArguments& a) {
  sub->add_option("--dtype", a.dtype, "fp64, fp32 or bf16");
  sub->add_option("--device", a.device, "cpu or cuda");
  return sub->add_option("--model", a.model, "Hugging Face directory");
}

static void print_plan(const RunConfig& run) {
  const Plan plan = make_plan(run);
  fmt::print("{}peak_gb {:.6f}\n", plan.table, double(plan.peak_bytes) / 1e9);
}

static void add_data_and_training(CLI::App& app) {
  static TokenizeOptions o;
  CLI::App* t = app.add_subcommand("tokenize", "text to a token corpus");
  t->callback([] { fmt::print("{}\n", tokenize_corpus(o).str()); });
  t->add_option("--tokenizer", o.tokenizer, "tokenizer.json or a directory")->required();
  t->add_option("--input", o.inputs, "files, directories or - for stdin")->required();
  t->add_option("--output", o.output, "prefix of the corpus")->required();
  t->add_option("--glob", o.globs, "only files matching, inside directories");
  t->add_option("--text-key", o.text_key, "of .jsonl lines");
  t->add_flag("!--no-eos", o.eos, "append no end-of-text");
  t->add_option("--workers", o.workers, "threads, 0 = all cores");

  static std::string file;
  static std::vector<std::string> overrides;
  static bool dry_run = false;
  CLI::App* r = app.add_subcommand("train", "train, or continue a run");
  r->callback([] {
    const RunConfig run = load_run_config(file, overrides);
    if (!dry_run) return train(run);
    fmt::print("{}\n", run.to_toml());
    print_plan(run);
  });
  CLI::App* p = app.add_subcommand("plan", "memory of a run, without allocating it");
  p->callback([] { print_plan(load_run_config(file, overrides)); });
  for (CLI::App* sub : {r, p}) {
    sub->add_option("run", file, "run file (TOML)")->required();
    sub->add_option("overrides", overrides, "section.key=value ...");
  }
  r->add_flag("--dry-run", dry_run, "print the configuration and the memory plan");
}

static void add_model_commands(CLI::App& app) {
  static EvalOptions eval;
  CLI::App* e = app.add_subcommand("eval", "loss, multiple choice, or logits");
  e->callback([] { run_eval(eval); });
  add_model(e, eval)->required();
  e->add_option("--data", eval.data, "corpus prefix: loss and perplexity");
  e->add_option("--choices", eval.choices, "JSON lines with context, choices, answer");
  e->add_option("--golden", eval.golden, "safetensors with input_ids and labels");
  e->add_option("--dump", eval.dump, "with --golden: where logits and loss go");
  e->add_option("--sequence-length", eval.sequence_length,
                "0 = that of its training, else the model's up to 2048");
  e->add_option("--batch-size", eval.batch_size, "sequences at once")->check(CLI::PositiveNumber);
  e->add_option("--max-batches", eval.max_batches, "stop after so many, 0 = all");

  static GenerateOptions generate;
  CLI::App* g = app.add_subcommand("generate", "text from a model");
  g->callback([] { run_generate(generate); });
  add_model(g, generate)->required();
  g->add_option("--prompt", generate.prompt, "text to continue")->required();
  g->add_option("--tokens", generate.tokens, "at most so many new tokens");
  g->add_option("--temperature", generate.temperature, "0 = always the likeliest token");
  g->add_option("--top-p", generate.top_p, "nucleus");
  g->add_option("--seed", generate.seed, "of the sampling");

  static VerifyOptions verify;
  CLI::App* v = app.add_subcommand(
      "verify", "against golden vectors, cases or another checkpoint: PASS or FAIL");
  v->callback([] { exit_code = run_verify(verify); });
  add_model(v, verify);
  v->add_option("--golden", verify.golden, "golden.safetensors");
  v->add_option("--tokenizer", verify.tokenizer, "tokenizer.json");
  v->add_option("--cases", verify.cases, "cases.json");
  v->add_option("--checkpoint", verify.checkpoint, "step directory");
  v->add_option("--against", verify.against, "step directory");
  v->add_option("--tolerance", verify.tolerance, "see docs/commands.md");

  static std::string config;
  CLI::App* c = app.add_subcommand("check", "a model against itself: PASS or FAIL");
  c->callback([] { exit_code = run_check(config); });
  c->add_option("config", config, "config.json or a directory")->required();
  CLI::App* d = app.add_subcommand("doctor", "what this machine has and what is missing");
  d->callback([] { exit_code = run_doctor(); });
}

static void add_bench(CLI::App& app) {
  static BenchOptions o;
  CLI::App* b = app.add_subcommand("bench", "speed against ceilings measured in the same run");
  b->require_subcommand(1);
  CLI::App* t = b->add_subcommand("train", "training steps of a workload, on random tokens");
  t->callback([] { bench_train(o); });
  t->add_option("--workload", o.workload, "W1 ... W6 or tiny")->required();
  t->add_option("--steps", o.steps, "to be timed")->check(CLI::Range(1, 100000));
  t->add_option("--warmup", o.warmup, "before them")->check(CLI::Range(1, 100000));
  t->add_option("--routing", o.routing, "balanced or real")
      ->check(CLI::IsMember({"balanced", "real"}));
  t->add_option("--model", o.model, "this Hugging Face directory in place of random weights");
  t->add_option("--trace", o.trace, "timeline of one more step: FILE, FILE.csv, FILE.stages.csv");
  t->add_option("overrides", o.overrides, "section.key=value ...");
  CLI::App* p = b->add_subcommand("ops", "every operator, forward and backward");
  p->callback([] { bench_ops(o); });
  p->add_option("--filter", o.filter, "only operators with this in their name");
  p->add_option("--dtype", o.dtype, "fp64, fp32 or bf16");
  for (CLI::App* sub : {t, p}) {
    sub->add_option("--device", o.device, "cpu, cuda or auto");
    sub->add_option("--json", o.json, "file for the results");
  }
}

static void run(int argc, char** argv) {
  CLI::App app("pith: trains Mixture-of-Experts language models", "pith");
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default();
  add_data_and_training(app);
  add_model_commands(app);
  add_bench(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    app.exit(help);
  } catch (const CLI::ParseError& error) {
    if (app.get_subcommands().empty())
      fail_input("{} is no command: pith --help lists them", argc > 1 ? argv[1] : "(none)");
    fail_input("{}: {} (pith {} --help)", argv[1], error.what(), argv[1]);
  }
}

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
    pith::run(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout))
      pith::fail_input("the results could not be written to the standard output");
    return pith::exit_code;
  } catch (const std::exception& error) {
    pith::say(stderr, fmt::format("error: {}\n", error.what()));
    return dynamic_cast<const pith::InputError*>(&error) != nullptr ? 2 : 1;
  }
}
