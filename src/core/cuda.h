#pragma once
// One GPU as the rest of core sees it. Everything is ordered on one stream. In a build without CUDA
// these functions throw.

#include <cstdint>
#include <string>
#include <vector>

struct CUstream_st;
namespace pith {
enum class DType : uint8_t;
class Tensor;
}  // namespace pith

namespace pith::cuda {

using Stream = CUstream_st*;

#ifdef PITH_CUDA
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif

// InputError that says what is missing: CUDA in this build, the driver, a GPU, or one of the
// architecture that the kernels are built for.
void require_device();
bool is_available();

void* allocate(size_t bytes);  // nullptr when there is no such piece of memory left
void release(void* p);         // what was launched before may still use it
// Between device and device, or device and host, either way. What is read on the host may be
// changed, and what is written there be read, on return.
void copy(void* to, const void* from, size_t bytes);
void fill_zero(void* p, size_t bytes);
// To and from bf16 or fp32 in device memory; false for other types. to += from with `add`.
bool convert(void* to, DType to_type, const void* from, DType from_type, int64_t n,
             bool add = false);
// See core/param.h and core/rng.h.
void join_master(Tensor& wide, const Tensor& value, const Tensor& rest);
void split_master(const Tensor& wide, const Tensor& value, Tensor& rest);
void fill_normal(Tensor& dst, uint64_t key, uint64_t first_index, double std);
void synchronize();
Stream stream();

// A CUDA library, loaded once. Looked for by the system's rules ($LD_LIBRARY_PATH, ldconfig), then in
// $CUDA_HOME/lib64, /usr/local/cuda/lib64, and the `nvidia` packages of every python3 on $PATH.
// InputError that names the library and these places.
void* load_library(const std::string& name);
void* find_function(void* library, const char* name);
template <class F> F function(void* library, const char* name) {
  return reinterpret_cast<F>(find_function(library, name));
}
// A member that is the function of this name in the member `library`.
// NOLINTBEGIN(bugprone-macro-parentheses)
#define PITH_LOADED(name) \
  decltype(&::name) name = ::pith::cuda::function<decltype(&::name)>(library, #name)
// NOLINTEND(bugprone-macro-parentheses)

// What the GPU does between start and stop, through CUPTI, in order; both wait for the GPU. Work
// launched between begin_tag and end_tag carries the tag. Nsight captures the same stretch
// (cudaProfilerStart) with NVTX ranges: one for every tag, inside the one last entered. Where
// another tool has CUPTI for itself nothing is recorded, with a warning.
constexpr uint64_t kNoTag = UINT64_MAX;
struct Timeline {
  struct Run {
    std::string name;  // of the kernel, or memcpy, memset
    uint64_t begin_ns, end_ns, tag;
  };
  std::vector<Run> runs;
  // How often the host waited for the GPU between its first and its last kernel; -1: not recorded.
  int64_t host_syncs = -1;
};
void start_timeline();
void begin_tag(uint64_t tag, const char* range);
void end_tag();
void enter_range(const std::string& name);  // until the next one, or stop
Timeline stop_timeline();

}  // namespace pith::cuda
