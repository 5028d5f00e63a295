#include "engine/tfevents.h"

#include <gtest/gtest.h>

#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <vector>

#include "core/error.h"
#include "core/file.h"
#include "testing.h"

namespace pith {
namespace {

// CRC-32C bit by bit from its polynomial, and TFRecord's mask: independent of the writer's table.
uint32_t masked_crc(std::string_view bytes) {
  uint32_t c = ~0u;
  for (const char b : bytes) {
    c ^= uint8_t(b);
    for (int k = 0; k < 8; ++k) c = (c & 1) ? (c >> 1) ^ 0x82f63b78u : c >> 1;
  }
  c = ~c;
  return ((c >> 15) | (c << 17)) + 0xa282ead8u;
}

template <class T> T fixed(std::string_view s, size_t i) {
  T v{};
  EXPECT_LE(i + sizeof v, s.size());
  std::memcpy(&v, s.data() + i, sizeof v);
  return v;
}

std::vector<std::string> records(const std::string& file) {
  std::vector<std::string> out;
  for (size_t i = 0; i < file.size();) {
    const auto n = fixed<uint64_t>(file, i);
    EXPECT_EQ(fixed<uint32_t>(file, i + 8), masked_crc(std::string_view(file).substr(i, 8)));
    if (n > file.size()) break;
    out.push_back(file.substr(i + 12, n));
    EXPECT_EQ(fixed<uint32_t>(file, i + 12 + n), masked_crc(out.back()));
    i += 16 + n;
  }
  return out;
}

// The fields of a protobuf message by number; scalars as their bytes.
std::multimap<int, std::string> fields(std::string_view s) {
  std::multimap<int, std::string> out;
  size_t i = 0;
  const auto varint = [&] {
    uint64_t v = 0;
    for (int shift = 0; i < s.size(); shift += 7) {
      const auto b = uint8_t(s[i++]);
      v |= uint64_t(b & 127) << shift;
      if (b < 128) break;
    }
    return v;
  };
  while (i < s.size()) {
    const uint64_t tag = varint();
    size_t n = tag % 8 == 1 ? 8 : 4;
    if (tag % 8 == 0) {
      const uint64_t v = varint();
      out.emplace(int(tag / 8), std::string(reinterpret_cast<const char*>(&v), 8));
      continue;
    }
    if (tag % 8 == 2) n = varint();
    EXPECT_LE(i + n, s.size());
    out.emplace(int(tag / 8), std::string(s.substr(i, n)));
    i += n;
  }
  return out;
}

TEST(TfEvents, Crc32cKnownAnswer) {
  // RFC 3720, B.4: 32 bytes of zeros give 8a9136aa.
  const uint32_t c = 0x8a9136aau;
  EXPECT_EQ(masked_crc(std::string(32, '\0')), ((c >> 15) | (c << 17)) + 0xa282ead8u);
}

TEST(TfEvents, WritesScalars) {
  const TempDir dir;
  const double before =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  EventFile file(dir / "tb");
  EXPECT_EQ(file.path().find((dir / "tb") + "/events.out.tfevents."), 0u) << file.path();
  const std::vector<std::pair<std::string, float>> values = {
      {"loss", 3.25f},
      {"träg/" + std::string(200, 'x'), -0.0f},
      {"nan", std::numeric_limits<float>::quiet_NaN()}};
  const std::vector<int64_t> steps = {1, 127, 128, 300, int64_t(1) << 40};
  for (const int64_t step : steps) file.scalars(step, values);
  const std::vector<std::string> all =
      records(read_file(file.path()));  // while still open: flushed
  ASSERT_EQ(all.size(), 1 + steps.size());
  const auto first = fields(all[0]);
  EXPECT_EQ(first.find(3)->second, "brain.Event:2");
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto event = fields(all[i + 1]);
    EXPECT_NEAR(fixed<double>(event.find(1)->second, 0), before, 60);
    EXPECT_EQ(fixed<int64_t>(event.find(2)->second, 0), steps[i]);
    const auto summary = fields(event.find(5)->second);
    ASSERT_EQ(summary.count(1), values.size());
    size_t k = 0;
    for (const auto& [number, text] : summary) {
      const auto value = fields(text);
      EXPECT_EQ(value.find(1)->second, values[k].first);
      EXPECT_EQ(fixed<uint32_t>(value.find(2)->second, 0),
                std::bit_cast<uint32_t>(values[k].second));
      ++k;
    }
  }
}

TEST(TfEvents, ASecondFileKeepsTheFirst) {
  const TempDir dir;
  const std::vector<std::pair<std::string, float>> one = {{"a", 1.0f}};
  EventFile first(dir.path);
  first.scalars(1, one);
  EventFile second(dir.path);
  second.scalars(2, one);
  const size_t in_first = records(read_file(first.path())).size();
  EXPECT_EQ(in_first, first.path() == second.path() ? 4u : 2u);
}

TEST(TfEvents, Errors) {
  const TempDir dir;
  EXPECT_THROW(EventFile(dir / "no/tb"), InputError);
  write_file_atomic(dir / "file", "x");
  EXPECT_THROW(EventFile(dir / "file"), InputError);
}

}  // namespace
}  // namespace pith
