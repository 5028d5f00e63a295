#pragma once
// What several tests share.

#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace pith {

// The directory of golden vectors: $PITH_GOLDEN, else ../shared/golden beside the repository. A test
// that asks for it where there is none is skipped.
std::string golden_dir();

// The message of the InputError that f throws; "(no InputError)" if it throws none.
std::string error_of(const std::function<void()>& f);

// A fresh empty directory under the test's temporary directory, removed at exit of the scope.
struct TempDir {
  std::string path;
  TempDir();
  ~TempDir();
  std::string operator/(const std::string& name) const { return path + "/" + name; }
};

// The real program, run to its end.
struct Outcome {
  int code = -1;  // exit code; 128 + signal if a signal ended it
  std::string out, err;
};
Outcome run_pith(const std::string& arguments);

// A run directory's worth of input: a small Qwen3-MoE config.json, corpora and a run file that
// trains on them in under a second. `overrides` go on the command line.
struct TinyRun {
  TempDir dir;
  TinyRun();
  std::string arguments(const std::string& out,
                        const std::string& overrides = "") const;  // "train RUN.toml out=..."
  Outcome train(const std::string& out, const std::string& overrides = "") const;
  std::string path(const std::string& out) const { return dir / out; }
  // metrics.jsonl, one map of key to text per step, without times and memory.
  std::vector<std::map<std::string, std::string>> metrics(const std::string& out) const;
  std::vector<double> series(const std::string& out, const std::string& key) const;
};

}  // namespace pith
