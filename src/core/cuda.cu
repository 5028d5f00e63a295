#include "core/cuda_helpers.cuh"
#include "core/rng.h"

namespace pith::cuda {

// What keeps the first GPU from being used; empty if nothing does.
static std::string find_fault() {
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

static const std::string& fault() {
  static const std::string text = find_fault();
  return text;
}

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
  cudaPointerAttributes target{};
  check(cudaPointerGetAttributes(&target, to));
  if (target.type != cudaMemoryTypeDevice) synchronize();
}

void fill_zero(void* p, size_t bytes) { check(cudaMemsetAsync(p, 0, bytes, stream())); }

void synchronize() { check(cudaStreamSynchronize(stream())); }

template <class To, class From> static void convert(To* to, const From* from, int64_t n, bool add) {
  each(n, stream(),
       [=] __device__(int64_t i) { to[i] = To((add ? float(to[i]) : 0.0f) + float(from[i])); });
}

bool convert(void* to, DType to_type, const void* from, DType from_type, int64_t n, bool add) {
  for (const DType t : {to_type, from_type})
    if (t != DType::f32 && t != DType::bf16) return false;
  by_float_on_device(to_type, [&]<class To>(To) {
    by_float_on_device(from_type, [&]<class From>(From) {
      convert(static_cast<To*>(to), static_cast<const From*>(from), n, add);
    });
  });
  return true;
}

void join_master(Tensor& wide, const Tensor& value, const Tensor& rest) {
  each(wide.numel(), stream(),
       [to = wide.data<float>(), high = value.data<bf16>(), low = rest.data<uint16_t>()] __device__(
           int64_t i) { to[i] = pith::join_master(high[i].bits, low[i]); });
}

void split_master(const Tensor& wide, const Tensor& value, Tensor& rest) {
  each(
      wide.numel(), stream(),
      [from = wide.data<float>(), high = value.data<bf16>(), to = rest.data<uint16_t>()] __device__(
          int64_t i) { to[i] = rest_of_master(from[i], high[i].bits); });
}

void fill_normal(Tensor& dst, uint64_t key, uint64_t first, double std) {
  each(dst.numel(), stream(),
       [to = dst.data<float>(), key, first, s = float(std)] __device__(int64_t i) {
         to[i] = s * normal(key, first + uint64_t(i));
       });
}

}  // namespace pith::cuda
