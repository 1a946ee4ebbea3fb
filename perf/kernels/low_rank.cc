// The functions of runtime/low_rank.h against the same work done with `gemm` (runtime/linalg.h), one thread,
// float32, over factor ranks. Matrices rotate through more memory than the last-level cache holds.
//
//   low_rank --benchmark_filter=768x2048 --benchmark_repetitions=5
//   --benchmark_enable_random_interleaving=true
//
// Counter `floor`: measured time over the larger of (bytes that must move / bandwidth) and (flops / peak).
// Both are measured at the start: the bandwidth of a plain loop with the same reads and writes, and the rate
// of independent FMAs. Counter GB/s: those bytes by the measured time.

#include "runtime/low_rank.h"

#include "perf/compare/machine.h"
#include "runtime/buffer.h"
#include "runtime/cpu.h"
#include "runtime/random.h"
#include "runtime/vector_kernels.h"

#include <algorithm>
#include <iostream>

#include <benchmark/benchmark.h>

namespace lowband {
namespace {

// Four times the 32 MiB of a large last-level cache.
constexpr Index kRotatedBytes = Index{128} << 20;

Buffer<float> gaussian(Index elements, std::string_view name) {
  Buffer<float> buffer(elements);
  const RandomStream stream(3, name);
  for (Index i = 0; i < elements; ++i) buffer[i] = static_cast<float>(stream.normal(i % 65536));
  return buffer;
}

struct Shape {
  Index rows, cols;
};

/// Matrices of one shape, one after the other, and factors for them.
class Data {
 public:
  Data(Shape shape, Index r)
      : shape_(shape),
        count_(kRotatedBytes / (4 * shape.rows * shape.cols)),
        m_(gaussian(count_ * shape.rows * shape.cols, "m")),
        g_(gaussian(count_ * shape.rows * shape.cols, "g")),
        left_(gaussian(shape.rows * r, "left")),
        right_(gaussian(shape.cols * r, "right")),
        out_left_(shape.rows * r),
        out_right_(shape.cols * r),
        left(left_.matrix(0, shape.rows, r)),
        right(right_.matrix(0, shape.cols, r)),
        out_left(out_left_.matrix(0, shape.rows, r)),
        out_right(out_right_.matrix(0, shape.cols, r)) {
    // Updates repeat for a long time: small factors keep the matrix finite.
    for (Buffer<float>* factor : {&left_, &right_}) {
      for (float& x : factor->span()) x *= 1e-3F;
    }
  }
  void next() { current_ = (current_ + 1) % count_; }
  MatrixView<float> m() { return m_.matrix(current_ * shape_.rows * shape_.cols, shape_.rows, shape_.cols); }
  MatrixView<float> g() { return g_.matrix(current_ * shape_.rows * shape_.cols, shape_.rows, shape_.cols); }

 private:
  Shape shape_;
  Index count_, current_ = 0;
  Buffer<float> m_, g_, left_, right_, out_left_, out_right_;

 public:
  MatrixView<float> left, right, out_left, out_right;
};

struct Case {
  const char* name;
  int products;       // of 2 rows cols r flops
  int reads, writes;  // of rows cols elements
  double Machine::*bandwidth;
  void (*ours)(Data&);
  void (*library)(Data&);
};

void library_accumulate(Data& d) {
  vector_kernels<float>().axpy(0.5F, d.g().data, d.m().data, d.m().elements());
}

const Case kCases[] = {
    {"accumulate_and_multiply", 1, 2, 1, &Machine::accumulate,
     [](Data& d) { accumulate_and_multiply<float>(0.5F, d.g(), d.m(), Op::kNone, d.right, d.out_left); },
     [](Data& d) {
       library_accumulate(d);
       gemm<float>(Op::kNone, Op::kNone, 1, d.m(), d.right, 0, d.out_left);
     }},
    {"accumulate_and_multiply^T", 1, 2, 1, &Machine::accumulate,
     [](Data& d) { accumulate_and_multiply<float>(0.5F, d.g(), d.m(), Op::kTranspose, d.left, d.out_right); },
     [](Data& d) {
       library_accumulate(d);
       gemm<float>(Op::kTranspose, Op::kNone, 1, d.m(), d.left, 0, d.out_right);
     }},
    {"multiply", 1, 1, 0, &Machine::read,
     [](Data& d) { multiply<float>(Op::kNone, d.m(), d.right, d.out_left); },
     [](Data& d) { gemm<float>(Op::kNone, Op::kNone, 1, d.m(), d.right, 0, d.out_left); }},
    {"multiply^T", 1, 1, 0, &Machine::read,
     [](Data& d) { multiply<float>(Op::kTranspose, d.m(), d.left, d.out_right); },
     [](Data& d) { gemm<float>(Op::kTranspose, Op::kNone, 1, d.m(), d.left, 0, d.out_right); }},
    {"multiply_there_and_back", 2, 1, 0, &Machine::read,
     [](Data& d) { multiply_there_and_back<float>(d.m(), d.right, d.out_left, d.out_right); },
     [](Data& d) {
       gemm<float>(Op::kNone, Op::kNone, 1, d.m(), d.right, 0, d.out_left);
       gemm<float>(Op::kTranspose, Op::kNone, 1, d.m(), d.out_left, 0, d.out_right);
     }},
    {"accumulate_and_multiply_there_and_back", 2, 2, 1, &Machine::accumulate,
     [](Data& d) {
       accumulate_and_multiply_there_and_back<float>(0.5F, d.g(), 0.5F, d.m(), d.right, d.out_left,
                                                     d.out_right);
     },
     [](Data& d) {
       accumulate<float>(0.5F, d.g(), 0.5F, d.m());
       gemm<float>(Op::kNone, Op::kNone, 1, d.m(), d.right, 0, d.out_left);
       gemm<float>(Op::kTranspose, Op::kNone, 1, d.m(), d.out_left, 0, d.out_right);
     }},
    {"add_product", 1, 1, 1, &Machine::update,
     [](Data& d) {
       add_product<float>(-0.5F, {d.left, d.right}, 1, d.m());
     },
     [](Data& d) { gemm<float>(Op::kNone, Op::kTranspose, -0.5F, d.left, d.right, 1, d.m()); }},
    {"decompress", 2, 1, 2, &Machine::accumulate,
     [](Data& d) {
       decompress<float>({d.left, d.right}, {d.left, d.right}, d.g(), d.m());
     },
     [](Data& d) {
       gemm<float>(Op::kNone, Op::kTranspose, -1, d.left, d.right, 1, d.m());
       gemm<float>(Op::kNone, Op::kTranspose, 1, d.left, d.right, 0, d.g());
     }},
};

void run(benchmark::State& state, const Case& c, Shape shape, Index r, void (*body)(Data&),
         const Machine& machine) {
  Data data(shape, r);
  for (auto _ : state) {
    data.next();
    body(data);
  }
  const double matrix_bytes = 4.0 * static_cast<double>(shape.rows * shape.cols);
  const double bytes = matrix_bytes * (c.reads + c.writes);
  const double flops = matrix_bytes / 2 * static_cast<double>(r) * c.products;
  const double floor = std::max(bytes / (machine.*c.bandwidth), flops / machine.float_flops);
  using benchmark::Counter;
  const auto iterations = static_cast<double>(state.iterations());
  state.counters["GB/s"] = Counter(bytes * iterations / 1e9, Counter::kIsRate);
  // A rate divides by the time, and the inverse turns it round: time / (floor x iterations).
  state.counters["floor"] = Counter(floor * iterations, Counter::Flags(Counter::kIsRate | Counter::kInvert));
}

void register_cases(const Machine& machine) {
  for (const Case& c : kCases) {
    for (const Shape shape : {Shape{768, 768}, Shape{768, 2048}, Shape{2048, 768}}) {
      for (const Index r : {1, 2, 4, 8, 12, 16, 32, 64, 128, 620}) {
        for (const auto& [who, body] : {std::pair("ours", c.ours), std::pair("gemm", c.library)}) {
          const std::string name = cat(c.name, "/", shape.rows, "x", shape.cols, "/r", r, "/", who);
          benchmark::RegisterBenchmark(name.c_str(), [&c, shape, r, body, &machine](benchmark::State& state) {
            run(state, c, shape, r, body, machine);
          })->MinTime(0.1);
        }
      }
    }
  }
}

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  lowband::ensure_fast_blas_kernels(argv);
  lowband::set_compute_threads(1);
  const lowband::Machine machine = lowband::measure_machine();
  std::cout << "# GB/s of plain loops: read " << machine.read / 1e9 << ", update " << machine.update / 1e9
            << ", accumulate " << machine.accumulate / 1e9 << ", write " << machine.write / 1e9 << "; FMA "
            << machine.float_flops / 1e9 << " Gflop/s\n";
  lowband::register_cases(machine);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 64;
  benchmark::RunSpecifiedBenchmarks();
}
