#include "core/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

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
void sync(int fd, const std::string& path) {
  if (::fsync(fd) != 0 && errno != EINVAL && errno != ENOTSUP) fail_errno(path);
}

}  // namespace

std::string read_file(const std::string& path) {
  const Descriptor file{open_or_fail(path, O_RDONLY)};
  std::string text;
  size_t size = 0;
  for (;;) {  // not by fstat: pipes and /proc report 0 bytes
    if (size == text.size()) text.resize(2 * size + 65536);
    const ssize_t n = ::read(file.fd, text.data() + size, text.size() - size);
    if (n == 0) break;
    if (n < 0 && errno != EINTR) fail_errno(path);
    if (n > 0) size += size_t(n);
  }
  text.resize(size);
  return text;
}

void write_file_atomic(const std::string& path, std::string_view bytes) {
  const std::string temporary = path + ".tmp";
  OutputFile file(temporary);
  try {
    file.write(bytes.data(), bytes.size());
    file.close();
    if (::rename(temporary.c_str(), path.c_str()) != 0) fail_errno(path);
  } catch (const InputError&) {
    ::unlink(temporary.c_str());
    throw;
  }
  const size_t slash = path.rfind('/');
  fsync_directory(slash == path.npos ? "." : path.substr(0, slash + 1));
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const Descriptor file{open_or_fail(path, O_RDONLY | O_NONBLOCK)};  // opening a pipe must not wait
  struct stat info {};
  if (::fstat(file.fd, &info) != 0) fail_errno(path);
  if (!S_ISREG(info.st_mode)) fail_input("{}: not a regular file", path);
  size_ = size_t(info.st_size);
  if (size_ == 0) return;
  void* data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED) fail_errno(path);
  data_ = {static_cast<const std::byte*>(data), [data, n = size_](auto) { ::munmap(data, n); }};
}

OutputFile::OutputFile(const std::string& path, bool append)
    : path_(path), fd_(open_or_fail(path, O_WRONLY | O_CREAT | (append ? O_APPEND : O_TRUNC))) {}

OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
}

void OutputFile::write_at(const void* data, size_t bytes, uint64_t offset) {
  std::string_view rest(static_cast<const char*>(data), bytes);
  while (!rest.empty()) {
    const off_t at = off_t(offset + bytes - rest.size());
    const ssize_t n = offset == kHere ? ::write(fd_, rest.data(), rest.size())
                                      : ::pwrite(fd_, rest.data(), rest.size(), at);
    if (n < 0 && errno != EINTR) fail_errno(path_);
    if (n > 0) rest.remove_prefix(size_t(n));
  }
}

void OutputFile::resize(uint64_t bytes) {
  if (::ftruncate(fd_, off_t(bytes)) != 0) fail_errno(path_);
}

void OutputFile::flush_to_disk() { sync(fd_, path_); }

void OutputFile::close() {
  if (fd_ < 0) return;
  flush_to_disk();
  if (::close(std::exchange(fd_, -1)) != 0) fail_errno(path_);
}

RunLock::RunLock(const std::string& out) : OutputFile(out + "/.lock", true) {
  if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) fail_errno(path_);
    const std::string holder = read_file(path_);
    fail_input("{} is in use by process {}: wait for it, stop it, or choose another out", out,
               holder.empty() ? "?" : holder);
  }
  resize(0);
  const std::string pid = std::to_string(::getpid());
  write(pid.data(), pid.size());
}

void fsync_directory(const std::string& path) {
  const Descriptor directory{open_or_fail(path, O_RDONLY | O_DIRECTORY)};
  sync(directory.fd, path);
}

}  // namespace pith
