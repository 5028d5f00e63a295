#include "engine/lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"
#include "core/file.h"

namespace pith {

RunLock::RunLock(const std::string& out) {
  const std::string path = out + "/.lock";
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd_ < 0) fail_input("{}: {}", path, std::strerror(errno));
  if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    ::close(fd_);
    if (error != EWOULDBLOCK) fail_input("{}: cannot be locked: {}", path, std::strerror(error));
    const std::string holder = read_file(path);
    fail_input("{} is in use by process {}: wait for it, stop it, or choose another out", out,
               holder.empty() ? "?" : holder);
  }
  const std::string pid = std::to_string(::getpid());
  if (::ftruncate(fd_, 0) != 0 || ::pwrite(fd_, pid.data(), pid.size(), 0) != ssize_t(pid.size())) {
    const int error = errno;
    ::close(fd_);
    fail_input("{}: {}", path, std::strerror(error));
  }
}

RunLock::~RunLock() { ::close(fd_); }

}  // namespace pith
