#ifdef PITH_CUDA
// Kernel timelines through CUPTI's activity records. The library is loaded when one is asked for.

#include <cuda_profiler_api.h>
#include <cupti.h>
#include <cxxabi.h>
#include <nvtx3/nvToolsExt.h>

#include <mutex>
#include <unordered_map>

#include "core/cuda.h"
#include "core/error.h"

namespace pith::cuda {
namespace {

struct Cupti {
  void* library = load_library("libcupti.so.13");
  PITH_LOADED(cuptiActivityRegisterCallbacks);
  PITH_LOADED(cuptiActivityEnable);
  PITH_LOADED(cuptiActivityDisable);
  PITH_LOADED(cuptiActivityFlushAll);
  PITH_LOADED(cuptiActivityGetNextRecord);
  PITH_LOADED(cuptiActivityPushExternalCorrelationId);
  PITH_LOADED(cuptiActivityPopExternalCorrelationId);
};

constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                         CUPTI_ACTIVITY_KIND_MEMCPY,
                                         CUPTI_ACTIVITY_KIND_MEMSET,
                                         CUPTI_ACTIVITY_KIND_SYNCHRONIZATION,
                                         CUPTI_ACTIVITY_KIND_RUNTIME,
                                         CUPTI_ACTIVITY_KIND_DRIVER,
                                         CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION};

// What was recorded since the start; CUPTI fills it from a thread of its own.
std::mutex mutex;
Timeline recorded;
std::unordered_map<uint32_t, uint64_t> tag_of;  // by correlation
std::vector<uint64_t> sync_ends;                // of the host's waits
uint64_t first_kernel = UINT64_MAX, last_kernel = 0;  // when they began
bool recording = false, in_range = false;

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* bytes, size_t* records) {
  *bytes = size_t(8) << 20;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *bytes));
  *records = 0;
}

Cupti& cupti() {
  static Cupti the;
  return the;
}

std::string readable(const char* name) {
  int status = -1;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string out = status == 0 ? text : name;
  std::free(text);
  return out.substr(0, out.find('('));
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t used) {
  const std::lock_guard lock(mutex);
  CUpti_Activity* record = nullptr;
  const auto add = [](const auto* r, std::string name) {
    recorded.runs.push_back({std::move(name), r->start, r->end, r->correlationId});
  };
  while (used > 0 && cupti().cuptiActivityGetNextRecord(buffer, used, &record) == CUPTI_SUCCESS) {
    const auto kind = record->kind;
    if (kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto* r = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
      add(r, readable(r->name));
      first_kernel = std::min(first_kernel, r->start);
      last_kernel = std::max(last_kernel, r->start);
    } else if (kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      add(reinterpret_cast<const CUpti_ActivityMemcpy6*>(record), "memcpy");
    } else if (kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      add(reinterpret_cast<const CUpti_ActivityMemset4*>(record), "memset");
    } else if (kind == CUPTI_ACTIVITY_KIND_SYNCHRONIZATION) {
      const auto* r = reinterpret_cast<const CUpti_ActivitySynchronization2*>(record);
      if (r->type != CUPTI_ACTIVITY_SYNCHRONIZATION_TYPE_STREAM_WAIT_EVENT)  // the GPU's own
        sync_ends.push_back(r->end);
    } else if (kind == CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION) {
      const auto* r = reinterpret_cast<const CUpti_ActivityExternalCorrelation*>(record);
      tag_of[r->correlationId] = r->externalId;
    }
  }
  std::free(buffer);
}

}  // namespace

void start_timeline() {
  synchronize();
  cudaProfilerStart();
  CUptiResult e = cupti().cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
  for (const CUpti_ActivityKind kind : kKinds)
    if (e == CUPTI_SUCCESS) e = cupti().cuptiActivityEnable(kind);
  recording = e == CUPTI_SUCCESS;
  if (!recording)
    warn_once(fmt::format("no kernel timeline: CUPTI fails with {} (another profiler?)", int(e)));
}

void begin_tag(uint64_t tag, const char* range) {
  nvtxRangePushA(range);
  if (recording)
    cupti().cuptiActivityPushExternalCorrelationId(CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0, tag);
}
void end_tag() {
  uint64_t tag = 0;
  nvtxRangePop();
  if (recording)
    cupti().cuptiActivityPopExternalCorrelationId(CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0, &tag);
}

void enter_range(const std::string& name) {
  if (std::exchange(in_range, true)) nvtxRangePop();
  nvtxRangePushA(name.c_str());
}

Timeline stop_timeline() {
  synchronize();
  if (std::exchange(in_range, false)) nvtxRangePop();
  cudaProfilerStop();
  if (!std::exchange(recording, false)) return {};
  for (const CUpti_ActivityKind kind : kKinds) cupti().cuptiActivityDisable(kind);
  cupti().cuptiActivityFlushAll(0);
  const std::lock_guard lock(mutex);
  for (Timeline::Run& run : recorded.runs) {
    const auto found = tag_of.find(uint32_t(run.tag));
    run.tag = found == tag_of.end() ? kNoTag : found->second;
  }
  std::ranges::sort(recorded.runs, {}, &Timeline::Run::begin_ns);
  recorded.host_syncs = std::ranges::count_if(
      sync_ends, [](uint64_t end) { return end > first_kernel && end < last_kernel; });
  first_kernel = UINT64_MAX;
  last_kernel = 0;
  tag_of.clear();
  sync_ends.clear();
  return std::exchange(recorded, {});
}

}  // namespace pith::cuda
#endif
