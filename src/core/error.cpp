#include "core/error.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <mutex>
#include <set>

#include "core/op.h"

namespace pith {
namespace {

constexpr unsigned kTraceSeconds = 10;
std::FILE* log_file = nullptr;  // of say()

// "  pith::rms_norm(...) + 0x1a (build/pith 0x5f10)": the last pair is what addr2line -e takes.
void print_frame(void* address) {
  const char* pc = static_cast<const char*>(address) - 1;  // inside the call, not after it
  const auto after = [&](const void* from) { return size_t(pc - static_cast<const char*>(from)); };
  Dl_info at{};
  ::dladdr(pc, &at);
  int status = -1;
  // Never freed: the process dies.
  const char* name = abi::__cxa_demangle(at.dli_sname, nullptr, nullptr, &status);
  if (status != 0) name = at.dli_sname;
  ::dprintf(STDERR_FILENO, "  %s + %#zx (%s %#zx)\n", name ? name : "?", after(at.dli_saddr),
            at.dli_fname ? at.dli_fname : "?", after(at.dli_fbase));
}

void on_crash(int signal) {
  // The thread that prints, or its alarm, ends the process: demangling allocates, and the crash may
  // hold the allocator's lock.
  static std::atomic_flag printing;
  while (printing.test_and_set()) ::pause();
  ::alarm(kTraceSeconds);
  const char* op = current_op_text();
  ::dprintf(STDERR_FILENO, "\nfatal: SIG%s%s%s\n", ::sigabbrev_np(signal),
            op[0] != '\0' ? ", running " : "", op);
  std::array<void*, 64> frames{};
  const int count = ::backtrace(frames.data(), int(frames.size()));
  // Not the first two, this handler and its trampoline.
  for (int i = 2; i < count; ++i) print_frame(frames[size_t(i)]);
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

}  // namespace

std::string Loc::str() const {
  const char* slash = std::strrchr(file, '/');
  return fmt::format("{}:{}", slash != nullptr ? slash + 1 : file, line);
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
  static std::array<char, 64 * 1024> memory;
  // A stack of its own, for the crash that is a stack overflow of the main thread.
  const stack_t stack{.ss_sp = memory.data(), .ss_size = memory.size()};
  ::sigaltstack(&stack, nullptr);
  struct sigaction action {};
  action.sa_handler = on_crash;
  action.sa_flags = SA_ONSTACK | SA_NODEFER;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT})
    ::sigaction(signal, &action, nullptr);
}

}  // namespace pith
