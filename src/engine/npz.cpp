#include "engine/npz.h"

#include <zlib.h>

#include <cstring>

#include "core/error.h"
#include "core/file.h"
#include "core/value.h"

namespace pith {
namespace {

constexpr uint32_t kLocal = 0x04034b50, kCentral = 0x02014b50, kEnd = 0x06054b50;
constexpr uint32_t kEnd64 = 0x06064b50, kLocator64 = 0x07064b50;
constexpr uint16_t kVersion = 45;         // zip64
constexpr uint16_t kDate = (1 << 5) | 1;  // 1980-01-01: equal arrays give equal files
constexpr std::string_view kMagic("\x93NUMPY\x01\x00", 8);

std::string_view slice(std::string_view file, uint64_t at, uint64_t n, const std::string& path) {
  const bool inside = at <= file.size() && n <= file.size() - at;
  if (!inside) fail_input("{}: truncated or damaged .npz", path);
  return file.substr(at, n);
}

// The little-endian T at `at`.
template <class T> T get(std::string_view file, uint64_t at, const std::string& path) {
  T v;
  std::memcpy(&v, slice(file, at, sizeof v, path).data(), sizeof v);
  return v;
}

uint32_t checksum(std::string_view bytes) {
  return uint32_t(crc32_z(0, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size()));
}

// As a double: exact where it matters, and without overflow.
double elements(const std::vector<int64_t>& shape) {
  double n = 1;
  for (const int64_t d : shape) n *= double(d);
  return n;
}

// What numpy, which sorts the keys, writes before the dimensions.
std::string header_start(bool floats) {
  return fmt::format("{{'descr': '<{}4', 'fortran_order': False, 'shape': (", floats ? 'f' : 'i');
}

std::string npy_of(const NpyArray& a) {
  const std::string_view data = std::visit(
      [](const auto& v) {
        return std::string_view(reinterpret_cast<const char*>(v.data()), 4 * v.size());
      },
      a.data);
  std::string shape;
  for (const int64_t d : a.shape) shape += fmt::format("{}, ", d);
  if (elements(a.shape) != double(data.size()) / 4)
    fail("{}: {} elements for shape ({})", a.name, data.size() / 4, shape);
  if (a.shape.size() > 1) shape.resize(shape.size() - 2);
  std::string header = header_start(a.data.index() == 1) + shape + "), }";
  header.resize((header.size() + 11 + 63) / 64 * 64 - 11, ' ');  // so that the data starts aligned
  std::string out(kMagic);
  append_raw(out, uint16_t(header.size() + 1));
  return out.append(header).append(1, '\n').append(data);
}

NpyArray parse_npy(std::string_view name, std::string_view npy, const std::string& where) {
  if (!npy.starts_with(kMagic)) fail_input("{}: not a .npy array of version 1, or damaged", where);
  const uint64_t length = get<uint16_t>(npy, 8, where);
  const std::string header(slice(npy, 10, length, where));
  const std::string_view data = npy.substr(10 + length);
  const bool floats = header.starts_with(header_start(true));
  const std::string start = header_start(floats);
  if (!header.starts_with(start))
    fail_input("{}: malformed .npy header: expected <i4 or <f4 in C order, got {}", where,
               printable(header));
  NpyArray a{std::string(name), {}, {}};
  const char* p = header.c_str() + start.size();
  for (char* end = nullptr; *p != ')'; p = end + std::strspn(end, ", ")) {
    a.shape.push_back(std::strtoll(p, &end, 10));
    if (end == p || a.shape.back() < 0) fail_input("{}: malformed shape", where);
  }
  if (elements(a.shape) != double(data.size()) / 4)
    fail_input("{}: {} bytes of data do not fit the shape", where, data.size());
  if (floats) a.data = std::vector<float>();
  const auto fill = [&](auto& v) {
    v.resize(data.size() / 4);
    data.copy(reinterpret_cast<char*>(v.data()), data.size());
  };
  std::visit(fill, a.data);
  return a;
}

}  // namespace

void write_npz(const std::string& path, const std::vector<NpyArray>& arrays) {
  constexpr uint16_t utf8_name = 1 << 11, none = 0, local_extra = 20, central_extra = 28;
  constexpr uint32_t in_extra = UINT32_MAX;
  std::string out, directory;
  for (const NpyArray& a : arrays) {
    const std::string name = a.name + ".npy", npy = npy_of(a);
    const uint64_t offset = out.size(), bytes = npy.size();
    const uint32_t crc = checksum(npy);
    append_raw(out, kLocal, kVersion, utf8_name, none, none, kDate, crc, in_extra, in_extra,
               uint16_t(name.size()), local_extra);
    out += name;
    append_raw(out, uint16_t(1), uint16_t(16), bytes, bytes);
    out += npy;
    append_raw(directory, kCentral, kVersion, kVersion, utf8_name, none, none, kDate, crc, in_extra,
               in_extra, uint16_t(name.size()), central_extra, none, none, none, uint32_t(0),
               in_extra);
    directory += name;
    append_raw(directory, uint16_t(1), uint16_t(24), bytes, bytes, offset);
  }
  const uint64_t begin = out.size(), end64 = begin + directory.size(), entries = arrays.size();
  out += directory;
  append_raw(out, kEnd64, uint64_t(44), kVersion, kVersion, uint32_t(0), uint32_t(0), entries,
             entries, end64 - begin, begin);
  append_raw(out, kLocator64, uint32_t(0), end64, uint32_t(1));
  append_raw(out, kEnd, none, none, uint16_t(UINT16_MAX), uint16_t(UINT16_MAX), in_extra, in_extra,
             none);
  write_file_atomic(path, out);
}

std::vector<NpyArray> read_npz(const std::string& path) {
  const std::string file = read_file(path);
  std::vector<NpyArray> arrays;
  uint64_t at = 0;
  // The entries follow one another from the start of the file; after the last comes the directory.
  while (get<uint32_t>(file, at, path) == kLocal) {
    const auto name_bytes = get<uint16_t>(file, at + 26, path);
    std::string_view name = slice(file, at + 30, name_bytes, path);
    const std::string where = path + ": " + printable(name);
    const bool streamed = (get<uint16_t>(file, at + 6, path) & 8) != 0;
    if (get<uint16_t>(file, at + 8, path) != 0 || streamed)
      fail_input("{}: expected a stored entry, as numpy.savez writes it", where);
    uint64_t bytes = get<uint32_t>(file, at + 22, path);
    const uint64_t extra = at + 30 + name_bytes, begin = extra + get<uint16_t>(file, at + 28, path);
    if (bytes == UINT32_MAX) bytes = get<uint64_t>(file, extra + 4, where);  // zip64, always first
    const std::string_view npy = slice(file, begin, bytes, where);
    if (checksum(npy) != get<uint32_t>(file, at + 14, path))
      fail_input("{}: wrong checksum", where);
    if (name.ends_with(".npy")) name.remove_suffix(4);
    arrays.push_back(parse_npy(name, npy, where));
    at = begin + bytes;
  }
  if (slice(file, at, 2, path) != "PK") fail_input("{}: not an .npz file, or damaged", path);
  return arrays;
}

}  // namespace pith
