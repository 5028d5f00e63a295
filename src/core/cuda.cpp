#include "core/cuda.h"

#include <dlfcn.h>
#include <glob.h>
#include <unistd.h>

#include <sstream>

#include "core/error.h"

namespace pith::cuda {

#ifndef PITH_CUDA

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
bool convert(void*, DType, const void*, DType, int64_t, bool) { refuse(); }
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
