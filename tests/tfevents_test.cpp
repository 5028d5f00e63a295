#include <gtest/gtest.h>

#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <vector>

#include "core/error.h"
#include "core/file.h"
#include "engine/metrics.h"
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

struct RunDir : RunConfig {
  const TempDir dir;
  const std::string events = dir / "tensorboard";
  RunDir() { out = dir.path; }
  std::vector<std::string> files() const {
    std::vector<std::string> paths;
    for (const auto& e : std::filesystem::directory_iterator(events)) paths.push_back(e.path());
    std::ranges::sort(paths);
    return paths;
  }
};

void log_step(Metrics& metrics, int64_t step) {
  testing::internal::CaptureStdout();
  metrics.log({.step = step,
               .loss = 2.5,
               .lr = -0.0,
               .grad_norm = std::numeric_limits<double>::quiet_NaN(),
               .load = {{7, 1.5}}});
  testing::internal::GetCapturedStdout();
}

TEST(TfEvents, AFileOpensWithItsVersionAndHoldsEveryStep) {
  const double before =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  const RunDir run;
  Metrics metrics(run, 0);
  const std::vector<int64_t> steps = {1, 127, 128, 300, int64_t(1) << 40};
  for (const int64_t step : steps) log_step(metrics, step);
  ASSERT_EQ(run.files().size(), 1u);
  const std::string path = run.files()[0];
  EXPECT_EQ(path.find(run.events + "/events.out.tfevents."), 0u) << path;
  const std::vector<std::string> all = records(read_file(path));  // while still open: flushed
  ASSERT_EQ(all.size(), steps.size() + 1);
  EXPECT_EQ(fields(all[0]).find(3)->second, "brain.Event:2");
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto event = fields(all[i + 1]);
    EXPECT_NEAR(fixed<double>(event.find(1)->second, 0), before, 60);
    EXPECT_EQ(fixed<int64_t>(event.find(2)->second, 0), steps[i]);
    std::map<std::string, uint32_t> scalars;
    for (const auto& [number, text] : fields(event.find(5)->second)) {
      EXPECT_EQ(number, 1);
      const auto value = fields(text);
      scalars[value.find(1)->second] = fixed<uint32_t>(value.find(2)->second, 0);
    }
    const auto bits = [](float v) { return std::bit_cast<uint32_t>(v); };
    EXPECT_EQ(scalars.at("loss"), bits(2.5f));
    EXPECT_EQ(scalars.at("lr"), bits(-0.0f));
    EXPECT_EQ(scalars.at("grad_norm"), bits(std::numeric_limits<float>::quiet_NaN()));
    EXPECT_EQ(scalars.at("load_max"), bits(1.5f));
    EXPECT_EQ(scalars.at("load_max/L07"), bits(1.5f));
    EXPECT_EQ(scalars.size(), 10u);
  }
}

TEST(TfEvents, ASecondFileKeepsTheFirst) {
  const RunDir run;
  Metrics first(run, 0);
  log_step(first, 1);
  Metrics second(run, 1);
  log_step(second, 2);
  const std::vector<std::string> files = run.files();
  ASSERT_GE(files.size(), 1u);
  EXPECT_EQ(records(read_file(files[0])).size(), files.size() == 1 ? 4u : 2u);
}

TEST(TfEvents, Errors) {
  const RunDir missing, file;
  std::filesystem::create_symlink(missing.dir / "no/tb", missing.events);
  EXPECT_THROW(Metrics(missing, 0), InputError);
  write_file_atomic(file.events, "x");
  EXPECT_THROW(Metrics(file, 0), InputError);
}

}  // namespace
}  // namespace pith
