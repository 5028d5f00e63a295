#include "data/tokenize.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <filesystem>
#include <future>
#include <thread>

#include "core/error.h"
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
};

struct Job {
  const TokenizeOptions& options;
  const Tokenizer& tokenizer;
  const std::vector<Source>& sources;

  void add_document(std::string_view text, Encoder& encoder, Batch& batch) const {
    const size_t before = batch.ids.size();
    encoder.encode(text, batch.ids);
    if (batch.ids.size() == before) return;
    if (options.eos) batch.ids.push_back(*tokenizer.eos_id());
    batch.ends.push_back(batch.ids.size());
    batch.bytes += int64_t(text.size());
  }

  Batch encode(const Chunk& chunk, Encoder& encoder) const {
    Batch batch;
    batch.disk_bytes = chunk.disk_bytes;
    for (size_t i = chunk.begin; i < chunk.end; ++i)
      add_document(read_file(sources[i].path), encoder, batch);
    if (chunk.whole) {
      add_document(chunk.lines, encoder, batch);
      return batch;
    }
    std::string_view rest = chunk.lines;
    for (int64_t number = chunk.first_line; !rest.empty(); ++number) {
      const std::string_view line = rest.substr(0, rest.find('\n'));
      rest.remove_prefix(std::min(line.size() + 1, rest.size()));
      if (line.find_first_not_of(" \t\r") == line.npos) continue;
      const Value json = parse_json(line, fmt::format("{}:{}", sources[chunk.begin].path, number));
      add_document(json.at(options.text_key).as_string(), encoder, batch);
    }
    return batch;
  }
};

// Calls done(batch) for every chunk after the first `skip`, in order. Of several failures the first
// in the input is thrown.
template <class Done> void encode_all(const Job& job, int64_t skip, Done&& done) {
  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  std::deque<Encoder> encoders;  // chunk n is encoded by encoder n modulo their number
  while (encoders.size() < (job.options.workers ? size_t(job.options.workers) : cores))
    encoders.emplace_back(job.tokenizer);
  std::deque<std::future<Batch>> pending;
  ChunkReader reader(job.sources);
  Chunk chunk;
  for (int64_t i = 0; i < skip; ++i) reader.next(chunk);
  std::exception_ptr unreadable;
  size_t n = 0;
  for (bool more = true; more || !pending.empty();) {
    try {
      while (pending.size() < encoders.size() && (more = more && reader.next(chunk))) {
        Encoder& encoder = encoders[n++ % encoders.size()];
        pending.push_back(std::async(std::launch::async, [&, chunk = std::move(chunk)] {
          return job.encode(chunk, encoder);
        }));
      }
    } catch (...) {
      unreadable = std::current_exception();
      more = false;
    }
    if (pending.empty()) break;
    done(pending.front().get());
    pending.pop_front();
  }
  if (unreadable) std::rethrow_exception(unreadable);
}

// FNV-1a over everything that decides the output; "" for standard input, of which nobody can say
// that it is the same again.
std::string fingerprint(const Job& job) {
  std::string all =
      fmt::format("1\n{}\n{}\n{}\n", read_file(job.tokenizer.file()), job.options.text_key,
                  job.options.eos ? *job.tokenizer.eos_id() : -1);
  for (const Source& s : job.sources) {
    if (s.kind == Source::Kind::standard_input) return "";
    all += fmt::format("{}\n{} {}\n", s.path, s.bytes, s.time);
  }
  uint64_t hash = 0xcbf29ce484222325u;
  for (const unsigned char c : all) hash = (hash ^ c) * 0x100000001b3u;
  return fmt::format("{:016x}", hash);
}

// The JSON in `path` if that exists and has this fingerprint, else null; says so when it is another's.
Value matching_json(const std::string& path, const std::string& fingerprint) {
  if (::access(path.c_str(), F_OK) != 0) return {};
  Value json = parse_json(read_file(path), path);
  if (!fingerprint.empty() && json.at("fingerprint").as_string() == fingerprint) return json;
  fmt::print(stderr, "{}: from other inputs or options; starting again\n", path);
  return {};
}

// How far a run has come; kept in PREFIX.tokenize.partial, always whole.
struct Journal {
  int64_t chunks = 0, documents = 0, tokens = 0, bytes = 0;

  void save(const std::string& path, const std::string& fingerprint) const {
    const Value json = Value::object({{"fingerprint", fingerprint},
                                      {"chunks", chunks},
                                      {"documents", documents},
                                      {"tokens", tokens},
                                      {"bytes", bytes}});
    write_file_atomic(path, json.json() + "\n");
  }
  static Journal load(const std::string& path, const std::string& fingerprint) {
    const Value json = matching_json(path, fingerprint);
    if (json.is_null()) return {};
    return {json.at("chunks").as_int(), json.at("documents").as_int(), json.at("tokens").as_int(),
            json.at("bytes").as_int()};
  }
};

// A line on stderr every few seconds.
class Progress {
 public:
  explicit Progress(const std::vector<Source>& sources) {
    for (const Source& s : sources) total_ += s.bytes;
  }
  void show(const Batch& batch, int64_t tokens) {
    if (bytes_ == 0) first_disk_ = batch.disk_bytes;
    bytes_ += batch.bytes;
    if (seconds_since(last_) < 5) return;
    last_ = Clock::now();
    const double elapsed = seconds_since(start_);
    const double rate = double(batch.disk_bytes - first_disk_) / elapsed;
    const bool known = rate > 0 && total_ > batch.disk_bytes;
    fmt::print(stderr, "tokenize  {:.1f} MB  {:.1f} MB/s  {} tokens  eta {}\n",
               double(bytes_) / 1e6, double(bytes_) / 1e6 / elapsed, tokens,
               known ? fmt::format("{:.0f}s", double(total_ - batch.disk_bytes) / rate) : "?");
  }

 private:
  int64_t total_ = 0, bytes_ = 0, first_disk_ = 0;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point last_ = start_;
};

void make_parent_directory(const std::string& path) {
  const auto parent = std::filesystem::path(path).parent_path();
  std::error_code error;
  if (!parent.empty()) std::filesystem::create_directories(parent, error);
  if (error) fail_input("{}: {}", parent.string(), error.message());
}

}  // namespace

std::string TokenizeResult::str() const {
  return fmt::format("{} documents, {} tokens, {} bytes of text in {}.bin{}", documents, tokens,
                     bytes, output,
                     up_to_date ? ": up to date" : fmt::format(", {:.1f} s", seconds));
}

TokenizeResult tokenize_corpus(const TokenizeOptions& o) {
  const Clock::time_point start = Clock::now();
  if (o.workers < 0) fail_input("--workers {}: must be at least 1, or 0 for all cores", o.workers);
  const Tokenizer tokenizer(o.tokenizer);
  if (o.eos && !tokenizer.eos_id())
    fail_input("{} names no end-of-text token; use --no-eos", tokenizer.file());
  const std::vector<Source> sources = find_sources(o.inputs, o.globs);
  const Job job{o, tokenizer, sources};
  const std::string mark = fingerprint(job), finished = o.output + ".tokenize.json",
                    partial = o.output + ".tokenize.partial";
  if (const Value json = matching_json(finished, mark); !json.is_null()) {
    const Corpus corpus(o.output);
    return {corpus.documents(), corpus.tokens(), json.at("bytes").as_int(), 0, 0, true, o.output};
  }
  make_parent_directory(o.output);
  Journal done = Journal::load(partial, mark);
  CorpusWriter writer(o.output, tokenizer.vocab_size(), done.documents, done.tokens);
  if (writer.documents() == 0) done = {};
  if (done.chunks > 0)
    fmt::print(stderr, "{}: continuing after {} documents\n", o.output, done.documents);
  const int64_t continued = done.documents;
  Progress progress(sources);
  Clock::time_point saved = start;
  encode_all(job, done.chunks, [&](const Batch& batch) {
    size_t begin = 0;
    for (const size_t end : batch.ends) {
      writer.add(std::span(batch.ids).subspan(begin, end - begin));
      begin = end;
    }
    done = {done.chunks + 1, writer.documents(), writer.tokens(), done.bytes + batch.bytes};
    progress.show(batch, done.tokens);
    if (seconds_since(saved) < 0.2) return;
    writer.flush_to_disk();  // before the file that says so
    done.save(partial, mark);
    saved = Clock::now();
  });
  ::unlink(finished.c_str());
  writer.finish();
  const Value json = Value::object({{"fingerprint", mark}, {"bytes", done.bytes}});
  write_file_atomic(finished, json.json() + "\n");
  ::unlink(partial.c_str());
  return {done.documents,       done.tokens, done.bytes, continued,
          seconds_since(start), false,       o.output};
}

}  // namespace pith
