#include "op_testing.h"

#include <cmath>

#include "core/memory.h"
#include "core/rng.h"
#include "ops/linear.h"

namespace pith {
namespace {

struct Run {
  Inputs results;
  std::vector<std::vector<double>> values;  // of the results
  std::vector<std::vector<double>> input_grads, param_grads;
  size_t bytes = 0;
};

std::vector<double> random_values(const std::string& name, int64_t n, double scale) {
  std::vector<double> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = scale * normal(stream_key(7, name), i);
  return v;
}

Tensor tensor_of(const std::vector<double>& v, Shape shape, DType dtype) {
  return Tensor::of<double>(shape, v).to(dtype, "input").on(test_device());
}

// Weights of the scalar that finite differences look at.
double weight_of(size_t result, int64_t i) {
  return normal(stream_key(11, "weights"), result * 1000003 + i);
}

using Values = std::vector<std::vector<double>>;

Run run_case(const OpCase& c, const Values& x, const Values& w, DType dtype, bool backward,
             int repeats = 1) {
  Context context{.device = test_device(), .dtype = dtype};
  Inputs inputs;
  Params params;
  for (size_t i = 0; i < x.size(); ++i) inputs.push_back(tensor_of(x[i], c.inputs[i], dtype));
  for (size_t i = 0; i < w.size(); ++i) {
    params.push_back(make_param("w" + std::to_string(i), c.params[i], dtype, test_device()));
    params.back()->value.copy_from(tensor_of(w[i], c.params[i], dtype));
  }
  Run r;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    WgradQueue queue;
    Tape tape(context, backward, &queue);
    for (const Tensor& t : inputs) tape.leaf(t);
    r.results = c.run(tape, inputs, params);
    r.values.clear();
    for (const Tensor& t : r.results) r.values.push_back(t.to_vector<double>());
    if (!backward) continue;
    for (size_t k = 0; k < r.results.size(); ++k) {
      std::vector<double> seed(r.results[k].numel());
      for (size_t i = 0; i < seed.size(); ++i) seed[i] = weight_of(k, i);
      tape.set_grad(r.results[k], tensor_of(seed, r.results[k].shape(), r.results[k].dtype()));
    }
    tape.backward();
    WgradQueue* queues[] = {&queue};
    flush_wgrads(context, queues);
    r.input_grads.clear();
    for (const Tensor& t : inputs) r.input_grads.push_back(tape.take_grad(t).to_vector<double>());
  }
  for (const auto& p : params) r.param_grads.push_back(p->grad.to_vector<double>());
  return r;
}

double scalar_of(const Values& results) {
  double s = 0;
  for (size_t k = 0; k < results.size(); ++k)
    for (size_t i = 0; i < results[k].size(); ++i) s += results[k][i] * weight_of(k, i);
  return s;
}

void expect_near(const std::vector<double>& got, const std::vector<double>& want, double tolerance,
                 const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double scale = 1e-30, worst = 0;
  size_t where = 0;
  for (double v : want) scale = std::max(scale, std::abs(v));
  for (size_t i = 0; i < got.size(); ++i) {
    const double d = std::abs(got[i] - want[i]), error = std::isnan(d) ? HUGE_VAL : d;
    if (error > worst) worst = error, where = i;
  }
  EXPECT_LE(worst / scale, tolerance)
      << what << ": element " << where << " is " << (got.empty() ? 0 : got[where])
      << ", the reference says " << (got.empty() ? 0 : want[where]);
}

void check_differences(const OpCase& c, Values x, Values w, const Run& exact) {
  const auto along = [&](std::vector<double>& v, const std::vector<double>& grad,
                         const std::string& name) {
    const std::vector<double> direction = random_values("direction " + name, v.size(), 1), kept = v;
    const double h = 1e-5;
    double analytic = 0, norm = 0;
    for (size_t i = 0; i < v.size(); ++i) analytic += grad[i] * direction[i];
    const auto at = [&](double step) {
      for (size_t i = 0; i < v.size(); ++i) v[i] = kept[i] + step * direction[i];
      return scalar_of(run_case(c, x, w, DType::f64, false).values);
    };
    // Fourth-order central difference.
    const double numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
    v = kept;
    for (double g : grad) norm += g * g;
    EXPECT_NEAR(analytic, numeric, c.gradient_tolerance * std::max(std::sqrt(norm), 1e-3))
        << c.name << ": gradient of " << name;
  };
  for (size_t i = 0; i < x.size(); ++i)
    along(x[i], exact.input_grads[i], "input " + std::to_string(i));
  for (size_t i = 0; i < w.size(); ++i)
    along(w[i], exact.param_grads[i], "parameter " + std::to_string(i));
}

void check_meta(const OpCase& c, const Run& exact) {
  Context context;
  context.device = Device::meta;
  context.dtype = DType::f64;
  Inputs inputs;
  Params params;
  for (const Shape& s : c.inputs) inputs.push_back(Tensor(s, DType::f64, Device::meta, "input"));
  for (const Shape& s : c.params) params.push_back(make_param("w", s, DType::f64, Device::meta));
  WgradQueue queue;
  Tape tape(context, true, &queue);
  Inputs results;
  try {
    results = c.run(tape, inputs, params);
  } catch (const Error& e) {
    if (std::string(e.what()).find("the tape runs on meta") == std::string::npos)
      ADD_FAILURE() << c.name << " on meta: " << e.what();
    return;  // the case captures cpu tensors (ids, tables); its op is covered by the model on meta
  }
  ASSERT_EQ(results.size(), exact.results.size());
  for (size_t k = 0; k < results.size(); ++k)
    EXPECT_EQ(results[k].shape().str(), exact.results[k].shape().str());
}

}  // namespace

Device test_device() {
  const char* wanted = std::getenv("PITH_TEST_DEVICE");
  return wanted && std::string(wanted) == "cuda" ? Device::cuda : Device::cpu;
}

Tensor ints(const std::vector<int32_t>& v, Device device) {
  return Tensor::of<int32_t>({int64_t(v.size())}, v).on(device);
}

void fill_nan(Tensor t) {
  const std::vector<double> nan(size_t(t.numel()), std::nan(""));
  t.copy_from(Tensor::of<double>(t.shape(), nan).to(t.dtype(), "nan"));
}

std::unique_ptr<Param> make_param(const std::string& name, Shape shape, DType compute,
                                  Device device) {
  auto p = std::make_unique<Param>();
  p->name = name;
  p->shape = shape;
  p->value = Tensor::zeros(shape, compute, device, "weight");
  p->grad = Tensor::zeros(shape, master_dtype(compute), device, "main_grad");
  return p;
}

void check_op(const OpCase& c) {
  SCOPED_TRACE(c.name);
  Values x, w;
  for (size_t i = 0; i < c.inputs.size(); ++i)
    x.push_back(random_values("x" + std::to_string(i), c.inputs[i].numel(), c.input_scale));
  for (size_t i = 0; i < c.params.size(); ++i)
    w.push_back(random_values("w" + std::to_string(i), c.params[i].numel(), c.input_scale));
  const Run exact = run_case(c, x, w, DType::f64, c.differentiable);
  for (const OpCase::Tolerance& t : c.tolerances) {
    // The reference sees what the op sees: inputs rounded to the dtype.
    Values xr, wr;
    for (size_t i = 0; i < x.size(); ++i)
      xr.push_back(tensor_of(x[i], c.inputs[i], t.dtype).to_vector<double>());
    for (size_t i = 0; i < w.size(); ++i)
      wr.push_back(tensor_of(w[i], c.params[i], t.dtype).to_vector<double>());
    const Run got = run_case(c, xr, wr, t.dtype, c.differentiable);
    const Values want = c.reference(xr, wr);
    ASSERT_EQ(got.values.size(), want.size());
    const std::string type = name_of(t.dtype);
    for (size_t k = 0; k < want.size(); ++k)
      expect_near(got.values[k], want[k], t.value,
                  c.name + " " + type + " result " + std::to_string(k));
    if (!c.differentiable || t.dtype == DType::f64) continue;
    const Run wide = run_case(c, xr, wr, DType::f64, true);
    for (size_t i = 0; i < x.size(); ++i)
      expect_near(got.input_grads[i], wide.input_grads[i], 10 * t.value,
                  c.name + " " + type + " gradient of input " + std::to_string(i));
    for (size_t i = 0; i < w.size(); ++i)
      expect_near(got.param_grads[i], wide.param_grads[i], 10 * t.value,
                  c.name + " " + type + " gradient of parameter " + std::to_string(i));
  }
  if (!c.differentiable) return;
  check_differences(c, x, w, exact);
  check_meta(c, exact);
  const Run twice = run_case(c, x, w, DType::f64, true, 2);
  for (size_t i = 0; i < w.size(); ++i) {
    std::vector<double> doubled = exact.param_grads[i];
    for (double& v : doubled) v *= 2;
    expect_near(twice.param_grads[i], doubled, 1e-12,
                c.name + " second micro-batch, parameter " + std::to_string(i));
  }
}

}  // namespace pith
