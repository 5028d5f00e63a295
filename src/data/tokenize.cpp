#include "data/tokenize.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <filesystem>
#include <future>
#include <sstream>
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
    const Source& source = sources[chunk.source];
    Batch batch{.disk_bytes = chunk.disk_bytes};
    const bool is_file = source.kind == Source::Kind::text;
    if (chunk.whole)
      add_document(is_file ? read_file(source.path) : chunk.text, encoder, batch);
    else
      add_lines(chunk, encoder, batch);
    return batch;
  }

  void add_lines(const Chunk& chunk, Encoder& encoder, Batch& batch) const {
    std::istringstream lines(chunk.text);
    std::string line;
    for (int64_t number = chunk.first_line; std::getline(lines, line); ++number) {
      if (line.find_first_not_of(" \t\r") == line.npos) continue;
      const Value json = parse_json(line, fmt::format("{}:{}", sources[chunk.source].path, number));
      add_document(json.at(options.text_key).as_string(), encoder, batch);
    }
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
      more = false;
      pending.push_back(std::async(std::launch::deferred, [e = std::current_exception()] {
        std::rethrow_exception(e);
        return Batch();
      }));
    }
    if (pending.empty()) break;
    done(pending.front().get());
    pending.pop_front();
  }
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

// PREFIX.tokenize.partial says how far a run has come, PREFIX.tokenize.json what it came to. Both
// are always whole.
void save(const TokenizeResult& r, const std::string& path, const std::string& fingerprint) {
  const Value json = Value::object({{"fingerprint", fingerprint},
                                    {"chunks", r.chunks},
                                    {"documents", r.documents},
                                    {"tokens", r.tokens},
                                    {"bytes", r.bytes}});
  write_file_atomic(path, json.json() + "\n");
}

// Whether there is such a file with this fingerprint, and then what it says. Tells of another's.
bool load(TokenizeResult& r, const std::string& path, const std::string& fingerprint) {
  if (::access(path.c_str(), F_OK) != 0) return false;
  const Value json = parse_json(read_file(path), path);
  if (fingerprint.empty() || json.at("fingerprint").as_string() != fingerprint) {
    fmt::print(stderr, "{}: from other inputs or options; starting again\n", path);
    return false;
  }
  r.chunks = json.at("chunks").as_int();
  r.documents = json.at("documents").as_int();
  r.tokens = json.at("tokens").as_int();
  r.bytes = json.at("bytes").as_int();
  return true;
}

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
  TokenizeResult r{.output = o.output};
  r.up_to_date = load(r, finished, mark);
  if (r.up_to_date) {
    const Corpus whole(o.output);
    return r;
  }
  make_parent_directory(o.output);
  load(r, partial, mark);
  CorpusWriter writer(o.output, tokenizer.vocab_size(), r.documents, r.tokens);
  if (writer.documents() == 0) r = {.output = o.output};
  r.continued = r.documents;
  if (r.continued) fmt::print(stderr, "{}: continuing after {} documents\n", o.output, r.documents);
  const int64_t old_bytes = r.bytes;
  int64_t total = 0;
  for (const Source& s : sources) total += s.bytes;
  Clock::time_point saved = start, told = start;
  encode_all(job, r.chunks, [&](const Batch& batch) {
    size_t begin = 0;
    for (const size_t end : batch.ends) {
      writer.add(std::span(batch.ids).subspan(begin, end - begin));
      begin = end;
    }
    r.chunks += 1;
    r.documents = writer.documents();
    r.tokens = writer.tokens();
    r.bytes += batch.bytes;
    r.seconds = seconds_since(start);
    if (seconds_since(told) > 5) {
      fmt::print(stderr, "tokenize  {:.1f} MB  {:.1f} MB/s  {} tokens  {}\n", double(r.bytes) / 1e6,
                 double(r.bytes - old_bytes) / 1e6 / r.seconds, r.tokens,
                 total ? fmt::format("{}%", 100 * batch.disk_bytes / total) : "");
      told = Clock::now();
    }
    if (seconds_since(saved) < 0.2) return;
    writer.flush_to_disk();  // before the file that says so
    save(r, partial, mark);
    saved = Clock::now();
  });
  ::unlink(finished.c_str());
  writer.finish();
  save(r, finished, mark);
  ::unlink(partial.c_str());
  return r;
}

}  // namespace pith
