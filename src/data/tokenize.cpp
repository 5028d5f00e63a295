#include "data/tokenize.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <exception>
#include <filesystem>
#include <future>
#include <memory>
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
  std::vector<int32_t> ids;  // of all documents, end-of-text included
  std::vector<size_t> ends;  // of each document in ids
  int64_t bytes = 0, disk_bytes = 0;
  Position after;
};

class ChunkEncoder {
 public:
  ChunkEncoder(const TokenizeOptions& options, const Tokenizer& tokenizer,
               const std::vector<Source>& sources)
      : options_(options), sources_(sources), encoder_(tokenizer), eos_(tokenizer.eos_id()) {}

  Batch encode(const Chunk& chunk) {
    Batch batch;
    batch.after = chunk.after;
    batch.disk_bytes = chunk.disk_bytes;
    for (size_t i = chunk.begin; i < chunk.end; ++i) document(read_file(sources_[i].path), batch);
    if (chunk.whole)
      document(chunk.lines, batch);
    else
      lines(chunk, batch);
    return batch;
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

// Calls done(batch) for every chunk, in order. Chunk n is encoded by worker n modulo their number.
// Of several failures the first in the input is thrown.
template <class Done>
void encode_all(const TokenizeOptions& options, const Tokenizer& tokenizer,
                const std::vector<Source>& sources, Position start, Done&& done) {
  struct Worker {
    ChunkEncoder encoder;
    std::future<Batch> batch;
  };
  const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  std::deque<Worker> workers;
  while (workers.size() < (options.workers ? unsigned(options.workers) : cores))
    workers.push_back({ChunkEncoder(options, tokenizer, sources), {}});
  ChunkReader reader(sources, start);
  std::exception_ptr unreadable;
  bool more = true;
  for (size_t n = 0, idle = 0; idle < workers.size(); ++n) {
    Worker& worker = workers[n % workers.size()];
    if (worker.batch.valid()) done(worker.batch.get());
    auto chunk = std::make_shared<Chunk>();
    try {
      more = more && reader.next(*chunk);
    } catch (...) {
      unreadable = std::current_exception();
      more = false;
    }
    idle += !more;
    if (more)
      worker.batch = std::async(std::launch::async,
                                [&worker, chunk] { return worker.encoder.encode(*chunk); });
  }
  if (unreadable) std::rethrow_exception(unreadable);
}

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
    if (s.kind == Source::Kind::standard_input)
      return "";  // nobody can say that it is the same again
    mix(s.path);
    mix(fmt::format("{} {}", s.bytes, s.time));
  }
  return fmt::format("{:016x}", hash);
}

// How far a run has come; kept in PREFIX.tokenize.partial, always whole.
struct Checkpoint {
  Position at;
  int64_t documents = 0, tokens = 0, bytes = 0;

  void save(const std::string& path, const std::string& fingerprint) const {
    Value json;
    json["fingerprint"] = fingerprint;
    json["state"] = Value::array({at.source, at.offset, at.line, documents, tokens, bytes});
    write_file_atomic(path, json.json() + "\n");
  }
};

// Where the last run stopped if it had this fingerprint, else the beginning.
Checkpoint load_checkpoint(const std::string& prefix, const std::string& fingerprint,
                           int64_t vocab_size) {
  const std::string path = prefix + ".tokenize.partial";
  if (::access(path.c_str(), F_OK) != 0) return {};
  const Value json = parse_json(read_file(path), path);
  const std::vector<Value>& v = json.at("state").items();
  if (fingerprint.empty() || json.at("fingerprint").as_string() != fingerprint || v.size() != 6) {
    fmt::print(stderr, "{}: an unfinished run had other inputs or options; starting again\n",
               prefix);
    return {};
  }
  const Checkpoint c{
      {v[0].as_int(), v[1].as_int(), v[2].as_int()}, v[3].as_int(), v[4].as_int(), v[5].as_int()};
  if (!CorpusWriter::can_continue(prefix, vocab_size, c.documents, c.tokens)) return {};
  fmt::print(stderr, "{}: continuing after {} documents\n", prefix, c.documents);
  return c;
}

// A line on stderr every few seconds; on a terminal, one line that changes.
class Progress {
 public:
  Progress(int64_t total, int64_t bytes) : total_(total), first_bytes_(bytes) {}
  ~Progress() {
    if (terminal_ && last_ != start_) std::fputc('\n', stderr);
  }
  void show(int64_t bytes, int64_t tokens, int64_t disk_bytes) {
    if (first_disk_ < 0) first_disk_ = disk_bytes;
    if (seconds_since(last_) < (terminal_ ? 0.5 : 5)) return;
    last_ = Clock::now();
    const double elapsed = seconds_since(start_), rate = double(disk_bytes - first_disk_) / elapsed;
    const bool known = rate > 0 && total_ > disk_bytes;
    fmt::print(stderr, "{}tokenize  {:.1f} MB  {:.1f} MB/s  {} tokens  eta {}{}",
               terminal_ ? "\r" : "", double(bytes) / 1e6,
               double(bytes - first_bytes_) / 1e6 / elapsed, tokens,
               known ? fmt::format("{:.0f}s", double(total_ - disk_bytes) / rate) : "?",
               terminal_ ? "\x1b[K" : "\n");
    std::fflush(stderr);
  }

 private:
  const int64_t total_, first_bytes_;
  int64_t first_disk_ = -1;
  const bool terminal_ = ::isatty(2);
  const Clock::time_point start_ = Clock::now();
  Clock::time_point last_ = start_;
};

// Whether the finished corpus has this fingerprint; then with its counts.
bool up_to_date(const std::string& fingerprint, TokenizeResult& result) {
  const std::string path = result.output + ".tokenize.json";
  if (::access(path.c_str(), F_OK) != 0) return false;
  const Value json = parse_json(read_file(path), path);
  if (fingerprint.empty() || json.at("fingerprint").as_string() != fingerprint) {
    fmt::print(stderr, "{}: made from other inputs or options; tokenizing again\n", result.output);
    return false;
  }
  const Corpus corpus(result.output);
  result.documents = corpus.documents();
  result.tokens = corpus.tokens();
  result.bytes = json.at("bytes").as_int();
  return result.up_to_date = true;
}

}  // namespace

std::string TokenizeResult::str() const {
  const std::string counts = fmt::format("{} documents, {} tokens, {} bytes of text in {}.bin",
                                         documents, tokens, bytes, output);
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
  if (up_to_date(mark, result)) return result;

  if (const auto parent = std::filesystem::path(o.output).parent_path(); !parent.empty()) {
    std::error_code error;
    std::filesystem::create_directories(parent, error);
    if (error) fail_input("{}: {}", parent.string(), error.message());
  }
  const std::string partial = o.output + ".tokenize.partial";
  Checkpoint done = load_checkpoint(o.output, mark, tokenizer.vocab_size());
  result.continued = done.documents;
  CorpusWriter writer(o.output, tokenizer.vocab_size(), done.documents, done.tokens);
  int64_t total = 0, saved = done.bytes;
  for (const Source& s : sources) total += s.bytes;
  Progress progress(total, done.bytes);
  Clock::time_point last = start;
  encode_all(o, tokenizer, sources, done.at, [&](const Batch& batch) {
    size_t begin = 0;
    for (const size_t end : batch.ends) {
      writer.add(std::span(batch.ids).subspan(begin, end - begin));
      begin = end;
    }
    done = {batch.after, writer.documents(), writer.tokens(), done.bytes + batch.bytes};
    progress.show(done.bytes, done.tokens, batch.disk_bytes);
    if (done.bytes - saved < 8 << 20 || seconds_since(last) < 0.1) return;
    writer.flush_to_disk();  // before the file that says so
    done.save(partial, mark);
    saved = done.bytes;
    last = Clock::now();
  });
  ::unlink((o.output + ".tokenize.json").c_str());
  writer.finish();
  result.documents = done.documents;
  result.tokens = done.tokens;
  result.bytes = done.bytes;
  result.seconds = seconds_since(start);
  Value json;
  json["fingerprint"] = mark;
  json["bytes"] = result.bytes;
  write_file_atomic(o.output + ".tokenize.json", json.json() + "\n");
  ::unlink(partial.c_str());
  return result;
}

}  // namespace pith
