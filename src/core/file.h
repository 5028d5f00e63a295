#pragma once
// Files: whole reads, memory maps, and writes that leave either the old file or the new one, never
// a half.

#include <unistd.h>

#include <filesystem>

#include "core/error.h"

namespace pith {

inline bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

std::string read_file(const std::string& path);  // InputError "PATH: No such file or directory"

// Writes PATH.tmp, fsyncs, renames over PATH. InputError on no permission or a full disk; PATH is
// then untouched and PATH.tmp removed.
void write_file_atomic(const std::string& path, std::string_view bytes);

// Appends the bytes of each value, little-endian as the machine is.
template <class... T> void append_raw(std::string& out, T... values) {
  (out.append(reinterpret_cast<const char*>(&values), sizeof values), ...);
}

// A read-only map of a whole file, which its copies share. An empty file maps to an empty span.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);  // InputError when it cannot be opened
  std::span<const std::byte> bytes() const { return {data_.get(), size_}; }

 private:
  std::shared_ptr<const std::byte> data_;
  size_t size_ = 0;
};

// A file descriptor, closed at the end of the scope.
struct Descriptor {
  Descriptor(const std::string& path, int flags);  // InputError "PATH: No such file or directory"
  Descriptor(const Descriptor&) = delete;
  ~Descriptor() { ::close(fd); }  // of -1: nothing
  int fd;
};

// An output file written through one descriptor. Every failure (full disk included) throws
// InputError with the path. close() fsyncs; the destructor closes without a check.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path, bool append = false);
  void write(const void* data, size_t bytes) { write_at(data, bytes, kHere); }
  void write(std::string_view text) { write(text.data(), text.size()); }
  void write_at(const void* data, size_t bytes, uint64_t offset);
  void resize(uint64_t bytes);  // what is added reads as zeros
  void flush_to_disk();         // fsync
  void close();

 protected:
  static constexpr uint64_t kHere = UINT64_MAX;
  std::string path_;
  Descriptor file_;
};

// Holds a run directory for this process, through flock on OUT/.lock, which the kernel releases
// when the process ends however it ends. InputError naming the holder's process id when another
// process has it.
class RunLock : OutputFile {
 public:
  explicit RunLock(const std::string& out);  // `out` must exist
};

void fsync_directory(const std::string& path);

}  // namespace pith
