#include "engine/trace.h"

#include <archive.h>
#include <archive_entry.h>

namespace pith {

constexpr std::string_view kMagic("\x93NUMPY\x01\x00", 8);
constexpr size_t kHeader = 10;  // bytes before the header: the magic and its length

// To the letter as numpy writes it.
static std::string header_of(DType dtype, const Shape& shape) {
  std::string dims = shape.str();  // "[4, 128]"
  dims = dims.substr(1, dims.size() - 2) + (shape.rank() == 1 ? "," : "");
  return fmt::format("{{'descr': '<{}4', 'fortran_order': False, 'shape': ({}), }}",
                     dtype == DType::f32 ? 'f' : 'i', dims);
}

static std::string npy_of(const Tensor& t) {
  std::string header = header_of(t.dtype(), t.shape());
  header.resize((kHeader + header.size() + 64) / 64 * 64 - kHeader, ' ');  // aligns the data
  header.back() = '\n';
  std::string npy(kMagic);
  append_raw(npy, uint16_t(header.size()));
  return npy.append(header).append(static_cast<const char*>(t.raw()), t.nbytes());
}

static Tensor tensor_of(std::string_view npy, const std::string& where) {
  if (!npy.starts_with(kMagic) || npy.size() < kHeader)
    fail_input("{}: not a .npy array of version 1, or damaged", where);
  uint16_t length;
  std::memcpy(&length, npy.data() + kMagic.size(), sizeof length);
  std::string header(npy.substr(kHeader, length));
  const std::string_view data = npy.substr(kHeader + header.size());
  header.resize(header.find_last_not_of(" \n") + 1);
  const DType dtype = header.find("'<f4'") != header.npos ? DType::f32 : DType::i32;
  std::vector<int64_t> dims;
  char* p = header.data() + std::min(header.find('('), header.size() - 1) + 1;
  for (; std::isdigit(*p) && dims.size() < 4; p += std::strspn(p, ", "))
    dims.push_back(std::strtoll(p, &p, 10));
  const Shape shape(dims);
  if (header != header_of(dtype, shape))
    fail_input("{}: malformed .npy header: expected <i4 or <f4 in C order, got {}", where,
               printable(header));
  // In doubles: integers could overflow.
  if (std::accumulate(dims.begin(), dims.end(), 4.0, std::multiplies()) != double(data.size()))
    fail_input("{}: {} bytes of data do not fit the shape", where, data.size());
  Tensor t(shape, dtype, Device::cpu, "npz");
  data.copy(static_cast<char*>(t.raw()), data.size());
  return t;
}

void write_npz(const std::string& path, const Arrays& arrays) {
  constexpr size_t headers = 4096;  // more than an entry and its array need, beside the data
  size_t room = headers, used = 0;
  for (const auto& [name, tensor] : arrays) room += headers + 2 * name.size() + tensor.nbytes();
  std::string out(room, '\0');
  const std::shared_ptr<archive> zip(archive_write_new(), archive_free);
  const std::shared_ptr<archive_entry> entry(archive_entry_new(), archive_entry_free);
  archive_write_set_format_zip(zip.get());
  archive_write_zip_set_compression_store(zip.get());
  archive_write_open_memory(zip.get(), out.data(), out.size(), &used);
  archive_entry_set_filetype(entry.get(), AE_IFREG);
  archive_entry_set_perm(entry.get(), 0644);
  for (const auto& [name, tensor] : arrays) {
    const std::string npy = npy_of(tensor);
    archive_entry_set_pathname(entry.get(), (name + ".npy").c_str());
    archive_entry_set_size(entry.get(), int64_t(npy.size()));
    archive_write_header(zip.get(), entry.get());
    archive_write_data(zip.get(), npy.data(), npy.size());
  }
  if (archive_write_close(zip.get()) != ARCHIVE_OK || archive_errno(zip.get()) != 0)
    fail("{}: {}", path, archive_error_string(zip.get()));
  write_file_atomic(path, std::string_view(out).substr(0, used));
}

Arrays read_npz(const std::string& path) {
  const std::string file = read_file(path);
  const std::shared_ptr<archive> zip(archive_read_new(), archive_free);
  std::string where = path;
  // Whether there is more; a mere warning counts as damage too.
  const auto more = [&](int result) {
    if (result != ARCHIVE_OK && result != ARCHIVE_EOF)
      fail_input("{}: not an .npz file, or damaged: {}", where, archive_error_string(zip.get()));
    return result == ARCHIVE_OK;
  };
  // By the directory at the end, which a truncated file lacks.
  more(archive_read_support_format_zip_seekable(zip.get()));
  more(archive_read_open_memory(zip.get(), file.data(), file.size()));
  Arrays arrays;
  for (archive_entry* entry; more(archive_read_next_header(zip.get(), &entry)); where = path) {
    const char* known = archive_entry_pathname(entry);
    std::string name = known ? known : "", npy;
    where += ": " + printable(name);
    const void* block;
    size_t bytes;
    int64_t offset;
    while (more(archive_read_data_block(zip.get(), &block, &bytes, &offset)))
      npy.append(static_cast<const char*>(block), bytes);
    if (name.ends_with(".npy")) name.resize(name.size() - 4);
    arrays[name] = tensor_of(npy, where);
  }
  return arrays;
}

static std::string trace_path(const std::string& directory, int64_t step) {
  return fmt::format("{}/step-{:08d}.npz", directory, step);
}

void write_routing_trace(const std::string& directory, int64_t step, const StepSums& sums,
                         const Batch& batch) {
  const size_t layers = sums.trace[0].size();
  if (layers == 0) return;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  for (size_t layer = 0; layer < layers; ++layer) {
    for (const std::vector<Routing>& micro_batch : sums.trace) {
      const auto i = micro_batch[layer].ids.to_vector<int32_t>();
      const auto w = micro_batch[layer].weights.to_vector<float>();
      ids.insert(ids.end(), i.begin(), i.end());
      weights.insert(weights.end(), w.begin(), w.end());
    }
  }
  const int64_t k = sums.trace[0][0].ids.dim(1);
  const Shape shape = {int64_t(layers), batch.batch, batch.sequence, k};
  write_npz(trace_path(directory, step), {{"expert_ids", Tensor::of<int32_t>(shape, ids)},
                                          {"gate_weights", Tensor::of<float>(shape, weights)}});
}

std::vector<Tensor> read_routing_trace(const std::string& directory, int64_t step,
                                       const Model::Size& model, const Batch& batch) {
  const std::string path = trace_path(directory, step);
  const Tensor ids = read_npz(path)["expert_ids"];
  const Shape want = {model.moe_layers, batch.batch, batch.sequence, model.top_k};
  if (!ids || ids.dtype() != DType::i32 || ids.shape() != want)
    fail_input("{}: expert_ids is {}, this run routes int32 {}", path,
               ids ? ids.shape().str() : "missing", want.str());
  std::vector<Tensor> layers;
  for (int64_t l = 0; l < model.moe_layers; ++l)
    layers.push_back(ids.row_range(l, l + 1).reshape({batch.batch * batch.sequence, model.top_k}));
  return layers;
}

}  // namespace pith
