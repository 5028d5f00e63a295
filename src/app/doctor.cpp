// pith doctor: what this machine has, and what is missing.

#include <dlfcn.h>
#include <omp.h>

#include "app/commands.h"

extern "C" int openblas_get_parallel(void);  // declared in a header of OpenBLAS's own directory

namespace pith {

static void print_row(const std::string& name, const std::string& value) {
  fmt::print("  {:<14} {}\n", name, value);
}

// What follows the colon in the first line of `path` that begins with `name`; "" if there is none.
static std::string field(const std::string& path, const std::string& name) {
  const std::string text = "\n" + read_file(path);
  const size_t at = text.find("\n" + name);
  if (at == text.npos) return "";
  const size_t begin = text.find_first_not_of(": \t", text.find(':', at));
  return text.substr(begin, text.find('\n', begin) - begin);
}

static bool has_flag(const std::string& flag) {
  return (field("/proc/cpuinfo", "flags") + " ").find(" " + flag + " ") != std::string::npos;
}

// Where the library in use is whose file name begins with `name`; the full name has the version.
static std::string place_of(const std::string& name) {
  const std::string maps = read_file("/proc/self/maps");
  const size_t at = maps.find("/" + name), begin = maps.rfind(' ', at) + 1;
  return at == maps.npos ? "linked statically" : maps.substr(begin, maps.find('\n', at) - begin);
}

// Where a run would find it too.
static bool is_found(const char* library) {
  try {
    return cuda::load_library(library) != nullptr;
  } catch (const Error&) {
    return false;
  }
}

// For GPUs and for several processes: name, file, package.
constexpr const char* kOptional[][3] = {
    {"CUDA driver", "libcuda.so.1", "nvidia-driver"},
    {"cuBLASLt", "libcublasLt.so.13", "libcublas-13-0"},
    {"cuDNN", "libcudnn.so.9", "libcudnn9-cuda-13"},
    {"NCCL", "libnccl.so.2", "libnccl2"},
    {"CUPTI", "libcupti.so.13", "cuda-cupti-13-0"},
    {"MPI", "libmpi.so.40", "libopenmpi-dev openmpi-bin"},
};

int run_doctor() {
  fmt::print("machine\n");
  print_row("CPU", field("/proc/cpuinfo", "model name"));
  for (const char* flag : {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    print_row(flag, has_flag(flag) ? "yes" : "no");
  print_row("cores", fmt::format("{} of {} usable, {} OpenMP threads", omp_get_num_procs(),
                                 ::sysconf(_SC_NPROCESSORS_ONLN), omp_get_max_threads()));
  print_row("memory", field("/proc/meminfo", "MemTotal") + ", available " +
                          field("/proc/meminfo", "MemAvailable"));
  fmt::print("\nlibraries in use\n");
  for (const char* name : {"libdnnl", "libopenblas", "libgomp", "libonig", "libutf8proc", "libzstd",
                           "libz.", "libarchive", "libfmt"})
    print_row(name, place_of(name));
  fmt::print(
      "\noptional: GPU (nvidia-driver is in Debian non-free, the rest in NVIDIA's apt "
      "repository) and several processes\n");
  const bool driver = ::access("/dev/nvidiactl", F_OK) == 0;
  print_row("NVIDIA GPU", cuda::is_available() ? "usable"
                          : !driver            ? "none with a driver"
                          : cuda::kBuilt       ? "not one that this program runs on"
                                               : "with a driver; make build-cuda makes use of it");
  for (const auto& [name, file, package] : kOptional)
    print_row(name, is_found(file) ? place_of(std::string(file, std::strstr(file, ".so")))
                                   : fmt::format("missing: apt-get install {}", package));

  // A library that is linked and missing keeps the program from starting; the rest is checked here.
  const char* verdict = "ready: the CPU path is complete";
  if (!has_flag("avx2") || !has_flag("fma"))
    verdict = "not ready: the CPU lacks AVX2 or FMA, for which this program is compiled";
  else if (openblas_get_parallel() != 2)  // OpenMP
    verdict =
        "not ready: this OpenBLAS runs threads of its own beside OpenMP's: apt-get install "
        "libopenblas-openmp-dev";
  fmt::print("\n{}\n", verdict);
  return verdict[0] == 'r' ? 0 : 1;
}

}  // namespace pith
