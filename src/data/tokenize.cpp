#include "data/tokenize.h"

#include <fnmatch.h>
#include <omp.h>
#include <sys/stat.h>
#include <zlib.h>
#include <zstd.h>

#include <deque>
#include <future>
#include <sstream>

#include "core/rng.h"
#include "data/corpus.h"
#include "data/tokenizer.h"

namespace pith {
namespace {

namespace fs = std::filesystem;
constexpr size_t kChunkBytes = size_t(1) << 20;

struct Source {
  std::string path;             // "-": standard input
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

Source source_at(const std::string& path) {
  if (path == "-") return {path};
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) fail_input("{}: {}", path, std::strerror(errno));
  if (!is_lines(path) && (path.ends_with(".gz") || path.ends_with(".zst")))
    fail_input("{}: of compressed files only .jsonl.gz and .jsonl.zst are read", path);
  return {path, info.st_size, info.st_mtim.tv_sec * 1000000000 + info.st_mtim.tv_nsec};
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

// Every file behind the inputs, in the order given. InputError for a path that does not exist, a
// compressed file that is not .jsonl, or no file at all.
std::vector<Source> find_sources(const TokenizeOptions& o) {
  std::vector<Source> sources;
  std::error_code error;
  for (const std::string& input : o.inputs) {
    if (input == "-" || !fs::is_directory(input, error)) {
      sources.push_back(source_at(input));
      continue;
    }
    const std::string root = fs::path(input) / "";
    std::set<fs::path> visited;
    std::set<std::string> files;
    walk(root, visited, files);
    for (const std::string& file : files) {
      const fs::path name = fs::path(file).filename();
      const bool wanted = std::ranges::any_of(o.globs, [&](const std::string& glob) {
        return fnmatch(glob.c_str(), name.c_str(), 0) == 0 ||
               fnmatch(glob.c_str(), file.c_str() + root.size(), 0) == 0;
      });
      if (wanted || (o.globs.empty() && (is_lines(file) || looks_like_text(file))))
        sources.push_back(source_at(file));
    }
  }
  if (sources.empty())
    fail_input("no text file among the inputs{}", o.globs.empty() ? "" : " matches --glob");
  return sources;
}

// The bytes of a plain, gzip or zstd file. zlib hands on what is not gzip as it is.
class Stream {
 public:
  explicit Stream(const std::string& path)
      : path_(path),
        file_(path == "-" ? gzdopen(::dup(0), "rb") : gzopen(path.c_str(), "rb"), &gzclose),
        zstd_(path.ends_with(".zst") ? ZSTD_createDCtx() : nullptr, &ZSTD_freeDCtx) {
    if (!file_) fail_input("{}: {}", path_, std::strerror(errno));
    gzbuffer(file_.get(), unsigned(block_.size()));
  }

  // Appends some more; false at the end.
  bool read(std::string& out) {
    const int n = gzread(file_.get(), block_.data(), unsigned(block_.size()));
    int error = Z_OK;
    const char* message = gzerror(file_.get(), &error);
    if (error == Z_ERRNO) fail_input("{}: {}", path_, std::strerror(errno));
    if (error != Z_OK && error != Z_STREAM_END) fail_input("{}", message);  // it names the file
    if (zstd_)
      unpack(size_t(n), out);
    else
      out.append(block_.data(), size_t(n));
    return n > 0;
  }

 private:
  void unpack(size_t n, std::string& out) {
    if (n == 0 && open_) fail_input("{}: ends within a zstd frame", path_);
    std::array<char, 1 << 16> unpacked;
    ZSTD_inBuffer from{block_.data(), n, 0};
    for (bool full = false; from.pos < from.size || (open_ && full);) {
      ZSTD_outBuffer to{unpacked.data(), unpacked.size(), 0};
      const size_t rc = ZSTD_decompressStream(zstd_.get(), &to, &from);
      if (ZSTD_isError(rc)) fail_input("{}: {}", path_, ZSTD_getErrorName(rc));
      out.append(unpacked.data(), to.pos);
      full = to.pos == to.size;
      open_ = rc != 0;
    }
  }

  std::string path_;
  std::vector<char> block_ = std::vector<char>(1 << 17);
  std::unique_ptr<gzFile_s, int (*)(gzFile_s*)> file_;
  std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> zstd_;
  bool open_ = false;  // within a frame
};

// One document, or about a megabyte of lines.
struct Chunk {
  std::string path, text;
  int64_t first_line = 0;  // of the file, counted from 1; 0: a document
};

// Cuts the same sources into the same chunks every time.
class ChunkReader {
 public:
  explicit ChunkReader(const std::vector<Source>& sources) : sources_(sources) {}

  // False at the end; InputError for what cannot be read.
  bool next(Chunk& chunk) {
    if (at_ == sources_.size()) return false;
    chunk.path = sources_[at_].path;
    if (!stream_) stream_.emplace(chunk.path);
    bool lines = is_lines(chunk.path), more = true;
    size_t cut = 0;  // behind the last whole line; what was left over has none
    while (more && (!lines || rest_.size() < kChunkBytes || cut == 0)) {
      const size_t before = rest_.size();
      more = stream_->read(rest_);
      const size_t newline = std::string_view(rest_).substr(before).rfind('\n');
      if (newline != rest_.npos) cut = before + newline + 1;
      if (chunk.path != "-") continue;
      const size_t first = rest_.find_first_not_of(" \t\r\n");
      lines = line_ > 0 || first == rest_.npos || rest_[first] == '{';
    }
    if (!more) cut = rest_.size();
    chunk.text = rest_.substr(0, cut);
    rest_.erase(0, cut);
    chunk.first_line = lines ? line_ + 1 : 0;
    line_ += std::count(chunk.text.begin(), chunk.text.end(), '\n');
    if (!more) {
      stream_.reset();
      line_ = 0;
      ++at_;
    }
    return true;
  }

 private:
  const std::vector<Source>& sources_;
  size_t at_ = 0;  // the source to go on with, which the others are about
  std::optional<Stream> stream_;
  std::string rest_;  // read but not handed out
  int64_t line_ = 0;  // the last one handed out
};

// The encoded documents of one chunk.
struct Batch {
  std::vector<int32_t> ids, lengths;  // of all documents, end-of-text included
  int64_t bytes = 0;
};

struct Job {
  const TokenizeOptions& options;
  const Tokenizer tokenizer = Tokenizer(options.tokenizer);
  const std::vector<Source> sources = find_sources(options);

  void add_document(std::string_view text, PieceCache& cache, Batch& batch) const {
    std::vector<int32_t> ids = tokenizer.encode(text, &cache);
    if (ids.empty()) return;
    if (options.eos) ids.push_back(*tokenizer.eos_id());
    if (ids.size() > INT32_MAX) fail_input("a document of {} tokens is too long", ids.size());
    batch.ids.insert(batch.ids.end(), ids.begin(), ids.end());
    batch.lengths.push_back(int32_t(ids.size()));
    batch.bytes += int64_t(text.size());
  }

  Batch encode(const Chunk& chunk, PieceCache& cache) const {
    Batch batch;
    if (chunk.first_line == 0) {
      add_document(chunk.text, cache, batch);
      return batch;
    }
    std::istringstream lines(chunk.text);
    std::string line;
    for (int64_t number = chunk.first_line; std::getline(lines, line); ++number) {
      if (line.find_first_not_of(" \t\r") == line.npos) continue;
      const Value json = parse_json(line, fmt::format("{}:{}", chunk.path, number));
      add_document(json.at(options.text_key).as_string(), cache, batch);
    }
    return batch;
  }

  // Calls done(batch) for every chunk after the first `skip`, in order. Of several failures the
  // first in the input is thrown.
  void encode_all(int64_t skip, const std::function<void(const Batch&)>& done) const {
    const auto workers = size_t(options.workers ? options.workers : omp_get_num_procs());
    // Chunk n is encoded with cache n modulo their number.
    std::vector<PieceCache> caches(workers, PieceCache(1 << 15));
    std::deque<std::future<Batch>> pending;
    ChunkReader reader(sources);
    Chunk chunk;
    for (int64_t i = 0; i < skip; ++i) reader.next(chunk);
    std::exception_ptr unreadable;
    for (size_t n = 0;;) {
      try {
        while (!unreadable && pending.size() < workers && reader.next(chunk)) {
          PieceCache& cache = caches[n++ % workers];
          pending.push_back(std::async(
              std::launch::async, [&, chunk = std::move(chunk)] { return encode(chunk, cache); }));
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
  std::string fingerprint() const {
    std::string all = fmt::format("2\n{}\n{}\n{}\n", read_file(tokenizer.file()), options.text_key,
                                  options.eos ? *tokenizer.eos_id() : -1);
    for (const Source& s : sources) {
      if (s.path == "-") return "";
      all += fmt::format("{}\n{} {}\n", s.path, s.bytes, s.time);
    }
    return fmt::format("{:016x}", stream_key(0, all));
  }
};

// PREFIX.tokenize.partial says how far a run has come, PREFIX.tokenize.json what it came to. Both
// are always whole.
constexpr std::pair<const char*, int64_t TokenizeResult::*> kSaved[] = {
    {"chunks", &TokenizeResult::chunks},
    {"documents", &TokenizeResult::documents},
    {"tokens", &TokenizeResult::tokens},
    {"bytes", &TokenizeResult::bytes}};

void save(const TokenizeResult& r, const std::string& path, const std::string& fingerprint) {
  Value json = Value::object({{"fingerprint", fingerprint}});
  for (const auto& [key, number] : kSaved) json[key] = r.*number;
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
  for (const auto& [key, number] : kSaved) r.*number = json.at(key).as_int();
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
  const Job job{o};
  if (o.eos && !job.tokenizer.eos_id())
    fail_input("{} names no end-of-text token; use --no-eos", job.tokenizer.file());
  const std::string mark = job.fingerprint(), finished = o.output + ".tokenize.json",
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
  CorpusWriter writer(o.output, job.tokenizer.vocab_size(), r.documents, r.tokens);
  if (writer.documents() == 0) r = {.output = o.output};
  r.continued = r.documents;
  if (r.continued) fmt::print(stderr, "{}: continuing after {} documents\n", o.output, r.documents);
  const int64_t old_bytes = r.bytes;
  double saved = start, told = start;
  job.encode_all(r.chunks, [&](const Batch& batch) {
    writer.add(batch.ids, batch.lengths);
    r.chunks += 1;
    r.documents = writer.documents();
    r.tokens = writer.tokens();
    r.bytes += batch.bytes;
    const double now = omp_get_wtime();
    r.seconds = now - start;
    if (now - told > 5) {
      fmt::print(stderr, "tokenize  {:.1f} MB  {:.1f} MB/s  {} tokens\n", double(r.bytes) / 1e6,
                 double(r.bytes - old_bytes) / 1e6 / r.seconds, r.tokens);
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
