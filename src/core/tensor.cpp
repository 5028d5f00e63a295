#include "core/tensor.h"

#include <atomic>
#include <mutex>

#include "core/cuda.h"
#include "core/memory.h"

namespace pith {
namespace {

constexpr std::pair<const char*, size_t> kDTypes[] = {{"fp64", 8},   {"fp32", 4},  {"bf16", 2},
                                                      {"e4m3", 1},   {"int64", 8}, {"int32", 4},
                                                      {"uint16", 2}, {"uint8", 1}};
constexpr const char* kDevices[] = {"cpu", "cuda", "meta"};
std::atomic<uint64_t> last_id{0};

// The copies of on_host, by the memory they are of.
struct HostCopy {
  std::shared_ptr<void> keep;
  std::vector<std::byte> bytes;
  bool written = false;
};
std::mutex host_mutex;
std::map<void*, HostCopy> host_copies;
int host_view = 0;  // how many on_host are under way

}  // namespace

size_t size_of(DType t) { return kDTypes[int(t)].second; }
const char* name_of(DType t) { return kDTypes[int(t)].first; }
const char* name_of(Device d) { return kDevices[int(d)]; }

DType parse_dtype(const std::string& text) {
  for (DType t : {DType::f64, DType::f32, DType::bf16})
    if (text == name_of(t)) return t;
  fail_input("unknown dtype '{}': use bf16, fp32 or fp64", text);
}

Device parse_device(const std::string& text) {
  if (text == "cpu" || (text == "auto" && !cuda::is_available())) return Device::cpu;
  if (text != "cuda" && text != "auto")
    fail_input("unknown device '{}': use cpu, cuda or auto", text);
  cuda::require_device();
  return Device::cuda;
}

Shape::Shape(std::span<const int64_t> dims) : rank_(int(dims.size())) {
  if (rank_ > 4) fail("a tensor has at most 4 dimensions, not {}", rank_);
  for (int i = 0; i < rank_; ++i) {
    if (dims[i] < 0) fail("negative dimension {} in a shape", dims[i]);
    dims_[i] = dims[i];
  }
}

std::string Shape::str() const {
  std::string s = "[";
  for (int i = 0; i < rank_; ++i) s += (i ? ", " : "") + std::to_string(dims_[i]);
  return s + "]";
}

struct Tensor::Storage {
  void* data;  // on meta it points nowhere
  size_t bytes;
  Device device;
  const char* name;
  bool evicted = false;
  std::function<void(const Tensor&)> remake = nullptr;
  ~Storage() {
    if (!evicted) memory::release(data, bytes, device, name);
  }
};

Tensor::Tensor(Shape shape, DType dtype, Device device, const char* name)
    : shape_(shape), dtype_(dtype), device_(device), id_(++last_id) {
  storage_.reset(new Storage{memory::allocate(nbytes(), device, name), nbytes(), device, name});
}

Tensor Tensor::zeros(Shape shape, DType dtype, Device device, const char* name) {
  Tensor t(shape, dtype, device, name);
  t.fill_zero();
  return t;
}

void* Tensor::raw(DType want, bool writes) const {
  if (dtype_ != want) fail("a {} tensor was read as {}", str(), name_of(want));
  if (!*this) fail("an empty tensor has no data");
  if (device_ == Device::meta) fail("a meta tensor {} has no data", shape_.str());
  if (storage_->evicted) fail("the data of {} were given back", str());
  void* data = storage_->data;
  if (device_ == Device::cuda && host_view) {
    const std::lock_guard lock(host_mutex);
    HostCopy& copy = host_copies[data];
    if (!copy.keep) {
      copy.keep = storage_;
      copy.bytes.resize(storage_->bytes);
      cuda::copy(copy.bytes.data(), data, storage_->bytes);
    }
    copy.written |= writes;
    data = copy.bytes.data();
  }
  return static_cast<std::byte*>(data) + offset_;
}

void on_host(const std::function<void()>& f) {
  const auto leave = [](int* views) {
    if (--*views == 0) host_copies.clear();
  };
  const std::unique_ptr<int, decltype(leave)> inside(&host_view);
  ++host_view;
  f();
  for (const auto& [data, copy] : host_copies)
    if (copy.written) cuda::copy(data, copy.bytes.data(), copy.bytes.size());
}

Tensor Tensor::reshape(Shape shape) const {
  if (shape.numel() != numel()) fail("cannot reshape {} to {}", shape_.str(), shape.str());
  Tensor t = *this;
  t.shape_ = shape;
  return t;
}

Tensor Tensor::elements(int64_t begin, int64_t end) const {
  return id_ ? reshape({numel()}).row_range(begin, end) : *this;
}

Tensor Tensor::row_range(int64_t begin, int64_t end) const {
  if (!id_) return *this;
  if (rank() < 1 || begin < 0 || end < begin || end > dim(0))
    fail("rows [{}, {}) of a tensor {}", begin, end, shape_.str());
  Tensor t = *this;
  t.shape_.dims_[0] = end - begin;
  t.offset_ += size_t(begin * cols()) * size_of(dtype_);
  t.id_ = ++last_id;
  return t;
}

Tensor Tensor::identity() const {
  Tensor t = *this;
  t.storage_ = nullptr;
  return t;
}

Tensor Tensor::to(DType dtype, const char* name) const {
  Tensor t(shape_, dtype, device_, name);
  t.copy_from(*this);
  return t;
}

Tensor Tensor::on(Device device) const {
  if (device == device_ || !id_) return *this;
  Tensor t(shape_, dtype_, device, "copy");
  t.copy_from(*this);
  return t;
}

void Tensor::fill_zero() {
  if (device_ == Device::meta || nbytes() == 0) return;
  if (device_ == Device::cuda && !host_view)
    cuda::fill_zero(raw(), nbytes());
  else
    std::memset(raw(), 0, nbytes());
}

void Tensor::copy_from(const Tensor& src) {
  if (src.numel() != numel()) fail("cannot copy {} into {}", src.str(), str());
  if (device_ == Device::meta || src.device_ == Device::meta || numel() == 0) return;
  const bool on_gpu = (device_ == Device::cuda || src.device_ == Device::cuda) && !host_view;
  if (src.dtype_ == dtype_) {
    on_gpu ? cuda::copy(raw(), src.raw(), nbytes()) : void(std::memcpy(raw(), src.raw(), nbytes()));
    return;
  }
  if (on_gpu && device_ == src.device_ &&
      cuda::convert(raw(), dtype_, src.raw(), src.dtype_, numel()))
    return;
  if (on_gpu) return copy_from(src.on(Device::cpu).to(dtype_, "copy").on(device_));
  by_float(dtype_, [&](auto d) {
    by_float(src.dtype_, [&](auto s) {
      const auto* in = src.data<decltype(s)>();
      auto* out = data<decltype(d)>();
      const int64_t n = numel();
      using To = std::conditional_t<std::is_same_v<decltype(d), bf16>, float, decltype(d)>;
#pragma omp parallel for simd if (n > 65536)
      for (int64_t i = 0; i < n; ++i) out[i] = decltype(d)(To(in[i]));
    });
  });
}

void Tensor::add(const Tensor& other) {
  if (device_ == Device::meta || numel() == 0) return;
  if (device_ == Device::cuda && !host_view &&
      cuda::convert(raw(), dtype_, other.raw(), dtype_, numel(), true))
    return;
  on_host([&] {
    by_float(dtype_, [&](auto z) {
      using T = decltype(z);
      T* to = data<T>();
      const T* from = other.data<T>();
#pragma omp parallel for simd if (parallel : numel() > 65536)
      for (int64_t i = 0; i < numel(); ++i) to[i] = T(to[i] + from[i]);
    });
  });
}

void Tensor::set_remake(std::function<void(const Tensor&)> remake) {
  storage_->remake = std::move(remake);
}

void Tensor::evict() const {
  if (!storage_ || !storage_->remake || storage_->evicted) return;
  storage_->evicted = true;
  memory::release(storage_->data, storage_->bytes, device_, storage_->name);
}

void Tensor::restore() const {
  if (!storage_ || !storage_->evicted) return;
  storage_->data = memory::allocate(storage_->bytes, device_, storage_->name);
  storage_->evicted = false;
  storage_->remake(*this);
}

std::string Tensor::str() const {
  if (!id_) return "empty";
  return std::string(name_of(dtype_)) + shape_.str() + " " + name_of(device_);
}

double relative_l2(const std::vector<double>& a, const std::vector<double>& reference) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - reference[i]) * (a[i] - reference[i]);
    norm += reference[i] * reference[i];
  }
  return std::sqrt(norm > 0 ? difference / norm : difference);
}

}  // namespace pith
