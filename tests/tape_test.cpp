#include "core/tape.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/file.h"
#include "core/memory.h"
#include "core/op.h"
#include "core/value.h"
#include "testing.h"

namespace pith {
namespace {

// y = a x, with a gradient that can be told apart from others.
Tensor scaled(Tape& tape, const Tensor& x, double a, Loc at = Loc::current()) {
  Op op(tape, "scaled", at, {{"x", x}});
  op.require(x.rank() == 1, "x must have one dimension");
  Tensor y = op.output("y", x.shape(), x.dtype());
  op.run({.flops = double(x.numel()), .bytes = 0}, [&] {
    for (int64_t i = 0; i < x.numel(); ++i) y.data<double>()[i] = a * x.data<double>()[i];
  });
  op.backward([=](Op& op) {
    Tensor dy = op.grad(y);
    if (auto dx = op.accumulate(x))
      op.run({}, [&] {
        for (int64_t i = 0; i < dy.numel(); ++i)
          dx.tensor.data<double>()[i] =
              (dx.add ? dx.tensor.data<double>()[i] : 0) + a * dy.data<double>()[i];
      });
  });
  return y;
}

Tensor numbers(std::vector<double> v) { return Tensor::of<double>({int64_t(v.size())}, v); }

struct TapeTest : testing::Test {
  Context context{.dtype = DType::f64};
};

TEST_F(TapeTest, GradientsOfTwoUsesAdd) {
  Tape tape(context);
  Tensor x = numbers({1, 2});
  tape.leaf(x);
  Tensor a = scaled(tape, x, 3), b = scaled(tape, x, 10), c = scaled(tape, a, 2);
  tape.set_grad(c, numbers({1, 1}));
  tape.set_grad(b, numbers({1, 0}));
  tape.backward();
  EXPECT_EQ(tape.take_grad(x).to_vector<double>(), (std::vector<double>{16, 6}));
}

TEST_F(TapeTest, ClosuresWithoutGradientAreSkippedAndUnreachedLeavesAreZero) {
  Tape tape(context);
  Tensor x = numbers({1}), z = numbers({5});
  tape.leaf(x);
  tape.leaf(z);
  scaled(tape, x, 3);
  Tensor used = scaled(tape, z, 2);
  tape.set_grad(used, numbers({1}));
  tape.backward();
  EXPECT_EQ(tape.take_grad(x).to_vector<double>()[0], 0);
  EXPECT_EQ(tape.take_grad(z).to_vector<double>()[0], 2);
}

TEST_F(TapeTest, WithoutRecordingNothingIsKept) {
  Tape tape(context, false);
  Tensor x = numbers({1});
  const size_t live = memory::live(Device::cpu);
  scaled(tape, x, 3);
  EXPECT_EQ(memory::live(Device::cpu), live);
}

TEST_F(TapeTest, BackwardFreesSavedTensorsAndGradients) {
  Tensor x = numbers({1, 2, 3});
  const size_t live = memory::live(Device::cpu);
  {
    Tape tape(context);
    tape.leaf(x);
    Tensor y = scaled(tape, scaled(tape, scaled(tape, x, 2), 2), 2);
    tape.set_grad(y, numbers({1, 1, 1}));
    y = Tensor();
    EXPECT_GT(memory::live(Device::cpu), live);
    tape.backward();
    tape.take_grad(x);
    EXPECT_EQ(memory::live(Device::cpu), live);
  }
}

TEST_F(TapeTest, AFailureNamesTheCallersLineInForwardAndBackward) {
  Tape tape(context);
  Tensor matrix = Tensor::zeros({2, 2}, DType::f64, Device::cpu, "x");
  const int line = __LINE__ + 2;
  try {
    scaled(tape, matrix, 1);
    FAIL() << "a matrix was accepted";
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()),
              fmt::format("tape_test.cpp:{}: scaled: x must have one dimension; "
                          "x fp64[2, 2] cpu",
                          line));
  }
  Tensor x = numbers({1});
  tape.leaf(x);
  const int second = __LINE__ + 1;
  Tensor y = scaled(tape, x, std::nan(""));
  context.check_finite = true;
  tape.set_grad(y, numbers({1}));
  try {
    tape.backward();
    FAIL() << "a NaN gradient passed check_finite";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(
                  fmt::format("tape_test.cpp:{}: scaled backward: wrote a non-finite", second)),
              std::string::npos)
        << e.what();
  }
}

TEST_F(TapeTest, MetaCountsWithoutRunning) {
  context.device = Device::meta;
  Tape tape(context);
  Tensor x({1000}, DType::f64, Device::meta, "x");
  tape.leaf(x);
  memory::reset_peak(Device::meta);
  const size_t live = memory::live(Device::meta);
  Tensor y = scaled(tape, x, 2);
  EXPECT_EQ(memory::live(Device::meta), live + 8000);
  EXPECT_EQ(context.total.flops, 1000);
  tape.set_grad(y, Tensor({1000}, DType::f64, Device::meta, "g"));
  tape.backward();
  EXPECT_EQ(memory::peak(Device::meta), live + 24000);
  EXPECT_THROW(x.data<double>(), Error);
}

TEST_F(TapeTest, ATensorOfAnotherDeviceIsRefused) {
  Tape tape(context);
  Tensor x({4}, DType::f64, Device::meta, "x");
  EXPECT_THROW(scaled(tape, x, 1), Error);
}

TEST_F(TapeTest, TheFirstParameterGradientOfAStepOverwrites) {
  Param p;
  p.name = "p";
  p.grad = numbers({7});
  Tape tape(context);
  Tensor x = numbers({1});
  tape.leaf(x);
  for (bool add : {false, true}) {
    Op op(tape, "probe", Loc::current(), {{"x", x}});
    EXPECT_EQ(op.accumulate(p).add, add);
  }
}

TEST(Timeline, SaysWhichKernelsStagesAndGapsTookTheTime) {
  const TempDir dir;
  const Loc at = Loc::current();
  const std::vector<OpEvent> events = {{"norm", at, false, 0, 0, {}, "stage1", 3},
                                       {"norm", at, true, 0, 0, {2e9, 3e6}, "stage1", 3}};
  cuda::Timeline timeline;
  const uint64_t ms = 1000000;
  timeline.runs = {{"memcpy", 5 * ms, 6 * ms, cuda::kNoTag},
                   {"kernel<int, 2>", 6 * ms, 8 * ms, 0},
                   {"memset", 8 * ms, 9 * ms, cuda::kNoTag},  // counts to the stage before it
                   {"kernel<int, 2>", 11 * ms, 15 * ms, 1}};
  const std::string path = dir / "t.json", table = write_timeline(path, events, timeline);
  EXPECT_EQ(read_file(path + ".csv"),
            "kernel_name,total_time_ms,instances,mean_time_ms\n"
            "\"kernel<int, 2> [norm backward]\",4.0000,1,4.00000\n"
            "\"kernel<int, 2> [norm]\",2.0000,1,2.00000\n"
            "\"memcpy\",1.0000,1,1.00000\n"
            "\"memset\",1.0000,1,1.00000\n");
  EXPECT_EQ(read_file(path + ".stages.csv"),
            "stage,total_time_ms,instances,share\n"
            "stage1 backward,4.0000,1,0.40000\n"
            "stage1,3.0000,2,0.30000\n"
            "idle,2.0000,0,0.20000\n"
            "before the first op,1.0000,1,0.10000\n");
  EXPECT_NE(table.find("stage1 backward"), std::string::npos);
  const Value trace = parse_json(read_file(path), path);
  const Value& last = trace.at("traceEvents").items().at(3);
  EXPECT_EQ(last.at("ts").as_real(), 6000);
  EXPECT_EQ(last.at("dur").as_real(), 4000);
  EXPECT_EQ(last.at("args").json(),
            fmt::format("{{\"op\":\"norm backward\",\"at\":\"{}\",\"stage\":\"stage1\","
                        "\"layer\":3,\"gflop\":2.0,\"mb\":3.0}}",
                        at.str()));
}

TEST(Tensor, ReshapeKeepsIdentityAndRowRangeDoesNot) {
  Tensor x = numbers({1, 2, 3, 4, 5, 6});
  Tensor m = x.reshape({3, 2}), rows = m.row_range(1, 3);
  EXPECT_EQ(m.id(), x.id());
  EXPECT_NE(rows.id(), x.id());
  EXPECT_EQ(rows.to_vector<double>(), (std::vector<double>{3, 4, 5, 6}));
  EXPECT_THROW(x.reshape({5}), Error);
  EXPECT_THROW(m.row_range(2, 4), Error);
  EXPECT_THROW(x.data<float>(), Error);
}

TEST(Tensor, Bf16RoundsToNearestEvenAndKeepsNaN) {
  EXPECT_EQ(float(bf16(1.0f)), 1.0f);
  EXPECT_EQ(bf16(1.00390625f).bits, 0x3f80);  // halfway: to even, down
  EXPECT_EQ(bf16(1.01171875f).bits, 0x3f82);  // halfway: to even, up
  EXPECT_TRUE(std::isnan(float(bf16(std::nanf("")))));
  EXPECT_TRUE(std::isinf(float(bf16(3.4e38f))));
}

TEST(Tensor, RelativeL2) {
  EXPECT_EQ(relative_l2({3, 4, 1}, {3, 0, 4}), 1.0);
  EXPECT_EQ(relative_l2({3, 4}, {0, 0}), 5.0);  // absolute where the reference is zero
}

}  // namespace
}  // namespace pith
