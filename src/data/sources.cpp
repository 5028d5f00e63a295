#include "data/sources.h"

#include <fnmatch.h>
#include <sys/stat.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>

#include "core/error.h"

namespace pith {
namespace {

namespace fs = std::filesystem;
constexpr size_t kChunkBytes = size_t(1) << 20;

struct stat status_of(const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) fail_input("{}: {}", path, std::strerror(errno));
  return info;
}

// No NUL in the first 8 KiB.
bool looks_like_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail_input("{}: {}", path, std::strerror(errno));
  char block[8192];
  file.read(block, sizeof block);
  return !std::memchr(block, '\0', size_t(file.gcount()));
}

bool is_lines(const std::string& path) {
  return path.ends_with(".jsonl") || path.ends_with(".jsonl.gz") || path.ends_with(".jsonl.zst");
}

Source file_source(const std::string& path) {
  const struct stat info = status_of(path);
  if (!is_lines(path) && (path.ends_with(".gz") || path.ends_with(".zst")))
    fail_input("{}: of compressed files only .jsonl.gz and .jsonl.zst are read", path);
  return {path, is_lines(path) ? Source::Kind::lines : Source::Kind::text, info.st_size,
          info.st_mtim.tv_sec * 1000000000 + info.st_mtim.tv_nsec};
}

// The regular files below a directory, each directory once, without hidden names.
void walk(const std::string& directory, std::set<std::pair<dev_t, ino_t>>& visited,
          std::vector<std::string>& files) {
  const struct stat info = status_of(directory);
  if (!visited.emplace(info.st_dev, info.st_ino).second) return;
  std::error_code error;
  std::vector<fs::path> entries;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error))
    entries.push_back(it->path());
  if (error) fail_input("{}: {}", directory, error.message());
  std::sort(entries.begin(), entries.end());
  for (const fs::path& entry : entries) {
    if (entry.filename().string()[0] == '.') continue;
    if (fs::is_directory(entry, error)) walk(entry.string(), visited, files);
    if (fs::is_regular_file(entry, error)) files.push_back(entry.string());
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

}  // namespace

std::vector<Source> find_sources(const std::vector<std::string>& inputs,
                                 const std::vector<std::string>& globs) {
  std::vector<Source> sources;
  for (const std::string& input : inputs) {
    if (input == "-") {
      sources.push_back({"standard input", Source::Kind::standard_input});
    } else if (S_ISDIR(status_of(input).st_mode)) {
      std::string root = input;
      while (root.ends_with('/')) root.pop_back();
      std::set<std::pair<dev_t, ino_t>> visited;
      std::vector<std::string> files;
      walk(root + "/", visited, files);
      std::sort(files.begin(), files.end());
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
class ChunkReader::Stream {
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

ChunkReader::ChunkReader(const std::vector<Source>& sources) : sources_(sources) {}
ChunkReader::~ChunkReader() = default;

bool ChunkReader::next(Chunk& chunk) {
  if (at_ == sources_.size()) return false;
  chunk = {.source = at_, .first_line = line_ + 1};
  chunk.whole = sources_[at_].kind == Source::Kind::text;
  chunk.whole ? next_source() : next_lines(chunk);
  chunk.disk_bytes = done_bytes_ + (stream_ ? stream_->disk_position() : 0);
  return true;
}

void ChunkReader::next_lines(Chunk& chunk) {
  if (!stream_) stream_ = std::make_unique<Stream>(sources_[at_]);
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

void ChunkReader::next_source() {
  stream_.reset();
  line_ = 0;
  done_bytes_ += sources_[at_++].bytes;
}

}  // namespace pith
