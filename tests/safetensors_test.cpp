#include "core/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <numeric>

#include "core/error.h"
#include "core/value.h"
#include "testing.h"

namespace pith {
namespace {

// A file of the format with this header and `data_bytes` bytes 0, 1, 2, ... of data.
std::string file_of(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::string out(reinterpret_cast<const char*>(&length), sizeof length);
  out += header;
  for (size_t i = 0; i < data_bytes; ++i) out += char(i);
  return out;
}

std::string u64(uint64_t v) { return {reinterpret_cast<const char*>(&v), sizeof v}; }

// {"t": {dtype, shape, data_offsets}} for the hostile cases.
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"t":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

TEST(Safetensors, HostileHeadersAreRejected) {
  const std::string a = R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]})";
  std::string header_of_one = one("U8", "[4]", "[0,4]");
  const struct {
    const char* name;
    std::string file, why;
  } cases[] = {
      {"empty file", "", "truncated"},
      {"seven bytes", "1234567", "truncated"},
      {"no header", u64(0), "truncated"},
      {"length beyond the file", u64(100) + "{}", "header of 100 bytes"},
      {"length near 2^64", u64(UINT64_MAX) + "{}", "header of 18446744073709551615 bytes"},
      {"length that wraps", u64(UINT64_MAX - 7) + "{}", "truncated"},
      {"truncated data", file_of(header_of_one, 3), "within 3"},
      {"not JSON", file_of("{\"a\":", 0), ":1:"},
      {"not an object", file_of("[]", 0), "expected an object, got an array"},
      {"duplicate tensor", file_of("{" + a + "," + a + "}", 4), "duplicate key \"a\""},
      {"invalid UTF-8", file_of("{\"\xff\":1}", 0), "UTF-8"},
      {"deep nesting", file_of("{\"a\":" + std::string(5000, '['), 0), "nested deeper"},
      {"entry is a number", file_of(R"({"t":1})", 0), "expected an object, got integer 1"},
      {"no dtype", file_of(R"({"t":{"shape":[4],"data_offsets":[0,4]}})", 4),
       "missing key \"dtype\""},
      {"no shape", file_of(R"({"t":{"dtype":"U8","data_offsets":[0,4]}})", 4),
       "missing key \"shape\""},
      {"no offsets", file_of(R"({"t":{"dtype":"U8","shape":[4]}})", 4),
       "missing key \"data_offsets\""},
      {"unknown dtype", file_of(one("F4", "[4]", "[0,4]"), 4), "expected one of F64"},
      {"dtype is a number", file_of(R"({"t":{"dtype":8,"shape":[4],"data_offsets":[0,4]}})", 4),
       "string"},
      {"negative dimension", file_of(one("U8", "[-4]", "[0,4]"), 4), "non-negative"},
      {"two negative dimensions", file_of(one("U8", "[-2,-2]", "[0,4]"), 4), "non-negative"},
      {"fractional dimension", file_of(one("U8", "[4.0]", "[0,4]"), 4), "non-negative integer"},
      {"shape is a number", file_of(one("U8", "4", "[0,4]"), 4), "expected an array"},
      {"shape wraps to 0", file_of(one("U8", "[4294967296,4294967296]", "[0,0]"), 0), "63 bits"},
      {"bytes wrap", file_of(one("F64", "[2305843009213693952]", "[0,0]"), 0), "63 bits"},
      {"huge beside zero", file_of(one("U8", "[0,9223372036854775807,9]", "[0,0]"), 0), "63 bits"},
      {"dimension over 2^63", file_of(one("U8", "[9223372036854775808]", "[0,0]"), 0),
       "non-negative"},
      {"offsets swapped", file_of(one("U8", "[4]", "[4,0]"), 4), "need 4 bytes"},
      {"offsets negative", file_of(one("U8", "[4]", "[-4,0]"), 4), "non-negative"},
      {"one offset", file_of(one("U8", "[4]", "[4]"), 4), "two offsets"},
      {"three offsets", file_of(one("U8", "[4]", "[0,4,8]"), 8), "two offsets"},
      {"offsets beyond the data", file_of(one("U8", "[4]", "[0,4]"), 2), "within 2"},
      {"offsets far beyond",
       file_of(one("U8", "[4]", "[9223372036854775803,9223372036854775807]"), 4), "t lies at"},
      {"fewer bytes than the shape", file_of(one("F32", "[4]", "[0,4]"), 4), "need 16 bytes"},
      {"more bytes than the shape", file_of(one("U8", "[2]", "[0,4]"), 4), "need 2 bytes"},
      {"overlap", file_of("{" + a + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})", 6),
       "b lies at bytes 2 to 6"},
      {"same bytes twice",
       file_of("{" + a + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4),
       "b lies at"},
      {"hole", file_of("{" + a + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[6,10]}})", 10),
       "expected it at 4"},
      {"data that nothing names", file_of(header_of_one, 9), "its tensors end at 4"},
      {"metadata is not an object", file_of(R"({"__metadata__":[]})", 0), "expected an object"},
      {"metadata is not text", file_of(R"({"__metadata__":{"a":1}})", 0), "expected a string"},
      {"pickle", "\x80\x02}q\x01(U\x05modelq\x02", "not safetensors"},
  };
  const TempDir dir;
  for (const auto& c : cases) {
    OutputFile(dir / "x.safetensors").write(c.file.data(), c.file.size());
    const std::string e = error_of([&] { Safetensors s(dir / "x.safetensors"); });
    EXPECT_EQ(e.find(dir / "x.safetensors"), 0u) << c.name << ": " << e;
    EXPECT_NE(e.find(c.why), e.npos) << c.name << ": " << e;
    EXPECT_EQ(e.find('\n'), e.npos) << c.name << ": " << e;
  }
}

TEST(Safetensors, HostileIndexIsRejected) {
  const struct {
    const char* name;
    std::string index, why;
  } cases[] = {
      {"not JSON", "{", ":1:"},
      {"no map", "{}", "missing key \"weight_map\""},
      {"map is a list", R"({"weight_map":[]})", "expected an object"},
      {"missing tensor", R"({"weight_map":{"b":"s.safetensors"}})", "no tensor b"},
      {"missing file", R"({"weight_map":{"a":"gone.safetensors"}})", "No such file"},
      {"parent directory", R"({"weight_map":{"a":"../s.safetensors"}})", "same directory"},
      {"dots", R"({"weight_map":{"a":".."}})", "same directory"},
      {"absolute", R"({"weight_map":{"a":"/etc/passwd"}})", "same directory"},
      {"empty name", R"({"weight_map":{"a":""}})", "same directory"},
      {"NUL in the name", R"({"weight_map":{"a":"s.safetensors\u0000x"}})", "same directory"},
      {"file is a number", R"({"weight_map":{"a":1}})", "expected a string"},
      {"tensor twice", R"({"weight_map":{"a":"s.safetensors","a":"s.safetensors"}})",
       "duplicate key"},
  };
  const TempDir dir;
  write_file_atomic(dir / "s.safetensors",
                    file_of(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4));
  EXPECT_NE(error_of([&] { Safetensors s(dir.path); }).find("neither model.safetensors nor"),
            std::string::npos);
  for (const auto& c : cases) {
    write_file_atomic(dir / "model.safetensors.index.json", c.index);
    const std::string e = error_of([&] { Safetensors s(dir.path); });
    EXPECT_NE(e.find(c.why), e.npos) << c.name << ": " << e;
  }
  write_file_atomic(dir / "model.safetensors.index.json",
                    R"({"weight_map":{"a":"s.safetensors"}})");
  EXPECT_EQ(Safetensors(dir.path).entry("a").shape, std::vector<int64_t>{4});
}

TEST(Safetensors, ReadsAtAnyAddressAndRank) {
  const TempDir dir;
  // The odd header length and the one-byte tensor put the floats at odd addresses.
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"o":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
      R"("f":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},)"
      R"("r":{"dtype":"U8","shape":[1,1,1,1,2],"data_offsets":[9,11]},)"
      R"("s":{"dtype":"BF16","shape":[],"data_offsets":[11,13]},)"
      R"("e":{"dtype":"I64","shape":[3,0],"data_offsets":[13,13]}})";
  std::string file = file_of(header, 13);
  const float f[2] = {1.5f, -3.0f};
  std::memcpy(file.data() + 8 + header.size() + 1, f, sizeof f);
  const uint16_t scalar = bf16(0.75f).bits;
  std::memcpy(file.data() + 8 + header.size() + 11, &scalar, 2);
  write_file_atomic(dir / "x", file);
  const Safetensors s(dir / "x");
  EXPECT_EQ(s.entries().size(), 5u);
  EXPECT_EQ(s.load("f").to_vector<float>(), (std::vector<float>{1.5f, -3.0f}));
  EXPECT_EQ(s.load("s").to_vector<float>(), std::vector<float>{0.75f});
  EXPECT_EQ(s.load("e").numel(), 0);
  EXPECT_EQ(s.bytes("r").size(), 2u);
  EXPECT_EQ(s.bytes("r")[1], std::byte(10));
  EXPECT_NE(error_of([&] { (void)s.load("r"); }).find("more than 4 dimensions"), std::string::npos);
  EXPECT_EQ(error_of([&] { (void)s.load("nope"); }), (dir / "x") + ": no tensor nope");
  EXPECT_TRUE(s.has("o"));
  EXPECT_FALSE(s.has("nope"));
}

TEST(Safetensors, ReadsSlicesAndConverts) {
  const TempDir dir;
  std::vector<float> values(24);
  std::iota(values.begin(), values.end(), -3.0f);
  SafetensorsWriter w(dir.path, "model");
  w.add("w", DType::f32, {4, 6});
  w.add("i", DType::i32, {2});
  w.create();
  w.write("w", 0, Tensor::of<float>({4, 6}, values));
  w.write("i", 0, Tensor::of<int32_t>({2}, std::vector<int32_t>{7, -8}));
  w.close();
  const Safetensors s(dir.path);
  const auto expect_slice = [&](auto zero, int64_t begin) {
    using T = decltype(zero);
    Tensor dst({2, 3}, dtype_of<T>(), Device::cpu, "dst");
    s.read("w", begin, dst);
    for (int64_t i = 0; i < 6; ++i)
      EXPECT_EQ(double(dst.data<T>()[i]), double(values[size_t(begin + i)]));
  };
  for (const int64_t begin : {0, 5, 18}) {
    expect_slice(float{}, begin);
    expect_slice(double{}, begin);
    expect_slice(bf16{}, begin);
  }
  Tensor dst({2, 3}, DType::f32, Device::cpu, "dst");
  for (const int64_t begin : {int64_t(-1), int64_t(19), INT64_MAX}) {
    EXPECT_THROW(s.read("w", begin, dst), InputError) << begin;
  }
  Tensor two({2}, DType::f32, Device::cpu, "two");
  EXPECT_NE(error_of([&] { s.read("i", 0, two); }).find("I32 cannot be read as fp32"),
            std::string::npos);
  EXPECT_EQ(s.load("i").to_vector<int32_t>(), (std::vector<int32_t>{7, -8}));
}

TEST(Safetensors, WriterShardsAndSlices) {
  const TempDir dir;
  SafetensorsWriter w(dir.path, "part", 40);
  w.add("z", DType::f32, {2, 3});    // 24 bytes: shard 1
  w.add("a", DType::bf16, {8});      // 16: fits to the byte
  w.add("big", DType::f64, {3, 3});  // 72: alone in shard 2, though larger than a shard
  w.add("none", DType::f32, {0, 5});
  w.add("last", DType::i64, {1});  // shard 3
  EXPECT_THROW(w.add("z", DType::f32, {1}), Error);
  EXPECT_THROW(w.add("__metadata__", DType::f32, {1}), Error);
  EXPECT_THROW(w.add("n", DType::f32, {-1}), Error);
  EXPECT_THROW(w.add("n", DType::f32, {INT64_MAX, 2}), Error);
  w.create();
  const std::vector<double> big{1, 2, 3, 4, 5, 6, 7, 8, 9};
  w.write("big", 5, Tensor::of<double>({4}, std::span(big).subspan(5)));
  w.write("big", 0, Tensor::of<float>({5}, std::vector<float>{1, 2, 3, 4, 5}));  // converted
  w.write("a", 2, Tensor::of<float>({2}, std::vector<float>{0.5f, 1.00390625f}));
  w.write("last", 0, Tensor::of<int64_t>({1}, std::vector<int64_t>{-9}));
  w.write("none", 0, Tensor({0}, DType::f32, Device::cpu, "none"));
  EXPECT_THROW(w.write("big", 8, Tensor::of<double>({2}, std::span(big).first(2))), Error);
  EXPECT_THROW(w.write("nope", 0, Tensor::of<double>({1}, std::span(big).first(1))), Error);
  w.close();

  const Safetensors s(dir.path, "part");
  EXPECT_EQ(s.entries().size(), 5u);
  EXPECT_EQ(s.load("big").to_vector<double>(), big);
  EXPECT_EQ(s.load("a").to_vector<float>(), (std::vector<float>{0, 0, 0.5f, 1.0f, 0, 0, 0, 0}));
  EXPECT_EQ(s.load("z").to_vector<float>(), std::vector<float>(6, 0.0f));
  EXPECT_EQ(s.load("last").to_vector<int64_t>(), std::vector<int64_t>{-9});
  const std::string name = dir / "part.safetensors.index.json";
  const Value index = parse_json(read_file(name), name);
  EXPECT_EQ(index.at("metadata").at("total_size").as_int(), 24 + 16 + 72 + 8);
  EXPECT_EQ(index.at("weight_map").at("a").as_string(), "part-00001-of-00003.safetensors");
  EXPECT_EQ(index.at("weight_map").at("big").as_string(), "part-00002-of-00003.safetensors");
  EXPECT_EQ(index.at("weight_map").at("last").as_string(), "part-00003-of-00003.safetensors");
  const std::string shard = read_file(dir / "part-00001-of-00003.safetensors");
  uint64_t length = 0;
  std::memcpy(&length, shard.data(), sizeof length);
  EXPECT_EQ(length % 8, 0u);
  EXPECT_EQ(shard.size(), 8 + length + 40);
  EXPECT_EQ(parse_json(std::string_view(shard).substr(8, length), "header")
                .at("__metadata__")
                .at("format")
                .as_string(),
            "pt");
}

TEST(Safetensors, WriterWithoutTensors) {
  const TempDir dir;
  SafetensorsWriter w(dir.path, "model");
  w.create();
  w.close();
  EXPECT_TRUE(Safetensors(dir.path).entries().empty());
  EXPECT_TRUE(Safetensors(dir / "model.safetensors").entries().empty());
}

TEST(Safetensors, WriterErrors) {
  const TempDir dir;
  SafetensorsWriter missing(dir / "missing", "model");
  EXPECT_NE(error_of([&] { missing.create(); }).find("No such file"), std::string::npos);
  SafetensorsWriter w(dir.path, "model");
  w.add("a", DType::f32, {1});
  EXPECT_THROW(w.write("a", 0, Tensor::zeros({1}, DType::f32, Device::cpu, "z")), Error);
  ASSERT_EQ(::symlink("/dev/full", (dir / "model.safetensors").c_str()), 0);
  EXPECT_NE(error_of([&] { w.create(); }).find("No space left on device"), std::string::npos);
}

TEST(Safetensors, ReadsTheGoldenModel) {
  const std::string dir = golden_dir() + "/qwen3_moe";
  const Safetensors model(dir), golden(dir, "golden");
  EXPECT_GT(model.entries().size(), 10u);
  EXPECT_TRUE(golden.has("adamw.loss"));
  for (const auto& [name, e] : model.entries()) {
    const Tensor t = model.load(name);
    EXPECT_EQ(t.numel(), e.numel());
    EXPECT_EQ(std::memcmp(t.raw(), model.bytes(name).data(), t.nbytes()), 0) << name;
  }
}

}  // namespace
}  // namespace pith
