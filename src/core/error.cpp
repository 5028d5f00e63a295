#include "core/error.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string_view>

#include "core/op.h"

namespace pith {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
constexpr unsigned kTraceSeconds = 10;
volatile sig_atomic_t fatal_signal = 0;

void put(std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::write(STDERR_FILENO, text.data(), text.size());
    if (n <= 0) return;
    text.remove_prefix(size_t(n));
  }
}

void put_hex(uintptr_t v) {
  char digits[2 + 2 * sizeof v];
  char* p = digits + sizeof digits;
  do {
    *--p = "0123456789abcdef"[v % 16];
    v /= 16;
  } while (v != 0);
  *--p = 'x';
  *--p = '0';
  put({p, size_t(digits + sizeof digits - p)});
}

// "  pith::rms_norm(...) + 0x1a (build/pith 0x5f10)": the last pair is what addr2line -e takes.
void put_frame(void* address) {
  const char* pc = static_cast<const char*>(address) - 1;  // inside the call, not after it
  const auto put_distance = [&](const void* from) {
    put_hex(size_t(pc - static_cast<const char*>(from)));
  };
  Dl_info info{};
  put("  ");
  if (::dladdr(pc, &info) == 0 || info.dli_fname == nullptr) {
    put_distance(nullptr);
    put("\n");
    return;
  }
  if (info.dli_sname != nullptr) {
    int status = 0;
    // Never freed: the process dies.
    const char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
    put(status == 0 ? name : info.dli_sname);
    put(" + ");
    put_distance(info.dli_saddr);
    put(" ");
  }
  put("(");
  put(info.dli_fname);
  put(" ");
  put_distance(info.dli_fbase);
  put(")\n");
}

[[noreturn]] void die(int signal) {
  ::signal(signal, SIG_DFL);
  ::raise(signal);
  ::_exit(128 + signal);
}

// Demangling allocates, and the crash may hold the allocator's lock: the alarm ends what never
// comes back.
void on_alarm(int) { die(fatal_signal); }

void on_crash(int signal) {
  static std::atomic<pid_t> owner{0};
  pid_t nobody = 0;
  if (!owner.compare_exchange_strong(nobody, ::gettid())) {
    if (nobody == ::gettid()) die(signal);  // crashed while printing
    for (;;) ::pause();                     // another thread is printing and will end the process
  }
  fatal_signal = signal;
  ::signal(SIGALRM, on_alarm);
  ::alarm(kTraceSeconds);
  const char* name = ::sigabbrev_np(signal);
  put("\nfatal: SIG");
  put(name == nullptr ? "?" : name);
  const char* op = current_op_text();
  put(op[0] != '\0' ? ", running " : "");
  put(op);
  put("\n");
  std::array<void*, 64> frames{};
  const int count = ::backtrace(frames.data(), int(frames.size()));
  // Not the first two, this handler and its trampoline.
  for (int i = 2; i < count; ++i) put_frame(frames[size_t(i)]);
  die(signal);
}

}  // namespace

std::string Loc::str() const {
  const char* slash = std::strrchr(file, '/');
  return fmt::format("{}:{}", slash != nullptr ? slash + 1 : file, line);
}

void warn_once(const std::string& text) {
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard lock(mutex);
  if (printed.insert(text).second) fmt::print(stderr, "warning: {}\n", text);
}

void install_crash_handler() {
  void* first[1];
  ::backtrace(first, 1);  // loads libgcc now, while allocating is safe
  static std::array<char, 64 * 1024> memory;
  stack_t stack{};  // a stack of its own, for the crash that is a stack overflow of the main thread
  stack.ss_sp = memory.data();
  stack.ss_size = memory.size();
  ::sigaltstack(&stack, nullptr);
  struct sigaction action {};
  action.sa_handler = on_crash;
  action.sa_flags = SA_ONSTACK | SA_NODEFER;
  for (const int signal : kSignals) ::sigaction(signal, &action, nullptr);
}

}  // namespace pith
