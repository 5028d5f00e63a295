#include "core/rng.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "core/param.h"
#include "op_testing.h"

namespace pith {
namespace {

// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
TEST(Philox, KnownAnswers) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(philox(0, 0, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox(~0ull, ~0ull, ~0ull), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(Normal, HasTheMomentsAndTailsOfTheDistribution) {
  const int n = 400000;
  double sum = 0, square = 0, fourth = 0;
  int beyond3 = 0;
  for (int i = 0; i < n; ++i) {
    const double x = normal(stream_key(1, "w"), i);
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    square += x * x;
    fourth += x * x * x * x;
    beyond3 += std::abs(x) > 3;
  }
  EXPECT_NEAR(sum / n, 0, 0.006);
  EXPECT_NEAR(square / n, 1, 0.01);
  EXPECT_NEAR(fourth / n, 3, 0.08);
  EXPECT_NEAR(beyond3 / double(n), 0.0027, 0.0004);
}

// The polynomials against the C library.
TEST(Normal, MatchesBoxMuller) {
  for (uint64_t i = 0; i < 20000; ++i) {
    const auto p = philox(42, i);
    const double u = double((p[0] >> 8) + 1) * 0x1p-24, t = double(p[1] >> 8) * 0x1p-24;
    EXPECT_NEAR(normal(42, i), std::sqrt(-2 * std::log(u)) * std::cos(2 * M_PI * t), 3e-6);
  }
}

TEST(Permute, IsABijectionForEverySize) {
  for (uint64_t n : {1, 2, 3, 7, 64, 1000, 4097}) {
    std::set<uint64_t> seen;
    for (uint64_t i = 0; i < n; ++i) {
      const uint64_t p = permute(i, n, 99);
      ASSERT_LT(p, n);
      seen.insert(p);
    }
    EXPECT_EQ(seen.size(), n);
  }
  int same = 0;
  for (uint64_t i = 0; i < 1000; ++i) same += permute(i, 1000, 1) == permute(i, 1000, 2);
  EXPECT_LT(same, 20);
}

TEST(Init, DependsOnNameSeedAndElementAlone) {
  ParamSet params;
  Param& both =
      params.add({.name = "both", .shape = {2, 3}, .pieces = {{"a", {1, 3}}, {"b", {1, 3}}}});
  params.allocate(DType::f32, Device::cpu, true);
  params.initialize(5, 0.02);
  ParamSet alone;
  Param& b = alone.add({.name = "b", .shape = {1, 3}});
  alone.allocate(DType::bf16, Device::cpu, true);
  alone.initialize(5, 0.02);
  EXPECT_EQ(both.master().row_range(1, 2).to_vector<float>(), b.master().to_vector<float>());
  EXPECT_NE(both.master().row_range(0, 1).to_vector<float>(), b.master().to_vector<float>());
  EXPECT_EQ(b.value.to_vector<float>(), b.master().to(DType::bf16, "w").to_vector<float>());
  alone.initialize(6, 0.02);
  EXPECT_NE(both.master().row_range(1, 2).to_vector<float>(), b.master().to_vector<float>());
}

TEST(Init, EveryDeviceMakesTheSameBits) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    std::vector<std::vector<float>> found;
    for (const Device device : {Device::cpu, test_device()}) {
      ParamSet params;
      Param& p = params.add({.name = "w", .shape = {301, 77}});
      params.allocate(dtype, device, true);
      params.initialize(3, 0.02);
      found.push_back(p.master().to_vector<float>());
    }
    EXPECT_EQ(found[0], found[1]);
  }
}

TEST(ParamSet, RefusesPiecesThatDoNotFill) {
  ParamSet params;
  EXPECT_THROW(params.add({.name = "p", .shape = {2, 3}, .pieces = {{"a", {1, 3}}}}), Error);
  params.add({.name = "p", .shape = {1}});
  EXPECT_THROW(params.add({.name = "p", .shape = {1}}), Error);
}

}  // namespace
}  // namespace pith
