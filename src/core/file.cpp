#include "core/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>

namespace pith {

[[noreturn]] static void fail_errno(const std::string& path) {
  fail_input("{}: {}", path, std::strerror(errno));
}

// Devices and pipes cannot be synced and say EINVAL: there is nothing to make durable then.
static void sync(int fd, const std::string& path) {
  if (::fsync(fd) != 0 && errno != EINVAL && errno != ENOTSUP) fail_errno(path);
}

Descriptor::Descriptor(const std::string& path, int flags)
    : fd(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
  if (fd < 0) fail_errno(path);
}

std::string read_file(const std::string& path) {
  const Descriptor file(path, O_RDONLY);
  std::string text;
  std::vector<char> buffer(1 << 16);
  for (;;) {  // not by fstat: pipes and /proc report 0 bytes
    const ssize_t n = ::read(file.fd, buffer.data(), buffer.size());
    if (n == 0) return text;
    if (n < 0 && errno != EINTR) fail_errno(path);
    if (n > 0) text.append(buffer.data(), size_t(n));
  }
}

void write_file_atomic(const std::string& path, std::string_view bytes) {
  const std::string temporary = path + ".tmp";
  OutputFile file(temporary);
  try {
    file.write(bytes);
    file.close();
    if (::rename(temporary.c_str(), path.c_str()) != 0) fail_errno(path);
  } catch (const InputError&) {
    ::unlink(temporary.c_str());
    throw;
  }
  fsync_directory(path.substr(0, path.rfind('/') + 1) + ".");  // npos + 1 is 0
}

MappedFile::MappedFile(const std::string& path) {
  const Descriptor file(path, O_RDONLY | O_NONBLOCK);  // opening a pipe must not wait
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
    : path_(path), file_(path, O_WRONLY | O_CREAT | (append ? O_APPEND : O_TRUNC)) {}

void OutputFile::write_at(const void* data, size_t bytes, uint64_t offset) {
  std::string_view rest(static_cast<const char*>(data), bytes);
  while (!rest.empty()) {
    const off_t at = off_t(offset + bytes - rest.size());
    const ssize_t n = offset == kHere ? ::write(file_.fd, rest.data(), rest.size())
                                      : ::pwrite(file_.fd, rest.data(), rest.size(), at);
    if (n < 0 && errno != EINTR) fail_errno(path_);
    if (n > 0) rest.remove_prefix(size_t(n));
  }
}

void OutputFile::resize(uint64_t bytes) {
  if (::ftruncate(file_.fd, off_t(bytes)) != 0) fail_errno(path_);
}

void OutputFile::flush_to_disk() { sync(file_.fd, path_); }

void OutputFile::close() {
  if (file_.fd < 0) return;
  flush_to_disk();
  if (::close(std::exchange(file_.fd, -1)) != 0) fail_errno(path_);
}

RunLock::RunLock(const std::string& out) : OutputFile(out + "/.lock", true) {
  if (::flock(file_.fd, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) fail_errno(path_);
    const std::string holder = read_file(path_);
    fail_input("{} is in use by process {}: wait for it, stop it, or choose another out", out,
               holder.empty() ? "?" : holder);
  }
  resize(0);
  write(std::to_string(::getpid()));
}

void fsync_directory(const std::string& path) {
  const Descriptor directory(path, O_RDONLY | O_DIRECTORY);
  sync(directory.fd, path);
}

}  // namespace pith
