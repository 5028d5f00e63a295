#include "engine/tfevents.h"

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <ctime>

namespace pith {
namespace {

// CRC-32C (Castagnoli, RFC 3720), reflected, a bit at a time: events are small. TFRecord stores it
// rotated and offset, so that a checksum of a checksum is not degenerate.
uint32_t masked_crc(std::string_view bytes) {
  uint32_t c = ~0u;
  for (const char b : bytes) {
    c ^= uint8_t(b);
    for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ (c & 1 ? 0x82f63b78u : 0);
  }
  return ((~c >> 15) | (~c << 17)) + 0xa282ead8u;
}

enum Wire { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };
char tag(int field, Wire wire) { return char(field << 3 | wire); }

void put_varint(std::string& out, uint64_t v) {
  for (; v >= 128; v >>= 7) out += char(v | 128);
  out += char(v);
}

void put_bytes(std::string& out, int field, std::string_view v) {
  out += tag(field, Wire::bytes);
  put_varint(out, v.size());
  out += v;
}

// The file's name in `directory`, which may exist; if it cannot be made, opening the file says why.
std::string new_path(const std::string& directory) {
  ::mkdir(directory.c_str(), 0777);
  char host[256] = "";
  ::gethostname(host, sizeof host - 1);
  return fmt::format("{}/events.out.tfevents.{:010}.{}.{}", directory, std::time(nullptr), host,
                     ::getpid());
}

}  // namespace

// Appending, should two be opened within one second.
EventFile::EventFile(const std::string& directory)
    : path_(new_path(directory)), file_(path_, true) {
  write(0, 3, "brain.Event:2");  // Event.file_version
}

void EventFile::scalars(int64_t step, std::span<const std::pair<std::string, float>> values) {
  std::string summary;
  for (const auto& [name, value] : values) {  // Summary.Value: tag = 1, simple_value = 2 (float)
    std::string item;
    put_bytes(item, 1, name);
    append_raw(item, tag(2, Wire::fixed32), value);
    put_bytes(summary, 1, item);
  }
  write(step, 5, summary);  // Event.summary
}

// One Event, wall_time = 1 (double), step = 2 (int64) and a field of bytes, as a record.
void EventFile::write(int64_t step, int field, std::string_view content) {
  const std::chrono::duration<double> now = std::chrono::system_clock::now().time_since_epoch();
  std::string event, record;
  append_raw(event, tag(1, Wire::fixed64), now.count(), tag(2, Wire::varint));
  put_varint(event, uint64_t(step));
  put_bytes(event, field, content);
  append_raw(record, uint64_t(event.size()));
  append_raw(record, masked_crc(record));
  record += event;
  append_raw(record, masked_crc(event));
  file_.write(record.data(), record.size());
}

}  // namespace pith
