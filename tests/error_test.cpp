// The crash handler: what a program that dies of a signal still says.

#include "core/error.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <regex>

#include "core/file.h"
#include "core/op.h"
#include "testing.h"

namespace pith {
namespace {

// stderr of a process that dies of `signal` when it runs `crash` inside an op; not EXPECT_EXIT,
// because Oniguruma has a regcomp of its own, which gtest would call.
std::string last_words(int signal, const std::function<void()>& crash) {
  const TempDir dir;
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen((dir / "err").c_str(), "w", stderr)) _exit(1);
    install_crash_handler();
    Context context;
    Tape tape(context);
    const Tensor x = Tensor::of<float>({2}, std::vector<float>{1, 2});
    Op(tape, "broken", Loc{"model.cpp", 19}, {{"x", x}}).run({}, crash);
    _exit(1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == signal) << status;
  return read_file(dir / "err");
}

TEST(CrashHandler, PrintsTheOpAndADemangledStackTrace) {
  const std::regex frame("\n  pith::Op::run\\(pith::Cost, .*\\) \\(.*pith_tests 0x[0-9a-f]+\\)\n");
  for (const int signal : {SIGSEGV, SIGABRT}) {
    const std::string text = last_words(signal, [&] { raise(signal); });
    EXPECT_EQ(text.find(std::string("\nfatal: SIG") + sigabbrev_np(signal) +
                        "\nmodel.cpp:19: broken: was running; x fp32[2] cpu\n  "),
              0u)
        << text;
    EXPECT_TRUE(std::regex_search(text, frame)) << text;
  }
}

// Deeper than any stack: every call needs its array.
int overflow(int depth) {
  volatile char used[1 << 16];
  used[0] = char(depth);
  return depth < 0 ? 0 : overflow(depth + 1) + used[0];
}

TEST(CrashHandler, PrintsAStackOverflow) {
  const std::string text = last_words(SIGSEGV, [] { overflow(0); });
  EXPECT_EQ(text.find("\nfatal: SIGSEGV\nmodel.cpp:19: broken: was running"), 0u) << text;
}

}  // namespace
}  // namespace pith
