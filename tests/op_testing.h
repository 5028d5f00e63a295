#pragma once
// One definition of an op gives its test against a naive fp64 reference in every dtype, its test
// against finite differences, and its run on meta.

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "core/op.h"

namespace pith {

using Inputs = std::vector<Tensor>;
using Params = std::vector<std::unique_ptr<Param>>;

struct OpCase {
  std::string name;
  // Shapes of the differentiable inputs and of the parameters; filled with normal numbers
  // (parameters too).
  std::vector<Shape> inputs;
  std::vector<Shape> params;
  // Runs the op on `tape`; the results are compared in order. Integer tensors and constants are
  // captured.
  std::function<Inputs(Tape& tape, const Inputs& x, const Params& w)> run;
  // The same results, naive, in fp64: x and w as flat vectors of doubles.
  std::function<std::vector<std::vector<double>>(const std::vector<std::vector<double>>& x,
                                                 const std::vector<std::vector<double>>& w)>
      reference;
  // Dtypes to try and the allowed error, relative to the largest magnitude of the result.
  struct Tolerance {
    DType dtype;
    double value;
  };
  std::vector<Tolerance> tolerances = {
      {DType::f64, 1e-12}, {DType::f32, 2e-6}, {DType::bf16, 2e-2}};
  double input_scale = 1.0;
  // Finite differences in fp64 of sum(result * fixed random weights) along random directions, for
  // every input and parameter: relative error.
  double gradient_tolerance = 1e-6;
  bool differentiable = true;
};

// Where check_op runs: $PITH_TEST_DEVICE, cpu or cuda (fp64 there runs the CPU's code on copies).
Device test_device();
// What cases capture.
Tensor ints(const std::vector<int32_t>& v, Device device = test_device());
// NaN everywhere: what a first write must overwrite, or nobody may read.
void fill_nan(Tensor t);

// EXPECTs forward in every dtype, gradients of fp64 against finite differences, gradients of fp32
// and bf16 against those of fp64 (10 x tolerance), that a second backward contribution adds, and
// that meta gives the same shapes and bytes.
void check_op(const OpCase& c);

// A parameter outside a model: allocated in `compute`, with a gradient.
std::unique_ptr<Param> make_param(const std::string& name, Shape shape, DType compute,
                                  Device device = Device::cpu);

}  // namespace pith
