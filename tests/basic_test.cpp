#include "ops/basic.h"

#include <algorithm>
#include <cmath>

#include "op_testing.h"

namespace pith {
namespace {

using Vec = std::vector<double>;
using Vecs = std::vector<Vec>;

Tensor ints(Shape shape, const std::vector<int32_t>& v) {
  return Tensor::of<int32_t>(shape, v).on(test_device());
}

// A case without parameters.
template <class Run, class Reference>
OpCase make_case(const std::string& name, std::vector<Shape> shapes, Run run, Reference reference) {
  OpCase c;
  c.name = name;
  c.inputs = std::move(shapes);
  c.run = [=](Tape& t, const Inputs& x, const Params&) { return Inputs{run(t, x)}; };
  c.reference = [=](const Vecs& x, const Vecs&) { return Vecs{reference(x)}; };
  return c;
}

Vec map(const Vec& x, double (*f)(double)) {
  Vec y(x.size());
  std::transform(x.begin(), x.end(), y.begin(), f);
  return y;
}

TEST(Basic, unary) {
  struct Unary {
    const char* name;
    Tensor (*op)(Tape&, const Tensor&, Loc);
    double (*f)(double);
  };
  const Unary all[] = {
      {"exp", exp, [](double v) { return std::exp(v); }},
      {"sigmoid", sigmoid, [](double v) { return 1 / (1 + std::exp(-v)); }},
  };
  for (const Unary& u : all)
    for (const Shape& shape : {Shape{1}, Shape{3, 5}, Shape{2, 3, 7}})
      check_op(make_case(
          u.name, {shape}, [=](Tape& t, const Inputs& x) { return u.op(t, x[0], Loc::current()); },
          [=](const Vecs& x) { return map(x[0], u.f); }));
  // log of 1 + x^2, so that random inputs are in its domain.
  const Tensor one = Tensor::of<double>({1}, Vec{1}).on(test_device());
  check_op(make_case(
      "log", {{3, 5}},
      [=](Tape& t, const Inputs& x) {
        return log(t, add(t, mul(t, x[0], x[0]), one.to(x[0].dtype(), "one")));
      },
      [](const Vecs& x) { return map(x[0], [](double v) { return std::log(1 + v * v); }); }));
  // What many elements take: the parallel path.
  check_op(make_case(
      "sigmoid", {{300, 257}}, [](Tape& t, const Inputs& x) { return sigmoid(t, x[0]); },
      [](const Vecs& x) { return map(x[0], [](double v) { return 1 / (1 + std::exp(-v)); }); }));
}

struct Binary {
  const char* name;
  Tensor (*op)(Tape&, const Tensor&, const Tensor&, Loc);
  double (*f)(double, double);
};
const Binary kBinary[] = {
    {"add", add, [](double a, double b) { return a + b; }},
    {"sub", sub, [](double a, double b) { return a - b; }},
    {"mul", mul, [](double a, double b) { return a * b; }},
    {"div", div, [](double a, double b) { return a / b; }},
};

// Element of b for element (r, c) of a [rows, cols], by the words of the header.
double element(const Vec& b, const Shape& shape, int64_t rows, int64_t cols, int64_t r, int64_t c) {
  if (int64_t(b.size()) == rows * cols) return b[r * cols + c];
  if (b.size() == 1) return b[0];
  return shape.rank() == 2 && shape[1] == 1 ? b[r] : b[c];
}

TEST(Basic, binary_broadcasts) {
  struct Form {
    Shape a, b;
  };
  const Form forms[] = {{{3, 5}, {3, 5}},    {{3, 5}, {5}}, {{3, 5}, {1, 5}}, {{3, 5}, {3, 1}},
                        {{3, 5}, {1}},       {{4, 4}, {4}}, {{4, 4}, {4, 1}}, {{2, 3, 4}, {12}},
                        {{6}, {6}},          {{6}, {1}},    {{1, 7}, {7}},    {{7, 1}, {7, 1}},
                        {{2, 3, 4}, {2, 1}}, {{1, 1}, {1}}};
  for (const Binary& op : kBinary)
    for (const Form& form : forms) {
      const bool divides = std::string(op.name) == "div";  // by exp(b), away from 0
      check_op(make_case(
          std::string(op.name) + form.a.str() + form.b.str(), {form.a, form.b},
          [=](Tape& t, const Inputs& x) {
            return op.op(t, x[0], divides ? exp(t, x[1]) : x[1], Loc::current());
          },
          [=](const Vecs& x) {
            const int64_t rows = form.a[0], cols = form.a.numel() / rows;
            Vec y(x[0].size());
            for (int64_t i = 0; i < rows * cols; ++i) {
              const double b = element(x[1], form.b, rows, cols, i / cols, i % cols);
              y[i] = op.f(x[0][i], divides ? std::exp(b) : b);
            }
            return y;
          }));
    }
}

TEST(Basic, binary_of_one_tensor_with_itself) {
  check_op(make_case(
      "mul(x, x)", {{3, 4}}, [](Tape& t, const Inputs& x) { return mul(t, x[0], x[0]); },
      [](const Vecs& x) { return map(x[0], [](double v) { return v * v; }); }));
  check_op(make_case(
      "matmul(x, x)", {{3, 3}}, [](Tape& t, const Inputs& x) { return matmul(t, x[0], x[0]); },
      [](const Vecs& x) {
        Vec y(9, 0);
        for (int i = 0; i < 27; ++i)
          y[i / 9 * 3 + i % 3] += x[0][i / 3] * x[0][i / 3 % 3 * 3 + i % 3];
        return y;
      }));
}

TEST(Basic, no_rows) {
  Context context;
  Tape tape(context);
  const Tensor a({0, 3}, DType::f32, Device::cpu, "a"),
      b = Tensor::zeros({3}, DType::f32, Device::cpu, "b");
  tape.leaf(b);
  const Tensor y = add(tape, a, b), s = sum(tape, y, 0);
  EXPECT_EQ(y.shape().str(), "[0, 3]");
  EXPECT_EQ(s.to_vector<double>(), Vec(3, 0));
  tape.set_grad(s, Tensor::zeros({1, 3}, DType::f32, Device::cpu, "g"));
  tape.backward();
  EXPECT_EQ(tape.take_grad(b).to_vector<double>(), Vec(3, 0));
}

TEST(Basic, softmax_and_reductions) {
  for (const Shape& shape : {Shape{1, 1}, Shape{1, 9}, Shape{5, 7}, Shape{2, 3, 4}}) {
    const int64_t rows = shape[0], cols = shape.numel() / rows;
    check_op(make_case(
        "softmax", {shape}, [](Tape& t, const Inputs& x) { return softmax(t, x[0]); },
        [=](const Vecs& x) {
          Vec y(x[0].size());
          for (int64_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (int64_t c = 0; c < cols; ++c) sum += std::exp(x[0][r * cols + c]);
            for (int64_t c = 0; c < cols; ++c) y[r * cols + c] = std::exp(x[0][r * cols + c]) / sum;
          }
          return y;
        }));
    const auto sums = [=](const Vec& x, int64_t of_row, int64_t of_col, int64_t n) {
      Vec y(n, 0);
      for (int64_t i = 0; i < rows * cols; ++i) y[i / cols * of_row + i % cols * of_col] += x[i];
      return y;
    };
    check_op(make_case(
        "sum of columns", {shape}, [](Tape& t, const Inputs& x) { return sum(t, x[0], 1); },
        [=](const Vecs& x) { return sums(x[0], 1, 0, rows); }));
    check_op(make_case(
        "sum of rows", {shape}, [](Tape& t, const Inputs& x) { return sum(t, x[0], 0); },
        [=](const Vecs& x) { return sums(x[0], 0, 1, cols); }));
    check_op(make_case(
        "mean", {shape}, [](Tape& t, const Inputs& x) { return mean(t, x[0]); },
        [=](const Vecs& x) {
          Vec y = sums(x[0], 0, 0, 1);
          y[0] /= double(rows * cols);
          return y;
        }));
  }
}

TEST(Basic, softmax_of_large_numbers) {
  Context context;
  Tape tape(context, false);
  const Tensor y = softmax(tape, Tensor::of<float>({1, 3}, std::vector<float>{1e4f, 1e4f, -1e4f}));
  EXPECT_EQ(y.to_vector<double>(), (Vec{0.5, 0.5, 0}));
}

TEST(Basic, matmul) {
  for (const auto& [m, k, n] : {std::array<int64_t, 3>{1, 1, 1}, {3, 5, 4}, {17, 1, 2}, {1, 33, 9}})
    check_op(make_case(
        "matmul", {{m, k}, {k, n}}, [](Tape& t, const Inputs& x) { return matmul(t, x[0], x[1]); },
        [=, m = m, k = k, n = n](const Vecs& x) {
          Vec y(m * n, 0);
          for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j)
              for (int64_t p = 0; p < k; ++p) y[i * n + j] += x[0][i * k + p] * x[1][p * n + j];
          return y;
        }));
}

// Ops that move elements: y[i] = (x[0] ++ x[1] ++ ...)[from[i]].
OpCase moved(const std::string& name, std::vector<Shape> shapes, const std::vector<int>& from,
             std::function<Tensor(Tape&, const Inputs&)> run) {
  return make_case(name, std::move(shapes), run, [=](const Vecs& x) {
    Vec all, y;
    for (const Vec& v : x) all.insert(all.end(), v.begin(), v.end());
    for (int i : from) y.push_back(all[i]);
    return y;
  });
}

TEST(Basic, moving_elements) {
  check_op(moved("transpose", {{2, 3}}, {0, 3, 1, 4, 2, 5},
                 [](Tape& t, const Inputs& x) { return transpose(t, x[0]); }));
  check_op(moved("slice of rows", {{4, 2}}, {2, 3, 4, 5},
                 [](Tape& t, const Inputs& x) { return slice(t, x[0], 0, 1, 3); }));
  check_op(moved("rows of rank 3", {{3, 2, 1}}, {4, 5},
                 [](Tape& t, const Inputs& x) { return slice(t, x[0], 0, 2, 3); }));
  check_op(moved("slice of columns", {{2, 4}}, {1, 2, 3, 5, 6, 7},
                 [](Tape& t, const Inputs& x) { return slice(t, x[0], 1, 1, 4); }));
  check_op(moved("concat of rows", {{1, 2}, {2, 2}}, {0, 1, 2, 3, 4, 5},
                 [](Tape& t, const Inputs& x) { return concat(t, x[0], x[1], 0); }));
  check_op(moved("concat of one tensor", {{1, 2}}, {0, 1, 0, 1},
                 [](Tape& t, const Inputs& x) { return concat(t, x[0], x[0], 0); }));
  check_op(moved("concat of columns", {{2, 1}, {2, 2}}, {0, 2, 3, 1, 4, 5},
                 [](Tape& t, const Inputs& x) { return concat(t, x[0], x[1], 1); }));
  check_op(
      moved("overlapping slices", {{3, 2}}, {0, 1, 2, 3, 2, 3, 4, 5}, [](Tape& t, const Inputs& x) {
        return concat(t, slice(t, x[0], 0, 0, 2), slice(t, x[0], 0, 1, 3), 0);
      }));
  const Tensor mask =
      Tensor::of<uint8_t>({2, 2}, std::vector<uint8_t>{1, 0, 0, 1}).on(test_device());
  check_op(moved("where", {{2, 2}, {2, 2}}, {0, 5, 6, 3},
                 [=](Tape& t, const Inputs& x) { return where(t, mask, x[0], x[1]); }));
  check_op(moved("where with a row", {{2, 2}, {2}}, {0, 5, 4, 3},
                 [=](Tape& t, const Inputs& x) { return where(t, mask, x[0], x[1]); }));
  const Tensor index = ints({2, 3}, {2, 0, 2, 1, 1, 3});
  check_op(moved("gather_cols", {{2, 4}}, {2, 0, 2, 5, 5, 7},
                 [=](Tape& t, const Inputs& x) { return gather_cols(t, x[0], index); }));
}

TEST(Basic, top_k_is_best_first_and_stable) {
  Context context;
  Tape tape(context);
  const float nan = std::nanf("");
  const Tensor x =
      Tensor::of<float>({3, 4}, std::vector<float>{1, 3, 2, 3, 0, 0, 0, 0, nan, -1, nan, 5});
  EXPECT_EQ(top_k(tape, x, 3).to_vector<int32_t>(),
            (std::vector<int32_t>{1, 3, 2, 0, 1, 2, 3, 1, 0}));
  EXPECT_EQ(top_k(tape, x, 0).shape().str(), "[3, 0]");
  EXPECT_THROW(top_k(tape, x, 5), Error);
}

TEST(Basic, cast) {
  for (DType to : {DType::f64, DType::f32, DType::bf16}) {
    OpCase c = make_case(
        std::string("cast to ") + name_of(to), {{3, 5}},
        [=](Tape& t, const Inputs& x) { return cast(t, x[0], to); },
        [](const Vecs& x) { return x[0]; });
    const double error = to == DType::f64 ? 0 : to == DType::f32 ? 1e-7 : 4e-3;
    c.tolerances = {{DType::f64, error}, {DType::f32, error}, {DType::bf16, 4e-3}};
    // Rounding has no derivative that differences could see.
    c.differentiable = to == DType::f64;
    check_op(c);
  }
  Context context;
  Tape tape(context);
  const Tensor x = Tensor::of<float>({2}, std::vector<float>{1, 2});
  tape.leaf(x);
  const Tensor y = cast(tape, x, DType::bf16);
  tape.set_grad(y, Tensor::of<float>({2}, std::vector<float>{3, -0.5f}).to(DType::bf16, "g"));
  tape.backward();
  EXPECT_EQ(tape.take_grad(x).to_vector<double>(), (Vec{3, -0.5}));
}

template <class F> std::string error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Basic, bad_arguments_name_the_line) {
  Context context;
  Tape tape(context);
  const Tensor x = Tensor::zeros({3, 5}, DType::f32, Device::cpu, "x");
  const Tensor narrow = Tensor::zeros({3, 5}, DType::bf16, Device::cpu, "x");
  const auto expect = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
    EXPECT_EQ(text.find("basic_test.cpp:"), 0u) << text;
  };
  expect(error_of([&] { add(tape, x, Tensor::zeros({3}, DType::f32, Device::cpu, "b")); }),
         "one row [5]");
  expect(error_of([&] { mul(tape, x, narrow); }), "cast one of them");
  expect(error_of([&] { matmul(tape, x, x); }), "must share k");
  expect(error_of([&] { slice(tape, x, 0, 2, 4); }), "rows [2, 4) of 3");
  expect(error_of([&] { slice(tape, x, 1, -1, 4); }), "columns [-1, 4) of 5");
  expect(error_of([&] {
           concat(tape, x, Tensor::zeros({1, 4}, DType::f32, Device::cpu, "b"), 0);
         }),
         "as many columns");
  expect(error_of([&] {
           gather_cols(tape, x, Tensor::of<int32_t>({3, 1}, std::vector<int32_t>{0, 5, 1}));
         }),
         "index 5 is outside 5 columns");
}

}  // namespace
}  // namespace pith
