// pith verify: a model against golden vectors, a tokenizer against cases, a checkpoint against
// another.

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "app/commands.h"
#include "core/safetensors.h"
#include "data/tokenizer.h"
#include "engine/checkpoint.h"

namespace pith {
namespace {

struct Row {
  std::string name;
  double error, allowed;
  bool ok() const { return error <= allowed; }  // false for NaN
};

// The worst rows first; the last line of the command is the verdict alone.
int report(std::vector<Row> rows) {
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
    const double x = a.error / a.allowed, y = b.error / b.allowed;
    return std::isnan(x) ? !std::isnan(y) : x > y;
  });
  const bool ok = std::all_of(rows.begin(), rows.end(), [](const Row& r) { return r.ok(); });
  fmt::print("{:<64} {:>12} {:>12}\n", "worst", "error", "allowed");
  for (size_t i = 0; i < std::min<size_t>(rows.size(), 12); ++i)
    fmt::print("{:<64} {:>12.3e} {:>12.3e}{}\n", rows[i].name, rows[i].error, rows[i].allowed,
               rows[i].ok() ? "" : "  <-");
  fmt::print("{} compared\n{}\n", rows.size(), ok ? "PASS" : "FAIL");
  return ok ? 0 : 1;
}

double one_minus_cosine(const std::vector<double>& a, const std::vector<double>& b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) ab += a[i] * b[i], aa += a[i] * a[i], bb += b[i] * b[i];
  if (aa == 0 && bb == 0) return 0;
  return aa > 0 && bb > 0 ? 1 - ab / std::sqrt(aa * bb) : 1;
}

double relative(double a, double reference) {
  return std::abs(a - reference) / std::max(std::abs(reference), 1e-30);
}

struct GoldenRun {
  const Safetensors& golden;
  LoadedModel& loaded;
  Batch batch;
  double scale;  // of the tolerances
  bool low_precision;
  std::vector<Tensor> replay = {};
  std::vector<Row> rows = {};

  std::vector<double> reference(const std::string& name) const {
    return golden.load(name).to_vector<double>();
  }

  void logits() {
    MicroBatch mb = make_micro_batch(batch, 1, 1, 1);
    mb.replay = replay;
    const std::vector<double> got = loaded.pipeline->logits(mb).to_vector<double>(),
                              want = reference("logits");
    if (got.size() != want.size())
      fail_input("{}: logits has {} elements, the model makes {}", golden.path(), want.size(),
                 got.size());
    double worst = 0;
    for (size_t i = 0; i < got.size(); ++i)
      if (!(std::abs(got[i] - want[i]) <= worst)) worst = std::abs(got[i] - want[i]);
    const auto [low, high] = std::minmax_element(want.begin(), want.end());
    rows.push_back(low_precision
                       ? Row{"logits (share of their range)", worst / (*high - *low), 5e-2 * scale}
                       : Row{"logits (absolute)", worst, 1e-4 * scale});
  }

  void gradients(const StepSums& sums) {
    const double loss = reference("loss")[0];
    rows.push_back(
        {"loss", relative(sums.loss / sums.labels, loss), (low_precision ? 1e-2 : 1e-5) * scale});
    size_t compared = 0;
    for (const auto& p : loaded.model->params) {
      if (!p->trained()) continue;
      const std::vector<double> grad = p->grad.to_vector<double>();
      for (const Piece& piece : p->pieces) {
        const std::vector<double> want = reference("grad." + piece.name);
        if (int64_t(want.size()) != piece.shape.numel())
          fail_input("{}: grad.{} has {} elements, the model has {}", golden.path(), piece.name,
                     want.size(), piece.shape.str());
        std::vector<double> got(want.size(), 0.0);
        if (p->grad_written)
          for (size_t i = 0; i < got.size(); ++i)
            got[i] = grad[size_t(piece.begin) + i] / sums.labels;
        rows.push_back(low_precision
                           ? Row{"grad." + piece.name + " (1 - cosine)",
                                 one_minus_cosine(got, want), 1e-2 * scale}
                           : Row{"grad." + piece.name, relative_l2(got, want), 1e-4 * scale});
        ++compared;
      }
    }
    for (const auto& [name, entry] : golden.entries())
      if (name.rfind("grad.", 0) == 0 && compared-- == 0)
        fail_input("{}: holds more gradients than the model has tensors", golden.path());
  }

  // Ten AdamW steps on the one batch: weight decay on every parameter.
  void adamw() {
    const std::vector<double> losses = reference("adamw.loss"),
                              norms = reference("adamw.grad_norm");
    RunConfig run;
    run.optimizer.lr = 1e-3;
    run.optimizer.betas = {0.9, 0.95};
    run.optimizer.weight_decay = 0.1;
    run.optimizer.clip_norm = 1.0;
    for (const auto& p : loaded.model->params) p->decay = true;
    Optimizer optimizer(loaded.model->params, run, loaded.context);
    for (size_t step = 0; step < losses.size(); ++step) {
      const StepSums sums = loaded.pipeline->train_step(batch);
      const Optimizer::Norm norm = optimizer.grad_norm(sums.labels);
      rows.push_back({fmt::format("adamw.loss[{}]", step),
                      relative(sums.loss / sums.labels, losses[step]), 1e-4 * scale});
      rows.push_back({fmt::format("adamw.grad_norm[{}]", step), relative(norm.value, norms[step]),
                      1e-4 * scale});
      optimizer.update(run.optimizer.lr, int64_t(step) + 1, norm, sums.labels);
    }
  }
};

// Expert ids as the fp32 model chooses them, so that low precision is compared on the same routes.
std::vector<Tensor> fp32_routing(const VerifyOptions& o, const Batch& batch) {
  auto exact = load_model(o.model, "fp32", "cpu", batch.sequence, batch.batch, false);
  std::vector<Routing> trace;
  MicroBatch mb = make_micro_batch(batch, 1, 1, 1);
  mb.trace = &trace;
  exact->pipeline->logits(mb);
  std::vector<Tensor> ids;
  for (const Routing& r : trace) ids.push_back(r.ids);
  return ids;
}

int verify_model(const VerifyOptions& o) {
  const Safetensors golden(o.golden);
  const Value config = read_model_config(o.model);
  const Batch batch = golden_batch(golden, config.at("vocab_size").as_int());
  auto loaded = load_model(o.model, o.dtype, o.device, batch.sequence, batch.batch, true);
  const bool low = loaded->context.dtype == DType::bf16;
  GoldenRun run{golden, *loaded, batch, o.tolerance > 0 ? o.tolerance / 1e-4 : 1.0, low};
  if (low) run.replay = fp32_routing(o, batch);
  run.logits();
  run.gradients(loaded->pipeline->train_step(batch, false, run.replay));
  if (!low) run.adamw();
  return report(std::move(run.rows));
}

std::string excerpt(const std::string& text) {
  return text.size() > 40 ? text.substr(0, 40) + "..." : text;
}

int verify_tokenizer(const VerifyOptions& o) {
  const Tokenizer tokenizer(o.tokenizer);
  const Value cases = parse_json(read_file(o.cases), o.cases);
  int64_t wrong = 0;
  for (const Value& c : cases.items()) {
    const std::string& text = c.at("text").as_string();
    std::vector<int32_t> want;
    for (const Value& id : c.at("ids").items()) want.push_back(int32_t(id.as_int()));
    const std::vector<int32_t> got = tokenizer.encode(text);
    const bool ids_differ = got != want;
    const bool text_differs =
        c.find("decoded") && tokenizer.decode(want) != c.at("decoded").as_string();
    if (!ids_differ && !text_differs) continue;
    ++wrong;
    fmt::print("{} of {} differ\n", ids_differ ? "ids" : "decoded text",
               Value(excerpt(text)).json());
  }
  fmt::print("{} cases, {} wrong\n{}\n", cases.items().size(), wrong, wrong ? "FAIL" : "PASS");
  return wrong ? 1 : 0;
}

}  // namespace

int run_verify(const VerifyOptions& o) {
  const auto both = [](const std::string& a, const std::string& b, const char* names) {
    if (a.empty() || b.empty()) fail_input("verify needs {} together", names);
  };
  if (!o.checkpoint.empty() || !o.against.empty()) {
    both(o.checkpoint, o.against, "--checkpoint A and --against B");
    const bool ok = compare_checkpoints(o.checkpoint, o.against, std::max(o.tolerance, 0.0));
    fmt::print("{}\n", ok ? "PASS" : "FAIL");
    return ok ? 0 : 1;
  }
  if (!o.tokenizer.empty() || !o.cases.empty()) {
    both(o.tokenizer, o.cases, "--tokenizer FILE and --cases FILE");
    return verify_tokenizer(o);
  }
  both(o.model, o.golden, "--model DIR and --golden FILE");
  return verify_model(o);
}

}  // namespace pith
