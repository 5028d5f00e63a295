#pragma once
// .npz: a zip archive of .npy arrays, as numpy.savez writes it (entries stored, not compressed;
// zip64). Formats: numpy.lib.format; PKWARE APPNOTE 6.3, sections 4.3 and 4.5.3.

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace pith {

struct NpyArray {
  std::string name;            // without ".npy"
  std::vector<int64_t> shape;  // row-major, any rank
  std::variant<std::vector<int32_t>, std::vector<float>> data;
};

// Replaces `path` atomically. An array whose data does not fit its shape is an Error.
void write_npz(const std::string& path, const std::vector<NpyArray>& arrays);

// Every array of the archive, in its order. InputError: not a zip, damaged, a compressed entry, a
// dtype other than little-endian int32 and float32, Fortran order.
std::vector<NpyArray> read_npz(const std::string& path);

}  // namespace pith
