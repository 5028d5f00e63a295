#include "engine/tfevents.h"

#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <ctime>

#include "core/error.h"

namespace pith {
namespace {

// CRC-32C (Castagnoli, RFC 3720), reflected, a byte at a time: events are small.
constexpr std::array<uint32_t, 256> kCrcTable = [] {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c & 1) != 0 ? (c >> 1) ^ 0x82f63b78u : c >> 1;
    table[i] = c;
  }
  return table;
}();

// TFRecord stores the checksum rotated and offset, so that a checksum of a checksum is not
// degenerate.
uint32_t masked_crc(std::string_view bytes) {
  uint32_t c = ~0u;
  for (const char b : bytes) c = kCrcTable[(c ^ uint8_t(b)) & 0xff] ^ (c >> 8);
  c = ~c;
  return ((c >> 15) | (c << 17)) + 0xa282ead8u;
}

enum Wire : uint8_t { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

void put_varint(std::string& out, uint64_t v) {
  for (; v >= 128; v >>= 7) out += char(v | 128);
  out += char(v);
}

void put_tag(std::string& out, int field, Wire wire) { out += char(field << 3 | wire); }

template <class T> void put_fixed(std::string& out, T v) {
  out.append(reinterpret_cast<const char*>(&v), sizeof v);
}

void put_bytes(std::string& out, int field, std::string_view v) {
  put_tag(out, field, Wire::bytes);
  put_varint(out, v.size());
  out += v;
}

// Event: wall_time = 1 (double), step = 2 (int64); then file_version = 3 or summary = 5.
std::string event(int64_t step) {
  const std::chrono::duration<double> now = std::chrono::system_clock::now().time_since_epoch();
  std::string out;
  put_tag(out, 1, Wire::fixed64);
  put_fixed(out, now.count());
  put_tag(out, 2, Wire::varint);
  put_varint(out, uint64_t(step));
  return out;
}

std::string file_name() {
  char host[256] = "";
  ::gethostname(host, sizeof host - 1);
  return fmt::format("events.out.tfevents.{:010}.{}.{}", std::time(nullptr), host, ::getpid());
}

// It may exist; if it cannot be made, opening a file in it says why.
const std::string& make_directory(const std::string& path) {
  ::mkdir(path.c_str(), 0777);
  return path;
}

}  // namespace

// Appending, should two be opened within one second.
EventFile::EventFile(const std::string& directory)
    : path_(make_directory(directory) + "/" + file_name()), file_(path_, true) {
  std::string first = event(0);
  put_bytes(first, 3, "brain.Event:2");
  write_record(first);
}

void EventFile::scalars(int64_t step, std::span<const std::pair<std::string, float>> values) {
  std::string summary;
  for (const auto& [tag, value] : values) {  // Summary.Value: tag = 1, simple_value = 2 (float)
    std::string item;
    put_bytes(item, 1, tag);
    put_tag(item, 2, Wire::fixed32);
    put_fixed(item, value);
    put_bytes(summary, 1, item);
  }
  std::string e = event(step);
  put_bytes(e, 5, summary);
  write_record(e);
}

void EventFile::write_record(std::string_view event) {
  std::string record;
  put_fixed(record, uint64_t(event.size()));
  put_fixed(record, masked_crc(record));
  record += event;
  put_fixed(record, masked_crc(event));
  file_.write(record.data(), record.size());
}

}  // namespace pith
