#include "engine/checkpoint.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>

#include "core/file.h"
#include "core/memory.h"
#include "core/rng.h"
#include "core/safetensors.h"
#include "testing.h"

namespace pith {
namespace {

namespace fs = std::filesystem;

const char* const kBias = "model.layers.0.mlp.gate.e_score_correction_bias";

struct ToyOptions {
  bool bias_exported = false;
  int64_t width = 16;
  bool only_stacked = false;  // experts in the alternative form only
};

// Parameters of every kind a checkpoint meets; no computation.
class Toy : public Model {
 public:
  explicit Toy(DType dtype, ToyOptions o = {}, double theta = 1e4) : theta_(theta) {
    const int64_t E = 2, I = 3, H = o.width;
    params.add({.name = "model.embed_tokens.weight", .shape = {64, H}, .role = Role::embedding});
    params.add({.name = "model.layers.0.attention.qkv",
                .shape = {10, H},
                .pieces = {{"model.layers.0.self_attn.q_proj.weight", {6, H}},
                           {"model.layers.0.self_attn.k_proj.weight", {2, H}},
                           {"model.layers.0.self_attn.v_proj.weight", {2, H}}}});
    std::vector<Piece> gate_up;
    for (int e = 0; e < E; ++e)
      for (const char* name : {"gate", "up"})
        gate_up.push_back(
            {fmt::format("model.layers.0.mlp.experts.{}.{}_proj.weight", e, name), {I, H}});
    const std::vector<Piece> stacked = {{"model.layers.0.mlp.experts.gate_up_proj", {E, 2 * I, H}}};
    params.add({.name = "experts.gate_up",
                .shape = {E, 2 * I, H},
                .pieces = o.only_stacked ? stacked : gate_up,
                .also_read = {stacked}});
    params.add({.name = "model.norm.weight",
                .shape = {H},
                .role = Role::vector,
                .decay = false,
                .init = Init::ones});
    params.add({.name = kBias,
                .shape = {E},
                .role = Role::state,
                .init = Init::zeros,
                .exported = o.bias_exported});
    params.allocate(dtype, Device::cpu, true);
    size.vocabulary = 1 << 20;
  }
  Carry embed(Tape&, MicroBatch&) override { return {}; }
  Stage1 stage1_attention_router(Tape&, int64_t, const Carry&, MicroBatch&) override { return {}; }
  Tensor stage3_experts(Tape&, int64_t, const Received&) override { return {}; }
  Tensor head_loss(Tape&, const Carry&, MicroBatch&) override { return {}; }
  Tensor logits(Tape&, const Carry&) override { return {}; }
  void after_step(const Statistics&) override {}
  Value hf_config() const override {
    return Value::object(
        {{"model_type", "toy"}, {"rope_theta", theta_}, {"eos_token_id", 7}, {"bos_token_id", {}}});
  }

 private:
  double theta_;
};

// A model with its optimizer and checkpoints, whose whole state is a function of the step.
struct Trainer {
  RunConfig run;
  ToyOptions options;
  Toy model;
  Context context;
  Optimizer optimizer;
  std::unique_ptr<Checkpoints> checkpoints;

  static RunConfig with_bias_dropped(RunConfig r) {
    r.balance.bias_export = "drop";
    return r;
  }
  explicit Trainer(const RunConfig& r, ToyOptions o = {}, double theta = 1e4)
      : run(with_bias_dropped(r)),
        options(o),
        model(parse_dtype(r.dtype), o, theta),
        optimizer(model.params, run, context),
        checkpoints(std::make_unique<Checkpoints>(run, model, optimizer)) {
    fill(0);
  }

  std::vector<Tensor> tensors() {
    std::vector<Tensor> all;
    for (const auto& p : model.params)
      for (const Tensor& t : {p->value, p->rest})
        if (t) all.push_back(t);
    for (const auto& s : optimizer.states()) all.push_back(s.tensor);
    return all;
  }
  void fill(int64_t step) {
    uint64_t key = uint64_t(step) * 1000;
    const auto random = [&](const Tensor& like) {
      const DType dtype = master_dtype(like.dtype());
      Tensor t(like.shape(), dtype, Device::cpu, "random");
      fill_normal(t, ++key, 0, 1.0);
      return t;
    };
    for (const auto& p : model.params) p->set_master(random(p->value));
    for (const auto& s : optimizer.states()) Tensor(s.tensor).copy_from(random(s.tensor));
  }
  void save(int64_t step) {
    fill(step);
    checkpoints->save(step);
  }
  bool holds(int64_t step) {
    Trainer other(run, options);
    other.fill(step);
    const auto mine = tensors(), theirs = other.tensors();
    for (size_t i = 0; i < mine.size(); ++i)
      if (std::memcmp(mine[i].raw(), theirs[i].raw(), mine[i].nbytes()) != 0) return false;
    for (const auto& p : model.params)
      if (std::memcmp(p->value.raw(), other.model.params.find(p->name).value.raw(),
                      p->value.nbytes()) != 0)
        return false;
    return true;
  }
};

RunConfig config_for(const TempDir& dir, const std::string& dtype = "bf16",
                     const std::string& rule = "adamw") {
  RunConfig run;
  run.model = "toy";
  run.out = dir.path;
  run.dtype = dtype;
  run.optimizer.name = rule;
  run.train.global_batch_size = 8;
  return run;
}

// `pith verify` of two checkpoints.
bool same(const std::string& a, const std::string& b, double tolerance) {
  const Outcome o =
      run_pith(fmt::format("verify --checkpoint {} --against {} --tolerance {}", a, b, tolerance));
  EXPECT_TRUE(o.code == 0 || o.code == 1) << o.out << o.err;
  EXPECT_TRUE(o.out.ends_with(o.code == 0 ? "\nPASS\n" : "\nFAIL\n")) << o.out;
  return o.code == 0;
}

template <class F> std::string input_error_of(F&& f) {
  try {
    f();
  } catch (const InputError& e) {
    return e.what();
  }
  return "(no InputError)";
}
#define EXPECT_REFUSED(statement, text)                             \
  do {                                                              \
    const std::string message = input_error_of([&] { statement; }); \
    EXPECT_NE(message.find(text), message.npos) << message;         \
    EXPECT_EQ(message.find('\n'), message.npos) << message;         \
  } while (0)

std::vector<std::string> listing(const std::string& directory) {
  std::vector<std::string> names;
  for (const auto& e : fs::directory_iterator(directory)) names.push_back(e.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

// Where the data of a tensor lies in a file of one shard.
int64_t offset_of(const std::string& file, const std::string& tensor) {
  uint64_t header;
  std::memcpy(&header, read_file(file).data(), 8);
  return int64_t(8 + header + Safetensors(file).entry(tensor).begin);
}

void flip_bit(const std::string& file, int64_t offset) {
  std::fstream f(file, std::ios::in | std::ios::out | std::ios::binary);
  f.seekg(offset);
  const char c = char(f.get() ^ 1);
  f.seekp(offset);
  f.put(c);
}

void copy_all(const std::string& from, const std::string& to) {
  fs::copy(from, to, fs::copy_options::recursive);
}

TEST(Checkpoint, RoundTripIsBitEqual) {
  for (const char* dtype : {"bf16", "fp32", "fp64"})
    for (const char* rule : {"adamw", "muon"}) {
      TempDir dir;
      const RunConfig run = config_for(dir, dtype, rule);
      Trainer(run).save(20);
      Trainer other(run);
      EXPECT_FALSE(other.holds(20));
      EXPECT_EQ(other.checkpoints->load(Checkpoints::latest(dir.path)), 20);
      EXPECT_TRUE(other.holds(20)) << dtype << " " << rule;
    }
}

TEST(Checkpoint, IsAHuggingFaceDirectory) {
  TempDir dir;
  const RunConfig run = config_for(dir);
  Trainer r(run);
  r.save(20);
  const std::string step = dir / "step-00000020";
  EXPECT_EQ(fs::read_symlink(dir / "latest"), "step-00000020");
  EXPECT_EQ(Checkpoints::latest(dir.path), step);
  EXPECT_TRUE(has_weights(step));
  EXPECT_FALSE(has_weights(dir.path));
  EXPECT_EQ(listing(dir.path), (std::vector<std::string>{"latest", "step-00000020"}));
  EXPECT_EQ(listing(step), (std::vector<std::string>{"config.json", "generation_config.json",
                                                     "model.safetensors", "trainer"}));
  EXPECT_EQ(listing(step + "/trainer"),
            (std::vector<std::string>{"run.toml", "state.json", "trainer.safetensors"}));

  const Safetensors model(step);
  EXPECT_NE(read_file(step + "/model.safetensors").find(R"("__metadata__":{"format":"pt"})"),
            std::string::npos);
  std::vector<std::string> names;
  for (const auto& [name, entry] : model.entries()) {
    names.push_back(name);
    EXPECT_EQ(entry.dtype, DType::bf16);
  }
  const std::string layer = "model.layers.0.";
  EXPECT_EQ(names,
            (std::vector<std::string>{
                "model.embed_tokens.weight", layer + "mlp.experts.0.gate_proj.weight",
                layer + "mlp.experts.0.up_proj.weight", layer + "mlp.experts.1.gate_proj.weight",
                layer + "mlp.experts.1.up_proj.weight", layer + "self_attn.k_proj.weight",
                layer + "self_attn.q_proj.weight", layer + "self_attn.v_proj.weight",
                "model.norm.weight"}));
  // Expert 1's up_proj is the last of four blocks of 3 x 16.
  const Tensor up = model.load(layer + "mlp.experts.1.up_proj.weight");
  const Tensor master = r.model.params.find("experts.gate_up").master();
  for (int i = 0; i < 48; ++i)
    EXPECT_EQ(float(up.data<bf16>()[i]), float(bf16(master.data<float>()[3 * 48 + i]))) << i;

  const Safetensors trainer(step + "/trainer", "trainer");
  EXPECT_EQ(trainer.entries().size(), 9u * 3 + 1);
  for (const std::string name :
       {"master.model.norm.weight", "m.model.norm.weight", "v.model.norm.weight",
        "master.model.layers.0.self_attn.q_proj.weight"})
    EXPECT_TRUE(trainer.has(name)) << name;
  EXPECT_EQ(trainer.entry(std::string("state.") + kBias).dtype, DType::f32);

  const Value config = read_model_config(step);
  EXPECT_EQ(config.at("dtype").as_string(), "bfloat16");
  EXPECT_EQ(config.at("torch_dtype").as_string(), "bfloat16");
  EXPECT_EQ(config.json(), read_model_config(step + "/config.json").json());
  const Value generation = parse_json(read_file(step + "/generation_config.json"), "g");
  EXPECT_EQ(generation.json(), R"({"_from_model_config":true,"eos_token_id":7})");
  const Value state = parse_json(read_file(step + "/trainer/state.json"), "s");
  EXPECT_EQ(state.at("step").as_int(), 20);
  EXPECT_EQ(state.at("data_position").as_int(), 160);
  EXPECT_EQ(state.at("dtype").as_string(), "bf16");
  EXPECT_EQ(read_file(step + "/trainer/run.toml"), r.run.to_toml());
}

TEST(Checkpoint, CopiesTheTokenizer) {
  TempDir dir, bare, tokenizer;
  RunConfig run = config_for(dir);
  run.tokenizer = bare / "tokenizer.json";  // with nothing beside it
  fs::copy(PITH_SOURCE_DIR "/examples/tiny/tokenizer.json", run.tokenizer);
  run.data.sequence_length = 321;
  Trainer(run).save(1);
  const std::string step = dir / "step-00000001";
  EXPECT_EQ(read_file(step + "/tokenizer.json"), read_file(run.tokenizer));
  const Value minimal = parse_json(read_file(step + "/tokenizer_config.json"), "t");
  EXPECT_EQ(minimal.at("tokenizer_class").as_string(), "PreTrainedTokenizerFast");
  EXPECT_EQ(minimal.at("model_max_length").as_int(), 321);

  // What lies beside it wins, and a directory will do.
  fs::copy(run.tokenizer, tokenizer / "tokenizer.json");
  std::ofstream(tokenizer / "tokenizer_config.json") << "{\"eos_token\": \"x\"}";
  std::ofstream(tokenizer / "merges.txt") << "a b";
  run.tokenizer = tokenizer.path;
  Trainer(run).save(2);
  EXPECT_EQ(read_file(dir / "step-00000002/tokenizer_config.json"), "{\"eos_token\": \"x\"}");
  EXPECT_EQ(read_file(dir / "step-00000002/merges.txt"), "a b");

  Toy small(DType::f32);
  small.size.vocabulary = 10;
  Context context;
  Optimizer optimizer(small.params, run, context);
  EXPECT_REFUSED(Checkpoints(run, small, optimizer), "tokens, the model's vocab_size is 10");

  run.tokenizer = tokenizer / "absent.json";
  EXPECT_REFUSED(Trainer{run}, "absent.json: No such file");
}

TEST(Checkpoint, LoadsWeightsByName) {
  TempDir dir;
  Trainer r(config_for(dir));
  r.save(5);
  Toy fresh(DType::bf16);
  Tensor& bias = fresh.params.find(kBias).value;
  bias.fill_zero();
  load_weights(fresh.params, dir / "step-00000005", {});
  for (const auto& p : r.model.params) {
    if (!p->exported) continue;
    const Param& q = fresh.params.find(p->name);
    const Tensor rounded = p->master().to(DType::bf16, "test");
    EXPECT_EQ(0, std::memcmp(q.value.raw(), rounded.raw(), rounded.nbytes())) << p->name;
    EXPECT_EQ(q.master().to_vector<float>(), rounded.to_vector<float>()) << p->name;
  }
  EXPECT_EQ(bias.to_vector<float>(), (std::vector<float>{0, 0}));

  // Written in one form, read in the other.
  TempDir stacked;
  Trainer s(config_for(stacked), {.only_stacked = true});
  s.save(5);
  Toy other(DType::f64);
  load_weights(other.params, stacked / "step-00000005", {});
  EXPECT_EQ(
      other.params.find("experts.gate_up").master().to_vector<float>(),
      s.model.params.find("experts.gate_up").master().to(DType::bf16, "test").to_vector<float>());
}

// A model directory with the toy's tensors, edited by `change(name, shape)`; false leaves the
// tensor out.
void write_model(const std::string& directory,
                 const std::function<bool(const std::string&, std::vector<int64_t>&)>& change,
                 const std::string& extra = "", const ToyOptions& options = {}) {
  Toy toy(DType::f32, options);
  SafetensorsWriter w(directory, "model");
  for (const auto& p : toy.params)
    for (const Piece& piece : p->pieces) {
      std::vector<int64_t> shape(piece.shape.dims().begin(), piece.shape.dims().end());
      if (p->trained() && change(piece.name, shape)) w.add(piece.name, DType::f32, shape);
    }
  if (!extra.empty()) w.add(extra, DType::f32, {3});
  w.create();
  w.close();
}

TEST(Checkpoint, RefusesWeightsThatDoNotFit) {
  const auto all = [](const std::string&, std::vector<int64_t>&) { return true; };
  const auto load = [](const std::string& path, const std::vector<std::string>& ignored = {}) {
    Toy toy(DType::f32);
    load_weights(toy.params, path, ignored);
  };
  {
    TempDir dir;
    write_model(dir.path,
                [](const std::string& name, auto&) { return name != "model.norm.weight"; });
    EXPECT_REFUSED(load(dir.path), "no tensor model.norm.weight");
  }
  {
    TempDir dir;  // neither form is complete
    write_model(dir.path, [](const std::string& name, auto&) {
      return name.find("experts.1.up") == name.npos;
    });
    EXPECT_REFUSED(load(dir.path),
                   "no tensor model.layers.0.mlp.experts.1.up_proj.weight (or, in another form, "
                   "model.layers.0.mlp.experts.gate_up_proj)");
  }
  {
    TempDir dir;
    write_model(dir.path, [](const std::string& name, auto& shape) {
      if (name == "model.embed_tokens.weight") shape = {16, 64};
      return true;
    });
    EXPECT_REFUSED(load(dir.path),
                   "model.embed_tokens.weight has shape [16,64], this model needs [64,16]");
  }
  {
    TempDir dir;
    write_model(dir.path, all, "mtp.head.weight");
    EXPECT_REFUSED(load(dir.path), "tensor mtp.head.weight does not belong");
    EXPECT_REFUSED(load(dir.path, {"model.mtp.*"}), "tensor mtp.head.weight does not belong");
    load(dir.path, {"x", "mtp.*"});
  }
  {
    TempDir dir;
    write_model(dir.path, all);
    load(dir.path);
    fs::resize_file(dir / "model.safetensors", fs::file_size(dir / "model.safetensors") - 4);
    EXPECT_REFUSED(load(dir.path), "model.safetensors");
  }
  EXPECT_REFUSED(load("/nonexistent"), "/nonexistent");
  EXPECT_REFUSED(read_model_config("/nonexistent"), "No such file");
}

TEST(Checkpoint, RefusesAnotherRun) {
  TempDir dir;
  const RunConfig run = config_for(dir);
  Trainer(run).save(20);
  const std::string step = dir / "step-00000020";
  RunConfig muon = run;
  muon.optimizer.name = "muon";
  EXPECT_REFUSED(Trainer(muon).checkpoints->load(step),
                 "optimizer was \"adamw\", now it is \"muon\"");
  EXPECT_REFUSED(Trainer(run, {.width = 8}).checkpoints->load(step),
                 "master.model.embed_tokens.weight has shape [64,16], this model needs [64,8]");
  EXPECT_REFUSED(Trainer(run, {}, 5e5).checkpoints->load(step),
                 "another model: rope_theta was 10000.0, now it is 5");
  EXPECT_REFUSED(Trainer(run).checkpoints->load(dir.path), "state.json: No such file");

  // What the run does not know, and what it misses; nothing is changed before everything is
  // checked.
  Trainer r(run);
  r.fill(3);
  EXPECT_REFUSED(Trainer(run, {.only_stacked = true}).checkpoints->load(step),
                 "no tensor master.model.layers.0.mlp.experts.gate_up_proj");
  fs::resize_file(step + "/trainer/trainer.safetensors",
                  fs::file_size(step + "/trainer/trainer.safetensors") - 1);
  EXPECT_REFUSED(r.checkpoints->load(step), "trainer.safetensors");
  EXPECT_TRUE(r.holds(3));
  std::ofstream(step + "/trainer/state.json") << "{";
  EXPECT_REFUSED(r.checkpoints->load(step), "state.json");
}

TEST(Checkpoint, RefusesABiasThatCannotBeExported) {
  TempDir dir;
  RunConfig run = config_for(dir);
  run.balance.bias_update_rate = 0.001;
  Context context;
  Toy model(DType::f32);
  Optimizer optimizer(model.params, run, context);
  EXPECT_REFUSED(Checkpoints(run, model, optimizer), "balance.bias_export=\"drop\"");
  run.balance.bias_export = "drop";
  Checkpoints(run, model, optimizer);
  Toy other(DType::f32, {.bias_exported = true});
  Optimizer other_optimizer(other.params, run, context);
  run.balance.bias_export = "refuse";
  Checkpoints c(run, other, other_optimizer);
  other.params.initialize(1, 0.02);
  c.save(1);
  EXPECT_TRUE(Safetensors(dir / "step-00000001").has(kBias));
  EXPECT_TRUE(same(dir / "step-00000001", dir / "latest", 0));
}

TEST(Checkpoint, LatestFallsBackToTheNewestCompleteOne) {
  TempDir dir;
  const RunConfig run = config_for(dir);
  EXPECT_EQ(Checkpoints::latest(dir.path), "");
  EXPECT_EQ(Checkpoints::latest(dir / "absent"), "");
  Trainer r(run);
  r.save(9);
  r.save(10);
  EXPECT_EQ(Checkpoints::latest(dir.path), dir / "step-00000010");
  fs::remove(dir / "latest");
  fs::create_directory(dir / "step-00000099");  // not complete
  fs::create_directories(dir / "step-backup/trainer");
  std::ofstream(dir / "step-backup/trainer/state.json") << "{}";
  EXPECT_EQ(Checkpoints::latest(dir.path), dir / "step-00000010");
  fs::create_symlink("step-00000011", dir / "latest");  // dangling
  EXPECT_EQ(Checkpoints::latest(dir.path), dir / "step-00000010");
  fs::remove(dir / "latest");
  fs::create_symlink("step-00000009", dir / "latest");  // whoever set it back means it
  EXPECT_EQ(Checkpoints::latest(dir.path), dir / "step-00000009");
}

TEST(Checkpoint, PrunesOnlyOlderOnes) {
  TempDir dir;
  RunConfig run = config_for(dir);
  run.checkpoint.keep_last = 2;
  Trainer r(run);
  for (int64_t step : {1, 2, 3, 100}) r.save(step);
  fs::create_directory(dir / "step-00000000");  // not ours to judge
  EXPECT_EQ(listing(dir.path), (std::vector<std::string>{"latest", "step-00000000", "step-00000003",
                                                         "step-00000100"}));
  r.save(50);
  EXPECT_EQ(listing(dir.path), (std::vector<std::string>{"latest", "step-00000000", "step-00000003",
                                                         "step-00000050", "step-00000100"}));
  EXPECT_EQ(Checkpoints::latest(dir.path), dir / "step-00000050");
  r.save(51);
  EXPECT_EQ(listing(dir.path), (std::vector<std::string>{"latest", "step-00000000", "step-00000050",
                                                         "step-00000051", "step-00000100"}));
}

TEST(Checkpoint, RemovesWhatACrashLeft) {
  TempDir dir;
  const RunConfig run = config_for(dir);
  Trainer(run).save(1);
  fs::create_directories(dir / ".step-00000002.tmp-12345/trainer");
  std::ofstream(dir / ".step-00000002.tmp-12345/trainer/x") << "x";
  fs::create_directories(dir / ".step-00000002.tmp-12345-old");
  fs::create_symlink("nowhere", dir / "latest.tmp");
  std::ofstream(dir / "metrics.jsonl") << "{}";
  Trainer r(run);
  EXPECT_EQ(listing(dir.path),
            (std::vector<std::string>{"latest", "metrics.jsonl", "step-00000001"}));
  // A crash between the rename and the symbolic link left a whole directory under the next number.
  copy_all(dir / "step-00000001", dir / "step-00000002");
  std::ofstream(dir / "step-00000002/stranger") << "x";
  r.save(2);
  EXPECT_FALSE(fs::exists(dir / "step-00000002/stranger"));
  EXPECT_EQ(listing(dir.path), (std::vector<std::string>{"latest", "metrics.jsonl", "step-00000001",
                                                         "step-00000002"}));
  Trainer other(run);
  EXPECT_EQ(other.checkpoints->load(dir / "latest"), 2);
  EXPECT_TRUE(other.holds(2));
}

TEST(Checkpoint, CompareSeesOneBit) {
  TempDir dir;
  const RunConfig run = config_for(dir);
  Trainer(run).save(1);
  const std::string a = dir / "step-00000001", b = dir / "b";
  const std::string trainer = "/trainer/trainer.safetensors", model = "/model.safetensors";
  copy_all(a, b);
  EXPECT_TRUE(same(a, b, 0));
  for (const std::string name :
       {"m.model.norm.weight", "v.model.layers.0.mlp.experts.1.up_proj.weight",
        "state.model.layers.0.mlp.gate.e_score_correction_bias"}) {
    const int64_t at = offset_of(b + trainer, name);
    flip_bit(b + trainer, at);
    EXPECT_FALSE(same(a, b, 0)) << name;
    EXPECT_TRUE(same(a, b, 1e-6)) << name;
    flip_bit(b + trainer, at);
    EXPECT_TRUE(same(a, b, 0)) << name;
  }
  const int64_t weight = offset_of(b + model, "model.norm.weight");
  flip_bit(b + model, weight);
  EXPECT_FALSE(same(a, b, 1e-6));
  EXPECT_FALSE(same(b, a, 1e6));
  flip_bit(b + model, weight);
  EXPECT_TRUE(same(b, a, 0));

  Trainer(run, {.only_stacked = true}).save(7);
  EXPECT_FALSE(same(a, dir / "step-00000007", 1e6));
  Trainer r(run);
  r.save(7);
  EXPECT_FALSE(same(a, dir / "step-00000007", 1e-3));
  Tensor moment = r.optimizer.states()[0].tensor;
  moment.data<float>()[0] = NAN;
  r.checkpoints->save(8);
  EXPECT_FALSE(same(dir / "step-00000007", dir / "step-00000008", 1e6));
  EXPECT_TRUE(same(dir / "step-00000008", dir / "step-00000008", 0));
  const Outcome o = run_pith("verify --checkpoint " + a + " --against " + dir.path);
  EXPECT_EQ(o.code, 2) << o.out;
  EXPECT_NE(o.err.find(dir.path), o.err.npos) << o.err;

  // A weight that was not exported, in one of them and in both.
  const auto export_without = [&](const std::string& left_out) {
    const Safetensors file(a);
    SafetensorsWriter writer(b, "model");
    for (const auto& [name, entry] : file.entries())
      if (name != left_out) writer.add(name, entry.dtype, entry.shape);
    writer.create();
    for (const auto& [name, entry] : file.entries())
      if (name != left_out) writer.write(name, 0, file.load(name));
    writer.close();
  };
  export_without("");
  EXPECT_TRUE(same(a, b, 0));
  export_without("model.norm.weight");
  EXPECT_FALSE(same(a, b, 1e6));
  EXPECT_FALSE(same(b, a, 1e6));
  const Outcome missing =
      run_pith(fmt::format("verify --checkpoint {0} --against {0} --tolerance 1e6", b));
  EXPECT_EQ(missing.code, 1);
  EXPECT_NE(missing.out.find("model.norm.weight"), std::string::npos) << missing.out;
}

TEST(Checkpoint, BackgroundSaveIsASnapshot) {
  TempDir dir;
  RunConfig run = config_for(dir);
  run.checkpoint.background = true;
  Trainer r(run);
  r.save(1);  // the copy is made by the time save() returns
  r.fill(1234);
  r.save(2);
  r.fill(1234);
  r.checkpoints->finish();
  size_t bytes = 0;
  for (const Tensor& t : r.tensors()) bytes += t.nbytes();
  const size_t live = memory::live(Device::cpu);
  memory::reset_peak(Device::cpu);
  r.save(3);
  r.checkpoints->finish();
  EXPECT_EQ(memory::live(Device::cpu), live);
  EXPECT_GE(memory::peak(Device::cpu), live + bytes);
  for (int64_t step : {1, 2, 3}) {
    Trainer other(run);
    EXPECT_EQ(other.checkpoints->load(dir / fmt::format("step-{:08}", step)), step);
    EXPECT_TRUE(other.holds(step));
  }
  // A failure is thrown by the next call, once.
  fs::remove_all(dir.path);
  r.checkpoints->save(4);
  EXPECT_REFUSED(r.checkpoints->save(5), "the checkpoint of step 4 was not written");
  fs::create_directory(dir.path);
  r.checkpoints->save(6);
  r.checkpoints->finish();
  EXPECT_EQ(Checkpoints::latest(dir.path), dir / "step-00000006");
}

// Runs f in a child; its exit status, or 99 if it threw.
template <class F> int in_child(F&& f) {
  const pid_t child = fork();
  if (child == 0) {
    try {
      _exit(f());
    } catch (const std::exception& e) {
      fmt::print(stderr, "{}\n", e.what());
      _exit(99);
    }
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 100;
}

TEST(Checkpoint, FullDiskLeavesTheLastOne) {
  TempDir dir;
  const RunConfig run = config_for(dir);
  Trainer(run).save(1);
  const int status = in_child([&] {
    Trainer r(run);
    signal(SIGXFSZ, SIG_IGN);  // a file limit fails as a full disk does
    const rlimit limit{4000, 4000};
    setrlimit(RLIMIT_FSIZE, &limit);
    const std::string message = input_error_of([&] { r.save(2); });
    const bool clear = message.find("the checkpoint of step 2 was not written: ") == 0 &&
                       message.find("File too large") != message.npos &&
                       message.find('\n') == message.npos;
    if (!clear) fmt::print(stderr, "{}\n", message);
    return clear ? 0 : 1;
  });
  EXPECT_EQ(status, 0);
  EXPECT_EQ(listing(dir.path), (std::vector<std::string>{"latest", "step-00000001"}));
  Trainer r(run);
  EXPECT_EQ(r.checkpoints->load(Checkpoints::latest(dir.path)), 1);
  EXPECT_TRUE(r.holds(1));
}

// Saves in a loop, in the foreground and in the background, killed at random moments: what `latest`
// names always loads, is one of the states that were saved, and never gets older.
TEST(Checkpoint, SurvivesKillAtAnyMoment) {
  TempDir dir;
  RunConfig run = config_for(dir);
  run.checkpoint.keep_last = 2;
  std::mt19937 random(1234);
  const auto begin = std::chrono::steady_clock::now();
  Trainer(run, {.bias_exported = true}).save(1);
  const std::chrono::duration<double, std::micro> one_save =
      std::chrono::steady_clock::now() - begin;
  int64_t last = 1;
  int killed_in_a_save = 0;
  for (int attempt = 0; attempt < 40; ++attempt) {
    run.checkpoint.background = attempt % 4 == 3;
    const pid_t child = fork();
    if (child == 0) {
      try {
        Trainer r(run, {.bias_exported = true});
        int64_t step = r.checkpoints->load(Checkpoints::latest(run.out));
        for (;; ++step) r.save(step);  // the first again under its own number
      } catch (const std::exception& e) {
        fmt::print(stderr, "{}\n", e.what());
      }
      _exit(1);
    }
    usleep(useconds_t(random() % int64_t(5000 + 3 * one_save.count())));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the child ended by itself";
    for (const std::string& name : listing(dir.path))
      killed_in_a_save += name.starts_with(".step-");
    const std::string latest = Checkpoints::latest(dir.path);
    ASSERT_NE(latest, "") << "the last checkpoint was lost";
    Trainer r(run, {.bias_exported = true});
    const int64_t step = r.checkpoints->load(latest);
    ASSERT_GE(step, last);
    ASSERT_TRUE(r.holds(step)) << step;
    ASSERT_TRUE(same(latest, latest, 0));
    last = step;
  }
  EXPECT_GT(last, 1);
  EXPECT_GT(killed_in_a_save, 5);
}

}  // namespace
}  // namespace pith
