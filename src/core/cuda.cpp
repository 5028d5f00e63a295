#include "core/cuda.h"

#include <string>

#include "core/error.h"

#ifdef PITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pith::cuda {

#ifdef PITH_CUDA

namespace {

void check(cudaError_t e) {
  if (e != cudaSuccess) fail("CUDA: {}", cudaGetErrorString(e));
}

// What keeps the first GPU from being used; empty if nothing does.
std::string find_fault() {
  int count = 0;
  if (const cudaError_t e = cudaGetDeviceCount(&count); e != cudaSuccess || count == 0)
    return fmt::format("no usable GPU ({})",
                       cudaGetErrorString(e == cudaSuccess ? cudaErrorNoDevice : e));
  cudaDeviceProp found{};
  check(cudaGetDeviceProperties(&found, 0));
  if (found.major != 9 || found.minor != 0)
    return fmt::format(
        "{} has compute capability {}.{}, the kernels are built for 9.0 (H100, H200)", found.name,
        found.major, found.minor);
  // Freed memory stays with the process: giving it back to the driver costs more than a kernel.
  cudaMemPool_t pool{};
  uint64_t keep = UINT64_MAX;
  check(cudaDeviceGetDefaultMemPool(&pool, 0));
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
  return "";
}

const std::string& fault() {
  static const std::string text = find_fault();
  return text;
}

}  // namespace

bool is_available() { return fault().empty(); }

void require_device() {
  if (!is_available()) fail_input("device=\"cuda\": {}; use device=\"cpu\"", fault());
}

Stream stream() {
  static const Stream the_stream = [] {
    require_device();
    cudaStream_t s = nullptr;
    check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    return s;
  }();
  return the_stream;
}

void* allocate(size_t bytes) {
  void* p = nullptr;
  const cudaError_t e = cudaMallocAsync(&p, bytes ? bytes : 1, stream());
  if (e == cudaErrorMemoryAllocation) return cudaGetLastError(), nullptr;
  check(e);
  return p;
}

// Without a check: at exit the driver may be gone.
void release(void* p) { cudaFreeAsync(p, stream()); }

void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()));
  cudaPointerAttributes a{}, b{};
  check(cudaPointerGetAttributes(&a, to));
  check(cudaPointerGetAttributes(&b, from));
  if (a.type != cudaMemoryTypeDevice || b.type != cudaMemoryTypeDevice) synchronize();
}

void fill_zero(void* p, size_t bytes) { check(cudaMemsetAsync(p, 0, bytes, stream())); }

void synchronize() { check(cudaStreamSynchronize(stream())); }

#else

[[noreturn]] static void refuse() {
  fail_input(
      "device=\"cuda\": this program is built without CUDA (make build-cuda builds it with); use "
      "device=\"cpu\"");
}

bool is_available() { return false; }
void require_device() { refuse(); }
Stream stream() { refuse(); }
void* allocate(size_t) { refuse(); }
void release(void*) {}
void copy(void*, const void*, size_t) { refuse(); }
void fill_zero(void*, size_t) { refuse(); }
void synchronize() { refuse(); }

#endif

}  // namespace pith::cuda
