#include "core/cuda.h"

#include <dlfcn.h>
#include <glob.h>
#include <unistd.h>

#include <sstream>
#include <vector>

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
  cudaPointerAttributes target{};
  check(cudaPointerGetAttributes(&target, to));
  if (target.type != cudaMemoryTypeDevice) synchronize();
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
bool convert(void*, DType, const void*, DType, int64_t) { refuse(); }
bool add(void*, const void*, DType, int64_t) { refuse(); }
void join_master(Tensor&, const Tensor&, const Tensor&) { refuse(); }
void split_master(const Tensor&, const Tensor&, Tensor&) { refuse(); }
void fill_normal(Tensor&, uint64_t, uint64_t, double) { refuse(); }
void start_timeline() { refuse(); }
void begin_tag(uint64_t, const char*) { refuse(); }
void end_tag() { refuse(); }
void enter_range(const std::string&) { refuse(); }
Timeline stop_timeline() { refuse(); }
void synchronize() { refuse(); }

#endif

void* load_library(const std::string& name) {
  std::vector<std::string> places = {name};
  const auto look_in = [&](const std::string& pattern) {
    glob_t found{};
    if (::glob((pattern + "/" + name).c_str(), 0, nullptr, &found) == 0)
      places.insert(places.end(), found.gl_pathv, found.gl_pathv + found.gl_pathc);
    ::globfree(&found);
  };
  if (const char* home = std::getenv("CUDA_HOME")) look_in(std::string(home) + "/lib64");
  look_in("/usr/local/cuda/lib64");
  const char* path = std::getenv("PATH");
  std::istringstream directories(path ? path : "");
  for (std::string directory; std::getline(directories, directory, ':');)
    if (::access((directory + "/python3").c_str(), X_OK) == 0)
      look_in(directory + "/../lib/python3*/site-packages/nvidia/*/lib");
  for (const std::string& place : places)
    if (void* library = ::dlopen(place.c_str(), RTLD_NOW | RTLD_GLOBAL)) return library;
  fail_input(
      "{} was not found by the loader, in $CUDA_HOME/lib64, /usr/local/cuda/lib64 or the nvidia "
      "packages of a python3 on $PATH: install it, or add its directory to LD_LIBRARY_PATH",
      name);
}

void* find_function(void* library, const char* name) {
  void* f = ::dlsym(library, name);
  if (!f) fail("{}", ::dlerror());
  return f;
}

}  // namespace pith::cuda
