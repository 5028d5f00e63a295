#pragma once
// Every buffer has a name and is counted, on cpu, cuda and meta alike, so that a run on meta
// predicts the peak of the real one. This accounting is process-wide because memory is.

#include "core/error.h"

namespace pith {

enum class Device : uint8_t;

namespace memory {

struct Line {
  std::string name;
  size_t bytes = 0;   // live at the moment of the peak
  int64_t count = 0;  // buffers of that name, then
};

void* allocate(size_t bytes, Device device, const char* name);  // 64-byte aligned; nullptr on meta
void release(void* p, size_t bytes, Device device, const char* name);

size_t live(Device device);
size_t peak(Device device);  // high-water mark since reset_peak
void reset_peak(Device device);
std::vector<Line> planned_peak();  // what made up the peak on meta, largest first

}  // namespace memory
}  // namespace pith
