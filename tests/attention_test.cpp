#include "ops/attention.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "core/rng.h"
#include "op_testing.h"

namespace pith {
namespace {

using Vec = std::vector<double>;
using Vecs = std::vector<Vec>;

// For the device of the tape: on meta the shape alone.
Tensor on_device(const Tape& tape, const Tensor& t) { return t ? t.on(tape.context.device) : t; }

std::string describe(const AttentionShape& s) {
  return fmt::format("batch {} sequence {} heads {}/{} of {}", s.batch, s.sequence, s.heads,
                     s.kv_heads, s.head_dim);
}

// First position of the document of every position, for sequences cut into documents of these
// lengths, again and again.
std::vector<int32_t> starts(int64_t batch, int64_t sequence, const std::vector<int>& lengths) {
  std::vector<int32_t> out;
  for (int64_t b = 0; b < batch; ++b) {
    size_t next = size_t(b);  // sequences differ
    int64_t begin = 0;
    while (begin < sequence) {
      const int64_t end = std::min<int64_t>(sequence, begin + lengths[next++ % lengths.size()]);
      out.insert(out.end(), size_t(end - begin), int32_t(begin));
      begin = end;
    }
  }
  return out;
}

// softmax(scale q k^T) v by its definition.
Vec naive_attention(const Vec& qkv, const AttentionShape& s, double scale, int64_t window,
                    const std::vector<int32_t>& document_start) {
  const int64_t D = s.head_dim, W = s.width(), group = s.heads / s.kv_heads;
  Vec out(size_t(s.batch * s.sequence * s.heads * D), 0);
  for (int64_t t = 0; t < s.batch * s.sequence; ++t)
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t i = t % s.sequence, base = t - i;
      const double *q = &qkv[t * W + h * D], *k = &qkv[base * W + (s.heads + h / group) * D],
                   *v = k + s.kv_heads * D;
      Vec p(size_t(s.sequence), 0);
      double sum = 0;
      for (int64_t j = 0; j <= i; ++j) {
        if ((window && j <= i - window) || (!document_start.empty() && j < document_start[t]))
          continue;
        double score = 0;
        for (int64_t d = 0; d < D; ++d) score += q[d] * k[j * W + d];
        sum += p[j] = std::exp(scale * score);
      }
      for (int64_t j = 0; j <= i; ++j)
        for (int64_t d = 0; d < D; ++d) out[(t * s.heads + h) * D + d] += p[j] / sum * v[j * W + d];
    }
  return out;
}

void check_attention(const AttentionShape& s, int64_t window = 0,
                     const std::vector<int>& lengths = {}) {
  const auto documents =
      lengths.empty() ? std::vector<int32_t>() : starts(s.batch, s.sequence, lengths);
  const double scale = 1 / std::sqrt(double(s.head_dim));
  const Tensor start = documents.empty() ? Tensor() : ints(documents);
  OpCase c;
  c.name = fmt::format("attention {} window {} documents {}", describe(s), window, lengths.size());
  c.inputs = {{s.batch * s.sequence, s.width()}};
  c.run = [=](Tape& t, const Inputs& x, const Params&) {
    return Inputs{attention(t, x[0], s, float(scale), on_device(t, start), window)};
  };
  c.reference = [=](const Vecs& x, const Vecs&) {
    return Vecs{naive_attention(x[0], s, float(scale), window, documents)};
  };
  check_op(c);
}

TEST(Attention, shapes) {
  check_attention({.batch = 1, .sequence = 1, .heads = 1, .kv_heads = 1, .head_dim = 1});
  check_attention({.batch = 3, .sequence = 1, .heads = 4, .kv_heads = 1, .head_dim = 5});
  check_attention({.batch = 2, .sequence = 7, .heads = 3, .kv_heads = 3, .head_dim = 12});
  check_attention({.batch = 1, .sequence = 64, .heads = 2, .kv_heads = 2, .head_dim = 16});
  check_attention({.batch = 2, .sequence = 65, .heads = 8, .kv_heads = 1, .head_dim = 16});
  check_attention({.batch = 1, .sequence = 131, .heads = 4, .kv_heads = 1, .head_dim = 32});
  check_attention({.batch = 1, .sequence = 150, .heads = 3, .kv_heads = 1, .head_dim = 33});
  check_attention({.batch = 1, .sequence = 97, .heads = 2, .kv_heads = 1, .head_dim = 128});
  check_attention({.batch = 17, .sequence = 9, .heads = 2, .kv_heads = 1, .head_dim = 8});
  check_attention({.batch = 2, .sequence = 1, .heads = 4, .kv_heads = 2, .head_dim = 64});
  check_attention({.batch = 1, .sequence = 127, .heads = 3, .kv_heads = 1, .head_dim = 64});
  check_attention({.batch = 2, .sequence = 65, .heads = 3, .kv_heads = 3, .head_dim = 96});
  check_attention({.batch = 1, .sequence = 129, .heads = 3, .kv_heads = 1, .head_dim = 128});
  check_attention({.batch = 1, .sequence = 66, .heads = 2, .kv_heads = 1, .head_dim = 256});
  check_attention({.batch = 1, .sequence = 300, .heads = 1, .kv_heads = 1, .head_dim = 64});
}

TEST(Attention, windows) {
  const AttentionShape small{.batch = 2, .sequence = 9, .heads = 2, .kv_heads = 1, .head_dim = 5};
  const AttentionShape large{
      .batch = 1, .sequence = 200, .heads = 2, .kv_heads = 1, .head_dim = 16};
  for (int64_t window : {1, 2, 8, 9, 100}) check_attention(small, window);
  for (int64_t window : {1, 3, 64, 70}) check_attention(large, window);
  const AttentionShape wide{.batch = 1, .sequence = 150, .heads = 3, .kv_heads = 1, .head_dim = 64};
  for (int64_t window : {64, 129}) check_attention(wide, window);
}

TEST(Attention, documents) {
  const AttentionShape small{.batch = 2, .sequence = 11, .heads = 4, .kv_heads = 2, .head_dim = 5};
  const AttentionShape large{
      .batch = 2, .sequence = 170, .heads = 2, .kv_heads = 2, .head_dim = 16};
  check_attention(small, 0, {1});
  check_attention(small, 0, {3, 1, 4});
  check_attention(small, 2, {5, 1, 3});
  check_attention(large, 0, {70, 1, 3, 64, 1, 1});
  check_attention(large, 50, {130, 17});
}

Tensor random_qkv(const AttentionShape& s, DType dtype, uint64_t key = 3) {
  Tensor x({s.batch * s.sequence, s.width()}, DType::f64, Device::cpu, "qkv");
  fill_normal(x, key, 0, 1);
  return x.to(dtype, "qkv");
}

TEST(Attention, large_scores_do_not_overflow) {
  const AttentionShape s{.batch = 1, .sequence = 80, .heads = 1, .kv_heads = 1, .head_dim = 4};
  Context context;
  Tape tape(context);
  Tensor x = random_qkv(s, DType::f32);
  tape.leaf(x);
  const Tensor y = attention(tape, x, s, 500.0f);
  const Vec want = naive_attention(x.to_vector<double>(), s, 0, 0, {});
  tape.set_grad(y, y.clone("g"));
  tape.backward();
  for (double v : tape.take_grad(x).to_vector<double>()) ASSERT_TRUE(std::isfinite(v));
  EXPECT_NEAR(y.to_vector<double>()[0], want[0], 1e-6);
}

TEST(Attention, nan_stays_visible) {
  const AttentionShape s{.batch = 1, .sequence = 70, .heads = 1, .kv_heads = 1, .head_dim = 4};
  Context context;
  Tape tape(context, false);
  Tensor x = random_qkv(s, DType::f32);
  x.data<float>()[66 * s.width()] = std::nanf("");  // of a query
  const Vec y = attention(tape, x, s, 0.5f).to_vector<double>();
  for (int64_t t = 0; t < s.sequence; ++t) EXPECT_EQ(std::isnan(y[t * 4]), t == 66) << t;
}

TEST(Attention, a_query_that_sees_nothing_gets_zeros) {
  const AttentionShape s{.batch = 1, .sequence = 3, .heads = 1, .kv_heads = 1, .head_dim = 2};
  Context context;
  Tape tape(context);
  const Tensor x = random_qkv(s, DType::f32);
  tape.leaf(x);
  const Tensor y = attention(tape, x, s, 1, ints({0, 2, 0}, Device::cpu));
  EXPECT_EQ(y.to_vector<double>()[2], 0);
  tape.set_grad(y, y.clone("g"));
  tape.backward();
  for (double v : tape.take_grad(x).to_vector<double>()) EXPECT_TRUE(std::isfinite(v));
}

TEST(Attention, same_bits_for_any_number_of_threads) {
  const int kept = omp_get_max_threads();
  const AttentionShape several{
      .batch = 2, .sequence = 150, .heads = 8, .kv_heads = 2, .head_dim = 24};
  const AttentionShape one{.batch = 1, .sequence = 90, .heads = 1, .kv_heads = 1, .head_dim = 128};
  for (const AttentionShape& s : {several, one})
    for (DType dtype : {DType::f64, DType::f32}) {
      std::vector<Vec> results;
      for (int threads : {1, 2, 3}) {
        omp_set_num_threads(threads);
        Context context;
        context.dtype = dtype;
        Tape tape(context);
        const Tensor x = random_qkv(s, dtype);
        tape.leaf(x);
        const Tensor y = attention(tape, x, s, 0.2f);
        tape.set_grad(y, y.clone("g"));
        tape.backward();
        results.push_back(y.to_vector<double>());
        const Vec d = tape.take_grad(x).to_vector<double>();
        results.back().insert(results.back().end(), d.begin(), d.end());
      }
      EXPECT_EQ(results[0], results[1]) << describe(s) << " " << name_of(dtype);
      EXPECT_EQ(results[0], results[2]) << describe(s) << " " << name_of(dtype);
    }
  omp_set_num_threads(kept);
}

TEST(Attention, adds_to_a_gradient_that_is_there) {
  const AttentionShape s{.batch = 1, .sequence = 5, .heads = 4, .kv_heads = 2, .head_dim = 8};
  for (const auto& [dtype, error] : {std::pair{DType::f64, 1e-12}, {DType::bf16, 0.1}}) {
    Context context{.device = test_device(), .dtype = dtype};
    const Tensor x = random_qkv(s, dtype).on(context.device);
    Vec grads[2];
    for (int uses : {1, 2}) {
      Tape tape(context);
      tape.leaf(x);
      std::vector<Tensor> y;
      for (int i = 0; i < uses; ++i) y.push_back(attention(tape, x, s, 1));
      for (const Tensor& t : y) tape.set_grad(t, t.clone("g"));
      tape.backward();
      grads[uses - 1] = tape.take_grad(x).to_vector<double>();
    }
    for (size_t i = 0; i < grads[0].size(); ++i) EXPECT_NEAR(2 * grads[0][i], grads[1][i], error);
  }
}

TEST(Attention, deterministic_gives_the_same_bits) {
  const AttentionShape s{.batch = 2, .sequence = 600, .heads = 4, .kv_heads = 2, .head_dim = 64};
  Context context{.device = test_device(), .dtype = DType::bf16, .deterministic = true};
  const Tensor x = random_qkv(s, DType::bf16).on(context.device);
  Vec grads[2];
  for (Vec& grad : grads) {
    Tape tape(context);
    tape.leaf(x);
    const Tensor y = attention(tape, x, s, 0.125f);
    tape.set_grad(y, y.clone("g"));
    tape.backward();
    grad = tape.take_grad(x).to_vector<double>();
  }
  EXPECT_EQ(grads[0], grads[1]);
}

TEST(Attention, counts_visible_pairs) {
  Context context;
  context.device = Device::meta;
  const AttentionShape s{.batch = 2, .sequence = 10, .heads = 4, .kv_heads = 2, .head_dim = 8};
  const Tensor x({20, s.width()}, DType::bf16, Device::meta, "qkv");
  Tape tape(context);
  tape.leaf(x);
  const Tensor y = attention(tape, x, s, 1);
  EXPECT_EQ(context.total.flops, 4.0 * 8 * 4 * 2 * 55);
  tape.set_grad(y, y.clone("g"));
  tape.backward();
  EXPECT_EQ(context.total.flops, 3.5 * 4.0 * 8 * 4 * 2 * 55);
  context.total = {};
  attention(tape, x, s, 1, {}, 3);
  EXPECT_EQ(context.total.flops, 4.0 * 8 * 4 * 2 * (1 + 2 + 8 * 3));
}

// Feeds the tokens in pieces of the given lengths and compares with attention over the whole.
void check_cached(const AttentionShape& s, int64_t window, const std::vector<int>& lengths,
                  DType dtype, double error) {
  SCOPED_TRACE(describe(s) + " window " + std::to_string(window) + " " + name_of(dtype));
  Context context;
  context.dtype = dtype;
  Tape tape(context, false);
  const Tensor x = random_qkv(s, dtype);
  const Vec want = attention(tape, x, s, 0.3f, {}, window).to_vector<double>();
  KvCache cache{Tensor({s.sequence, 2 * s.kv_heads * s.head_dim}, dtype, Device::cpu, "cache"), 0};
  Vec got;
  for (size_t i = 0; cache.length < s.sequence; ++i) {
    AttentionShape piece = s;
    piece.sequence = std::min<int64_t>(lengths[i % lengths.size()], s.sequence - cache.length);
    const Tensor part = x.row_range(cache.length, cache.length + piece.sequence);
    const Vec y = attention_cached(tape, part, cache, piece, 0.3f, window).to_vector<double>();
    got.insert(got.end(), y.begin(), y.end());
  }
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], error) << "element " << i;
  AttentionShape one = s;
  one.sequence = 1;
  EXPECT_THROW(attention_cached(tape, x.row_range(0, 1), cache, one, 0.3f, window), Error);  // full
  EXPECT_EQ(cache.length, s.sequence);
}

TEST(Attention, cached_equals_whole) {
  const AttentionShape s{.batch = 1, .sequence = 75, .heads = 4, .kv_heads = 2, .head_dim = 12};
  const AttentionShape wide{.batch = 1, .sequence = 140, .heads = 8, .kv_heads = 1, .head_dim = 32};
  for (int64_t window : {0, 1, 6}) {
    check_cached(s, window, {1}, DType::f64, 1e-13);
    check_cached(s, window, {40, 1, 1, 5}, DType::f32, 2e-6);
  }
  check_cached(wide, 0, {100, 1}, DType::bf16, 2e-2);
  check_cached(wide, 70, {1}, DType::f32, 2e-6);
}

TEST(Attention, refuses_bad_arguments) {
  Context context;
  Tape tape(context);
  const AttentionShape s{.batch = 1, .sequence = 4, .heads = 4, .kv_heads = 2, .head_dim = 8};
  const Tensor x = random_qkv(s, DType::f32);
  AttentionShape odd = s;
  odd.heads = 3;
  EXPECT_THROW(attention(tape, x, odd, 1), Error);
  EXPECT_THROW(attention(tape, x.row_range(0, 3), s, 1), Error);
  EXPECT_THROW(attention(tape, x, s, 1, {}, -1), Error);
  EXPECT_THROW(attention(tape, x, s, 1, ints({0, 0, 0}, Device::cpu)), Error);
  EXPECT_THROW(attention(tape, x, s, 1, Tensor::zeros({4}, DType::f32, Device::cpu, "d")), Error);
}

TEST(Attention, empty_batch) {
  Context context{.device = test_device(), .dtype = DType::bf16};
  Tape tape(context);
  const AttentionShape s{.batch = 0, .sequence = 4, .heads = 4, .kv_heads = 2, .head_dim = 8};
  const Tensor x({0, s.width()}, DType::bf16, context.device, "qkv");
  tape.leaf(x);
  const Tensor y = attention(tape, x, s, 1);
  tape.set_grad(y, y.clone("g"));
  tape.backward();
  EXPECT_EQ(y.shape().str(), "[0, 32]");
}

struct RopeCase {
  AttentionShape shape;
  int64_t rotary;
  bool q_norm, k_norm;
  std::vector<int32_t> positions;
};

constexpr double kEps = 1e-3f;  // large enough to matter

double angle(int32_t position, int64_t channel, int64_t rotary) {
  return position * std::pow(100.0, -2.0 * double(channel) / double(rotary));
}

// Heads normalized, then rotated: channel d < rotary / 2 with channel d + rotary / 2.
Vec naive_rope(const Vec& qkv, const RopeCase& c, const Vec* wq, const Vec* wk) {
  const AttentionShape& s = c.shape;
  const int64_t D = s.head_dim, half = c.rotary / 2;
  Vec y = qkv;
  for (int64_t t = 0; t < s.batch * s.sequence; ++t)
    for (int64_t h = 0; h < s.heads + s.kv_heads; ++h) {
      const double* x = &qkv[t * s.width() + h * D];
      const Vec* w = h < s.heads ? wq : wk;
      Vec n(x, x + D);
      double sum = 0;
      for (double v : n) sum += v * v;
      for (int64_t d = 0; w && d < D; ++d) n[d] *= (*w)[d] / std::sqrt(sum / double(D) + kEps);
      double* out = &y[t * s.width() + h * D];
      for (int64_t d = 0; d < D; ++d) {
        if (d >= c.rotary) {
          out[d] = n[d];
          continue;
        }
        const double a = angle(c.positions[t], d % half, c.rotary);
        out[d] = n[d] * std::cos(a) + (d < half ? -n[d + half] : n[d - half]) * std::sin(a);
      }
    }
  return y;
}

RopeTable rope_table(const Tape& tape, int64_t positions, int64_t rotary, DType compute) {
  Vec cos, sin;
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t d = 0; d < rotary / 2; ++d) {
      cos.push_back(std::cos(angle(int32_t(p), d, rotary)));
      sin.push_back(std::sin(angle(int32_t(p), d, rotary)));
    }
  const Shape shape{positions, rotary / 2};
  return {on_device(tape, Tensor::of<double>(shape, cos).to(master_dtype(compute), "cos")),
          on_device(tape, Tensor::of<double>(shape, sin).to(master_dtype(compute), "sin"))};
}

TEST(QkNormRope, op) {
  const RopeCase cases[] = {
      {{.batch = 1, .sequence = 1, .heads = 1, .kv_heads = 1, .head_dim = 2}, 2, true, true, {3}},
      {{.batch = 2, .sequence = 3, .heads = 4, .kv_heads = 2, .head_dim = 8},
       8,
       true,
       true,
       {0, 1, 2, 0, 1, 2}},
      {{.batch = 1, .sequence = 4, .heads = 3, .kv_heads = 1, .head_dim = 5},
       4,
       true,
       true,
       {7, 0, 7, 2}},
      {{.batch = 1, .sequence = 3, .heads = 2, .kv_heads = 1, .head_dim = 12},
       6,
       false,
       false,
       {0, 4, 5}},
      {{.batch = 1, .sequence = 3, .heads = 2, .kv_heads = 2, .head_dim = 6},
       6,
       true,
       false,
       {1, 2, 3}},
      {{.batch = 1, .sequence = 3, .heads = 2, .kv_heads = 2, .head_dim = 6},
       6,
       false,
       true,
       {1, 2, 3}},
      {{.batch = 1, .sequence = 2, .heads = 2, .kv_heads = 1, .head_dim = 3},
       0,
       true,
       true,
       {1, 2}},
  };
  std::vector<RopeCase> all(std::begin(cases), std::end(cases));
  // Heads as models have them: whole, partly and not at all rotated; odd counts of heads.
  for (const auto& [dim, rotary] : {std::pair<int64_t, int64_t>{64, 64},
                                    {64, 16},
                                    {96, 96},
                                    {96, 24},
                                    {128, 128},
                                    {128, 64},
                                    {256, 256},
                                    {256, 64},
                                    {64, 0}})
    for (const bool norms : {false, true}) {
      RopeCase r{{.batch = 3, .sequence = 3, .heads = 3, .kv_heads = 1, .head_dim = dim},
                 rotary,
                 norms,
                 norms,
                 {0, 1, 2, 5, 6, 7, 1, 1, 0}};
      all.push_back(r);
    }
  all.push_back({{.batch = 1, .sequence = 129, .heads = 5, .kv_heads = 5, .head_dim = 24},
                 8,
                 true,
                 true,
                 {}});
  for (int32_t i = 0; i < 129; ++i) all.back().positions.push_back(i % 8);
  all.push_back(
      {{.batch = 0, .sequence = 4, .heads = 2, .kv_heads = 1, .head_dim = 64}, 64, true, true, {}});
  for (const RopeCase& r : all) {
    OpCase c;
    c.name = fmt::format("qk_norm_rope {} rotary {} norms {} {}", describe(r.shape), r.rotary,
                         r.q_norm, r.k_norm);
    c.inputs = {{r.shape.batch * r.shape.sequence, r.shape.width()}};
    c.params.assign(size_t(r.q_norm) + size_t(r.k_norm), Shape{r.shape.head_dim});
    c.run = [=](Tape& t, const Inputs& x, const Params& w) {
      return Inputs{qk_norm_rope(t, x[0], r.q_norm ? w.front().get() : nullptr,
                                 r.k_norm ? w.back().get() : nullptr, float(kEps),
                                 rope_table(t, 8, r.rotary, x[0].dtype()),
                                 on_device(t, ints(r.positions)), r.shape)};
    };
    c.reference = [=](const Vecs& x, const Vecs& w) {
      return Vecs{
          naive_rope(x[0], r, r.q_norm ? &w.front() : nullptr, r.k_norm ? &w.back() : nullptr)};
    };
    check_op(c);
  }
}

TEST(QkNormRope, many_tokens) {
  RopeCase r{
      {.batch = 1, .sequence = 200, .heads = 4, .kv_heads = 2, .head_dim = 32}, 32, true, true, {}};
  for (int32_t i = 0; i < 200; ++i) r.positions.push_back(i);
  OpCase c;
  c.name = "qk_norm_rope of several chunks";
  c.inputs = {{200, r.shape.width()}};
  c.params = {{32}, {32}};
  c.run = [=](Tape& t, const Inputs& x, const Params& w) {
    return Inputs{qk_norm_rope(t, x[0], w[0].get(), w[1].get(), float(kEps),
                               rope_table(t, 200, 32, x[0].dtype()),
                               on_device(t, ints(r.positions)), r.shape)};
  };
  c.reference = [=](const Vecs& x, const Vecs& w) {
    return Vecs{naive_rope(x[0], r, &w[0], &w[1])};
  };
  check_op(c);
}

TEST(QkNormRope, refuses_bad_arguments) {
  Context context;
  Tape tape(context);
  const AttentionShape s{.batch = 1, .sequence = 2, .heads = 2, .kv_heads = 1, .head_dim = 4};
  const Tensor x = random_qkv(s, DType::f32);
  const auto run = [&](const RopeTable& table, const Tensor& positions, Param* w = nullptr) {
    try {
      qk_norm_rope(tape, x, w, nullptr, 1e-6f, table, positions, s);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  const RopeTable table = rope_table(tape, 8, 4, DType::f32);
  const auto at = [](const std::vector<int32_t>& v) { return ints(v, Device::cpu); };
  EXPECT_EQ(run(table, at({0, 7})), "");
  const std::string outside = run(table, at({0, 8}));
  EXPECT_NE(outside.find("position 8 is outside the rotary tables of 8"), std::string::npos)
      << outside;
  EXPECT_EQ(outside.find("attention_test.cpp:"), 0u) << outside;
  EXPECT_NE(run(table, at({-1, 0})).find("position -1"), std::string::npos);
  EXPECT_NE(run(rope_table(tape, 8, 6, DType::f32), at({0, 1})),
            "");  // more channels than the head
  EXPECT_NE(run(rope_table(tape, 8, 4, DType::f64), at({0, 1})), "");  // fp64 tables for fp32
  EXPECT_NE(run(table, at({0, 1, 2})), "");
  const auto wrong = make_param("w", {5}, DType::f32);
  EXPECT_NE(run(table, at({0, 1}), wrong.get()), "");
}

}  // namespace
}  // namespace pith
