// The optimizer over a set of parameters; the update rules themselves are tested with the ops.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "core/memory.h"
#include "core/rng.h"
#include "engine/optimizer.h"
#include "ops/optimizer.h"

namespace pith {
namespace {

struct Fixture {
  ParamSet params;
  Context context;
  RunConfig run;
  Param *embed, *qkv, *experts, *norm, *router, *bias, *unfit;

  explicit Fixture(DType dtype = DType::f64, Device device = Device::cpu) {
    context.dtype = dtype;
    context.device = device;
    const auto add = [&](const std::string& name, Shape shape, Role role,
                         std::vector<Piece> pieces) {
      Param p;
      p.name = name;
      p.shape = shape;
      p.role = role;
      p.pieces = std::move(pieces);
      p.decay = role != Role::vector;
      return &params.add(std::move(p));
    };
    embed = add("embed", {7, 4}, Role::embedding, {});
    qkv = add("qkv", {8, 4}, Role::matrix, {{"q", {4, 4}}, {"k", {2, 4}}, {"v", {2, 4}}});
    experts = add("experts", {2, 6, 4}, Role::matrix,
                  {{"0.gate", {3, 4}}, {"0.up", {3, 4}}, {"1.gate", {3, 4}}, {"1.up", {3, 4}}});
    norm = add("norm", {4}, Role::vector, {});
    router = add("router", {2, 4}, Role::router, {});
    bias = add("bias", {2}, Role::state, {});
    unfit = add("unfit", {3, 4}, Role::matrix, {{"a", {4}}, {"b", {8}}});  // no matrices inside
    params.allocate(dtype, device, true);
    if (device == Device::cpu) params.initialize(1, 0.5);
    for (const auto& p : params) {
      if (!p->trained()) continue;
      if (device == Device::cpu) fill_normal(p->grad, stream_key(2, p->name), 0, 3.0);
      p->grad_written = true;
    }
  }
  std::vector<double> masters() const {
    std::vector<double> all;
    for (const auto& p : params)
      for (double x : p->master().to_vector<double>()) all.push_back(x);
    return all;
  }
};

double norm_of(const ParamSet& params) {
  double sum = 0;
  for (const auto& p : params)
    if (p->trained())
      for (double g : p->grad.to_vector<double>()) sum += g * g;
  return std::sqrt(sum);
}

TEST(Optimizer, NormCountsEveryParameterOnce) {
  Fixture f;
  Optimizer optimizer(f.params, f.run, f.context);
  optimizer.update(0, 1, 10);
  const Optimizer::Norm norm = optimizer.norm();
  EXPECT_TRUE(norm.finite());
  EXPECT_NEAR(norm.value, norm_of(f.params) / 10, 1e-12 * norm.value);

  // What no gradient reached in this step counts as zero, whatever its memory holds.
  f.params.begin_step();
  f.router->grad_written = true;
  fill_normal(f.embed->grad, 1, 0, std::numeric_limits<double>::quiet_NaN());
  double sum = 0;
  for (double g : f.router->grad.to_vector<double>()) sum += g * g;
  optimizer.update(0, 2, 1);
  EXPECT_NEAR(optimizer.norm().value, std::sqrt(sum), 1e-12);
  EXPECT_EQ(f.embed->grad.to_vector<double>(), std::vector<double>(28, 0.0));
  EXPECT_TRUE(f.embed->grad_written);
}

TEST(Optimizer, NamesTheFirstBadParameterAndDoesNothing) {
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    Fixture f;
    Optimizer optimizer(f.params, f.run, f.context);
    f.experts->grad.data<double>()[2 * 12 + 5] = bad;
    f.router->grad.data<double>()[0] = bad;
    const std::vector<double> before = f.masters();
    optimizer.update(0.1, 1, 10);
    const Optimizer::Norm norm = optimizer.norm();
    EXPECT_FALSE(norm.finite());
    EXPECT_FALSE(std::isfinite(norm.value));
    EXPECT_EQ(norm.first_bad, "experts (1.gate)");
    EXPECT_EQ(f.masters(), before);
    for (const auto& s : optimizer.states())
      for (double x : s.tensor.to_vector<double>()) EXPECT_EQ(x, 0);
  }
  Fixture f;
  Optimizer optimizer(f.params, f.run, f.context);
  f.norm->grad.data<double>()[3] = HUGE_VAL;
  optimizer.update(0.1, 1, 1);
  EXPECT_EQ(optimizer.norm().first_bad, "norm");
}

TEST(Optimizer, StatesFollowTheRoles) {
  Fixture f(DType::bf16);
  Optimizer adamw(f.params, f.run, f.context);
  EXPECT_EQ(adamw.states().size(), 12u);  // m and v of six trained parameters
  f.run.optimizer.name = "muon";
  Optimizer muon(f.params, f.run, f.context);
  std::string text;
  for (const auto& s : muon.states()) {
    text += s.kind + " " + s.param->name + ", ";
    EXPECT_EQ(s.tensor.shape(), s.param->shape);
    EXPECT_EQ(s.tensor.dtype(), DType::f32);
    for (double x : s.tensor.to_vector<double>()) EXPECT_EQ(x, 0);
  }
  EXPECT_EQ(text,
            "m embed, v embed, momentum qkv, momentum experts, m norm, v norm, m router, v router, "
            "m unfit, v unfit, ");
}

// Three steps against the formula in plain loops: clipping, decay classes, bias correction.
TEST(Optimizer, AdamW) {
  for (const double clip : {0.0, 0.25, 1e9}) {
    Fixture f;
    f.run.optimizer.clip_norm = clip;
    Optimizer optimizer(f.params, f.run, f.context);
    const OptimizerConfig& o = f.run.optimizer;
    std::vector<double> want = f.masters();
    std::vector<double> m(want.size(), 0), v(want.size(), 0);
    for (int64_t step = 1; step <= 3; ++step) {
      const double labels = 5, lr = 0.01 * double(step);
      const double norm = norm_of(f.params) / labels;
      const double scale = (clip > 0 ? std::min(1.0, clip / (norm + 1e-6)) : 1.0) / labels;
      optimizer.update(lr, step, labels);
      size_t i = 0;
      for (const auto& p : f.params)
        for (int64_t j = 0; j < p->numel(); ++j, ++i) {
          if (!p->trained()) continue;
          const double g = p->grad.data<double>()[j] * scale, decay = p->decay ? o.weight_decay : 0;
          m[i] = o.betas[0] * m[i] + (1 - o.betas[0]) * g;
          v[i] = o.betas[1] * v[i] + (1 - o.betas[1]) * g * g;
          const double mh = m[i] / (1 - std::pow(o.betas[0], double(step)));
          const double vh = v[i] / (1 - std::pow(o.betas[1], double(step)));
          want[i] -= lr * (mh / (std::sqrt(vh) + o.eps) + decay * want[i]);
        }
      const std::vector<double> got = f.masters();
      for (i = 0; i < want.size(); ++i)
        ASSERT_NEAR(got[i], want[i], 1e-12) << "step " << step << " element " << i;
    }
  }
}

// Muon works on each Hugging Face matrix by itself, whatever the batches.
TEST(Optimizer, MuonPieceByPiece) {
  Fixture f, g;
  f.run.optimizer.name = "muon";
  f.run.optimizer.clip_norm = 0;
  Optimizer optimizer(f.params, f.run, f.context);
  std::map<std::string, Tensor> momentum;
  for (int64_t step = 1; step <= 2; ++step) {
    optimizer.update(0.02, step, 4);
    for (Param* p : {g.qkv, g.experts})
      for (const Piece& piece : p->pieces) {
        Tensor& buffer = momentum[piece.name];
        if (!buffer) buffer = Tensor::zeros(piece.shape, DType::f64, Device::cpu, "test");
        const auto part = [&](const Tensor& t) {
          return t.reshape({t.numel()})
              .row_range(piece.begin, piece.begin + piece.shape.numel())
              .reshape(piece.shape);
        };
        Tape tape(g.context, false);
        muon_update(tape, {0.02, 0.95, 0.1, 0.25}, part(p->grad), buffer, part(p->value),
                    part(p->value));
      }
  }
  const auto expect_near = [](const Param* a, const Param* b) {
    const auto x = a->master().to_vector<double>(), y = b->master().to_vector<double>();
    for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(x[i], y[i], 1e-12) << a->name << " " << i;
  };
  expect_near(f.qkv, g.qkv);
  expect_near(f.experts, g.experts);
  EXPECT_NE(f.qkv->master().to_vector<double>(), Fixture().qkv->master().to_vector<double>());
  EXPECT_NE(f.unfit->master().to_vector<double>(), g.unfit->master().to_vector<double>());
  EXPECT_EQ(f.bias->master().to_vector<double>(), g.bias->master().to_vector<double>());
}

TEST(Optimizer, ValuesAreTheRoundedMasters) {
  for (const char* rule : {"adamw", "muon"}) {
    Fixture f(DType::bf16);
    f.run.optimizer.name = rule;
    Optimizer optimizer(f.params, f.run, f.context);
    optimizer.update(0.1, 1, 3);
    for (const auto& p : f.params) {
      if (!p->trained()) continue;
      const Tensor rounded = p->master().to(DType::bf16, "test");
      EXPECT_EQ(p->value.to_vector<float>(), rounded.to_vector<float>()) << rule << " " << p->name;
    }
  }
}

TEST(Optimizer, RunsOnMeta) {
  for (const char* rule : {"adamw", "muon"}) {
    Fixture f(DType::bf16, Device::meta);
    const size_t before = memory::live(Device::meta);
    f.run.optimizer.name = rule;
    Optimizer optimizer(f.params, f.run, f.context);
    size_t bytes = 0;
    for (const auto& s : optimizer.states()) bytes += s.tensor.nbytes();
    EXPECT_EQ(memory::live(Device::meta) - before, bytes);
    optimizer.update(0.1, 1, 4);
    EXPECT_TRUE(optimizer.norm().finite());
    EXPECT_EQ(optimizer.norm().value, 0);
  }
}

}  // namespace
}  // namespace pith
