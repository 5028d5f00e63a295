#pragma once
// Errors: two kinds, both one line for the user. InputError is something the caller can mend (a
// file, a key, a value: exit code 2); Error is everything else (exit code 1). main() holds the only
// catch. Nearly every file includes this one, so it also brings the standard headers that nearly
// every file uses: what is listed here is not included again elsewhere.

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pith {

// The caller's source line. Every op takes `Loc at = Loc::current()` last, so that a failure in
// forward or in backward is reported at the line of the model file that called the op; composite
// ops pass `at` on.
struct Loc {
  const char* file = "?";
  int line = 0;
  static constexpr Loc current(const char* f = __builtin_FILE(), int l = __builtin_LINE()) {
    return {f, l};
  }
  std::string str() const;  // "qwen3_moe.cpp:142" (the file without its directories)
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct InputError : Error {
  using Error::Error;
};

// fail("what {} ...", value): throws Error / InputError with the formatted message.
template <class... A> [[noreturn]] void fail(fmt::format_string<A...> f, A&&... a) {
  throw Error(fmt::format(f, std::forward<A>(a)...));
}
template <class... A> [[noreturn]] void fail_input(fmt::format_string<A...> f, A&&... a) {
  throw InputError(fmt::format(f, std::forward<A>(a)...));
}

// Prints text for the user to `stream`, and appends it to the log of the run once that is open.
void say(std::FILE* stream, const std::string& text);
void open_log(const std::string& path);  // InputError when it cannot be opened

// One line on stderr, "warning: ..."; the same text is printed once per process.
void warn_once(const std::string& text);

// On SIGSEGV, SIGBUS, SIGFPE, SIGILL and SIGABRT: prints the op that was running (see Op) and a
// stack trace to stderr, a line per frame with its function and, for `addr2line -e FILE OFFSET`,
// file and offset; then dies of the same signal (of SIGALRM, should printing hang). A stack
// overflow prints in the thread that called this. The trace of an Error is not printed: its message
// names the line.
void install_crash_handler();

}  // namespace pith
