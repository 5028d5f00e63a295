#include "data/sources.h"

#include <fnmatch.h>
#include <sys/stat.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <set>

#include "core/error.h"

namespace pith {
namespace {

namespace fs = std::filesystem;
constexpr size_t kChunkBytes = size_t(1) << 20;
constexpr size_t kChunkFiles = 256;

using File = std::unique_ptr<FILE, int (*)(FILE*)>;
using Gzip = std::unique_ptr<gzFile_s, int (*)(gzFile_s*)>;

struct stat status_of(const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) fail_input("{}: {}", path, std::strerror(errno));
  return info;
}

// No NUL in the first 8 KiB.
bool looks_like_text(const std::string& path) {
  const File file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (!file) fail_input("{}: {}", path, std::strerror(errno));
  char block[8192];
  return !std::memchr(block, '\0', std::fread(block, 1, sizeof block, file.get()));
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

struct Walk {
  const std::vector<std::string>& globs;
  std::set<std::pair<dev_t, ino_t>> visited;
  std::vector<std::string> files;

  void directory(const std::string& path, const std::string& relative) {
    const struct stat info = status_of(path);
    if (!visited.emplace(info.st_dev, info.st_ino).second) return;
    std::error_code error;
    std::vector<std::string> names;
    for (fs::directory_iterator it(path, error), end; !error && it != end; it.increment(error))
      names.push_back(it->path().filename().string());
    if (error) fail_input("{}: {}", path, error.message());
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) {
      const std::string child = path + "/" + name, below = relative + name;
      struct stat kind {};
      if (name[0] == '.' || ::stat(child.c_str(), &kind) != 0) continue;  // a dangling link
      if (S_ISDIR(kind.st_mode)) directory(child, below + "/");
      if (S_ISREG(kind.st_mode) && wanted(child, name, below)) files.push_back(child);
    }
  }
  bool wanted(const std::string& path, const std::string& name, const std::string& relative) const {
    if (globs.empty()) return is_lines(path) || looks_like_text(path);
    return std::any_of(globs.begin(), globs.end(), [&](const std::string& glob) {
      return fnmatch(glob.c_str(), name.c_str(), 0) == 0 ||
             fnmatch(glob.c_str(), relative.c_str(), 0) == 0;
    });
  }
};

}  // namespace

std::vector<Source> find_sources(const std::vector<std::string>& inputs,
                                 const std::vector<std::string>& globs) {
  std::vector<Source> sources;
  for (const std::string& input : inputs) {
    if (input == "-") {
      sources.push_back({"standard input", Source::Kind::standard_input});
    } else if (S_ISDIR(status_of(input).st_mode)) {
      Walk walk{globs, {}, {}};
      std::string root = input;
      while (root.size() > 1 && root.back() == '/') root.pop_back();
      walk.directory(root, "");
      std::sort(walk.files.begin(), walk.files.end());
      for (const std::string& file : walk.files) sources.push_back(file_source(file));
    } else {
      sources.push_back(file_source(input));
    }
  }
  if (sources.empty())
    fail_input("no text file among the inputs{}", globs.empty() ? "" : " matches --glob");
  return sources;
}

// The bytes of a plain, gzip or zstd file.
class ChunkReader::Stream {
 public:
  explicit Stream(const Source& source) : path_(source.path), zstd_(path_.ends_with(".zst")) {
    if (source.kind == Source::Kind::standard_input) {
      gzip_.reset(gzdopen(0, "rb"));  // zlib hands on what is not gzip as it is
    } else if (zstd_) {
      file_.reset(std::fopen(path_.c_str(), "rb"));
    } else {
      gzip_.reset(gzopen(path_.c_str(), "rb"));
    }
    if (!gzip_ && !file_) fail_input("{}: {}", path_, std::strerror(errno));
    if (gzip_) gzbuffer(gzip_.get(), 1 << 17);
    if (zstd_) in_.resize(ZSTD_DStreamInSize());
  }

  // Appends up to about n bytes; false at the end.
  bool read(std::string& out, size_t n) {
    const size_t before = out.size();
    out.resize(before + n);
    const size_t got =
        zstd_ ? read_zstd(out.data() + before, n) : read_gzip(out.data() + before, n);
    out.resize(before + got);
    return got > 0;
  }

  void skip(int64_t n) {
    if (gzip_ && gzseek(gzip_.get(), n, SEEK_SET) == n) return;
    for (std::string ignored; n > 0; n -= int64_t(ignored.size())) {
      ignored.clear();
      if (!read(ignored, size_t(std::min(n, int64_t(kChunkBytes)))))
        fail_input("{}: ends too early", path_);
    }
  }

  int64_t disk_position() const { return gzip_ ? gzoffset(gzip_.get()) : std::ftell(file_.get()); }

 private:
  size_t read_gzip(char* to, size_t n) {
    const int got = gzread(gzip_.get(), to, unsigned(n));
    int error = Z_OK;
    const char* message = gzerror(gzip_.get(), &error);
    if (got < 0 || (error != Z_OK && error != Z_STREAM_END))
      fail_input("{}: {}", path_, error == Z_ERRNO ? std::strerror(errno) : message);
    return size_t(got);
  }

  size_t read_zstd(char* to, size_t n) {
    ZSTD_outBuffer out{to, n, 0};
    while (out.pos == 0) {
      if (input_.pos == input_.size) {
        input_ = {in_.data(), std::fread(in_.data(), 1, in_.size(), file_.get()), 0};
        if (std::ferror(file_.get())) fail_input("{}: {}", path_, std::strerror(errno));
        if (input_.size == 0 && frame_open_) fail_input("{}: ends within a zstd frame", path_);
        if (input_.size == 0) break;
      }
      const size_t rc = ZSTD_decompressStream(context_.get(), &out, &input_);
      if (ZSTD_isError(rc)) fail_input("{}: {}", path_, ZSTD_getErrorName(rc));
      frame_open_ = rc != 0;
    }
    return out.pos;
  }

  std::string path_;
  bool zstd_;
  Gzip gzip_{nullptr, &gzclose};
  File file_{nullptr, &std::fclose};
  std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> context_{ZSTD_createDCtx(), &ZSTD_freeDCtx};
  std::string in_;
  ZSTD_inBuffer input_{nullptr, 0, 0};
  bool frame_open_ = false;
};

ChunkReader::ChunkReader(const std::vector<Source>& sources, Position start)
    : sources_(sources), at_(start) {
  for (int64_t i = 0; i < start.source; ++i) done_bytes_ += sources[size_t(i)].bytes;
}
ChunkReader::~ChunkReader() = default;

bool ChunkReader::next(Chunk& chunk) {
  if (at_.source == int64_t(sources_.size())) return false;
  chunk = Chunk();
  if (sources_[size_t(at_.source)].kind == Source::Kind::text)
    next_texts(chunk);
  else
    next_lines(chunk);
  chunk.after = at_;
  chunk.disk_bytes = done_bytes_ + (stream_ ? stream_->disk_position() : 0);
  return true;
}

void ChunkReader::next_texts(Chunk& chunk) {
  chunk.begin = chunk.end = size_t(at_.source);
  int64_t bytes = 0;
  while (chunk.end < sources_.size() && sources_[chunk.end].kind == Source::Kind::text &&
         chunk.end - chunk.begin < kChunkFiles && bytes < int64_t(kChunkBytes))
    bytes += sources_[chunk.end++].bytes;
  done_bytes_ += bytes;
  at_ = {int64_t(chunk.end), 0, 0};
}

void ChunkReader::next_lines(Chunk& chunk) {
  const Source& source = sources_[size_t(at_.source)];
  if (!stream_) {
    stream_ = std::make_unique<Stream>(source);
    stream_->skip(at_.offset);
    rest_.clear();
  }
  // Standard input that is not JSON is read to its end.
  bool more = true;
  size_t first = rest_.find_first_not_of(" \t\r\n"), newline = rest_.rfind('\n');
  while (more && (rest_.size() < kChunkBytes || newline == rest_.npos || chunk.whole)) {
    const size_t before = rest_.size();
    more = stream_->read(rest_, kChunkBytes);
    if (first == rest_.npos) first = rest_.find_first_not_of(" \t\r\n", before);
    if (const size_t found = rest_.rfind('\n'); found != rest_.npos && found >= before)
      newline = found;
    chunk.whole = source.kind == Source::Kind::standard_input && at_.line == 0 &&
                  first != rest_.npos && rest_[first] != '{';
  }
  chunk.begin = chunk.end = size_t(at_.source);
  chunk.first_line = at_.line + 1;
  const size_t cut = more ? newline + 1 : rest_.size();
  chunk.lines = rest_.substr(0, cut);
  rest_.erase(0, cut);
  at_.offset += int64_t(cut);
  at_.line += std::count(chunk.lines.begin(), chunk.lines.end(), '\n');
  if (more) return;
  stream_.reset();
  done_bytes_ += source.bytes;
  at_ = {at_.source + 1, 0, 0};
}

}  // namespace pith
