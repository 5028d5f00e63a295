#include "ops/linear.h"

#include <omp.h>

#include "core/rng.h"
#include "op_testing.h"

namespace pith {
namespace {

using Flat = std::vector<double>;

// y[r] = x[r] w^T (+ bias) for rows [begin, end).
void naive_rows(const Flat& x, const double* w, const Flat* bias, int64_t begin, int64_t end,
                int64_t n, int64_t k, Flat& y) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias ? (*bias)[j] : 0;
      for (int64_t p = 0; p < k; ++p) sum += x[r * k + p] * w[j * k + p];
      y[r * n + j] = sum;
    }
}

TEST(Linear, MatchesReferenceAndDifferences) {
  struct Size {
    int64_t t, n, k;
  };
  for (const Size& s :
       {Size{7, 13, 5}, Size{1, 1, 1}, Size{1, 33, 16}, Size{65, 1, 7}, Size{33, 70, 1},
        Size{3, 200, 40}, Size{0, 13, 5}, Size{127, 24, 40}, Size{129, 264, 8}, Size{300, 24, 16}})
    for (const bool with_bias : {false, true})
      for (const bool wide : {false, true}) {
        OpCase c;
        c.name = fmt::format("linear {}x{}x{}{}{}", s.t, s.n, s.k, with_bias ? " bias" : "",
                             wide ? " wide" : "");
        c.inputs = {{s.t, s.k}};
        c.params = {{s.n, s.k}};
        if (with_bias) c.params.push_back({s.n});
        c.run = [=](Tape& tape, const Inputs& x, const Params& w) -> Inputs {
          LinearOptions options;
          if (with_bias) options.bias = w[1].get();
          if (wide) options.out = master_dtype(x[0].dtype());
          return {linear(tape, x[0], *w[0], options)};
        };
        c.reference = [=](const std::vector<Flat>& x,
                          const std::vector<Flat>& w) -> std::vector<Flat> {
          Flat y(s.t * s.n);
          naive_rows(x[0], w[0].data(), with_bias ? &w[1] : nullptr, 0, s.t, s.n, s.k, y);
          return {y};
        };
        check_op(c);
      }
}

// Two uses of x and of w: the second gradient of x is added (in bf16 too), the second record of w
// as well.
TEST(Linear, GradientsAdd) {
  OpCase c;
  c.name = "linear twice";
  c.inputs = {{9, 6}};
  c.params = {{11, 6}};
  c.run = [](Tape& tape, const Inputs& x, const Params& w) -> Inputs {
    return {linear(tape, x[0], *w[0]), linear(tape, x[0], *w[0])};
  };
  c.reference = [](const std::vector<Flat>& x, const std::vector<Flat>& w) -> std::vector<Flat> {
    Flat y(9 * 11);
    naive_rows(x[0], w[0].data(), nullptr, 0, 9, 11, 6, y);
    return {y, y};
  };
  check_op(c);
}

Tensor offsets_of(const std::vector<int32_t>& counts, Device device = test_device()) {
  std::vector<int32_t> offsets = {0};
  for (int32_t c : counts) offsets.push_back(offsets.back() + c);
  return ints(offsets, device);
}

// Of each expert 0 to most - 1 rows, ragged.
std::vector<int32_t> ragged(int64_t experts, int32_t most, uint64_t key = 1) {
  std::vector<int32_t> counts;
  for (int64_t e = 0; e < experts; ++e) counts.push_back(int32_t(uniform(key, e) * most));
  return counts;
}

TEST(GroupedLinear, MatchesReferenceAndDifferences) {
  struct Case {
    const char* name;
    std::vector<int32_t> counts;
    int64_t tail, n, k;
  };
  // Tiles are 128 rows by 256 columns, 64 deep; multiples of 8 take them, other sizes do not.
  for (const Case& s :
       {Case{"one expert", {7}, 0, 13, 5}, Case{"one expert with a tail", {7}, 2, 13, 5},
        Case{"empty experts", {0, 3, 0, 0, 5, 0}, 0, 7, 9}, Case{"tail", {2, 1, 4}, 5, 6, 3},
        Case{"one gets everything", {0, 0, 300, 0}, 3, 8, 6},
        Case{"one dominates", {3, 290, 2, 1}, 0, 5, 4}, Case{"all empty", {0, 0, 0}, 4, 6, 3},
        Case{"no rows", {0, 0, 0}, 0, 6, 3}, Case{"single rows, K = 1", {1, 1, 1}, 0, 17, 1},
        Case{"no rows of whole tiles", {0, 0}, 0, 16, 8},
        Case{"a tail of whole tiles", {0, 0, 0}, 9, 8, 16},
        Case{"about a tile", {1, 127, 128, 129}, 5, 72, 40},
        Case{"one gets 300", {0, 300, 0, 1}, 0, 24, 72},
        Case{"wider than a tile", {3, 0, 66}, 0, 264, 136},
        Case{"deeper than a tile", {65, 2, 0}, 1, 136, 328},
        Case{"odd sizes", {130, 0, 1, 64}, 3, 31, 17}, Case{"40 experts", ragged(40, 9), 0, 24, 8},
        Case{"512 experts", ragged(512, 3), 2, 8, 16},
        Case{"600 experts", ragged(600, 3), 0, 16, 8}}) {
    const Tensor offsets = offsets_of(s.counts);
    const int64_t experts = s.counts.size(), rows = offsets.to_vector<int32_t>().back() + s.tail;
    OpCase c;
    c.name = fmt::format("grouped_linear {}", s.name);
    c.inputs = {{rows, s.k}};
    c.params = {{experts, s.n, s.k}};
    c.run = [=](Tape& tape, const Inputs& x, const Params& w) -> Inputs {
      return {grouped_linear(tape, x[0], *w[0], offsets)};
    };
    c.reference = [=](const std::vector<Flat>& x, const std::vector<Flat>& w) -> std::vector<Flat> {
      Flat y(rows * s.n, 0.0);
      const auto at = offsets.to_vector<int64_t>();
      for (int64_t e = 0; e < experts; ++e)
        naive_rows(x[0], &w[0][e * s.n * s.k], nullptr, at[e], at[e + 1], s.n, s.k, y);
      return {y};
    };
    for (const int threads : {1, 3}) {
      const int before = omp_get_max_threads();
      omp_set_num_threads(threads);
      check_op(c);
      omp_set_num_threads(before);
    }
  }
}

struct Segments {  // of one weight gradient: w is [E, N, K], or [N, K] for no experts
  int64_t records, experts, n, k;
  int32_t most;  // rows of an expert, about
  DType in, grad;
};

// One flush of several records, each with counts of its own, onto `before`, against the sum in fp64.
void check_segments(const Segments& s, bool add) {
  SCOPED_TRACE(fmt::format("{} records, {} experts, {} x {}, {} to {}{}", s.records, s.experts, s.n,
                           s.k, name_of(s.in), name_of(s.grad), add ? ", added" : ""));
  Context context{.device = test_device(), .dtype = s.in};
  const Shape shape = s.experts ? Shape{s.experts, s.n, s.k} : Shape{s.n, s.k};
  Param w{.name = "w", .shape = shape};
  Tensor before(shape, DType::f64, Device::cpu, "before");
  fill_normal(before, 3, 0, 1.0);
  w.grad = before.to(s.grad, "grad").on(context.device);
  w.grad_written = add;
  Flat want = add ? w.grad.to_vector<double>() : Flat(size_t(before.numel()), 0.0);
  if (!add) fill_nan(w.grad);
  std::vector<WgradQueue> queues(size_t(s.records));
  std::vector<WgradQueue*> all;
  for (int64_t i = 0; i < s.records; ++i) {
    // Every third record has nobody's rows alone, and every record a tail that nobody may read.
    const std::vector<int32_t> counts =
        i % 3 == 2 ? std::vector<int32_t>(size_t(s.experts), 0) : ragged(s.experts, s.most, i);
    const Tensor offsets = s.experts ? offsets_of(counts) : Tensor();
    const auto at = s.experts ? offsets.to_vector<int64_t>() : std::vector<int64_t>{0, 37 * i};
    const int64_t rows = at.back() + (s.experts ? 5 : 0);
    const auto operand = [&](int64_t width, uint64_t key) {
      Tensor t({rows, width}, DType::f64, Device::cpu, "operand");
      fill_normal(t, key, 0, 1.0);
      fill_nan(t.row_range(at.back(), rows));
      return t.to(s.in, "operand");
    };
    const Tensor x = operand(s.k, 100 + i), dy = operand(s.n, 200 + i);
    const Flat xv = x.to_vector<double>(), dv = dy.to_vector<double>();
    for (size_t e = 0; e + 1 < at.size(); ++e)
      for (int64_t r = at[e]; r < at[e + 1]; ++r)
        for (int64_t a = 0; a < s.n; ++a) {
          double* row = &want[(e * s.n + a) * s.k];
          for (int64_t b = 0; b < s.k; ++b) row[b] += dv[r * s.n + a] * xv[r * s.k + b];
        }
    queues[i].push_back({&w, x.on(context.device), dy.on(context.device), offsets, Loc::current()});
    all.push_back(&queues[i]);
  }
  flush_wgrads(context, all);
  const Flat got = w.grad.to_vector<double>();
  double scale = 1e-30, worst = 0;
  for (double v : want) scale = std::max(scale, std::abs(v));
  for (size_t i = 0; i < got.size(); ++i) {
    const double d = std::abs(got[i] - want[i]);
    worst = std::max(worst, std::isnan(d) ? HUGE_VAL : d);
  }
  EXPECT_LE(worst / scale, s.grad == DType::bf16 ? 1e-2 : 1e-5);
}

TEST(FlushWgrads, SeveralRecordsAreTheirSum) {
  std::vector<std::pair<DType, DType>> types = {{DType::f32, DType::f32},
                                                {DType::bf16, DType::f32}};
  if (test_device() == Device::cuda)  // the CPU has no bf16 gradients
    types.push_back({DType::bf16, DType::bf16});
  for (const auto& [in, grad] : types)
    for (const bool add : {false, true}) {
      for (int64_t records : {1, 2, 8, 9}) {
        check_segments({records, 5, 24, 40, 70, in, grad}, add);
        check_segments({records, 3, 7, 5, 20, in, grad}, add);
        check_segments({records, 0, 24, 40, 0, in, grad}, add);
      }
      check_segments({2, 3, 136, 264, 140, in, grad}, add);
      check_segments({2, 2, 264, 136, 70, in, grad}, add);
      check_segments({3, 40, 16, 8, 6, in, grad}, add);
      check_segments({2, 600, 8, 8, 3, in, grad}, add);
    }
}

struct Bench {
  Context context;
  WgradQueue queue;
  std::unique_ptr<Param> w;
  Tensor x, offsets;
  Bench(DType dtype, Device device, Shape shape, int64_t rows) {
    context.dtype = dtype;
    context.device = device;
    w = make_param("w", shape, dtype, device);
    x = Tensor::zeros({rows, shape[shape.rank() - 1]}, dtype, device, "x");
  }
};

TEST(GroupedLinear, TailOfGradientIsZeroAndEmptyExpertsAreCleared) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    Bench b(dtype, Device::cpu, {3, 4, 2}, 9);
    const Tensor offsets = offsets_of({2, 0, 3}, Device::cpu);
    std::memset(b.w->grad.raw(), 0xff,
                b.w->grad.nbytes());  // NaN: the first write of a step overwrites
    Tape tape(b.context, true, &b.queue);
    tape.leaf(b.x);
    Tensor y = grouped_linear(tape, b.x, *b.w, offsets);
    Tensor dy = Tensor::zeros(y.shape(), dtype, Device::cpu, "dy");
    std::memset(dy.row_range(5, 9).raw(), 0xff,
                dy.row_range(5, 9).nbytes());  // nobody may read the tail
    tape.set_grad(y, dy);
    tape.backward();
    EXPECT_EQ(tape.take_grad(b.x).to_vector<double>(), Flat(18, 0.0));
    WgradQueue* queues[] = {&b.queue};
    flush_wgrads(b.context, queues);
    EXPECT_EQ(b.w->grad.to_vector<double>(), Flat(24, 0.0));
    EXPECT_TRUE(b.queue.empty());
    EXPECT_TRUE(b.w->grad_written);
  }
}

TEST(Linear, FirstBiasGradientOfAStepOverwrites) {
  Bench b(DType::f32, Device::cpu, {3, 4}, 5);
  auto bias = make_param("bias", {3}, DType::f32);
  std::memset(bias->grad.raw(), 0xff, bias->grad.nbytes());  // NaN
  Tape tape(b.context, true, &b.queue);
  const Tensor y = linear(tape, b.x, *b.w, {.bias = bias.get()});
  tape.set_grad(y, Tensor::of<float>(y.shape(), std::vector<float>(15, 2)));
  tape.backward();
  EXPECT_EQ(bias->grad.to_vector<double>(), Flat(3, 10.0));
}

// Flushing micro-batches together or one by one gives the same bits, and records meet in order of
// micro-batch.
TEST(FlushWgrads, DoesNotDependOnHowManyAreFlushedTogether) {
  const auto gradient = [](bool together) {
    Context context;
    auto w = make_param("w", {5, 6}, DType::f32), v = make_param("v", {6, 6}, DType::f32);
    WgradQueue queues[3];
    for (int i = 0; i < 3; ++i) {
      Tensor x({31, 6}, DType::f32, Device::cpu, "x"), dy({31, 5}, DType::f32, Device::cpu, "dy");
      fill_normal(x, 17 + i, 0, 1.0);
      fill_normal(dy, 29 + i, 0, 1.0);
      queues[i].push_back({w.get(), x, dy, {}, Loc::current()});
      queues[i].push_back({v.get(), x, x, {}, Loc::current()});
      WgradQueue* one[] = {&queues[i]};
      if (!together) flush_wgrads(context, one);
    }
    WgradQueue* all[] = {&queues[0], &queues[1], &queues[2]};
    if (together) flush_wgrads(context, all);
    auto g = w->grad.to_vector<double>();
    for (double d : v->grad.to_vector<double>()) g.push_back(d);
    return g;
  };
  EXPECT_EQ(gradient(true), gradient(false));
}

TEST(FlushWgrads, CountsOnMeta) {
  Bench b(DType::bf16, Device::meta, {4, 8, 16}, 10);
  const Tensor offsets({5}, DType::i32, Device::meta, "offsets");
  Tape tape(b.context, true, &b.queue);
  tape.leaf(b.x);
  Tensor y = grouped_linear(tape, b.x, *b.w, offsets);
  tape.set_grad(y, Tensor(y.shape(), y.dtype(), Device::meta, "dy"));
  tape.backward();
  WgradQueue* queues[] = {&b.queue};
  flush_wgrads(b.context, queues);
  EXPECT_EQ(b.context.total.flops, 3 * 2.0 * 10 * 8 * 16);
}

template <class F> std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Linear, ErrorsNameTheCallersLine) {
  Bench b(DType::f32, Device::cpu, {3, 4}, 5);
  Tape tape(b.context, true, &b.queue);
  auto wrong = make_param("wrong", {3, 7}, DType::f32);
  const int line = __LINE__ + 1;
  const std::string shape = message_of([&] { linear(tape, b.x, *wrong); });
  EXPECT_NE(shape.find(fmt::format("linear_test.cpp:{}: linear: x has 4 columns, w has 7", line)),
            std::string::npos)
      << shape;
  auto experts = make_param("experts", {2, 3, 4}, DType::f32);
  const Tensor offsets = Tensor::of<int32_t>({3}, std::vector<int32_t>{0, 4, 6});
  EXPECT_NE(
      message_of([&] { grouped_linear(tape, b.x, *experts, offsets); }).find("at most 5 rows"),
      std::string::npos);
  b.queue.push_back({experts.get(), b.x, b.x, {}, Loc{"model.cpp", 42}});
  WgradQueue* queues[] = {&b.queue};
  const std::string late = message_of([&] { flush_wgrads(b.context, queues); });
  EXPECT_EQ(late.find("model.cpp:42: linear wgrad: "), 0u) << late;
}

}  // namespace
}  // namespace pith
