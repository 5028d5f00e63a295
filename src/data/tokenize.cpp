#include "data/tokenize.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "core/error.h"
#include "core/file.h"
#include "core/value.h"
#include "data/corpus.h"
#include "data/sources.h"
#include "data/tokenizer.h"

namespace pith {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The encoded documents of one chunk.
struct Batch {
  std::vector<int32_t> ids;      // of all documents, end-of-text included
  std::vector<size_t> ends;      // of each document in ids
  int64_t bytes = 0, disk_bytes = 0;
  Position after;
  std::exception_ptr error;
};

class ChunkEncoder {
 public:
  ChunkEncoder(const TokenizeOptions& options, const Tokenizer& tokenizer,
               const std::vector<Source>& sources)
      : options_(options), sources_(sources), encoder_(tokenizer), eos_(tokenizer.eos_id()) {}

  void encode(const Chunk& chunk, Batch& batch) {
    batch.after = chunk.after;
    batch.disk_bytes = chunk.disk_bytes;
    for (size_t i = chunk.begin; i < chunk.end; ++i) document(read_file(sources_[i].path), batch);
    if (chunk.whole) document(chunk.lines, batch);
    else if (!chunk.lines.empty()) lines(chunk, batch);
  }

 private:
  void lines(const Chunk& chunk, Batch& batch) {
    const std::string& path = sources_[chunk.begin].path;
    std::string_view rest = chunk.lines;
    for (int64_t number = chunk.first_line; !rest.empty(); ++number) {
      const std::string_view line = rest.substr(0, rest.find('\n'));
      rest.remove_prefix(std::min(line.size() + 1, rest.size()));
      if (line.find_first_not_of(" \t\r") == line.npos) continue;
      const Value json = parse_json(line, fmt::format("{}:{}", path, number));
      document(json.at(options_.text_key).as_string(), batch);
    }
  }

  void document(std::string_view text, Batch& batch) {
    const size_t before = batch.ids.size();
    encoder_.encode(text, batch.ids);
    if (batch.ids.size() == before) return;
    if (options_.eos) batch.ids.push_back(*eos_);
    batch.ends.push_back(batch.ids.size());
    batch.bytes += int64_t(text.size());
  }

  const TokenizeOptions& options_;
  const std::vector<Source>& sources_;
  Encoder encoder_;
  std::optional<int32_t> eos_;
};

// Threads that read and encode chunks; pop() hands the batches out in order. A reader or an encoder that throws does
// so out of the pop() whose turn it is.
class Workers {
 public:
  Workers(int count, const TokenizeOptions& options, const Tokenizer& tokenizer,
          const std::vector<Source>& sources, Position start)
      : reader_(sources, start), window_(4 * count) {
    for (int i = 0; i < count; ++i)
      threads_.emplace_back([&, this] { work(ChunkEncoder(options, tokenizer, sources)); });
  }
  ~Workers() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  bool pop(Batch& batch) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ready_.count(popped_) || popped_ == end_; });
    if (popped_ == end_) return false;
    batch = std::move(ready_.extract(popped_++).mapped());
    lock.unlock();
    changed_.notify_all();
    if (batch.error) std::rethrow_exception(batch.error);
    return true;
  }

 private:
  void work(ChunkEncoder encoder) {
    for (;;) {
      Chunk chunk;
      Batch batch;
      int64_t number;
      {
        const std::lock_guard reading(reader_mutex_);  // chunks are numbered as they are read
        {
          std::unique_lock lock(mutex_);
          changed_.wait(lock, [&] { return stop_ || end_ >= 0 || read_ < popped_ + window_; });
          if (stop_ || end_ >= 0) return;
        }
        number = read_++;
        bool more = true;
        try {
          more = reader_.next(chunk);
        } catch (...) {
          batch.error = std::current_exception();
        }
        const std::lock_guard lock(mutex_);
        if (!more) end_ = number;
        else if (batch.error) end_ = number + 1;
      }
      changed_.notify_all();
      if (end_at(number)) return;
      try {
        if (!batch.error) encoder.encode(chunk, batch);
      } catch (...) {
        batch.error = std::current_exception();
      }
      {
        const std::lock_guard lock(mutex_);
        ready_.emplace(number, std::move(batch));
      }
      changed_.notify_all();
    }
  }
  bool end_at(int64_t number) {
    const std::lock_guard lock(mutex_);
    return end_ == number;
  }

  std::mutex reader_mutex_, mutex_;
  std::condition_variable changed_;
  ChunkReader reader_;                // reader_mutex_, as is read_
  int64_t read_ = 0;
  int64_t popped_ = 0, end_ = -1;     // mutex_, and all below; end_: the number of chunks, once known
  bool stop_ = false;
  std::map<int64_t, Batch> ready_;
  const int64_t window_;              // chunks read ahead of pop()
  std::vector<std::thread> threads_;
};

// FNV-1a over everything that decides the output.
std::string fingerprint(const TokenizeOptions& o, const Tokenizer& tokenizer,
                        const std::vector<Source>& sources) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&](std::string_view text) {
    for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    hash = (hash ^ 0x100) * 0x100000001b3u;
  };
  mix("1");
  mix(read_file(tokenizer.file()));
  mix(o.text_key);
  mix(std::to_string(o.eos ? *tokenizer.eos_id() : -1));
  for (const Source& s : sources) {
    if (s.kind == Source::Kind::standard_input) return "";  // nobody can say that it is the same again
    mix(s.path);
    mix(fmt::format("{} {}", s.bytes, s.time));
  }
  return fmt::format("{:016x}", hash);
}

// PREFIX.tokenize.partial: the fingerprint, then a line for every point from which the work can go on.
// Locked while it is open.
class Journal {
 public:
  struct Entry {
    Position at;
    int64_t documents = 0, tokens = 0, bytes = 0;
  };
  explicit Journal(const std::string& prefix) : path_(prefix + ".tokenize.partial"), file_(path_, true) {
    lock_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (lock_ < 0 || ::flock(lock_, LOCK_EX | LOCK_NB) != 0)
      fail_input("{} is being written by another process", prefix);
  }
  ~Journal() { ::close(lock_); }

  // The last entry of a run with this fingerprint; else the beginning, and says so if there was another run.
  Entry open(const std::string& fingerprint, const std::string& prefix, int64_t vocab_size) {
    const std::string text = read_file(path_), header = "pith tokenize " + fingerprint + "\n";
    const bool same = !fingerprint.empty() && text.starts_with(header);
    const size_t end = text.rfind('\n'), begin = same ? text.rfind('\n', end - 1) + 1 : 0;
    Entry e;
    if (same &&
        std::sscanf(text.c_str() + begin, "%ld %ld %ld %ld %ld %ld", &e.at.source, &e.at.offset,
                    &e.at.line, &e.documents, &e.tokens, &e.bytes) == 6 &&
        CorpusWriter::can_continue(prefix, vocab_size, e.documents, e.tokens)) {
      fmt::print(stderr, "{}: continuing after {} documents\n", prefix, e.documents);
      file_.resize(end + 1);
      return e;
    }
    if (!text.empty() && !same)
      fmt::print(stderr, "{}: an unfinished run had other inputs or options; starting again\n", prefix);
    file_.resize(0);
    file_.write(header.data(), header.size());
    return {};
  }
  void add(const Entry& e) {
    const std::string line = fmt::format("{} {} {} {} {} {}\n", e.at.source, e.at.offset, e.at.line,
                                         e.documents, e.tokens, e.bytes);
    file_.write(line.data(), line.size());
    file_.flush_to_disk();
  }
  void remove() { ::unlink(path_.c_str()); }

 private:
  std::string path_;
  OutputFile file_;
  int lock_ = -1;
};

class Progress {
 public:
  explicit Progress(int64_t disk_bytes) : total_(disk_bytes), terminal_(::isatty(2)) {}
  ~Progress() {
    if (terminal_ && shown_) std::fputc('\n', stderr);
  }
  void show(int64_t bytes, int64_t tokens, int64_t disk_bytes) {
    const double elapsed = seconds_since(start_);
    if (first_disk_ < 0) {
      first_disk_ = disk_bytes;
      first_bytes_ = bytes;
    }
    if (seconds_since(last_) < (terminal_ ? 0.5 : 5)) return;
    last_ = Clock::now();
    shown_ = true;
    const double rate = double(disk_bytes - first_disk_) / elapsed;
    const std::string eta =
        total_ > disk_bytes && rate > 0 ? fmt::format("  eta {:.0f}s", double(total_ - disk_bytes) / rate) : "";
    fmt::print(stderr, "{}tokenize  {:.1f} MB  {:.1f} MB/s  {} tokens{}{}", terminal_ ? "\r" : "",
               double(bytes) / 1e6, double(bytes - first_bytes_) / 1e6 / elapsed, tokens, eta,
               terminal_ ? "\x1b[K" : "\n");
    std::fflush(stderr);
  }

 private:
  int64_t total_, first_disk_ = -1, first_bytes_ = 0;
  bool terminal_, shown_ = false;
  Clock::time_point start_ = Clock::now(), last_ = start_;
};

// Whether the finished corpus has this fingerprint; then with its counts.
bool up_to_date(const std::string& prefix, const std::string& fingerprint, TokenizeResult& result) {
  const std::string path = prefix + ".tokenize.json";
  if (::access(path.c_str(), F_OK) != 0 || ::access((prefix + ".idx").c_str(), F_OK) != 0) return false;
  const Value json = parse_json(read_file(path), path);
  if (fingerprint.empty() || json.at("fingerprint").as_string() != fingerprint) {
    fmt::print(stderr, "{}: was made from other inputs or options; tokenizing again\n", prefix);
    return false;
  }
  const Corpus corpus(prefix);
  result.documents = corpus.documents();
  result.tokens = corpus.tokens();
  result.bytes = json.at("bytes").as_int();
  result.up_to_date = true;
  return true;
}

void write_record(const TokenizeOptions& o, const TokenizeResult& r, const std::string& fingerprint) {
  Value json;
  json["fingerprint"] = fingerprint;
  json["tokenizer"] = o.tokenizer;
  json["documents"] = r.documents;
  json["tokens"] = r.tokens;
  json["bytes"] = r.bytes;
  write_file_atomic(o.output + ".tokenize.json", json.json() + "\n");
}

}  // namespace

std::string TokenizeResult::str() const {
  const std::string counts =
      fmt::format("{} documents, {} tokens, {} bytes of text in {}.bin", documents, tokens, bytes, output);
  if (up_to_date) return counts + ": up to date";
  return fmt::format("{}, {:.1f} s", counts, seconds);
}

TokenizeResult tokenize_corpus(const TokenizeOptions& o) {
  const Clock::time_point start = Clock::now();
  TokenizeResult result;
  result.output = o.output;
  if (o.workers < 0) fail_input("--workers {}: must be at least 1, or 0 for all cores", o.workers);
  const Tokenizer tokenizer(o.tokenizer);
  if (o.eos && !tokenizer.eos_id())
    fail_input("{} names no end-of-text token; use --no-eos", tokenizer.file());
  const std::vector<Source> sources = find_sources(o.inputs, o.globs);
  const std::string mark = fingerprint(o, tokenizer, sources);
  if (up_to_date(o.output, mark, result)) return result;

  if (const auto parent = std::filesystem::path(o.output).parent_path(); !parent.empty()) {
    std::error_code error;
    std::filesystem::create_directories(parent, error);
    if (error) fail_input("{}: {}", parent.string(), error.message());
  }
  Journal journal(o.output);
  Journal::Entry done = journal.open(mark, o.output, tokenizer.vocab_size());
  result.continued = done.documents;
  CorpusWriter writer(o.output, tokenizer.vocab_size(), done.documents, done.tokens);
  int64_t total = 0, journaled = done.bytes;
  for (const Source& s : sources) total += s.bytes;
  Progress progress(total);
  {
    const int cores = std::max(1, int(std::thread::hardware_concurrency()));
    Workers workers(o.workers ? o.workers : cores, o, tokenizer, sources, done.at);
    Clock::time_point last = start;
    for (Batch batch; workers.pop(batch);) {
      size_t begin = 0;
      for (const size_t end : batch.ends) {
        writer.add(std::span(batch.ids).subspan(begin, end - begin));
        begin = end;
      }
      done = {batch.after, writer.documents(), writer.tokens(), done.bytes + batch.bytes};
      progress.show(done.bytes, done.tokens, batch.disk_bytes);
      if (done.bytes - journaled < 8 << 20 || seconds_since(last) < 0.1) continue;
      writer.flush_to_disk();  // before the line that says so
      journal.add(done);
      journaled = done.bytes;
      last = Clock::now();
    }
  }
  if (done.documents == 0) {
    for (const char* end : {".bin.partial", ".len.partial"}) ::unlink((o.output + end).c_str());
    journal.remove();
    fail_input("{}: the inputs hold no text", o.output);
  }
  ::unlink((o.output + ".tokenize.json").c_str());
  writer.finish();
  result.documents = done.documents;
  result.tokens = done.tokens;
  result.bytes = done.bytes;
  result.seconds = seconds_since(start);
  write_record(o, result, mark);
  journal.remove();
  return result;
}

}  // namespace pith
