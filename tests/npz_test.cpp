#include "engine/npz.h"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>

#include "core/error.h"
#include "core/file.h"
#include "testing.h"

namespace pith {
namespace {

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const InputError& e) {
    return e.what();
  }
  return "(no InputError)";
}

using Ints = std::vector<int32_t>;
using Floats = std::vector<float>;

template <class T> T at(const std::string& s, size_t i) {
  T v;
  std::memcpy(&v, s.data() + i, sizeof v);
  return v;
}

// CRC-32 bit by bit (ISO 3309), independent of the library that the writer uses.
uint32_t crc32_of(std::string_view bytes) {
  uint32_t c = ~0u;
  for (const char b : bytes) {
    c ^= uint8_t(b);
    for (int k = 0; k < 8; ++k) c = (c >> 1) ^ (0xedb88320u & (0u - (c & 1)));
  }
  return ~c;
}

// A zip with one stored entry as numpy 1.26 writes it: sizes both in the local header and in a
// zip64 field.
std::string numpy_like(const std::string& name, const std::string& npy, bool zip64) {
  const auto le = [](uint64_t v, int bytes) {
    return std::string(reinterpret_cast<const char*>(&v), size_t(bytes));
  };
  const uint64_t small = zip64 ? UINT32_MAX : npy.size();
  std::string extra = zip64 ? le(1, 2) + le(16, 2) + le(npy.size(), 8) + le(npy.size(), 8) : "";
  std::string out = "PK\3\4" + le(45, 2) + le(0, 4) + le(0, 4) + le(crc32_of(npy), 4) +
                    le(small, 4) + le(small, 4) + le(name.size(), 2) + le(extra.size(), 2) + name +
                    extra + npy;
  return out + "PK\1\2" + std::string(42, '\0');  // the directory is not read
}

std::string npy(const std::string& header, const std::string& data) {
  const auto length = uint16_t(header.size());
  std::string out("\x93NUMPY\1\0", 8);
  out.append(reinterpret_cast<const char*>(&length), 2);
  return out + header + data;
}

TEST(Npz, RoundTrips) {
  const TempDir dir;
  const std::vector<NpyArray> arrays = {
      {"expert_ids", {2, 1, 3}, Ints{0, -1, 2, INT32_MAX, INT32_MIN, 5}},
      {"gate_weights", {3}, Floats{0.1f, -0.0f, 3e38f}},
      {"scalar", {}, Ints{7}},
      {"empty", {4, 0, 2}, Floats{}},
      {"rank6", {1, 2, 1, 2, 1, 1}, Floats{1, 2, 3, 4}},
  };
  write_npz(dir / "a.npz", arrays);
  const std::vector<NpyArray> back = read_npz(dir / "a.npz");
  ASSERT_EQ(back.size(), arrays.size());
  for (size_t i = 0; i < back.size(); ++i) {
    EXPECT_EQ(back[i].name, arrays[i].name);
    EXPECT_EQ(back[i].shape, arrays[i].shape);
    EXPECT_EQ(back[i].data, arrays[i].data);
  }
  write_npz(dir / "none.npz", {});
  EXPECT_TRUE(read_npz(dir / "none.npz").empty());
  write_npz(dir / "b.npz", arrays);
  EXPECT_EQ(read_file(dir / "a.npz"), read_file(dir / "b.npz"));
}

// Follows the records as an unzip program does: end -> zip64 locator -> zip64 end -> directory ->
// entry.
TEST(Npz, IsAProperZip64Archive) {
  const TempDir dir;
  write_npz(dir / "a.npz", {{"x", {2}, Ints{1, 2}}, {"weights", {1, 2}, Floats{1.5f, 2.5f}}});
  const std::string f = read_file(dir / "a.npz");
  const size_t end = f.size() - 22;
  ASSERT_EQ(f.substr(end, 4), "PK\5\6");
  ASSERT_EQ(f.substr(end - 20, 4), "PK\6\7");
  const auto end64 = at<uint64_t>(f, end - 12);
  ASSERT_EQ(f.substr(end64, 4), "PK\6\6");
  EXPECT_EQ(at<uint64_t>(f, end64 + 4), 44u);
  EXPECT_EQ(end64 + 56, end - 20);
  EXPECT_EQ(at<uint64_t>(f, end64 + 32), 2u);
  uint64_t entry = at<uint64_t>(f, end64 + 48);
  EXPECT_EQ(entry + at<uint64_t>(f, end64 + 40), end64);
  for (const std::string name : {"x.npy", "weights.npy"}) {
    ASSERT_EQ(f.substr(entry, 4), "PK\1\2");
    EXPECT_EQ(f.substr(entry + 46, name.size()), name);
    const size_t extra = entry + 46 + name.size();
    EXPECT_EQ(at<uint16_t>(f, extra), 1);
    EXPECT_EQ(at<uint16_t>(f, extra + 2), 24);
    const auto bytes = at<uint64_t>(f, extra + 4), local = at<uint64_t>(f, extra + 20);
    EXPECT_EQ(bytes, at<uint64_t>(f, extra + 12));
    ASSERT_EQ(f.substr(local, 4), "PK\3\4");
    const std::string array = f.substr(local + 30 + name.size() + 20, bytes);
    EXPECT_EQ(crc32_of(array), at<uint32_t>(f, entry + 16));
    EXPECT_EQ(crc32_of(array), at<uint32_t>(f, local + 14));
    EXPECT_EQ(array.substr(0, 8), std::string("\x93NUMPY\1\0", 8));
    EXPECT_EQ((10 + at<uint16_t>(array, 8)) % 64, 0);
    const bool ints = name == "x.npy";
    const std::string header = array.substr(10, at<uint16_t>(array, 8));
    EXPECT_EQ(header.find(ints ? "{'descr': '<i4', 'fortran_order': False, 'shape': (2, ), }"
                               : "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }"),
              0u)
        << header;
    EXPECT_EQ(header.back(), '\n');
    EXPECT_EQ(bytes, 10 + header.size() + 8);
    entry = extra + 28;
  }
  EXPECT_EQ(entry, end64);
}

TEST(Npz, ReadsWhatNumpyWrites) {
  const TempDir dir;
  const std::string data("\1\0\0\0\2\0\0\0", 8);
  for (const char* shape : {"(2,)", "(2, 1)", "(1, 2, 1)"}) {
    for (const bool zip64 : {false, true}) {
      const std::string header =
          std::string("{'descr': '<i4', 'fortran_order': False, 'shape': ") + shape + ", }   \n";
      write_file_atomic(dir / "n.npz", numpy_like("ids.npy", npy(header, data), zip64));
      const std::vector<NpyArray> a = read_npz(dir / "n.npz");
      ASSERT_EQ(a.size(), 1u);
      EXPECT_EQ(a[0].name, "ids");
      EXPECT_EQ(std::get<Ints>(a[0].data), (Ints{1, 2}));
    }
  }
}

TEST(Npz, DamagedAndForeignFilesAreRejected) {
  const TempDir dir;
  const auto error = [&](const std::string& bytes) {
    OutputFile(dir / "x.npz").write(bytes.data(), bytes.size());  // not synced: there are hundreds
    return error_of([&] { read_npz(dir / "x.npz"); });
  };
  write_npz(dir / "a.npz", {{"x", {2}, Ints{1, 2}}});
  const std::string good = read_file(dir / "a.npz");
  const size_t entries_end = good.find("PK\1\2");
  for (size_t n = 0; n < entries_end; ++n)
    EXPECT_NE(error(good.substr(0, n)), "(no InputError)") << n;
  for (size_t i = 55; i < entries_end; ++i) {  // every byte of the array is under the checksum
    std::string bad = good;
    bad[i] = char(bad[i] ^ 1);
    EXPECT_NE(error(bad).find("wrong checksum"), std::string::npos) << i;
  }
  std::string compressed = good;
  compressed[8] = 8;
  EXPECT_NE(error(compressed).find("expected a stored entry"), std::string::npos);
  EXPECT_NE(error("{\"a\": 1}").find("not an .npz file"), std::string::npos);

  const std::string data(8, '\0');
  const auto array = [&](const std::string& type, const std::string& order,
                         const std::string& shape) {
    const std::string header =
        "{'descr': '" + type + "', 'fortran_order': " + order + ", 'shape': (" + shape + "), }\n";
    return error(numpy_like("x.npy", npy(header, data), true));
  };
  EXPECT_EQ(array("<i4", "False", "2, "), "(no InputError)");
  EXPECT_NE(array("<f8", "False", "1, ").find("expected <i4 or <f4"), std::string::npos);
  EXPECT_NE(array(">i4", "False", "2, ").find("expected <i4 or <f4"), std::string::npos);
  EXPECT_NE(array("<i4", "True", "2, 1").find("C order"), std::string::npos);
  EXPECT_NE(array("<i4", "False", "3, ").find("do not fit the shape"), std::string::npos);
  EXPECT_NE(array("<i4", "False", "-2, -1").find("malformed shape"), std::string::npos);
  EXPECT_NE(array("<i4", "False", "x").find("malformed shape"), std::string::npos);
  EXPECT_NE(array("<i4", "False", "4294967296, 4294967296, 2").find("do not fit"),
            std::string::npos);
  EXPECT_NE(error(numpy_like("x.npy", "\x93NUMPY", true)).find("damaged"), std::string::npos);
  EXPECT_NE(error(numpy_like("x.npy", npy("{}", ""), true)).find("malformed .npy header"),
            std::string::npos);
  EXPECT_NE(error(numpy_like("x.npy", "hello", true)).find("not a .npy array"), std::string::npos);
}

TEST(Npz, WriterChecksTheShape) {
  const TempDir dir;
  EXPECT_THROW(write_npz(dir / "x.npz", {{"x", {3}, Ints{1, 2}}}), Error);
  EXPECT_NE(error_of([&] { write_npz(dir / "no/x.npz", {}); }).find("No such file"),
            std::string::npos);
}

}  // namespace
}  // namespace pith
