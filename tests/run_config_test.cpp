#include "engine/run_config.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/error.h"
#include "core/file.h"
#include "testing.h"

namespace pith {
namespace {

const std::string kMinimal = "model = \"m.json\"\nout = \"runs/x\"\n[data]\ntrain = \"corpus/a\"\n";

RunConfig load(const std::string& text, const std::vector<std::string>& overrides = {}) {
  TempDir dir;
  write_file_atomic(dir / "run.toml", text);
  return load_run_config(dir / "run.toml", overrides);
}

// What load() says, from "run.toml" on; "" if it accepts.
std::string refusal(const std::string& text, const std::vector<std::string>& overrides = {}) {
  try {
    load(text, overrides);
  } catch (const InputError& e) {
    const std::string message = e.what();
    const size_t at = message.find("run.toml");
    return at == message.npos ? message : message.substr(at);
  }
  return "";
}

TEST(RunConfig, DefaultsAreThoseOfTheContract) {
  const RunConfig c = load(kMinimal);
  EXPECT_EQ(c.model, "m.json");
  EXPECT_EQ(c.tokenizer, "");
  EXPECT_EQ(c.device, "auto");
  EXPECT_EQ(c.dtype, "bf16");
  EXPECT_TRUE(c.resume);
  ASSERT_EQ(c.data.train.size(), 1u);
  EXPECT_EQ(c.data.train[0].first, "corpus/a");
  EXPECT_EQ(c.data.train[0].second, 1.0);
  EXPECT_EQ(c.data.sequence_length, 2048);
  EXPECT_EQ(c.train.steps, 1000);
  EXPECT_EQ(c.train.global_batch_size, 64);
  EXPECT_EQ(c.train.seed, 1234);
  EXPECT_EQ(c.optimizer.lr, 3e-4);
  EXPECT_EQ(c.optimizer.schedule, "wsd");
  EXPECT_EQ(c.optimizer.betas[1], 0.95);
  EXPECT_EQ(c.optimizer.momentum, 0.95);
  EXPECT_EQ(c.balance.bias_export, "refuse");
  EXPECT_EQ(c.checkpoint.keep_last, 3);
  EXPECT_EQ(c.mesh.timeout_seconds, 900);
}

TEST(RunConfig, ReadsEveryFormOfAValue) {
  const RunConfig c = load(
      "model = 'm'\nout = 'o'\nresume = false\n"
      "data.train = [['corpus/a', 0.7], 'corpus/b', ['corpus/c', 2]]\n"
      "data.validation = ['v', 'w']\n"
      "optimizer = {betas = [0.5, 0], lr = 1}\n"
      "[train]\nsteps = 20.0\nmax_minutes = 0.5\n[profile]\nsteps = [3, 4]\n");
  ASSERT_EQ(c.data.train.size(), 3u);
  EXPECT_EQ(c.data.train[0].second, 0.7);
  EXPECT_EQ(c.data.train[1].first, "corpus/b");
  EXPECT_EQ(c.data.train[1].second, 1.0);
  EXPECT_EQ(c.data.train[2].second, 2.0);
  EXPECT_EQ(c.data.validation, (std::vector<std::string>{"v", "w"}));
  EXPECT_EQ(c.optimizer.betas[0], 0.5);
  EXPECT_EQ(c.optimizer.betas[1], 0.0);
  EXPECT_EQ(c.optimizer.lr, 1.0);
  EXPECT_EQ(c.train.steps, 20);
  EXPECT_EQ(c.train.max_minutes, 0.5);
  EXPECT_EQ(c.profile.steps, (std::vector<int64_t>{3, 4}));
  EXPECT_FALSE(c.resume);
}

TEST(RunConfig, OverridesWinInOrder) {
  const RunConfig c = load(
      kMinimal + "[train]\nsteps = 5\nseed = 6\n",
      {"train.steps=7", "train.steps=8", "device=cpu", "out=runs/other", "data.train=[[\"x\", 3]]",
       "tokenizer=", "optimizer.lr=1e-2", "dtype=\"fp32\"", "trace.replay=2024-05-01",
       "debug.sync=true", "data.validation=a/v", "model=a = b", "eval={every=2, batches=3}"});
  EXPECT_EQ(c.train.steps, 8);
  EXPECT_EQ(c.train.seed, 6);
  EXPECT_EQ(c.device, "cpu");
  EXPECT_EQ(c.out, "runs/other");
  EXPECT_EQ(c.data.train.at(0).first, "x");
  EXPECT_EQ(c.data.train.at(0).second, 3.0);
  EXPECT_EQ(c.tokenizer, "");
  EXPECT_EQ(c.optimizer.lr, 1e-2);
  EXPECT_EQ(c.dtype, "fp32");
  EXPECT_EQ(c.trace.replay, "2024-05-01");
  EXPECT_TRUE(c.debug.sync);
  EXPECT_EQ(c.data.validation.at(0), "a/v");
  EXPECT_EQ(c.model, "a = b");
  EXPECT_EQ(c.eval.every, 2);
  EXPECT_EQ(c.eval.batches, 3);
}

TEST(RunConfig, PrintsWhatItReadsBack) {
  const RunConfig c =
      load(kMinimal,
           {"train.steps=12345678", "optimizer.lr=0.1234567890123456789", "optimizer.eps=1e-20",
            "out=odd \"name\" \\ \xc3\xa9\t#=", "data.train=[[\"a\", 0.3], \"b\"]",
            "profile.steps=[1, 2]", "resume=false", "optimizer.betas=[0.1, 0.2]",
            "balance={loss=\"sequence\", coefficient=1e-3}"});
  const std::string text = c.to_toml();
  const RunConfig back = load(text);
  EXPECT_EQ(back.to_toml(), text);
  EXPECT_EQ(back.train.steps, 12345678);
  EXPECT_EQ(back.optimizer.lr, c.optimizer.lr);
  EXPECT_EQ(back.optimizer.eps, 1e-20);
  EXPECT_EQ(back.out, "odd \"name\" \\ \xc3\xa9\t#=");
  EXPECT_EQ(back.data.train.at(0).second, 0.3);
  EXPECT_EQ(back.profile.steps, c.profile.steps);
  EXPECT_FALSE(back.resume);
  EXPECT_EQ(back.balance.loss, "sequence");
  EXPECT_NE(text.find("\n[trace]\nrouting = \"\"\nreplay = \"\"\n"), text.npos) << text;
}

struct BadFile {
  const char* text;  // after kMinimal; "[train]\n..." and the like
  const char* message;
};

TEST(RunConfig, RefusesBadFilesWithFileLineAndKey) {
  const BadFile cases[] = {
      {"[train]\nstep = 3\n", "run.toml:6: train.step: unknown key; did you mean train.steps?"},
      {"[train]\nlr = 3\n", "run.toml:6: train.lr: unknown key; did you mean optimizer.lr?"},
      {"[optim]\nlr = 3\n",
       "run.toml:5: optim: unknown key; known here: "
       "model tokenizer out device dtype deterministic resume data train optimizer balance eval "
       "checkpoint mesh profile trace debug"},
      {"[debug]\nquux_frobnicate = 3\n",
       "run.toml:6: debug.quux_frobnicate: unknown key; known here: sync check_finite"},
      {"sequence-length = 3\n",
       "run.toml:5: data.sequence-length: unknown key; did you mean data.sequence_length?"},
      {"[train]\nsteps = \"many\"\n",
       "run.toml:6: train.steps: expected an integer, got string \"many\""},
      {"[train]\nsteps = 1.5\n", "run.toml:6: train.steps: expected an integer, got real 1.5"},
      {"[train]\nforce_balance = 1\n",
       "run.toml:6: train.force_balance: expected a boolean, got integer 1"},
      {"[optimizer]\nbetas = [0.9]\n",
       "run.toml:6: optimizer.betas: expected a list of two numbers, got an array"},
      {"[optimizer]\nbetas = 0.9\n",
       "run.toml:6: optimizer.betas: expected a list of two numbers, got real 0.9"},
      {"[optimizer]\nname = [1]\n", "run.toml:6: optimizer.name: expected a string, got an array"},
      {"[mesh]\npp = [1]\n", "run.toml:6: mesh.pp: expected an integer, got an array"},
      {"validation = [1]\n", "run.toml:5: data.validation[0]: expected a string, got integer 1"},
      {"[train]\nsteps = 3\nsteps = 4\n", "run.toml:7:"},
      {"[train\n", "run.toml:5:"},
      {"[train]\nsteps = \xff\n", "run.toml:6:"},
  };
  for (const BadFile& c : cases) {
    const std::string said = refusal(kMinimal + c.text);
    EXPECT_EQ(said.substr(0, std::string(c.message).size()), c.message) << said;
    EXPECT_EQ(said.find('\n'), said.npos) << said;
  }
  EXPECT_EQ(refusal("train = 3\n"),
            "run.toml:1: train: expected a section, [train], got integer 3");
  EXPECT_EQ(
      refusal("model = 'm'\nout = 'o'\ndata.train = [['a', 1, 2]]\n"),
      "run.toml:3: data.train[0]: expected a corpus prefix or [prefix, weight], got an array");
  EXPECT_EQ(refusal("out = 'o'\n"),
            "run.toml: model is not set: name a config.json or a Hugging Face directory");
  EXPECT_EQ(refusal("model = 'm'\n"),
            "run.toml: out is not set: name the directory that the run writes to");
  EXPECT_THROW(load_run_config("/nonexistent/run.toml"), InputError);
}

struct BadOverride {
  const char* text;
  const char* message;  // what validate() says has "run.toml: " before it
};

TEST(RunConfig, RefusesBadOverrides) {
  const BadOverride cases[] = {
      {"train.steps", "command line: expected section.key=value, got \"train.steps\""},
      {"=3", "command line: expected section.key=value, got \"=3\""},
      {"--fast=3", "command line:1: --fast: unknown key; known here: model tokenizer"},
      {"train.stepz=3", "command line:1: train.stepz: unknown key; did you mean train.steps?"},
      {"steps=3", "command line:1: steps: unknown key; did you mean train.steps?"},
      {"a.b.c=3", "command line:1: a: unknown key; known here: model tokenizer out device"},
      {"train.steps=x", "command line:1: train.steps: expected an integer, got string \"x\""},
      {"train.steps=1\nresume=false",
       "command line:1: train.steps: expected an integer, got string \"1\\nresume=false\""},
      {"train.steps.more=1", "command line:1: train.steps: expected an integer, got an object"},
      {"out=3", "command line:1: out: expected a string, got integer 3"},
      {"data.train=[[\"a\"", "command line:1:"},

      {"device=cpu | cuda", "run.toml: device = \"cpu | cuda\": expected cpu | cuda | auto"},
      {"device=gpu", "run.toml: device = \"gpu\": expected cpu | cuda | auto"},
      {"dtype=fp16", "run.toml: dtype = \"fp16\": expected bf16 | fp32 | fp64"},
      {"data.train=[]", "run.toml: data.train is empty: name at least one corpus"},
      {"data.train=[[\"a\", 0]]",
       "run.toml: data.train: weight 0 of a: expected a positive number"},
      {"data.train=[[\"a\", nan]]", "run.toml: data.train: weight nan of a: expected a positive"},
      {"data.train=", "run.toml: data.train: expected a corpus prefix, got \"\""},
      {"data.sequence_length=0",
       "run.toml: data.sequence_length = 0: expected an integer from 1 to 2000000000"},
      {"train.steps=-1", "run.toml: train.steps = -1: expected an integer from 1 to"},
      {"train.stop_after=-1", "run.toml: train.stop_after = -1: expected an integer from 0 to"},
      {"train.global_batch_size=0", "run.toml: train.global_batch_size = 0: expected"},
      {"train.global_batch_size=4000000000", "run.toml: train.global_batch_size = 4000000000: exp"},
      {"train.micro_batch_size=0",
       "run.toml: train.micro_batch_size = 0: expected an integer from"},
      {"train.micro_batch_size=7",
       "run.toml: train.global_batch_size = 64 is not a multiple of train.micro_batch_size = 7"},
      {"train.seed=-3", "run.toml: train.seed = -3: expected an integer, 0 or more"},
      {"train.max_minutes=-0.5", "run.toml: train.max_minutes = -0.5: expected a finite number"},
      {"train.wgrad_micro_batches=0", "run.toml: train.wgrad_micro_batches = 0: expected"},
      {"train.main_grad=fp16", "run.toml: train.main_grad = \"fp16\": expected fp32 | bf16"},
      {"train.main_grad=bf16", "run.toml: train.main_grad = \"bf16\" needs dtype = \"bf16\" and device = \"cuda\""},
      {"train.recompute=all",
       "run.toml: train.recompute = \"all\": expected norm | swiglu | gather | stage1"},
      {"optimizer.name=adam", "run.toml: optimizer.name = \"adam\": expected adamw | muon"},
      {"optimizer.schedule=step",
       "run.toml: optimizer.schedule = \"step\": expected wsd | cosine | linear | constant"},
      {"optimizer.lr=-1", "run.toml: optimizer.lr = -1: expected a finite number, 0 or more"},
      {"optimizer.lr=inf", "run.toml: optimizer.lr = inf: expected a finite number, 0 or more"},
      {"optimizer.final_lr=nan", "run.toml: optimizer.final_lr = nan: expected a finite number"},
      {"optimizer.warmup_ratio=1.1",
       "run.toml: optimizer.warmup_ratio = 1.1: expected a number from 0 to 1"},
      {"optimizer.decay_ratio=-0.1", "run.toml: optimizer.decay_ratio = -0.1: expected a number"},
      {"optimizer.decay_ratio=0.98",
       "run.toml: optimizer.warmup_ratio = 0.03 and decay_ratio = 0.98 are more than 1 together"},
      {"optimizer.betas=[0.9, 1.0]",
       "run.toml: optimizer.betas = 1: expected a number, 0 or more and below 1"},
      {"optimizer.eps=0", "run.toml: optimizer.eps = 0: expected a positive number up to 1"},
      {"optimizer.momentum=1", "run.toml: optimizer.momentum = 1: expected a number, 0 or more"},
      {"optimizer.weight_decay=-1", "run.toml: optimizer.weight_decay = -1: expected a finite"},
      {"optimizer.clip_norm=-1", "run.toml: optimizer.clip_norm = -1: expected a finite number"},
      {"balance.loss=batch",
       "run.toml: balance.loss = \"batch\": expected none | micro_batch | sequence | global_batch"},
      {"balance.coefficient=0.01",
       "run.toml: balance.coefficient = 0.01 needs balance.loss, which is \"none\""},
      {"balance.z_loss=-1", "run.toml: balance.z_loss = -1: expected a finite number, 0 or more"},
      {"balance.bias_update_rate=-1", "run.toml: balance.bias_update_rate = -1: expected a finite"},
      {"balance.bias_export=keep",
       "run.toml: balance.bias_export = \"keep\": expected refuse | drop"},
      {"eval.every=10", "run.toml: eval.every = 10 needs data.validation, which is empty"},
      {"eval.batches=0", "run.toml: eval.batches = 0: expected an integer from 1 to"},
      {"checkpoint.every=-1", "run.toml: checkpoint.every = -1: expected an integer from 0 to"},
      {"checkpoint.keep_last=0", "run.toml: checkpoint.keep_last = 0: expected an integer from 1"},
      {"mesh.pp=2",
       "run.toml: mesh.pp = 2 needs several processes: this build runs one process, use 1"},
      {"mesh.cp=0", "run.toml: mesh.cp = 0: expected an integer from 1 to"},
      {"mesh.shard=none", "run.toml: mesh.shard = \"none\": expected full | replicate_over_dp"},
      {"mesh.timeout_seconds=0", "run.toml: mesh.timeout_seconds = 0: expected a positive number"},
      {"profile.steps=[0]", "run.toml: profile.steps = 0: expected an integer from 1 to"},
  };
  for (const BadOverride& c : cases) {
    const std::string said = refusal(kMinimal, {c.text});
    EXPECT_EQ(said.substr(0, std::string(c.message).size()), c.message) << c.text << "\n" << said;
    EXPECT_EQ(said.find('\n'), said.npos) << said;
  }
}

TEST(RunConfig, RefusesContradictions) {
  EXPECT_EQ(refusal(kMinimal, {"dtype=fp64", "device=cuda"}),
            "run.toml: dtype = \"fp64\" runs on the cpu only: use device=\"cpu\", or bf16 or fp32");
  EXPECT_EQ(refusal(kMinimal, {"trace.routing=t", "trace.replay=t"}),
            "run.toml: trace.routing = \"t\" would overwrite the trace that trace.replay reads");
  EXPECT_EQ(refusal(kMinimal, {"train.force_balance=true", "trace.replay=t"}),
            "run.toml: train.force_balance and trace.replay both decide the routing: use one of "
            "them");
  EXPECT_EQ(refusal(kMinimal, {"dtype=fp64", "device=cpu"}), "");
  EXPECT_EQ(refusal(kMinimal, {"eval.every=10", "data.validation=v"}), "");
  EXPECT_EQ(refusal(kMinimal, {"balance.loss=sequence", "balance.coefficient=0.01"}), "");
}

}  // namespace
}  // namespace pith
