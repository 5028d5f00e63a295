#pragma once
#include <string>

namespace pith {

// Holds a run directory for this process, through flock on OUT/.lock, which the kernel releases
// when the process ends however it ends. InputError naming the holder's process id when another
// process has it.
class RunLock {
 public:
  explicit RunLock(const std::string& out);  // `out` must exist
  RunLock(const RunLock&) = delete;
  ~RunLock();

 private:
  int fd_ = -1;
};

}  // namespace pith
