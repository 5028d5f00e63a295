#pragma once
// Files: whole reads, memory maps, and writes that leave either the old file or the new one, never a half.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace pith {

std::string read_file(const std::string& path);  // InputError "PATH: No such file or directory"

// Writes PATH.tmp, fsyncs, renames over PATH. InputError on no permission or a full disk; PATH is then untouched
// and PATH.tmp removed.
void write_file_atomic(const std::string& path, std::string_view bytes);

// A read-only map of a whole file. Move-only. An empty file maps to an empty span.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);  // InputError when it cannot be opened
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }
  const std::string& path() const { return path_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
  std::string path_;
};

// An output file written through one descriptor. Every failure (full disk included) throws InputError with the
// path. close() fsyncs; the destructor closes without a check.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path, bool append = false);
  OutputFile(const OutputFile&) = delete;
  ~OutputFile();
  void write(const void* data, size_t bytes);
  void write_at(const void* data, size_t bytes, uint64_t offset);
  void resize(uint64_t bytes);  // what is added reads as zeros
  void flush_to_disk();         // fsync
  void close();

 private:
  std::string path_;
  int fd_ = -1;
};

void fsync_directory(const std::string& path);

}  // namespace pith
