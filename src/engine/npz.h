#pragma once
// .npz: a zip archive of .npy arrays, as numpy.savez writes it. The zip is libarchive's; the arrays
// are those of numpy.lib.format, version 1.

#include "core/tensor.h"

namespace pith {

using Arrays = std::map<std::string, Tensor>;  // by name, without ".npy"; i32 or fp32 on the cpu

// Replaces `path` atomically. Entries are stored, not compressed; equal arrays give equal files.
void write_npz(const std::string& path, const Arrays& arrays);

// InputError: not a zip, damaged, no array, a dtype other than little-endian int32 and float32,
// Fortran order, more than 4 dimensions.
Arrays read_npz(const std::string& path);

}  // namespace pith
