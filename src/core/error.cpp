#include "core/error.h"

#include <execinfo.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

#include "core/op.h"

namespace pith {

static std::FILE* log_file = nullptr;  // of say()

static void on_crash(int signal) {
  // The thread that prints, or its alarm, ends the process: the op's text allocates, and the crash
  // may hold the allocator's lock.
  static std::atomic_flag printing;
  while (printing.test_and_set()) ::pause();
  ::alarm(10);
  ::dprintf(STDERR_FILENO, "\nfatal: SIG%s\n%s\n", ::sigabbrev_np(signal), current_op_text());
  void* frames[64];
  const int count = ::backtrace(frames, std::size(frames));
  // Not the first two, this handler and its trampoline.
  ::backtrace_symbols_fd(frames + 2, count - 2, STDERR_FILENO);
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

std::string Loc::str() const {
  const std::string_view path = file;
  return fmt::format("{}:{}", path.substr(path.rfind('/') + 1), line);  // npos + 1 is 0
}

void say(std::FILE* stream, const std::string& text) {
  for (std::FILE* file : {stream, log_file}) {
    if (file == nullptr) continue;
    std::fputs(text.c_str(), file);
    std::fflush(file);  // a run that is killed has said what it said
  }
}

void open_log(const std::string& path) {
  log_file = std::fopen(path.c_str(), "ae");
  if (log_file == nullptr) fail_input("{}: {}", path, std::strerror(errno));
}

void warn_once(const std::string& text) {
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard lock(mutex);
  if (printed.insert(text).second) say(stderr, "warning: " + text + "\n");
}

void install_crash_handler() {
  void* first[1];
  ::backtrace(first, 1);  // loads libgcc now, while allocating is safe
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) ::signal(signal, on_crash);
}

}  // namespace pith
