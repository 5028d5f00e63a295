#pragma once
// Tensor: a small value type over shared storage. Rows are contiguous, up to 4 dimensions. No
// graph, no dispatcher.

#include "core/error.h"

namespace pith {

enum class DType : uint8_t { f64, f32, bf16, e4m3, i64, i32, u16, u8 };
// cpu: host memory. cuda: device memory. meta: shape and bytes but no memory, for planning: ops on
// meta allocate, count FLOPs and bytes, and run nothing.
enum class Device : uint8_t { cpu, cuda, meta };

size_t size_of(DType t);
const char* name_of(DType t);  // "fp32", "bf16", ... as users write them
const char* name_of(Device d);
// "cpu", "cuda" or "auto", which is the GPU if there is a usable one. InputError if not.
Device parse_device(const std::string& text);
DType parse_dtype(const std::string& text);  // InputError for anything but fp64, fp32, bf16

// Brain float: the upper half of a float. Conversion rounds to nearest even and keeps NaN.
struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  explicit bf16(float x) : bits(round(x)) {}
  bf16(const bf16&) = default;
  // Written out because gcc 12 does not vectorize `omp simd` loops that copy a struct as a whole.
  bf16& operator=(const bf16& o) {
    bits = o.bits;
    return *this;
  }
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }

 private:
  static constexpr uint16_t round(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    // A mask: a branch would not vectorize.
    const uint32_t nan = -uint32_t((u & 0x7fffffffu) > 0x7f800000u);
    return static_cast<uint16_t>((((u >> 16) | 0x40u) & nan) | (rounded & ~nan));
  }
};

template <class T> constexpr DType dtype_of();
template <> constexpr DType dtype_of<double>() { return DType::f64; }
template <> constexpr DType dtype_of<float>() { return DType::f32; }
template <> constexpr DType dtype_of<bf16>() { return DType::bf16; }
template <> constexpr DType dtype_of<int64_t>() { return DType::i64; }
template <> constexpr DType dtype_of<int32_t>() { return DType::i32; }
template <> constexpr DType dtype_of<uint16_t>() { return DType::u16; }
template <> constexpr DType dtype_of<uint8_t>() { return DType::u8; }

// Calls f with a value of the C++ type of a floating dtype: by_float(t, [&](auto z) { using T =
// decltype(z); ... }).
template <class F> decltype(auto) by_float(DType t, F&& f) {
  switch (t) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    default: fail("{} is not a floating dtype here", name_of(t));
  }
}

class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : Shape(std::span(dims.begin(), dims.size())) {}
  explicit Shape(std::span<const int64_t> dims);
  int rank() const { return rank_; }
  int64_t operator[](int i) const { return dims_[i]; }
  int64_t numel(int first = 0) const {  // elements; of the dimensions from `first` on
    return std::accumulate(dims_ + std::min(first, rank_), dims_ + rank_, int64_t(1),
                           std::multiplies());
  }
  std::span<const int64_t> dims() const { return {dims_, size_t(rank_)}; }
  bool operator==(const Shape& o) const = default;
  std::string str() const;  // "[4, 128]"

 private:
  friend class Tensor;
  int64_t dims_[4] = {0, 0, 0, 0};
  int rank_ = 0;
};

class Tensor {
 public:
  Tensor() = default;
  // Uninitialized memory, counted by the allocator (core/memory.h) under `name`.
  Tensor(Shape shape, DType dtype, Device device, const char* name);
  static Tensor zeros(Shape shape, DType dtype, Device device, const char* name);
  template <class T>
  static Tensor of(Shape shape, std::span<const T> values, const char* name = "values") {
    Tensor t(shape, dtype_of<T>(), Device::cpu, name);
    if (t.numel() != int64_t(values.size()))
      fail("Tensor::of: {} values for shape {}", values.size(), shape.str());
    if (!values.empty()) std::memcpy(t.raw(), values.data(), t.nbytes());
    return t;
  }

  explicit operator bool() const { return storage_ != nullptr; }
  const Shape& shape() const { return shape_; }
  int rank() const { return shape_.rank(); }
  int64_t dim(int i) const { return shape_[i]; }
  int64_t rows() const { return rank() == 0 ? 1 : shape_[0]; }
  int64_t cols() const { return shape_.numel(1); }  // elements per row of dimension 0
  int64_t numel() const { return shape_.numel(); }
  size_t nbytes() const { return size_t(numel()) * size_of(dtype_); }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  uint64_t id() const { return id_; }  // identity for the tape: equal for a tensor and its reshapes

  // Checked typed pointer; throws on the wrong dtype or on meta. data<T>() of a const Tensor is
  // const.
  template <class T> T* data() { return static_cast<T*>(raw(dtype_of<T>(), true)); }
  template <class T> const T* data() const { return static_cast<T*>(raw(dtype_of<T>(), false)); }
  template <class T> std::span<T> span() { return {data<T>(), size_t(numel())}; }
  template <class T> std::span<const T> span() const { return {data<T>(), size_t(numel())}; }
  void* raw() { return raw(dtype_, true); }
  const void* raw() const { return raw(dtype_, false); }

  Tensor reshape(Shape shape) const;  // same memory, same identity
  // Same memory, new identity: no gradient flows through it. Of an empty tensor: empty.
  Tensor row_range(int64_t begin, int64_t end) const;
  Tensor elements(int64_t begin, int64_t end) const;  // the same of all elements in a row
  // No memory, same identity and shape: all that a backward closure needs of a tensor whose values
  // it does not read.
  Tensor identity() const;
  Tensor clone(const char* name) const { return to(dtype_, name); }
  Tensor to(DType dtype, const char* name) const;
  Tensor on(Device device) const;  // itself if it is there, else a copy; to meta: no memory
  void fill_zero();
  void copy_from(
      const Tensor& src);         // as many elements; converts floating dtypes, between devices too
  void add(const Tensor& other);  // of the same shape and floating dtype, element by element
  // Gives memory back that `remake(*this)` can fill again: from evict() to restore() there are no
  // data. Both do nothing for a tensor without a remake.
  void set_remake(std::function<void(const Tensor&)> remake);
  void evict() const;
  void restore() const;
  std::string str() const;  // "bf16[4, 128] cpu"
  // Converted copy, for tests and small results.
  template <class T> std::vector<T> to_vector() const {
    std::vector<T> out(static_cast<size_t>(numel()));
    const Tensor host = on(Device::cpu);
    const auto copy = [&](auto z) { std::copy_n(host.data<decltype(z)>(), numel(), out.begin()); };
    switch (dtype_) {
      case DType::i64: copy(int64_t{}); break;
      case DType::i32: copy(int32_t{}); break;
      default: by_float(dtype_, copy);
    }
    return out;
  }

 private:
  struct Storage;
  void* raw(DType want, bool writes) const;
  std::shared_ptr<Storage> storage_;
  size_t offset_ = 0;  // bytes
  Shape shape_;
  DType dtype_ = DType::f32;
  Device device_ = Device::cpu;
  uint64_t id_ = 0;
};

// |a - reference| / |reference|, or |a - reference| where the reference is zero.
double relative_l2(const std::vector<double>& a, const std::vector<double>& reference);

// Runs f, in which data() of cuda tensors gives copies in host memory; what was asked for to write
// goes back at the end: so that an op without a CUDA kernel runs on the host.
void on_host(const std::function<void()>& f);

}  // namespace pith
