#pragma once
// What `pith tokenize` reads: the list of files, and a reader that cuts them into chunks.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pith {

struct Source {
  enum class Kind { text, lines, standard_input };
  std::string path;
  Kind kind;
  int64_t bytes = 0, time = 0;  // on disk; nanoseconds
};

// Every file behind `inputs`, in the order given. InputError for a path that does not exist, a
// compressed file that is not .jsonl, or no file at all.
std::vector<Source> find_sources(const std::vector<std::string>& inputs,
                                 const std::vector<std::string>& globs);

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
  explicit ChunkReader(const std::vector<Source>& sources);
  ~ChunkReader();
  bool next(Chunk& chunk);  // false at the end; InputError for what cannot be read

 private:
  class Stream;
  void next_lines(Chunk& chunk);
  void next_source();

  const std::vector<Source>& sources_;
  size_t at_ = 0;  // the source to go on with; the next three are of that one, when it has lines
  std::unique_ptr<Stream> stream_;
  std::string rest_;        // read but not handed out
  int64_t line_ = 0;        // the last one handed out
  int64_t done_bytes_ = 0;  // on disk, of the sources before
};

}  // namespace pith
