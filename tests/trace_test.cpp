#include "engine/trace.h"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>

#include "core/error.h"
#include "core/file.h"
#include "testing.h"

namespace pith {
namespace {

Tensor ints(const Shape& shape, std::vector<int32_t> values) {
  return Tensor::of<int32_t>(shape, values);
}
Tensor floats(const Shape& shape, std::vector<float> values) {
  return Tensor::of<float>(shape, values);
}

bool same(const Tensor& a, const Tensor& b) {
  return a.str() == b.str() && std::memcmp(a.raw(), b.raw(), a.nbytes()) == 0;
}

template <class T> T at(const std::string& s, size_t i) {
  T v;
  std::memcpy(&v, s.data() + i, sizeof v);
  return v;
}

// CRC-32 bit by bit (ISO 3309), independent of the library.
uint32_t crc32_of(std::string_view bytes) {
  uint32_t c = ~0u;
  for (const char b : bytes) {
    c ^= uint8_t(b);
    for (int k = 0; k < 8; ++k) c = (c >> 1) ^ (0xedb88320u & (0u - (c & 1)));
  }
  return ~c;
}

// A zip with one stored entry as numpy writes it: the local header has its sizes in a zip64 field.
std::string numpy_like(const std::string& name, const std::string& npy, bool zip64) {
  const auto le = [](uint64_t v, int bytes) {
    return std::string(reinterpret_cast<const char*>(&v), size_t(bytes));
  };
  const auto size = uint32_t(npy.size()), small = zip64 ? UINT32_MAX : size;
  const std::string extra = zip64 ? le(1, 2) + le(16, 2) + le(size, 8) + le(size, 8) : "";
  // From the flags to the checksum, the same in both headers.
  const std::string fields = le(0, 2) + le(0, 2) + le(0, 2) + le(33, 2) + le(crc32_of(npy), 4);
  const std::string out = "PK\3\4" + le(45, 2) + fields + le(small, 4) + le(small, 4) +
                          le(name.size(), 2) + le(extra.size(), 2) + name + extra + npy;
  const std::string directory = "PK\1\2" + le(0x032d, 2) + le(45, 2) + fields + le(size, 4) +
                                le(size, 4) + le(name.size(), 2) + le(0, 2) + le(0, 2) + le(0, 2) +
                                le(0, 2) + le(0600u << 16, 4) + le(0, 4) + name;
  return out + directory + "PK\5\6" + le(0, 4) + le(1, 2) + le(1, 2) + le(directory.size(), 4) +
         le(out.size(), 4) + le(0, 2);
}

std::string npy(const std::string& header, const std::string& data) {
  const auto length = uint16_t(header.size());
  std::string out("\x93NUMPY\1\0", 8);
  out.append(reinterpret_cast<const char*>(&length), 2);
  return out + header + data;
}

TEST(Npz, RoundTrips) {
  const TempDir dir;
  const Arrays arrays = {
      {"expert_ids", ints({2, 1, 3}, {0, -1, 2, INT32_MAX, INT32_MIN, 5})},
      {"gate_weights", floats({3}, {0.1f, -0.0f, 3e38f})},
      {"scalar", ints({}, {7})},
      {"empty", floats({4, 0, 2}, {})},
      {"rank4", floats({1, 2, 1, 2}, {1, 2, 3, 4})},
  };
  write_npz(dir / "a.npz", arrays);
  const Arrays back = read_npz(dir / "a.npz");
  ASSERT_EQ(back.size(), arrays.size());
  for (const auto& [name, tensor] : arrays) EXPECT_TRUE(same(back.at(name), tensor)) << name;
  write_npz(dir / "b.npz", arrays);
  EXPECT_EQ(read_file(dir / "a.npz"), read_file(dir / "b.npz"));
}

// Follows the records as an unzip program does: end -> directory -> entry.
TEST(Npz, IsAProperArchiveOfStoredArrays) {
  const TempDir dir;
  write_npz(dir / "a.npz", {{"ids", ints({2}, {1, 2})}, {"weights", floats({1, 2}, {1.5f, 2.5f})}});
  const std::string f = read_file(dir / "a.npz");
  const size_t end = f.size() - 22;
  ASSERT_EQ(f.substr(end, 4), "PK\5\6");
  EXPECT_EQ(at<uint16_t>(f, end + 10), 2);
  size_t entry = at<uint32_t>(f, end + 16);
  EXPECT_EQ(entry + at<uint32_t>(f, end + 12), end);
  for (const std::string name : {"ids.npy", "weights.npy"}) {
    ASSERT_EQ(f.substr(entry, 4), "PK\1\2");
    EXPECT_EQ(at<uint16_t>(f, entry + 10), 0) << "compressed";
    EXPECT_EQ(f.substr(entry + 46, name.size()), name);
    const auto bytes = at<uint32_t>(f, entry + 24), local = at<uint32_t>(f, entry + 42);
    EXPECT_EQ(bytes, at<uint32_t>(f, entry + 20));
    ASSERT_EQ(f.substr(local, 4), "PK\3\4");
    EXPECT_EQ(f.substr(local + 30, name.size()), name);
    const size_t begin = local + 30 + at<uint16_t>(f, local + 26) + at<uint16_t>(f, local + 28);
    const std::string array = f.substr(begin, bytes);
    EXPECT_EQ(crc32_of(array), at<uint32_t>(f, entry + 16));
    EXPECT_EQ(array.substr(0, 8), std::string("\x93NUMPY\1\0", 8));
    EXPECT_EQ((10 + at<uint16_t>(array, 8)) % 64, 0);
    const std::string header = array.substr(10, at<uint16_t>(array, 8));
    const std::string want = name == "ids.npy"
                                 ? "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }"
                                 : "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }";
    EXPECT_EQ(header.find(want), 0u) << header;
    EXPECT_EQ(header.back(), '\n');
    EXPECT_EQ(bytes, 10 + header.size() + 8);
    entry += 46 + at<uint16_t>(f, entry + 28) + at<uint16_t>(f, entry + 30);
  }
  EXPECT_EQ(entry, end);
}

TEST(Npz, ReadsWhatNumpyWrites) {
  const TempDir dir;
  const std::string data("\1\0\0\0\2\0\0\0", 8);
  const std::pair<const char*, Shape> shapes[] = {
      {"(2,)", {2}}, {"(2, 1)", {2, 1}}, {"(1, 2, 1)", {1, 2, 1}}};
  for (const auto& [text, shape] : shapes) {
    for (const bool zip64 : {false, true}) {
      const std::string header =
          std::string("{'descr': '<i4', 'fortran_order': False, 'shape': ") + text + ", }   \n";
      write_file_atomic(dir / "n.npz", numpy_like("ids.npy", npy(header, data), zip64));
      const Arrays a = read_npz(dir / "n.npz");
      ASSERT_EQ(a.size(), 1u);
      EXPECT_TRUE(same(a.at("ids"), ints(shape, {1, 2}))) << text;
    }
  }
}

TEST(Npz, DamagedAndForeignFilesAreRejected) {
  const TempDir dir;
  const auto error = [&](const std::string& bytes) {
    OutputFile(dir / "x.npz").write(bytes.data(), bytes.size());  // not synced: there are hundreds
    return error_of([&] { read_npz(dir / "x.npz"); });
  };
  write_npz(dir / "a.npz", {{"x", ints({2}, {1, 2})}});
  const std::string good = read_file(dir / "a.npz");
  for (size_t n = 0; n < good.size(); ++n)
    EXPECT_NE(error(good.substr(0, n)), "(no InputError)") << n;
  const size_t begin = good.find("\x93NUMPY");
  for (size_t i = begin; i < begin + 136; ++i) {  // every byte of the array is under the checksum
    std::string bad = good;
    bad[i] = char(bad[i] ^ 1);
    EXPECT_NE(error(bad).find("bad CRC"), std::string::npos) << i;
  }
  EXPECT_NE(error("{\"a\": 1}").find("not an .npz file"), std::string::npos);

  const std::string data(8, '\0');
  const auto array = [&](const std::string& type, const std::string& order,
                         const std::string& shape) {
    const std::string header =
        "{'descr': '" + type + "', 'fortran_order': " + order + ", 'shape': (" + shape + "), }\n";
    return error(numpy_like("x.npy", npy(header, data), true));
  };
  EXPECT_EQ(array("<i4", "False", "2,"), "(no InputError)");
  EXPECT_NE(array("<f8", "False", "1,").find("expected <i4 or <f4"), std::string::npos);
  EXPECT_NE(array(">i4", "False", "2,").find("expected <i4 or <f4"), std::string::npos);
  EXPECT_NE(array("<i4", "True", "2, 1").find("C order"), std::string::npos);
  EXPECT_NE(array("<i4", "False", "3,").find("do not fit the shape"), std::string::npos);
  EXPECT_NE(array("<i4", "False", "-2, -1").find("malformed .npy header"), std::string::npos);
  EXPECT_NE(array("<i4", "False", "x").find("malformed .npy header"), std::string::npos);
  EXPECT_NE(array("<i4", "False", "4294967296, 4294967296, 2").find("do not fit"),
            std::string::npos);
  EXPECT_NE(error(numpy_like("x.npy", "\x93NUMPY", true)).find("damaged"), std::string::npos);
  EXPECT_NE(array("<i4", "False", "1, 1, 1, 1, 2").find("malformed .npy header"),
            std::string::npos);
  EXPECT_NE(error(numpy_like("x.npy", npy("{}", ""), true)).find("malformed .npy header"),
            std::string::npos);
  EXPECT_NE(error(numpy_like("x.npy", "hello", true)).find("not a .npy array"), std::string::npos);
}

TEST(Npz, WriteErrors) {
  const TempDir dir;
  EXPECT_NE(error_of([&] { write_npz(dir / "no/x.npz", {}); }).find("No such file"),
            std::string::npos);
}

}  // namespace
}  // namespace pith
