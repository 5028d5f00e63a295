#include "core/error.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

#include "core/op.h"

namespace pith {

static std::FILE* log_file = nullptr;  // of say()

// "  pith::Op::run(...) (build/pith 0x5f10)": the last two are what addr2line -e takes.
static void print_frame(void* frame) {
  const char* pc = static_cast<const char*>(frame) - 1;  // inside the call, not after it
  Dl_info at{};
  ::dladdr(pc, &at);
  const char* name = abi::__cxa_demangle(at.dli_sname, nullptr, nullptr, nullptr);
  if (name == nullptr) name = at.dli_sname;  // of C, or nothing in a static function
  ::dprintf(STDERR_FILENO, "  %s (%s %#tx)\n", name ? name : "?", at.dli_fname,
            pc - static_cast<const char*>(at.dli_fbase));
}

static void on_crash(int signal) {
  // The thread that prints, or its alarm, ends the process: the op's text and the names of the
  // frames allocate, and the crash may hold the allocator's lock.
  static std::atomic_flag printing;
  while (printing.test_and_set()) ::pause();
  ::alarm(10);
  ::dprintf(STDERR_FILENO, "\nfatal: SIG%s\n%s\n", ::sigabbrev_np(signal), current_op_text());
  void* frames[64];
  const int count = ::backtrace(frames, std::size(frames));
  // Not the first two, this handler and its trampoline.
  for (int i = 2; i < count; ++i) print_frame(frames[i]);
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
  ::backtrace(first, 1);       // loads libgcc now, while allocating is safe
  static char stack[1 << 18];  // for the handler, so that a stack overflow prints too
  const stack_t other{.ss_sp = stack, .ss_size = sizeof stack};
  ::sigaltstack(&other, nullptr);
  struct sigaction action {};
  action.sa_handler = on_crash;
  action.sa_flags = SA_ONSTACK;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT})
    ::sigaction(signal, &action, nullptr);
}

}  // namespace pith
