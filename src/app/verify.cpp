// pith verify: a model against golden vectors, a tokenizer against cases, a checkpoint against
// another.

#include "app/commands.h"
#include "core/safetensors.h"
#include "data/tokenizer.h"
#include "engine/checkpoint.h"

namespace pith {
namespace {

double one_minus_cosine(const std::vector<double>& a, const std::vector<double>& b) {
  const auto dot = [](const std::vector<double>& x, const std::vector<double>& y) {
    return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
  };
  if (dot(a, a) == 0 && dot(b, b) == 0) return 0;
  return 1 - dot(a, b) / std::sqrt(dot(a, a) * dot(b, b));  // NaN where one of them is zero
}

// A model on the batch of a golden file, one method per thing that is compared.
struct GoldenRun {
  const VerifyOptions& options;
  const Safetensors golden = Safetensors(options.golden);
  const Batch batch = golden_batch(golden, options.model);
  Session session = {options, batch.sequence, batch.batch, true};
  const bool low_precision = session.context.dtype == DType::bf16;
  std::vector<Row> rows = {};

  // The golden `name`, which must have `size` elements, or any number of them for 0.
  std::vector<double> reference(const std::string& name, size_t size = 0) const {
    std::vector<double> values = golden.load(name).to_vector<double>();
    if (size != 0 && values.size() != size)
      fail_input("{}: {} has {} elements, the model makes {}", golden.path(), name, values.size(),
                 size);
    return values;
  }

  void logits(const std::vector<Tensor>& replay) {
    MicroBatch mb{batch};
    mb.replay = replay;
    const std::vector<double> got = session.pipeline.logits(mb).to_vector<double>(),
                              want = reference("logits", got.size());
    double worst = 0;
    for (size_t i = 0; i < got.size(); ++i)
      if (const double error = std::abs(got[i] - want[i]); !(error <= worst))
        worst = std::isnan(error) ? HUGE_VAL : error;  // so that no later one replaces it
    const auto [low, high] = std::ranges::minmax(want);
    if (low_precision)
      rows.push_back({"logits (share of their range)", worst / (high - low), 5e-2});
    else
      rows.push_back({"logits (absolute)", worst, 1e-4});
  }

  void gradients(const StepSums& sums) {
    rows.push_back({"loss", relative_l2({sums.loss() / sums.labels}, reference("loss", 1)),
                    low_precision ? 1e-2 : 1e-5});
    size_t extra = 0;
    for (const auto& [name, entry] : golden.entries()) extra += name.starts_with("grad.");
    for (const auto& p : session.model->params) {
      if (!p->trained()) continue;
      std::vector<double> grad(size_t(p->numel()), 0.0);
      if (p->grad_written) grad = p->grad.to_vector<double>();
      for (double& g : grad) g /= sums.labels;
      for (const Piece& piece : p->pieces) {
        const std::string name = "grad." + piece.name;
        const auto begin = grad.begin() + piece.begin;
        const std::vector<double> got(begin, begin + piece.shape.numel()),
            want = reference(name, got.size());
        if (low_precision)
          rows.push_back({name + " (1 - cosine)", one_minus_cosine(got, want), 1e-2});
        else
          rows.push_back({name, relative_l2(got, want), 1e-4});
        --extra;
      }
    }
    if (extra > 0) fail_input("{}: holds more gradients than the model has tensors", golden.path());
  }

  // Ten AdamW steps on the one batch: weight decay on every parameter.
  void adamw() {
    const std::vector<double> losses = reference("adamw.loss"),
                              norms = reference("adamw.grad_norm", losses.size());
    RunConfig run;
    run.optimizer = {.lr = 1e-3, .betas = {0.9, 0.95}, .weight_decay = 0.1, .clip_norm = 1.0};
    for (const auto& p : session.model->params) p->decay = true;
    Optimizer optimizer(session.model->params, run, session.context);
    for (size_t step = 0; step < losses.size(); ++step) {
      const StepSums sums = session.pipeline.train_step(batch);
      optimizer.update(run.optimizer.lr, int64_t(step) + 1, sums.labels);
      rows.push_back({fmt::format("adamw.loss[{}]", step),
                      relative_l2({sums.loss() / sums.labels}, {losses[step]}), 1e-4});
      rows.push_back({fmt::format("adamw.grad_norm[{}]", step),
                      relative_l2({optimizer.norm().value}, {norms[step]}), 1e-4});
    }
  }
};

// Expert ids as the fp32 model chooses them, so that low precision is compared on the same routes.
std::vector<Tensor> fp32_routing(const std::string& model, const Batch& batch) {
  Session exact(ModelArguments{model}, batch.sequence, batch.batch, false);
  std::vector<Routing> trace;
  MicroBatch mb{batch};
  mb.trace = &trace;
  exact.pipeline.logits(mb);
  std::vector<Tensor> ids;
  for (const Routing& r : trace) ids.push_back(r.ids);
  return ids;
}

int verify_model(const VerifyOptions& o) {
  GoldenRun run{o};
  std::vector<Tensor> replay;
  if (run.low_precision) replay = fp32_routing(o.model, run.batch);
  run.logits(replay);
  run.gradients(run.session.pipeline.train_step(run.batch, false, replay));
  if (!run.low_precision) run.adamw();
  if (o.tolerance > 0)
    for (Row& row : run.rows) row.allowed *= o.tolerance / 1e-4;
  return report(std::move(run.rows));
}

int verify_tokenizer(const VerifyOptions& o) {
  const Tokenizer tokenizer(o.tokenizer);
  const Value cases = parse_json(read_file(o.cases), o.cases);
  std::vector<Row> rows;
  for (const Value& c : cases.items()) {
    const std::string& text = c.at("text").as_string();
    std::vector<int32_t> want;
    for (const Value& id : c.at("ids").items()) want.push_back(int32_t(id.as_int()));
    rows.push_back(exact("ids of " + text.substr(0, 40), tokenizer.encode(text) == want));
    if (const Value* decoded = c.find("decoded"))
      rows.push_back(exact("decoded ids of " + text.substr(0, 40),
                           tokenizer.decode(want) == decoded->as_string()));
  }
  return report(std::move(rows));
}

// Whether the exported `name` is there, in bf16, and the rounding of its master.
bool is_rounded(const Safetensors& model, const Safetensors& trainer, const std::string& name) {
  const std::string master = (trainer.has("master." + name) ? "master." : "state.") + name;
  if (!model.has(name) || !trainer.has(master)) return false;
  const Tensor x = model.load(name), y = trainer.load(master).to(DType::bf16, "compare");
  return x.dtype() == DType::bf16 && x.shape() == y.shape() &&
         std::memcmp(x.raw(), y.raw(), x.nbytes()) == 0;
}

// Relative to `a`; 0 only if bit-equal, infinity if they cannot be compared.
double difference(const Safetensors& a, const Safetensors& b, const std::string& name) {
  if (!a.has(name) || !b.has(name) || a.entry(name).shape != b.entry(name).shape) return HUGE_VAL;
  if (std::ranges::equal(a.bytes(name), b.bytes(name))) return 0;
  const auto x = a.load(name).to_vector<double>(), y = b.load(name).to_vector<double>();
  return std::max(relative_l2(y, x), std::numeric_limits<double>::min());
}

// Masters, moments and untrained state of two checkpoints; bf16 weights only as the rounding of
// their own masters, at any tolerance.
int verify_checkpoint(const VerifyOptions& o) {
  std::vector<Safetensors> models, trainers;
  std::set<std::string> tensors, exported;  // of either
  for (const std::string& directory : {o.checkpoint, o.against}) {
    models.emplace_back(directory);
    trainers.emplace_back(directory + "/trainer", "trainer");
    for (const auto& [name, entry] : models.back().entries()) exported.insert(name);
    for (const auto& [name, entry] : trainers.back().entries()) {
      tensors.insert(name);
      // What is trained is exported; of the untrained state, what one of the two exports.
      if (name.starts_with("master.")) exported.insert(name.substr(7));
    }
  }
  std::vector<Row> rows;
  for (const std::string& name : tensors)
    rows.push_back({name, difference(trainers[0], trainers[1], name), o.tolerance});
  for (const std::string& name : exported)
    for (const int i : {0, 1})
      rows.push_back(
          exact(name + " in bf16, " + models[i].path(), is_rounded(models[i], trainers[i], name)));
  return report(std::move(rows));
}

}  // namespace

int run_verify(const VerifyOptions& o) {
  const auto both = [](const std::string& a, const std::string& b, const char* names) {
    if (a.empty() != b.empty()) fail_input("verify needs {} together", names);
    return !a.empty();
  };
  if (both(o.checkpoint, o.against, "--checkpoint A and --against B")) return verify_checkpoint(o);
  if (both(o.tokenizer, o.cases, "--tokenizer FILE and --cases FILE")) return verify_tokenizer(o);
  if (both(o.model, o.golden, "--model DIR and --golden FILE")) return verify_model(o);
  fail_input(
      "verify needs --model and --golden, --tokenizer and --cases, or --checkpoint and --against");
}

}  // namespace pith
