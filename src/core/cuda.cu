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

// to[i] = from[i], or += with kAdd, in fp32.
template <bool kAdd, class To, class From>
static bool move_elements(void* to, const void* from, int64_t n) {
  each(n, stream(),
       [to = static_cast<To*>(to), from = static_cast<const From*>(from)] __device__(int64_t i) {
         to[i] = To((kAdd ? float(to[i]) : 0.0f) + float(from[i]));
       });
  return true;
}

bool convert(void* to, DType to_type, const void* from, DType from_type, int64_t n) {
  if (to_type == DType::bf16 && from_type == DType::f32)
    return move_elements<false, Bf16, float>(to, from, n);
  if (to_type == DType::f32 && from_type == DType::bf16)
    return move_elements<false, float, Bf16>(to, from, n);
  return false;
}

bool add(void* to, const void* from, DType type, int64_t n) {
  if (type == DType::bf16) return move_elements<true, Bf16, Bf16>(to, from, n);
  if (type == DType::f32) return move_elements<true, float, float>(to, from, n);
  return false;
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
