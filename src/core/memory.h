#pragma once
// Every buffer has a name and is counted, on cpu, cuda and meta alike, so that a run on meta predicts the peak of the
// real one. This accounting is process-wide because memory is.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pith {

enum class Device : uint8_t;

namespace memory {

struct Line {
  std::string name;
  size_t bytes;   // live at the moment of the peak
  int64_t count;  // buffers of that name, then
};

void* allocate(size_t bytes, Device device, const char* name);  // 64-byte aligned; nullptr on meta
void release(void* p, size_t bytes, Device device, const char* name);

size_t live(Device device);
size_t peak(Device device);        // high-water mark since reset_peak
void reset_peak(Device device);
std::vector<Line> at_peak(Device device);  // what made up the peak, largest first; needs track(true)
void track(bool on);               // record the table at each new peak (planning; costs time)
std::string table(Device device);  // printable form of at_peak

}  // namespace memory
}  // namespace pith
