#include "engine/npz.h"

#include <zlib.h>

#include <cstdlib>
#include <cstring>
#include <string_view>

#include "core/error.h"
#include "core/file.h"
#include "core/value.h"

namespace pith {
namespace {

constexpr uint32_t kLocal = 0x04034b50, kCentral = 0x02014b50, kEnd = 0x06054b50;
constexpr uint32_t kEnd64 = 0x06064b50, kLocator64 = 0x07064b50;
constexpr uint16_t kVersion = 45;         // zip64
constexpr uint16_t kDate = (1 << 5) | 1;  // 1980-01-01: equal arrays give equal files

template <class... T> void put(std::string& out, T... values) {
  (out.append(reinterpret_cast<const char*>(&values), sizeof values), ...);
}

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

uint32_t checksum(std::string_view bytes, uint32_t before) {
  const auto* p = reinterpret_cast<const Bytef*>(bytes.data());
  return bytes.empty() ? before : uint32_t(crc32_z(before, p, bytes.size()));
}

std::string npy_header(const NpyArray& a, size_t elements) {
  std::string shape;
  uint64_t want = 1;
  for (const int64_t d : a.shape) {
    shape += fmt::format("{}, ", d);
    want *= uint64_t(d);
  }
  if (want != elements) fail("{}: {} elements for shape ({})", a.name, elements, shape);
  if (a.shape.size() > 1) shape.resize(shape.size() - 2);
  const char* type = a.data.index() == 0 ? "<i4" : "<f4";
  std::string text =
      fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}", type, shape);
  text.resize((text.size() + 11 + 63) / 64 * 64 - 11, ' ');  // so that the data starts aligned
  text += '\n';
  std::string out("\x93NUMPY\x01\x00", 8);
  put(out, uint16_t(text.size()));
  return out + text;
}

// What follows `key` in the text of a .npy header.
const char* header_value(const std::string& header, const char* key, const std::string& where) {
  const size_t at = header.find(key);
  if (at == header.npos) fail_input("{}: malformed .npy header, no {}", where, key);
  return header.c_str() + at + std::strlen(key);
}

NpyArray parse_npy(const std::string& name, std::string_view npy, const std::string& where) {
  if (npy.substr(0, 6) != "\x93NUMPY") fail_input("{}: not a .npy array", where);
  if (get<uint8_t>(npy, 6, where) != 1) fail_input("{}: .npy of a version other than 1", where);
  const uint64_t length = get<uint16_t>(npy, 8, where);
  const std::string header(slice(npy, 10, length, where));
  const std::string_view data = npy.substr(10 + length);
  NpyArray a;
  a.name = name;
  uint64_t elements = 1;
  bool fits = true;
  const char* p = header_value(header, "'shape': (", where);
  for (char* end = nullptr; *p != ')'; p = end + std::strspn(end, ", ")) {
    a.shape.push_back(std::strtoll(p, &end, 10));
    if (end == p || a.shape.back() < 0) fail_input("{}: malformed shape", where);
    fits = fits && !__builtin_mul_overflow(elements, uint64_t(a.shape.back()), &elements);
  }
  const std::string_view order = header_value(header, "'fortran_order': ", where);
  const std::string_view type =
      std::string_view(header_value(header, "'descr': '", where)).substr(0, 3);
  if (!order.starts_with("False") || (type != "<i4" && type != "<f4")) {
    fail_input("{}: expected <i4 or <f4 in C order, got {}", where, printable(header));
  }
  if (!fits || elements != data.size() / 4 || data.size() % 4 != 0) {
    fail_input("{}: {} bytes of data do not fit the shape", where, data.size());
  }
  if (type == "<f4") a.data = std::vector<float>();
  const auto fill = [&](auto& v) {
    v.resize(elements);
    if (elements > 0) std::memcpy(v.data(), data.data(), data.size());
  };
  std::visit(fill, a.data);
  return a;
}

}  // namespace

void write_npz(const std::string& path, const std::vector<NpyArray>& arrays) {
  constexpr uint16_t utf8_name = 1 << 11, none = 0, local_extra = 20, central_extra = 28;
  constexpr uint32_t in_extra = UINT32_MAX;
  const auto as_bytes = [](const auto& v) {
    return std::string_view(reinterpret_cast<const char*>(v.data()), 4 * v.size());
  };
  std::string out, directory;
  for (const NpyArray& a : arrays) {
    const std::string name = a.name + ".npy";
    const std::string_view data = std::visit(as_bytes, a.data);
    const std::string header = npy_header(a, data.size() / 4);
    const uint64_t offset = out.size(), bytes = header.size() + data.size();
    const uint32_t crc = checksum(data, checksum(header, 0));
    put(out, kLocal, kVersion, utf8_name, none, none, kDate, crc, in_extra, in_extra,
        uint16_t(name.size()), local_extra);
    out += name;
    put(out, uint16_t(1), uint16_t(16), bytes, bytes);
    out += header;
    out += data;
    put(directory, kCentral, kVersion, kVersion, utf8_name, none, none, kDate, crc, in_extra,
        in_extra, uint16_t(name.size()), central_extra, none, none, none, uint32_t(0), in_extra);
    directory += name;
    put(directory, uint16_t(1), uint16_t(24), bytes, bytes, offset);
  }
  const uint64_t begin = out.size(), end64 = begin + directory.size(), entries = arrays.size();
  out += directory;
  put(out, kEnd64, uint64_t(44), kVersion, kVersion, uint32_t(0), uint32_t(0), entries, entries,
      end64 - begin, begin);
  put(out, kLocator64, uint32_t(0), end64, uint32_t(1));
  put(out, kEnd, none, none, uint16_t(UINT16_MAX), uint16_t(UINT16_MAX), in_extra, in_extra, none);
  write_file_atomic(path, out);
}

std::vector<NpyArray> read_npz(const std::string& path) {
  const MappedFile mapped(path);
  const std::string_view file(reinterpret_cast<const char*>(mapped.bytes().data()),
                              mapped.bytes().size());
  std::vector<NpyArray> arrays;
  uint64_t at = 0;
  // The entries follow one another from the start of the file; after the last comes the directory.
  while (get<uint32_t>(file, at, path) == kLocal) {
    const auto name_bytes = get<uint16_t>(file, at + 26, path);
    const auto extra_bytes = get<uint16_t>(file, at + 28, path);
    std::string_view name = slice(file, at + 30, name_bytes, path);
    const std::string where = path + ": " + printable(name);
    const bool streamed = (get<uint16_t>(file, at + 6, path) & 8) != 0;
    if (get<uint16_t>(file, at + 8, path) != 0 || streamed) {
      fail_input("{}: expected a stored entry, as numpy.savez writes it", where);
    }
    uint64_t bytes = get<uint32_t>(file, at + 22, path);
    const uint64_t extra = at + 30 + name_bytes;
    if (bytes == UINT32_MAX) bytes = get<uint64_t>(file, extra + 4, where);  // zip64, always first
    const std::string_view npy = slice(file, extra + extra_bytes, bytes, where);
    if (checksum(npy, 0) != get<uint32_t>(file, at + 14, path))
      fail_input("{}: wrong checksum", where);
    if (name.ends_with(".npy")) name.remove_suffix(4);
    arrays.push_back(parse_npy(std::string(name), npy, where));
    at = extra + extra_bytes + bytes;
  }
  if (slice(file, at, 2, path) != "PK") fail_input("{}: not an .npz file, or damaged", path);
  return arrays;
}

}  // namespace pith
