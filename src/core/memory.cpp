#include "core/memory.h"

#include <malloc.h>

#include <atomic>
#include <mutex>

#include "core/tensor.h"

namespace pith::memory {

static std::atomic<size_t> live_bytes[3], peak_bytes[3];  // by device
// By name, on meta only: planning may take its time.
static std::map<std::string, Line> planned, at_peak;
static std::mutex mutex;  // of what changes them

// Large buffers stay in the heap instead of going back to the kernel: page faults would cost as
// much as the element-wise ops themselves.
static void* host_memory(size_t bytes) {
  [[maybe_unused]] static const bool configured = mallopt(M_MMAP_THRESHOLD, 1 << 30) &&
                                                  mallopt(M_TRIM_THRESHOLD, INT32_MAX) &&
                                                  mallopt(M_TOP_PAD, 64 << 20);
  // Not aligned_alloc: glibc cannot give it back a freed chunk of the very same size, so every
  // buffer would be new.
  void* start = std::malloc(bytes + 64);
  if (!start) return nullptr;
  char* p = static_cast<char*>(start) + 64 - (reinterpret_cast<uintptr_t>(start) & 63);
  reinterpret_cast<void**>(p)[-1] = start;  // malloc aligns to 16, so there is room
  return p;
}

// Adds `count` buffers, `bytes` in all; negative ones go.
static void add(Device device, const char* name, int64_t bytes, int64_t count) {
  const std::lock_guard lock(mutex);
  const size_t now = live_bytes[int(device)] += size_t(bytes);
  const bool new_peak = now > peak_bytes[int(device)];
  if (new_peak) peak_bytes[int(device)] = now;
  if (device != Device::meta) return;
  Line& line = planned[name];
  line = {name, line.bytes + size_t(bytes), line.count + count};
  if (new_peak) at_peak = planned;
}

void* allocate(size_t bytes, Device device, const char* name) {
  if (device == Device::cuda) fail("this build has no CUDA: {} cannot be allocated on a GPU", name);
  void* p = device == Device::cpu ? host_memory(bytes) : nullptr;
  if (device == Device::cpu && !p)
    fail("out of memory: {} needs {} bytes, {} are live", name, bytes, live(device));
  add(device, name, int64_t(bytes), 1);
  return p;
}

void release(void* p, size_t bytes, Device device, const char* name) {
  if (p) std::free(static_cast<void**>(p)[-1]);
  add(device, name, -int64_t(bytes), -1);
}

size_t live(Device device) { return live_bytes[int(device)]; }
size_t peak(Device device) { return peak_bytes[int(device)]; }

void reset_peak(Device device) {
  const std::lock_guard lock(mutex);
  peak_bytes[int(device)] = live(device);
  if (device == Device::meta) at_peak = planned;
}

std::vector<Line> planned_peak() {
  const std::lock_guard lock(mutex);
  std::vector<Line> lines;
  for (const auto& [name, line] : at_peak)
    if (line.bytes) lines.push_back(line);
  std::ranges::sort(lines, std::greater(), &Line::bytes);
  return lines;
}

}  // namespace pith::memory
