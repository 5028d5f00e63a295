#include "data/tokenize.h"

#include <fnmatch.h>
#include <omp.h>
#include <sys/stat.h>
#include <zlib.h>
#include <zstd.h>

#include <deque>
#include <future>
#include <sstream>
#include <thread>

#include "core/rng.h"
#include "data/corpus.h"
#include "data/tokenizer.h"

namespace pith {
namespace {

namespace fs = std::filesystem;
constexpr size_t kChunkBytes = size_t(1) << 20;

struct Source {
  enum class Kind { text, lines, standard_input };
  std::string path;
  Kind kind;
  int64_t bytes = 0, time = 0;  // on disk; nanoseconds
};

// No NUL in the first 8 KiB.
bool looks_like_text(const std::string& path) {
  const MappedFile file(path);
  const auto head = file.bytes().first(std::min<size_t>(file.bytes().size(), 8192));
  return std::ranges::find(head, std::byte(0)) == head.end();
}

bool is_lines(const std::string& path) {
  return path.ends_with(".jsonl") || path.ends_with(".jsonl.gz") || path.ends_with(".jsonl.zst");
}

Source file_source(const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) fail_input("{}: {}", path, std::strerror(errno));
  if (!is_lines(path) && (path.ends_with(".gz") || path.ends_with(".zst")))
    fail_input("{}: of compressed files only .jsonl.gz and .jsonl.zst are read", path);
  return {path, is_lines(path) ? Source::Kind::lines : Source::Kind::text, info.st_size,
          info.st_mtim.tv_sec * 1000000000 + info.st_mtim.tv_nsec};
}

// The regular files below a directory, each directory once, without hidden names.
void walk(const std::string& directory, std::set<fs::path>& visited, std::set<std::string>& files) {
  std::error_code error;
  if (!visited.insert(fs::canonical(directory, error)).second) return;
  const std::set<fs::path> entries(fs::directory_iterator(directory, error), {});
  if (error) fail_input("{}: {}", directory, error.message());
  for (const fs::path& entry : entries) {
    if (entry.filename().string()[0] == '.') continue;
    if (fs::is_directory(entry, error)) walk(entry.string(), visited, files);
    if (fs::is_regular_file(entry, error)) files.insert(entry.string());
  }
}

bool wanted(const std::string& path, size_t root_size, const std::vector<std::string>& globs) {
  if (globs.empty()) return is_lines(path) || looks_like_text(path);
  const char* relative = path.c_str() + root_size + 1;
  const char* name = path.c_str() + path.rfind('/') + 1;
  return std::any_of(globs.begin(), globs.end(), [&](const std::string& glob) {
    return fnmatch(glob.c_str(), name, 0) == 0 || fnmatch(glob.c_str(), relative, 0) == 0;
  });
}

// Every file behind `inputs`, in the order given. InputError for a path that does not exist, a
// compressed file that is not .jsonl, or no file at all.
std::vector<Source> find_sources(const std::vector<std::string>& inputs,
                                 const std::vector<std::string>& globs) {
  std::vector<Source> sources;
  std::error_code error;
  for (const std::string& input : inputs) {
    if (input == "-") {
      sources.push_back({"standard input", Source::Kind::standard_input});
    } else if (fs::is_directory(input, error)) {
      std::string root = input;
      while (root.ends_with('/')) root.pop_back();
      std::set<fs::path> visited;
      std::set<std::string> files;
      walk(root + "/", visited, files);
      for (const std::string& file : files)
        if (wanted(file, root.size(), globs)) sources.push_back(file_source(file));
    } else {
      sources.push_back(file_source(input));
    }
  }
  if (sources.empty())
    fail_input("no text file among the inputs{}", globs.empty() ? "" : " matches --glob");
  return sources;
}

// The bytes of a plain, gzip or zstd file. zlib hands on what is not gzip as it is.
class Stream {
 public:
  explicit Stream(const Source& source) : path_(source.path) {
    const bool from_file = source.kind != Source::Kind::standard_input;
    file_.reset(from_file ? gzopen(path_.c_str(), "rb") : gzdopen(0, "rb"));
    if (!file_) fail_input("{}: {}", path_, std::strerror(errno));
    gzbuffer(file_.get(), 1 << 17);
    if (path_.ends_with(".zst")) zstd_.reset(ZSTD_createDCtx());
  }

  // Appends up to a megabyte; false at the end.
  bool read(std::string& out) {
    const size_t before = out.size();
    out.resize(before + kChunkBytes);
    char* to = out.data() + before;
    out.resize(before + (zstd_ ? read_zstd(to, kChunkBytes) : read_file(to, kChunkBytes)));
    return out.size() > before;
  }

  int64_t disk_position() const { return gzoffset(file_.get()); }

 private:
  size_t read_file(char* to, size_t n) {
    const int got = gzread(file_.get(), to, unsigned(n));
    int error = Z_OK;
    const char* message = gzerror(file_.get(), &error);
    if (error == Z_ERRNO) fail_input("{}: {}", path_, std::strerror(errno));
    if (error != Z_OK && error != Z_STREAM_END) fail_input("{}", message);  // it names the file
    return size_t(got);
  }

  size_t read_zstd(char* to, size_t n) {
    ZSTD_outBuffer out{to, n, 0};
    while (out.pos == 0) {
      if (in_.pos == in_.size) in_ = {block_.data(), read_file(block_.data(), block_.size()), 0};
      if (in_.size == 0 && in_frame_) fail_input("{}: ends within a zstd frame", path_);
      if (in_.size == 0) break;
      const size_t rc = ZSTD_decompressStream(zstd_.get(), &out, &in_);
      if (ZSTD_isError(rc)) fail_input("{}: {}", path_, ZSTD_getErrorName(rc));
      in_frame_ = rc != 0;
    }
    return out.pos;
  }

  std::string path_, block_ = std::string(1 << 17, '\0');
  std::unique_ptr<gzFile_s, int (*)(gzFile_s*)> file_{nullptr, &gzclose};
  std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> zstd_{nullptr, &ZSTD_freeDCtx};
  ZSTD_inBuffer in_{nullptr, 0, 0};
  bool in_frame_ = false;
};

// A file, or about a megabyte of lines.
struct Chunk {
  size_t source = 0;
  bool whole = false;  // one document: `text`, or the file itself, which is then not read yet
  std::string text;    // else lines, the first of which is `first_line`, counted from 1
  int64_t first_line = 0;
  int64_t disk_bytes = 0;  // of all sources, read when this chunk ends
};

// Cuts the same sources into the same chunks every time.
class ChunkReader {
 public:
  explicit ChunkReader(const std::vector<Source>& sources) : sources_(sources) {}

  // False at the end; InputError for what cannot be read.
  bool next(Chunk& chunk) {
    if (at_ == sources_.size()) return false;
    chunk = {.source = at_, .first_line = line_ + 1};
    chunk.whole = sources_[at_].kind == Source::Kind::text;
    chunk.whole ? next_source() : next_lines(chunk);
    chunk.disk_bytes = done_bytes_ + (stream_ ? stream_->disk_position() : 0);
    return true;
  }

 private:
  void next_lines(Chunk& chunk) {
    if (!stream_) stream_.emplace(sources_[at_]);
    // Standard input that is not JSON is read to its end.
    const bool may_be_text = sources_[at_].kind == Source::Kind::standard_input && line_ == 0;
    bool more = true;
    size_t cut = 0;  // behind the last whole line; what was left over has none
    while (more && (rest_.size() < kChunkBytes || cut == 0 || chunk.whole)) {
      const size_t before = rest_.size();
      more = stream_->read(rest_);
      const size_t newline = std::string_view(rest_).substr(before).rfind('\n');
      if (newline != rest_.npos) cut = before + newline + 1;
      const size_t first = may_be_text ? rest_.find_first_not_of(" \t\r\n") : rest_.npos;
      chunk.whole = first != rest_.npos && rest_[first] != '{';
    }
    if (!more) cut = rest_.size();
    chunk.text = rest_.substr(0, cut);
    rest_.erase(0, cut);
    line_ += std::count(chunk.text.begin(), chunk.text.end(), '\n');
    if (!more) next_source();
  }

  void next_source() {
    stream_.reset();
    line_ = 0;
    done_bytes_ += sources_[at_++].bytes;
  }

  const std::vector<Source>& sources_;
  size_t at_ = 0;  // the source to go on with; the next three are of that one, when it has lines
  std::optional<Stream> stream_;
  std::string rest_;        // read but not handed out
  int64_t line_ = 0;        // the last one handed out
  int64_t done_bytes_ = 0;  // on disk, of the sources before
};

// The encoded documents of one chunk.
struct Batch {
  std::vector<int32_t> ids, lengths;  // of all documents, end-of-text included
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
    const size_t length = batch.ids.size() - before;
    if (length > INT32_MAX) fail_input("a document of {} tokens is too long", length);
    batch.lengths.push_back(int32_t(length));
    batch.bytes += int64_t(text.size());
  }

  Batch encode(const Chunk& chunk, Encoder& encoder) const {
    const Source& source = sources[chunk.source];
    Batch batch{.disk_bytes = chunk.disk_bytes};
    if (chunk.whole) {
      const bool is_file = source.kind == Source::Kind::text;
      add_document(is_file ? read_file(source.path) : chunk.text, encoder, batch);
      return batch;
    }
    std::istringstream lines(chunk.text);
    std::string line;
    for (int64_t number = chunk.first_line; std::getline(lines, line); ++number) {
      if (line.find_first_not_of(" \t\r") == line.npos) continue;
      const Value json = parse_json(line, fmt::format("{}:{}", source.path, number));
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
  for (;;) {
    try {
      while (!unreadable && pending.size() < encoders.size() && reader.next(chunk)) {
        Encoder& encoder = encoders[n++ % encoders.size()];
        pending.push_back(std::async(std::launch::async, [&, chunk = std::move(chunk)] {
          return job.encode(chunk, encoder);
        }));
      }
    } catch (...) {
      unreadable = std::current_exception();  // once the chunks before it are done
    }
    if (pending.empty()) break;
    done(pending.front().get());
    pending.pop_front();
  }
  if (unreadable) std::rethrow_exception(unreadable);
}

// A hash of everything that decides the output; "" for standard input, of which nobody can say
// that it is the same again.
std::string fingerprint(const Job& job) {
  std::string all =
      fmt::format("1\n{}\n{}\n{}\n", read_file(job.tokenizer.file()), job.options.text_key,
                  job.options.eos ? *job.tokenizer.eos_id() : -1);
  for (const Source& s : job.sources) {
    if (s.kind == Source::Kind::standard_input) return "";
    all += fmt::format("{}\n{} {}\n", s.path, s.bytes, s.time);
  }
  return fmt::format("{:016x}", stream_key(0, all));
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
  if (!exists(path)) return false;
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

}  // namespace

std::string TokenizeResult::str() const {
  return fmt::format("{} documents, {} tokens, {} bytes of text in {}.bin{}", documents, tokens,
                     bytes, output,
                     up_to_date ? ": up to date" : fmt::format(", {:.1f} s", seconds));
}

TokenizeResult tokenize_corpus(const TokenizeOptions& o) {
  const double start = omp_get_wtime();
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
  const fs::path parent = fs::path(o.output).parent_path();
  std::error_code error;
  if (!parent.empty()) fs::create_directories(parent, error);
  if (error) fail_input("{}: {}", parent.string(), error.message());
  load(r, partial, mark);
  CorpusWriter writer(o.output, tokenizer.vocab_size(), r.documents, r.tokens);
  if (writer.documents() == 0) r = {.output = o.output};
  r.continued = r.documents;
  if (r.continued) fmt::print(stderr, "{}: continuing after {} documents\n", o.output, r.documents);
  const int64_t old_bytes = r.bytes;
  int64_t total = 0;
  for (const Source& s : sources) total += s.bytes;
  double saved = start, told = start;
  encode_all(job, r.chunks, [&](const Batch& batch) {
    writer.add(batch.ids, batch.lengths);
    r.chunks += 1;
    r.documents = writer.documents();
    r.tokens = writer.tokens();
    r.bytes += batch.bytes;
    const double now = omp_get_wtime();
    r.seconds = now - start;
    if (now - told > 5) {
      fmt::print(stderr, "tokenize  {:.1f} MB  {:.1f} MB/s  {} tokens  {}\n", double(r.bytes) / 1e6,
                 double(r.bytes - old_bytes) / 1e6 / r.seconds, r.tokens,
                 total ? fmt::format("{}%", 100 * batch.disk_bytes / total) : "");
      told = now;
    }
    if (now - saved < 0.2) return;
    writer.flush_to_disk();  // before the file that says so
    save(r, partial, mark);
    saved = omp_get_wtime();
  });
  ::unlink(finished.c_str());
  writer.finish();
  save(r, finished, mark);
  ::unlink(partial.c_str());
  return r;
}

}  // namespace pith
