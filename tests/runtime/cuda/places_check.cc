// The functions on views give on a Device what they give on the host: element by element the same bits, sums
// and products to their rounding.
#include "runtime/copy.h"
#include "runtime/linalg.h"
#include "runtime/low_rank.h"
#include "runtime/passes.h"
#include "tests/runtime/cuda/device_checks.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

namespace lowband {
namespace {

using namespace test;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// One matrix on the host and on the device, with rows that lie `spare` elements further apart than they are
/// long.
class Both {
 public:
  Both(Device& device, Index rows, Index cols, Index seed, Index spare = 0)
      : host_(rows * (cols + spare)),
        there_(rows * (cols + spare), &device),
        rows_(rows),
        cols_(cols),
        stride_(cols + spare) {
    const std::vector<float> values = noise(std::max<Index>(1, host_.size()), seed);
    std::copy_n(values.begin(), host_.size(), host_.data());
    copy(host_.line(), there_.line());
  }
  MatrixView<float> host() { return {host_.data(), rows_, cols_, stride_}; }
  MatrixView<float> there() { return {there_.data(), rows_, cols_, stride_, there_.device()}; }
  void set(Index element, float value) {
    host_[element] = value;
    copy(host_.line(), there_.line());
  }
  /// What lies on the device; nothing between the rows has changed.
  Buffer<float> found() {
    Buffer<float> whole(host_.size()), own(rows_ * cols_);
    copy(there_.line(), whole.line());
    for (Index i = 0; i < rows_; ++i) {
      for (Index j = cols_; j < stride_ && i * stride_ + j < host_.size(); ++j)
        expect(whole[i * stride_ + j] == host_[i * stride_ + j], "written beside row ", i);
    }
    copy(MatrixView<float>(whole.data(), rows_, cols_, stride_), own.matrix(0, rows_, cols_));
    return own;
  }
  /// tolerance 0: the same bits.
  void expect_equal(std::string_view what, double tolerance = 0) {
    const Buffer<float> own = found();
    for (Index i = 0; i < rows_; ++i) {
      for (Index j = 0; j < cols_; ++j) {
        const float a = own[i * cols_ + j], b = host()(i, j);
        const bool same = tolerance == 0 ? std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b)
                                         : std::abs(a - b) <= tolerance;
        expect(same, what, ": (", i, ", ", j, ") is ", a, ", on the host ", b);
      }
    }
  }

 private:
  Buffer<float> host_, there_;
  Index rows_, cols_, stride_;
};

struct Shape {
  Index rows, cols, spare;
};
constexpr Shape kShapes[] = {{1, 1, 0},    {3, 5, 0},   {33, 70, 0}, {33, 70, 9},
                             {1, 3000, 0}, {700, 2, 3}, {0, 4, 0}};

// body(shape, device)
void on_shapes(const std::function<void(const Shape&, Device&)>& body) {
  const std::unique_ptr<Device> device = open_device();
  for (const Shape& shape : kShapes) body(shape, *device);
}

void check_elements(const CudaStream& /*stream*/) {
  on_shapes([](const Shape& s, Device& device) {
    Both x(device, s.rows, s.cols, 1, s.spare), y(device, s.rows, s.cols, 2);
    for (const float beta : {0.0F, 1.0F, 0.875F}) {
      add<float>(0.3F, x.host(), beta, y.host());
      add<float>(0.3F, x.there(), beta, y.there());
      y.expect_equal("add");
    }
    scale<float>(0.7F, x.host());
    scale<float>(0.7F, x.there());
    x.expect_equal("scale");
    const std::vector<float> of_rows = noise(std::max<Index>(1, s.rows), 3), of_columns = noise(s.cols, 4);
    const auto row_factors = std::span<const float>(of_rows).first(at(s.rows));
    scale_rows<float>(row_factors, x.host());
    scale_rows<float>(row_factors, x.there());
    x.expect_equal("scale_rows");
    scale_columns<float>(of_columns, x.host());
    scale_columns<float>(of_columns, x.there());
    x.expect_equal("scale_columns");
    Buffer<BFloat16> rounded(s.rows * s.cols), rounded_there(s.rows * s.cols, &device);
    round_to_bf16<float>(x.host(), rounded.matrix(0, s.rows, s.cols));
    round_to_bf16<float>(x.there(), rounded_there.matrix(0, s.rows, s.cols));
    widen_bf16<float>(rounded.matrix(0, s.rows, s.cols), y.host());
    widen_bf16<float>(rounded_there.matrix(0, s.rows, s.cols), y.there());
    y.expect_equal("bf16");
    fill<float>(0.5F, x.host());
    fill<float>(0.5F, x.there());
    x.expect_equal("fill");
  });
}

void check_steps(const CudaStream& /*stream*/) {
  on_shapes([](const Shape& s, Device& device) {
    Both g(device, s.rows, s.cols, 1), m(device, s.rows, s.cols, 2), w(device, s.rows, s.cols, 3, s.spare);
    Both v(device, s.rows, s.cols, 4);
    add<float>(0, v.host(), 0, v.host());  // second moments are no noise: zeros
    add<float>(0, v.there(), 0, v.there());
    const AdamWStep<float> adamw{.beta1 = 0.9F,
                                 .beta2 = 0.95F,
                                 .step_size = 0.01F,
                                 .inv_sqrt_correction2 = 1.5F,
                                 .epsilon = 1e-8F,
                                 .decay = 0.99F,
                                 .gradient_scale = 0.5F};
    update<float>(adamw, g.host(), m.host(), v.host(), w.host());
    update<float>(adamw, g.there(), m.there(), v.there(), w.there());
    Both n(device, s.rows, s.cols, 5, s.spare);
    const AdamDirection<float> direction{.beta1 = 0.9F,
                                         .new1 = 0.1F,
                                         .beta2 = 0.999F,
                                         .new2 = 0.001F,
                                         .correction = 0.3F,
                                         .epsilon = 1e-6F,
                                         .gradient_scale = 0.5F};
    update<float>(direction, g.host(), m.host(), v.host(), n.host());
    update<float>(direction, g.there(), m.there(), v.there(), n.there());
    n.expect_equal("direction");
    const LionStep<float> lion{.beta1 = 0.9F,
                               .new1 = 0.1F,
                               .beta2 = 0.99F,
                               .new2 = 0.01F,
                               .eta = 0.01F,
                               .decay = 0.99F,
                               .gradient_scale = 0.5F};
    update<float>(lion, g.host(), m.host(), w.host());
    update<float>(lion, g.there(), m.there(), w.there());
    const SgdStep<float> sgd{
        .mu = 0.9F, .own = 1, .across = 0.9F, .eta = 0.01F, .decay = 0.99F, .gradient_scale = 0.5F};
    update<float>(sgd, g.host(), v.host(), w.host());
    update<float>(sgd, g.there(), v.there(), w.there());
    m.expect_equal("first moment");
    v.expect_equal("second moment");
    w.expect_equal("weight");
  });
}

void check_slices(const CudaStream& /*stream*/) {
  const std::unique_ptr<Device> device = open_device();
  const std::vector<Index> places{6, 0, 3};
  for (const bool of_rows : {true, false}) {
    Both x(*device, 7, 9, 1, 2), u(*device, of_rows ? 3 : 7, of_rows ? 9 : 3, 2, 1);
    take_slices<float>(of_rows, places, x.host(), u.host());
    take_slices<float>(of_rows, places, x.there(), u.there());
    u.expect_equal("slices taken");
    expect(u.host()(2, 2) == (of_rows ? x.host()(3, 2) : x.host()(2, 3)), "the wrong slice");
    add_to_slices<float>(-0.3F, u.host(), of_rows, places, x.host());
    add_to_slices<float>(-0.3F, u.there(), of_rows, places, x.there());
    x.expect_equal("slices added to");
  }
}

// Sums of n squares in double, in two orders: each is off by at most n u of the sum.
void expect_close(const std::vector<double>& found, const std::vector<double>& expected, Index terms,
                  std::string_view what) {
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double tolerance = static_cast<double>(terms) * 0x1p-52 * expected[i];
    expect(std::abs(found[i] - expected[i]) <= tolerance, what, " ", i, ": ", found[i], ", on the host ",
           expected[i]);
  }
}

void check_sums(const CudaStream& /*stream*/) {
  on_shapes([](const Shape& s, Device& device) {
    Both x(device, s.rows, s.cols, 1, s.spare), y(device, s.cols, s.cols, 2);
    const auto sums = [&](MatrixView<const float> first, MatrixView<const float> second) {
      std::vector<double> found(2);
      const MatrixView<const float> both[] = {first, second};
      usable_sums_of_squares<float>(both, found);
      return found;
    };
    expect_close(sums(x.there(), y.there()), sums(x.host(), y.host()), s.cols * (s.rows + s.cols), "sum");
    expect_close({sum_of_squares<float>(x.there())}, {sum_of_squares<float>(x.host())}, s.rows * s.cols,
                 "sum");
    std::vector<double> rows(at(s.rows)), rows_there(rows), columns(at(s.cols)), columns_there(columns);
    sums_of_squares_of_rows<float>(x.host(), rows);
    sums_of_squares_of_rows<float>(x.there(), rows_there);
    expect_close(rows_there, rows, s.cols, "row");
    columns.resize(at(2 * s.cols));
    columns_there.resize(at(2 * s.cols));
    const MatrixView<const float> twice[] = {x.host(), y.host()}, twice_there[] = {x.there(), y.there()};
    sums_of_squares_of_columns<float>(twice, columns);
    sums_of_squares_of_columns<float>(twice_there, columns_there);
    expect_close(columns_there, columns, s.rows + s.cols, "column");
    for (const bool of_rows : {true, false}) {
      std::vector<double> magnitudes(at(of_rows ? s.rows : s.cols)), magnitudes_there(magnitudes);
      sums_of_magnitudes<float>(of_rows, x.host(), magnitudes);
      sums_of_magnitudes<float>(of_rows, x.there(), magnitudes_there);
      expect_close(magnitudes_there, magnitudes, s.rows + s.cols, "magnitudes");
    }
    Both z(device, s.rows, s.cols, 1);
    // Terms of magnitude one or so, of either sign.
    const double inner = inner_product<float>(x.host(), z.host()),
                 inner_there = inner_product<float>(x.there(), z.there());
    const auto terms = static_cast<double>(s.rows * s.cols);
    expect(std::abs(inner - inner_there) <= terms * terms * 0x1p-52, "inner product: ", inner_there,
           ", on the host ", inner);
    if (s.rows == 0) return;
    expect(all_finite<float>(x.there()), "finite");
    for (const float bad : {std::numeric_limits<float>::infinity(), -3e19F, std::nanf("")}) {
      x.set(s.cols - 1, bad);
      const double host = sums(x.host(), y.host())[0], there = sums(x.there(), y.there())[0];
      expect(std::isnan(host) && std::isnan(there), "usable sum with ", bad, ": ", there, ", host ", host);
      expect(all_finite<float>(x.there()) == all_finite<float>(x.host()), "all_finite with ", bad);
    }
  });
}

// A product of k terms of magnitude one, summed in float in two orders.
constexpr double kProduct = 4e-5;

void check_products(const CudaStream& /*stream*/) {
  const std::unique_ptr<Device> device = open_device();
  const Index rows = 70, cols = 45, r = 6;
  Both g(*device, rows, cols, 1), m(*device, rows, cols, 2), q(*device, cols, r, 3),
      p(*device, rows, r, 4, 2);
  Both t(*device, cols, r, 5), d(*device, rows, cols, 6), w(*device, rows, cols, 7, 5);
  for (const Op op : {Op::kNone, Op::kTranspose}) {
    const bool plain = op == Op::kNone;
    accumulate_and_multiply<float>(0.5F, g.host(), m.host(), op, plain ? q.host() : p.host(),
                                   plain ? p.host() : t.host());
    accumulate_and_multiply<float>(0.5F, g.there(), m.there(), op, plain ? q.there() : p.there(),
                                   plain ? p.there() : t.there());
    p.expect_equal("product", kProduct * 10);
    t.expect_equal("product", kProduct * 200);
  }
  m.expect_equal("accumulated");
  const double host = accumulate_and_multiply_there_and_back<float>(0.5F, g.host(), 0.75F, m.host(), q.host(),
                                                                    p.host(), t.host());
  const double there = accumulate_and_multiply_there_and_back<float>(0.5F, g.there(), 0.75F, m.there(),
                                                                     q.there(), p.there(), t.there());
  expect_close({there}, {host}, rows * cols, "|M|^2");
  m.expect_equal("accumulated");
  p.expect_equal("there", kProduct * 10);
  t.expect_equal("back", kProduct * 200);
  Both left(*device, rows, r, 8), right(*device, cols, r, 9);
  const FactorPair<float> sent{left.host(), right.host()}, sent_there{left.there(), right.there()};
  add_product<float>(-0.5F, sent, 0.9F, d.host());
  add_product<float>(-0.5F, sent_there, 0.9F, d.there());
  d.expect_equal("L R^T", kProduct);
  decompress_and_update<float>(sent, sent, 0.9F, 0.1F, 0.99F, m.host(), d.host(), w.host());
  decompress_and_update<float>(sent_there, sent_there, 0.9F, 0.1F, 0.99F, m.there(), d.there(), w.there());
  m.expect_equal("error", kProduct);
  d.expect_equal("momentum", kProduct);
  w.expect_equal("weight", kProduct);
  decompress<float>(sent, sent, d.host(), m.host());
  decompress<float>(sent_there, sent_there, d.there(), m.there());
  d.expect_equal("D", kProduct);
  gemm<float>(Op::kNone, Op::kNone, 1, m.host().block(0, rows, 0, 0), q.host().row_block(0, 0), 0.5F,
              p.host());
  gemm<float>(Op::kNone, Op::kNone, 1, m.there().block(0, rows, 0, 0), q.there().row_block(0, 0), 0.5F,
              p.there());
  p.expect_equal("no inner extent", kProduct * 10);
}

void check_factorisations(const CudaStream& /*stream*/) {
  const std::unique_ptr<Device> device = open_device();
  const Index rows = 60, r = 7;
  Both p(*device, rows, r, 1, 3), h(*device, rows, r, 2), a(*device, 12, 9, 3), vectors(*device, 12, 4, 4);
  Buffer<double> g(r * r), g_there(r * r);
  gram<float>(p.host(), g.matrix(0, r, r));
  gram<float>(p.there(), g_there.matrix(0, r, r));
  for (Index k = 0; k < r * r; ++k) expect(std::abs(g[k] - g_there[k]) <= 1e-13 * rows, "gram ", k);
  std::vector<std::uint8_t> dead(at(r)), dead_there(at(r));
  cholesky_with_dead_columns(g.matrix(0, r, r), 1e-5, dead);
  solve_upper_right<float>(p.host(), g.matrix(0, r, r));
  solve_upper_right<float>(p.there(), g.matrix(0, r, r));
  p.expect_equal("P U^-1", 1e-6);
  householder_orthonormalise<float>(h.host(), 1e-5, dead);
  householder_orthonormalise<float>(h.there(), 1e-5, dead_there);
  h.expect_equal("Householder");
  expect(dead == dead_there, "dead columns");
  expect(singular_values<float>(a.host()) == singular_values<float>(a.there()), "singular values");
  left_singular_vectors<float>(a.host(), vectors.host());
  left_singular_vectors<float>(a.there(), vectors.there());
  vectors.expect_equal("singular vectors");

  // Two of one shape, one with a dead column, one with a NaN, one of another shape.
  Both first(*device, rows, r, 5), second(*device, rows, r, 6), bad(*device, rows, r, 7),
      third(*device, 9, 9, 8);
  for (Index i = 0; i < rows; ++i) second.host()(i, 3) = 2 * second.host()(i, 1);
  copy(second.host(), second.there());
  bad.set(5, std::nanf(""));
  const std::vector<MatrixView<float>> matrices{first.there(), third.there(), second.there(), bad.there()};
  Buffer<float> outcomes_there(4 * (1 + 9), device.get());
  std::vector<float*> places;
  for (Index k = 0; k < 4; ++k) places.push_back(outcomes_there.data() + k * 10);
  device->orthonormalise(matrices, 1e-5, places);
  const OnHost<float> outcomes(outcomes_there.matrix(0, 4, 10));
  const auto factorisation = [&](Index k) { return static_cast<Factorisation>(outcomes.view()(k, 0)); };
  expect(factorisation(0) == Factorisation::kCholesky && factorisation(3) == Factorisation::kNonFinite,
         "outcomes");
  for (Index j = 0; j < r; ++j) {
    const float first_dead = outcomes.view()(0, 1 + j), second_dead = outcomes.view()(2, 1 + j);
    expect(first_dead == 0, "column ", j, " of the first is dead");
    expect(second_dead == (j == 3 ? 1 : 0), "column ", j, " of the second: ", second_dead);
  }
  householder_orthonormalise<float>(first.host(), 1e-5, dead);
  first.expect_equal("orthonormal factor", 1e-5);
  householder_orthonormalise<float>(second.host(), 1e-5, dead);
  second.expect_equal("orthonormal factor with a dead column", 1e-5);
}

// Refused before anything is launched.
void check_places(const CudaStream& /*stream*/) {
  const std::unique_ptr<Device> device = open_device();
  Both x(*device, 4, 4, 1);
  Buffer<double> wide(16, device.get());
  const auto refused = [](const std::function<void()>& call, const char* part) {
    try {
      call();
    } catch (const InvalidArgument& error) {
      return expect(std::string_view(error.what()).find(part) != std::string_view::npos, error.what());
    }
    expect(false, "not refused: ", part);
  };
  refused([&] { add<float>(1, x.host(), 1, x.there()); }, "the host and on cuda:0");
  refused([&] { gemm<float>(Op::kNone, Op::kNone, 1, x.there(), x.host(), 0, x.there()); },
          "expected one place");
  refused([&] { scale<double>(2, wide.matrix(0, 4, 4)); }, "doubles on cuda:0");
}

constexpr DeviceCheck kChecks[] = {
    {"passes over elements give the host's bits", check_elements},
    {"steps of elementwise optimizers give the host's bits", check_steps},
    {"slices", check_slices},
    {"sums of squares, with what is not usable", check_sums},
    {"products with factors", check_products},
    {"factorisations", check_factorisations},
    {"matrices in different places are refused", check_places},
};

}  // namespace
}  // namespace lowband

int main() { return lowband::test::run_device_checks(lowband::kChecks); }
