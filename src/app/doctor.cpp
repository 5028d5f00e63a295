#include <dlfcn.h>
#include <link.h>
#include <omp.h>
#include <sched.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <string>

#include "app/commands.h"
#include "core/error.h"
#include "core/file.h"

extern "C" int openblas_get_parallel(void);  // declared in a header of OpenBLAS's own directory

namespace pith {
namespace {

constexpr double kGib = 1024.0 * 1024.0 * 1024.0;

void print_row(const std::string& name, const std::string& value) {
  fmt::print("  {:<14} {}\n", name, value);
}

// What follows the colon in the first line of `path` that begins with `name`; "" if there is none.
std::string field(const std::string& path, const std::string& name) {
  if (::access(path.c_str(), R_OK) != 0) return "";
  std::istringstream text(read_file(path));
  for (std::string line; std::getline(text, line);) {
    if (!line.starts_with(name)) continue;
    const size_t begin = line.find_first_not_of(" \t", line.find(':') + 1);
    if (begin != line.npos) return line.substr(begin);
  }
  return "";
}

bool has_flag(const std::string& flag) {
  static const std::string flags = " " + field("/proc/cpuinfo", "flags") + " ";
  return flags.find(" " + flag + " ") != flags.npos;
}

void print_machine() {
  fmt::print("machine\n");
  print_row("CPU", field("/proc/cpuinfo", "model name"));
  for (const char* flag : {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}) {
    print_row(flag, has_flag(flag) ? "yes" : "no");
  }
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  ::sched_getaffinity(0, sizeof allowed, &allowed);
  print_row("cores", fmt::format("{} of {} usable, {} OpenMP threads", CPU_COUNT(&allowed),
                                 ::sysconf(_SC_NPROCESSORS_ONLN), omp_get_max_threads()));
  const auto gib = [](const char* name) {
    return std::atof(field("/proc/meminfo", name).c_str()) * 1024 / kGib;
  };
  print_row("memory",
            fmt::format("{:.1f} GiB, {:.1f} available", gib("MemTotal"), gib("MemAvailable")));
  struct statvfs disk {};
  ::statvfs(".", &disk);
  const double free_bytes = double(disk.f_bavail) * double(disk.f_frsize);
  print_row("disk", fmt::format("{:.1f} GiB free in this directory", free_bytes / kGib));
}

// The file of the loaded library whose name begins with `name`; its full name has the version.
std::string loaded_from(const std::string& name) {
  std::string found = "/" + name;
  const auto visit = [](dl_phdr_info* info, size_t, void* data) {
    auto& text = *static_cast<std::string*>(data);
    const std::string path = info->dlpi_name;
    if (path.find(text) == path.npos) return 0;
    text = std::filesystem::canonical(path);
    return 1;
  };
  return ::dl_iterate_phdr(visit, &found) ? found : "linked statically";
}

// NVIDIA display and 3D controllers on the PCI bus, with or without a driver.
int count_gpus() {
  int count = 0;
  std::error_code none;
  for (const auto& device : std::filesystem::directory_iterator("/sys/bus/pci/devices", none)) {
    const std::string path = device.path();
    count +=
        field(path + "/vendor", "") == "0x10de" && field(path + "/class", "").starts_with("0x03");
  }
  return count;
}

// Where a shared library or a program is; "" if it is nowhere.
std::string locate(const std::string& file) {
  if (file.find(".so") != file.npos) {
    void* library = ::dlopen(file.c_str(), RTLD_LAZY | RTLD_LOCAL);
    const link_map* map = nullptr;
    if (library == nullptr || ::dlinfo(library, RTLD_DI_LINKMAP, &map) != 0) return "";
    return std::filesystem::canonical(map->l_name);
  }
  const char* path = std::getenv("PATH");
  std::istringstream directories(path ? path : "/usr/bin");
  for (std::string directory; std::getline(directories, directory, ':');) {
    std::string program = directory + "/" + file;
    if (::access(program.c_str(), X_OK) == 0) return program;
  }
  return "";
}

struct Wanted {
  const char *name, *file, *package;
};
constexpr Wanted kOptional[] = {
    {"CUDA driver", "libcuda.so.1", "nvidia-driver"},
    {"CUDA run time", "libcudart.so.13", "cuda-cudart-13-0"},
    {"cuBLASLt", "libcublasLt.so.13", "libcublas-13-0"},
    {"cuDNN", "libcudnn.so.9", "libcudnn9-cuda-13"},
    {"NCCL", "libnccl.so.2", "libnccl2"},
    {"CUPTI", "libcupti.so.13", "cuda-cupti-13-0"},
    {"MPI", "libmpi.so.40", "libopenmpi-dev openmpi-bin"},
};
constexpr Wanted kTools[] = {
    {"compiler", "g++", "g++"},
    {"cmake", "cmake", "cmake"},
    {"ninja", "ninja", "ninja-build"},
    {"ccache", "ccache", "ccache"},
    {"mold", "mold", "mold"},
    {"git", "git", "git"},
    {"pkg-config", "pkg-config", "pkg-config"},
};

void print_wanted(const Wanted& item) {
  const std::string place = locate(item.file);
  print_row(item.name,
            place.empty() ? fmt::format("missing: apt-get install {}", item.package) : place);
}

}  // namespace

int run_doctor() {
  print_machine();
  fmt::print("\nlibraries in use\n");
  for (const char* name : {"libdnnl", "libopenblas", "libgomp", "libpcre2-8", "libutf8proc",
                           "libzstd", "libz.", "libfmt"}) {
    print_row(name, loaded_from(name));
  }
  const int gpus = count_gpus();
  fmt::print(
      "\noptional: GPU (nvidia-driver is in Debian non-free, the rest in NVIDIA's apt "
      "repository) and several processes\n");
  print_row("NVIDIA GPU", gpus == 0 ? "none" : fmt::format("{} on the PCI bus", gpus));
  for (const Wanted& item : kOptional) print_wanted(item);
  fmt::print("\ntools for building\n");
  for (const Wanted& item : kTools) print_wanted(item);

  // A library that is linked and missing keeps the program from starting; the rest is checked here.
  std::string problems;
  if (!has_flag("avx2") || !has_flag("fma")) {
    problems += "problem: the CPU lacks AVX2 or FMA, for which this program is compiled\n";
  }
  constexpr int kOpenMp = 2;
  if (openblas_get_parallel() != kOpenMp) {
    problems +=
        "problem: this OpenBLAS runs threads of its own beside OpenMP's: "
        "apt-get install libopenblas-openmp-dev\n";
  }
  fmt::print("\n{}{}\n", problems,
             problems.empty() ? "ready: the CPU path is complete" : "not ready");
  return problems.empty() ? 0 : 1;
}

}  // namespace pith
