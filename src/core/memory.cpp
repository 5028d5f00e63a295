#include "core/memory.h"

#include <malloc.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>

#include "core/tensor.h"

namespace pith::memory {
namespace {

struct Held {
  size_t bytes = 0;
  int64_t count = 0;
};

struct Account {
  size_t live = 0, peak = 0;
  std::map<std::string_view, Held> by_name, at_peak;
};

std::mutex mutex;
Account accounts[3];
bool tracking = false;

// Large buffers stay in the heap instead of going back to the kernel: page faults would cost as much as the
// element-wise ops themselves.
void* host_memory(size_t bytes) {
  static const bool configured = [] {
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, 2147483647);
    return mallopt(M_TOP_PAD, 64 << 20) != 0;
  }();
  (void)configured;
  // Not aligned_alloc: glibc cannot give it back a freed chunk of the very same size, so every buffer would be new.
  void* start = std::malloc(bytes + 64);
  if (!start) return nullptr;
  void* p = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(start) + 64) & ~uintptr_t(63));
  static_cast<void**>(p)[-1] = start;  // malloc aligns to 16, so there is room
  return p;
}

}  // namespace

void* allocate(size_t bytes, Device device, const char* name) {
  void* p = nullptr;
  if (device == Device::cpu && !(p = host_memory(bytes)))
    fail("out of memory: {} needs {} bytes, {} are live", name, bytes, live(device));
  if (device == Device::cuda) fail("this build has no CUDA: {} cannot be allocated on a GPU", name);
  std::lock_guard lock(mutex);
  Account& a = accounts[int(device)];
  a.live += bytes;
  if (tracking) {
    Held& h = a.by_name[name];
    h.bytes += bytes;
    ++h.count;
  }
  if (a.live > a.peak) {
    a.peak = a.live;
    if (tracking) a.at_peak = a.by_name;
  }
  return p;
}

void release(void* p, size_t bytes, Device device, const char* name) {
  if (p) std::free(static_cast<void**>(p)[-1]);
  std::lock_guard lock(mutex);
  Account& a = accounts[int(device)];
  a.live -= bytes;
  if (!tracking) return;
  auto held = a.by_name.find(name);
  if (held == a.by_name.end()) return;  // allocated before tracking began
  held->second.bytes -= bytes;
  --held->second.count;
}

size_t live(Device device) {
  std::lock_guard lock(mutex);
  return accounts[int(device)].live;
}

size_t peak(Device device) {
  std::lock_guard lock(mutex);
  return accounts[int(device)].peak;
}

void reset_peak(Device device) {
  std::lock_guard lock(mutex);
  Account& a = accounts[int(device)];
  a.peak = a.live;
  a.at_peak = a.by_name;
}

void track(bool on) {
  std::lock_guard lock(mutex);
  tracking = on;
}

std::vector<Line> at_peak(Device device) {
  std::lock_guard lock(mutex);
  std::vector<Line> lines;
  for (const auto& [name, held] : accounts[int(device)].at_peak)
    if (held.bytes) lines.push_back({std::string(name), held.bytes, held.count});
  std::sort(lines.begin(), lines.end(), [](const Line& a, const Line& b) { return a.bytes > b.bytes; });
  return lines;
}

std::string table(Device device) {
  std::string out = fmt::format("{:<28} {:>8} {:>12}\n", "buffer", "count", "MB");
  for (const Line& line : at_peak(device))
    out += fmt::format("{:<28} {:>8} {:>12.3f}\n", line.name, line.count, double(line.bytes) / 1e6);
  return out;
}

}  // namespace pith::memory
