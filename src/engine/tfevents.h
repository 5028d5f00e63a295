#pragma once
// TensorBoard scalars: an event file that any TensorBoard opens.
// Formats: TFRecord (tensorflow/core/lib/io/record_writer.h), event.proto and summary.proto of
// TensorFlow.

#include "core/file.h"

namespace pith {

class EventFile {
 public:
  // Makes `directory` (not its parents) if it is missing and opens
  // events.out.tfevents.<time>.<host>.<pid> in it. InputError when that fails.
  explicit EventFile(const std::string& directory);
  // One event per call, stamped with the current time, handed to the system before returning. Any
  // float is allowed.
  void scalars(int64_t step, std::span<const std::pair<std::string, float>> values);
  const std::string& path() const { return path_; }

 private:
  void write(int64_t step, int field, std::string_view content);
  std::string path_;
  OutputFile file_;
};

}  // namespace pith
