#include "core/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "core/error.h"

namespace pith {
namespace {

[[noreturn]] void fail_errno(const std::string& path) {
  fail_input("{}: {}", path, std::strerror(errno));
}

int open_or_fail(const std::string& path, int flags) {
  const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0666);
  if (fd < 0) fail_errno(path);
  return fd;
}

// A descriptor closed at the end of the scope.
struct Descriptor {
  int fd;
  ~Descriptor() { ::close(fd); }
};

// Devices and pipes cannot be synced and say EINVAL: there is nothing to make durable then.
bool sync(int fd) { return ::fsync(fd) == 0 || errno == EINVAL || errno == ENOTSUP; }

}  // namespace

std::string read_file(const std::string& path) {
  const Descriptor file{open_or_fail(path, O_RDONLY)};
  struct stat info {};
  if (::fstat(file.fd, &info) != 0) fail_errno(path);
  // The size is only a first guess: pipes and /proc report 0. One byte more lets the read that
  // finds the end fit.
  std::string text(size_t(info.st_size) + 1, '\0');
  size_t size = 0;
  for (;;) {
    if (size == text.size()) text.resize(2 * size + 4096);
    const ssize_t n = ::read(file.fd, text.data() + size, text.size() - size);
    if (n == 0) break;
    if (n < 0 && errno != EINTR) fail_errno(path);
    if (n > 0) size += size_t(n);
  }
  text.resize(size);
  return text;
}

void write_file_atomic(const std::string& path, std::string_view bytes) {
  struct Remover {
    std::string path;
    bool armed = true;
    ~Remover() {
      if (armed) ::unlink(path.c_str());
    }
  };
  OutputFile file(path + ".tmp");
  Remover temporary{path + ".tmp"};
  file.write(bytes.data(), bytes.size());
  file.close();
  if (::rename(temporary.path.c_str(), path.c_str()) != 0) fail_errno(path);
  temporary.armed = false;
  const size_t slash = path.rfind('/');
  fsync_directory(slash == path.npos ? "." : path.substr(0, slash + 1));
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const Descriptor file{open_or_fail(path, O_RDONLY | O_NONBLOCK)};  // opening a pipe must not wait
  struct stat info {};
  if (::fstat(file.fd, &info) != 0) fail_errno(path);
  if (!S_ISREG(info.st_mode)) fail_input("{}: not a regular file", path);
  if (info.st_size == 0) return;
  void* data = ::mmap(nullptr, size_t(info.st_size), PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED) fail_errno(path);
  data_ = data;
  size_ = size_t(info.st_size);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      path_(std::move(other.path_)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(path_, other.path_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

OutputFile::OutputFile(const std::string& path, bool append)
    : path_(path), fd_(open_or_fail(path, O_WRONLY | O_CREAT | (append ? O_APPEND : O_TRUNC))) {}

OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
}

void OutputFile::write(const void* data, size_t bytes) {
  std::string_view rest(static_cast<const char*>(data), bytes);
  while (!rest.empty()) {
    const ssize_t n = ::write(fd_, rest.data(), rest.size());
    if (n < 0 && errno != EINTR) fail_errno(path_);
    rest.remove_prefix(n < 0 ? 0 : size_t(n));
  }
}

void OutputFile::write_at(const void* data, size_t bytes, uint64_t offset) {
  std::string_view rest(static_cast<const char*>(data), bytes);
  while (!rest.empty()) {
    const ssize_t n = ::pwrite(fd_, rest.data(), rest.size(), off_t(offset + bytes - rest.size()));
    if (n < 0 && errno != EINTR) fail_errno(path_);
    rest.remove_prefix(n < 0 ? 0 : size_t(n));
  }
}

void OutputFile::resize(uint64_t bytes) {
  if (::ftruncate(fd_, off_t(bytes)) != 0) fail_errno(path_);
}

void OutputFile::flush_to_disk() {
  if (!sync(fd_)) fail_errno(path_);
}

void OutputFile::close() {
  if (fd_ < 0) return;
  flush_to_disk();
  if (::close(std::exchange(fd_, -1)) != 0) fail_errno(path_);
}

void fsync_directory(const std::string& path) {
  const Descriptor directory{open_or_fail(path, O_RDONLY | O_DIRECTORY)};
  if (!sync(directory.fd)) fail_errno(path);
}

}  // namespace pith
