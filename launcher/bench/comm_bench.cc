#include "launcher/bench/comm_bench.h"

#include "collectives/agreement.h"
#include "collectives/factors/factor_exchange.h"
#include "collectives/process_device.h"
#include "launcher/bench/exact_data.h"
#include "launcher/bench/interface_counter.h"
#include "launcher/bench/surroundings.h"
#include "runtime/copy.h"
#include "runtime/low_rank.h"
#include "runtime/random.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace lowband {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::vector<double>;  // by iteration

constexpr double kMicroseconds = 1e6;
constexpr double kGigabytes = 1e-9;
/// Iterations that --min-time may add, so that a tiny exchange ends.
constexpr double kMostAddedIterations = 100'000;

template <class T>
constexpr BenchWire kWireOf = BenchWire::kF32;
template <>
constexpr BenchWire kWireOf<BFloat16> = BenchWire::kBF16;

/// Writes elements, which may lie on a device, by the host: write(view of the host).
template <class T, class Write>
void write_elements(MatrixView<T> to, Write write) {
  if (to.device == nullptr) return write(to);
  Buffer<T> host(to.elements());
  write(host.matrix(0, to.rows, to.cols));
  copy<T>(host.matrix(0, to.rows, to.cols), to);
}

Index wire_bytes(BenchWire wire) { return wire == BenchWire::kBF16 ? 2 : 4; }

/// The smallest measured value that is not exceeded by a share `q` of all (nearest rank).
double percentile(Seconds seconds, double q) {
  std::ranges::sort(seconds);
  const double place = std::ceil(q * static_cast<double>(seconds.size()));
  return seconds[static_cast<std::size_t>(std::max(1.0, place)) - 1];
}
double median(const Seconds& seconds) { return percentile(seconds, 0.5); }

IterationTimes times_of(const Seconds& seconds) {
  const auto count = static_cast<double>(seconds.size());
  const double mean = std::accumulate(seconds.begin(), seconds.end(), 0.0) / count;
  double squares = 0;
  for (const double x : seconds) squares += (x - mean) * (x - mean);
  IterationTimes times;
  times.set_iterations(std::ssize(seconds));
  times.set_p50_us(kMicroseconds * median(seconds));
  times.set_p99_us(kMicroseconds * percentile(seconds, 0.99));
  times.set_min_us(kMicroseconds * *std::ranges::min_element(seconds));
  times.set_mean_us(kMicroseconds * mean);
  times.set_cv_percent(mean > 0 ? 100 * std::sqrt(squares / count) / mean : 0);
  return times;
}

/// B (a x b) of a matrix: the longer side is a.
FactorShape shape_of(const RankProfile& profile, std::size_t i, Communicator& alone) {
  const ParameterInfo& info = profile.matrices[i];
  return {.name = info.name,
          .factor_rank = profile.factor_ranks[i],
          .left_rows = std::max(info.rows, info.cols),
          .right_rows = std::min(info.rows, info.cols),
          .across_b = &alone,
          .across_a = &alone};
}

/// Sum of m + n, the elements of B(r) by rank.
double sum_of_sides(const RankProfile& profile) {
  Index sum = 0;
  for (const ParameterInfo& info : profile.matrices) sum += info.rows + info.cols;
  return static_cast<double>(sum);
}

/// Iterations of one measurement on this process: how long each took, and what it sent.
struct Samples {
  Seconds seconds;
  double modelled_wire_bytes = 0;  // of one iteration, equal in all
  double control_wire_bytes = 0;   // of these
  Index transport_bytes = 0;       // of one iteration
  Index interface_bytes = 0;       // of all iterations

  void add(const Samples& more) {
    seconds.insert(seconds.end(), more.seconds.begin(), more.seconds.end());
    modelled_wire_bytes = more.modelled_wire_bytes;
    control_wire_bytes = more.control_wire_bytes;
    transport_bytes = more.transport_bytes;
    interface_bytes += more.interface_bytes;
  }
};

/// What one line is measured with.
struct LineSamples {
  Samples exchange, ring, dense_f32, dense_bf16;
  Seconds pack, reduce_scatter, orthonormalise, all_gather, unpack, products;
};

/// Gradients for --with-products: B Q and B^T P are what is exchanged.
class Products {
 public:
  Products(const RankProfile& profile, Device* device) {
    Index gradient_elements = 0;
    Index right_elements = 0;
    for (std::size_t i = 0; i < profile.matrices.size(); ++i) {
      gradient_elements += profile.matrices[i].elements();
      right_elements +=
          std::min(profile.matrices[i].rows, profile.matrices[i].cols) * profile.factor_ranks[i];
    }
    gradients_ = Buffer<float>(gradient_elements, device);
    right_ = Buffer<float>(right_elements, device);
    // Full-rank and of order one; which values does not matter.
    const ExactSummands values(0, 1, ExactSummands::Held::kBF16, 17);
    write_elements(gradients_.line(), [&](MatrixView<float> host) { values.fill(0, host.flat()); });
    write_elements(right_.line(), [&](MatrixView<float> host) { values.fill(1, host.flat()); });
    Index gradient = 0;
    Index right = 0;
    for (std::size_t i = 0; i < profile.matrices.size(); ++i) {
      const Index a = std::max(profile.matrices[i].rows, profile.matrices[i].cols);
      const Index b = std::min(profile.matrices[i].rows, profile.matrices[i].cols);
      const Index r = profile.factor_ranks[i];
      b_.push_back(gradients_.matrix(gradient, a, b));
      q_.push_back(right_.matrix(right, b, r));
      gradient += a * b;
      right += b * r;
    }
  }
  void left(FactorExchange<float>& exchange) const {
    for (std::size_t i = 0; i < b_.size(); ++i)
      multiply<float>(Op::kNone, b_[i], q_[i], exchange.left(static_cast<Index>(i)));
  }
  void right(FactorExchange<float>& exchange) const {
    for (std::size_t i = 0; i < b_.size(); ++i)
      multiply<float>(Op::kTranspose, b_[i], exchange.left(static_cast<Index>(i)),
                      exchange.right(static_cast<Index>(i)));
  }

 private:
  Buffer<float> gradients_, right_;
  std::vector<MatrixView<const float>> b_, q_;
};

class CommBench {
 public:
  CommBench(Communicator& world, const CommBenchOptions& options, const BenchSink& sink)
      : world_(world), options_(options), sink_(sink) {
    if (options.on_device) {
      device_ = open_device_of(world, "--device: found cuda", "cpu");
      device_of_world_.emplace(world, *device_.device);
    }
    alone_ = world.split(world.process(), 0, "alone");
    agree(world, [&] {
      if (!options.interface.empty()) counter_.emplace(options.interface);
    });
    find_interfaces();
    describe_surroundings(world, options, report_);
    report_.set_device(device_.description);
    if (options.profiles.empty()) return;
    const RankProfile& profile = options.profiles.front();
    report_.set_break_even_rank(static_cast<double>(dense_elements(profile)) / sum_of_sides(profile));
  }

  BenchReport run() {
    if (sink_.begun) sink_.begun(report_);
    make_flat_buffers();
    for (const RankProfile& profile : options_.profiles) {
      for (const BenchWire wire : options_.wires) {
        ExchangeLine& line = *report_.add_lines();
        line = measure(profile, wire);
        if (sink_.line) sink_.line(line);
      }
    }
    add_dense_lines();
    for (const BenchWire wire : options_.wires) {
      for (const Index bytes : options_.sizes) {
        AllReduceLine& line = *report_.add_sizes();
        line = wire == BenchWire::kBF16 ? measure_size<BFloat16>(bytes) : measure_size<float>(bytes);
        if (sink_.size) sink_.size(line);
      }
    }
    finish();
    return report_;
  }

 private:
  // ---- Over all processes ----

  /// seconds[i] <- maximum over processes
  void slowest(Seconds& seconds) { world_.all_reduce<double>(seconds, Reduction::kMax, {Purpose::kControl}); }
  /// seconds[i] <- mean over processes
  void average(Seconds& seconds) {
    world_.all_reduce<double>(seconds, Reduction::kSum, {Purpose::kControl});
    for (double& x : seconds) x /= world_.size();
  }
  Index total(Index count) {
    world_.all_reduce<Index>(std::span(&count, 1), Reduction::kSum, {Purpose::kControl});
    return count;
  }

  Index rounded_total(double bytes) {
    world_.all_reduce<double>(std::span(&bytes, 1), Reduction::kSum, {Purpose::kControl});
    return std::llround(bytes);
  }

  double bus_factor() const { return 2.0 * (world_.size() - 1) / world_.size(); }

  template <class Action>
  double timed(Action action) {
    world_.barrier();
    const auto begin = Clock::now();
    action();
    if (device_.device) device_.device->synchronize();
    return std::chrono::duration<double>(Clock::now() - begin).count();
  }

  /// One iteration. Interfaces count from one barrier to another, so that all of what was sent before has
  /// left its socket, and all of what is sent now has arrived.
  template <class Action>
  void measure_once(Samples& samples, Action action) {
    world_.ledger().begin_step();
    if (counter_) world_.barrier();
    const Index counted_before = counter_ ? counter_->sent_bytes() : 0;
    samples.seconds.push_back(timed(action));
    samples.modelled_wire_bytes = samples.control_wire_bytes = 0;
    samples.transport_bytes = 0;
    for (const auto& [key, totals] : world_.ledger().step()) {
      if (key.axis != world_.axis()) continue;
      samples.modelled_wire_bytes += totals.modelled_wire_bytes;
      samples.transport_bytes += totals.transport_bytes;
      if (key.purpose == Purpose::kControl) samples.control_wire_bytes += totals.modelled_wire_bytes;
    }
    if (!counter_) return;
    world_.barrier();
    samples.interface_bytes += counter_->sent_bytes() - counted_before;
  }

  /// `Line`: an exchange or an all-reduce.
  template <class Line>
  void add_wire_bytes(Line& line, const Samples& samples) {
    // The formulas give fractions for a process and whole bytes for all.
    const Index modelled = rounded_total(samples.modelled_wire_bytes);
    const auto deviation = [&](double bytes) {
      return modelled > 0 ? 100 * (bytes / static_cast<double>(modelled) - 1) : 0;
    };
    line.set_modelled_wire_bytes(modelled);
    line.set_transport_bytes(total(samples.transport_bytes));
    line.set_transport_deviation_percent(deviation(static_cast<double>(line.transport_bytes())));
    if (!counter_) return;
    const Index counted = total(counts_interface_ ? samples.interface_bytes : 0);
    line.set_interface_bytes(static_cast<double>(counted) / static_cast<double>(samples.seconds.size()));
    if (!interfaces_shared_) line.set_interface_deviation_percent(deviation(line.interface_bytes()));
  }

  void find_interfaces() {
    if (!counter_) return;
    std::vector<Index> own{static_cast<Index>(counter_->identity())};
    const std::vector<Index> counts(static_cast<std::size_t>(world_.size()), 1);
    std::vector<Index> all(counts.size());
    world_.all_gather<Index>(own, all, counts, {Purpose::kControl});
    counts_interface_ = std::ranges::find(all, own[0]) - all.begin() == world_.process();
    std::ranges::sort(all);
    interfaces_shared_ = std::ranges::adjacent_find(all) != all.end();
  }

  // ---- Plain all-reduces ----

  template <class T>
  Buffer<T>& flat() {
    if constexpr (kWireOf<T> == BenchWire::kBF16) return flat_bf16_;
    if constexpr (kWireOf<T> == BenchWire::kF32) return flat_f32_;
  }

  void make_flat_buffers() {
    Index f32 = 0;
    Index bf16 = 0;
    for (const RankProfile& profile : options_.profiles) {
      for (const BenchWire wire : options_.wires) {
        Index& elements = wire == BenchWire::kBF16 ? bf16 : f32;
        elements = std::max(elements, factor_elements(profile));
      }
      if (options_.base_iterations == 0) continue;
      f32 = std::max(f32, dense_elements(profile));
      bf16 = std::max(bf16, dense_elements(profile));
    }
    if (!options_.sizes.empty()) {
      for (const BenchWire wire : options_.wires) {
        Index& elements = wire == BenchWire::kBF16 ? bf16 : f32;
        elements = std::max(elements, options_.sizes.back() / wire_bytes(wire));
      }
    }
    flat_f32_ = Buffer<float>(f32, world_.device());
    flat_bf16_ = Buffer<BFloat16>(bf16, world_.device());
  }

  // Zeros: their sums stay as they are over any number of iterations.
  template <class T>
  void all_reduce_flat(Index elements) {
    world_.all_reduce<T>(flat<T>().span(0, elements), Reduction::kSum, {Purpose::kDense});
  }

  template <class T>
  Index wrong_in_all_reduce(Index elements) {
    Index wrong = 0;
    const MatrixView<T> values = flat<T>().matrix(0, 1, elements);
    for (Index k = 0; k < options_.checks; ++k) {
      const ExactSummands data = summands(kWireOf<T>, k);
      write_elements(values, [&](MatrixView<T> host) { data.fill(0, host.flat()); });
      all_reduce_flat<T>(elements);
      wrong += data.count_not_sum(0, OnHost<T>(values).view().flat());
    }
    write_elements(values, [](MatrixView<T> host) { std::ranges::fill(host.flat(), T{}); });
    return total(wrong);
  }

  template <class T>
  AllReduceLine all_reduce_line(Index elements, const Samples& samples) {
    AllReduceLine line;
    line.set_dtype(std::string(wire_name(kWireOf<T>)));
    line.set_bytes(elements * static_cast<Index>(sizeof(T)));
    *line.mutable_time() = times_of(samples.seconds);
    line.set_algbw(kGigabytes * static_cast<double>(line.bytes()) / median(samples.seconds));
    line.set_busbw(line.algbw() * bus_factor());
    add_wire_bytes(line, samples);
    if (options_.checks > 0) line.set_wrong(wrong_in_all_reduce<T>(elements));
    return line;
  }

  template <class T>
  AllReduceLine measure_size(Index bytes) {
    const Index elements = bytes / static_cast<Index>(sizeof(T));
    for (Index k = 0; k < options_.warmup; ++k) all_reduce_flat<T>(elements);
    Samples samples;
    repeat(samples.seconds, [&](Index) { measure_once(samples, [&] { all_reduce_flat<T>(elements); }); });
    return all_reduce_line<T>(elements, samples);
  }

  /// Runs `round` for the iterations, and again as often as --min-time asks for; then seconds are those of
  /// the slowest process.
  template <class Round>
  void repeat(Seconds& seconds, Round round) {
    for (Index k = 0; k < options_.iterations; ++k) round(k);
    Seconds so_far = seconds;
    slowest(so_far);
    const double sum = std::accumulate(so_far.begin(), so_far.end(), 0.0);
    const double missing =
        std::ceil((options_.min_time_seconds - sum) / sum * static_cast<double>(so_far.size()));
    const auto added = static_cast<Index>(std::clamp(missing, 0.0, kMostAddedIterations));
    for (Index k = 0; k < added; ++k) round(options_.iterations + k);
    slowest(seconds);
  }

  // ---- Exchanges ----

  ExactSummands summands(BenchWire wire, Index check) const {
    return {world_.process(), world_.size(),
            wire == BenchWire::kBF16 ? ExactSummands::Held::kBF16 : ExactSummands::Held::kF32,
            static_cast<std::uint64_t>(check)};
  }

  FactorGroups groups() { return {.replica = &world_, .within_replica = alone_.get()}; }
  static FactorExchangeOptions exchange_options(BenchWire wire) {
    // As an optimizer with a local residual, which needs what this replica itself sent.
    return {.keep_own_right = true,
            .wire = wire == BenchWire::kBF16 ? FactorWire::kBF16 : FactorWire::kAsComputed};
  }

  static void fill(FactorExchange<float>& exchange, const RankProfile& profile, const ExactSummands& data) {
    for (Index i = 0; i < std::ssize(profile.matrices); ++i) {
      write_elements(exchange.left(i), [&](MatrixView<float> host) { data.fill_left(2 * i, host); });
      write_elements(exchange.right(i), [&](MatrixView<float> host) { data.fill(2 * i + 1, host.flat()); });
    }
  }

  Index wrong_in_exchange(FactorExchange<float>& exchange, const RankProfile& profile, BenchWire wire) {
    Index wrong = 0;
    for (Index k = 0; k < options_.checks; ++k) {
      const ExactSummands data = summands(wire, k);
      fill(exchange, profile, data);
      exchange.exchange_left();
      exchange.exchange_right();
      for (Index i = 0; i < std::ssize(profile.matrices); ++i) {
        wrong += data.count_not_orthonormal(2 * i, OnHost<float>(exchange.left(i)).view());
        wrong += data.count_not_mean(2 * i + 1, OnHost<float>(exchange.right(i)).view().flat());
      }
    }
    return total(wrong);
  }

  /// Tensors that travel uncompressed beside the first matrix of the profile.
  Index wrong_in_dense_tensors(const RankProfile& profile, BenchWire wire) {
    const std::vector<Index> sizes{1, 4099};
    FactorExchange<float> exchange(groups(), {shape_of(profile, 0, *alone_)}, {{"one", 1}, {"odd", 4099}},
                                   exchange_options(wire));
    Index wrong = 0;
    for (Index k = 0; k < options_.checks; ++k) {
      const ExactSummands data = summands(BenchWire::kF32, k);
      write_elements(exchange.left(0), [&](MatrixView<float> host) { data.fill_left(0, host); });
      Buffer<float> values(4099, world_.device());
      for (Index t = 0; t < 2; ++t) {
        const MatrixView<float> tensor = values.matrix(0, 1, sizes[static_cast<std::size_t>(t)]);
        write_elements(tensor, [&](MatrixView<float> host) { data.fill(t, host.flat()); });
        exchange.put_dense(t, tensor);
      }
      exchange.exchange_left();
      for (Index t = 0; t < 2; ++t) {
        const MatrixView<float> tensor = values.matrix(0, 1, sizes[static_cast<std::size_t>(t)]);
        exchange.get_dense(t, tensor);
        wrong += data.count_not_sum(t, OnHost<float>(tensor).view().flat());
      }
    }
    return total(wrong);
  }

  /// max of |X - X'|_F / |X'|_F over X = P, R of one matrix of each kind, X' in float64 from the same
  /// numbers. Process 0 forms X': every process's numbers follow from a seed.
  double relative_error(FactorExchange<float>& exchange, const RankProfile& profile) {
    std::vector<Index> chosen;
    std::vector<std::tuple<Index, Index, Index>> kinds;
    for (Index i = 0; i < std::ssize(profile.matrices); ++i) {
      const std::tuple kind(exchange.left(i).rows, exchange.right(i).rows, exchange.left(i).cols);
      if (std::ranges::find(kinds, kind) != kinds.end()) continue;
      kinds.push_back(kind);
      chosen.push_back(i);
    }
    const auto fill_normal = [](auto view, Index i, std::string_view side, Index process) {
      const RandomStream stream(static_cast<std::uint64_t>(i), side, process);
      for (Index e = 0; e < view.elements(); ++e) view.data[e] = static_cast<float>(stream.normal(e));
    };
    fill(exchange, profile, summands(BenchWire::kBF16, 0));
    for (const Index i : chosen) {
      write_elements(exchange.left(i),
                     [&](MatrixView<float> host) { fill_normal(host, i, "left", world_.process()); });
      write_elements(exchange.right(i),
                     [&](MatrixView<float> host) { fill_normal(host, i, "right", world_.process()); });
    }
    exchange.exchange_left();
    exchange.exchange_right();

    double largest = 0;
    const auto compare = [&](MatrixView<const float> found, Index i, std::string_view side) {
      Buffer<double> mean(found.elements());
      Buffer<double> summand(found.elements());
      for (int p = 0; p < world_.size(); ++p) {
        fill_normal(summand.matrix(0, found.rows, found.cols), i, side, p);
        for (Index e = 0; e < mean.size(); ++e) mean[e] += summand[e] / world_.size();
      }
      if (side == "left") {
        std::vector<std::uint8_t> dead(static_cast<std::size_t>(found.cols));
        householder_orthonormalise(mean.matrix(0, found.rows, found.cols), 0, dead);
      }
      double squares = 0;
      double difference = 0;
      for (Index e = 0; e < mean.size(); ++e) {
        squares += mean[e] * mean[e];
        const double d = static_cast<double>(found.data[e]) - mean[e];
        difference += d * d;
      }
      const double error = std::sqrt(difference / squares);
      if (!(error <= largest)) largest = error;  // a NaN stays
    };
    if (world_.process() == 0) {
      for (const Index i : chosen) {
        compare(OnHost<float>(exchange.left(i)).view(), i, "left");
        compare(OnHost<float>(exchange.right(i)).view(), i, "right");
      }
    }
    world_.all_reduce<double>(std::span(&largest, 1), Reduction::kMax, {Purpose::kControl});
    return largest;
  }

  void run_exchange(FactorExchange<float>& exchange, LineSamples& samples) {
    double products = 0;
    const auto multiply_in = [&](auto member) {
      if (!products_) return;
      const auto begin = Clock::now();
      ((*products_).*member)(exchange);
      if (device_.device) device_.device->synchronize();
      products += std::chrono::duration<double>(Clock::now() - begin).count();
    };
    exchange.reset_times();
    measure_once(samples.exchange, [&] {
      multiply_in(&Products::left);
      exchange.exchange_left();
      multiply_in(&Products::right);
      exchange.exchange_right();
    });
    const ExchangeTimes& times = exchange.times();
    samples.pack.push_back(times.pack);
    samples.reduce_scatter.push_back(times.reduce_scatter);
    samples.orthonormalise.push_back(times.orthonormalise);
    samples.all_gather.push_back(times.all_gather);
    samples.unpack.push_back(times.unpack);
    samples.products.push_back(products);
  }

  // Rounds of: all-reduce of equal bytes, exchange, and in some of them the two dense all-reduces, so that
  // what disturbs one disturbs all.
  template <class T>
  LineSamples sample(FactorExchange<float>& exchange, const RankProfile& profile) {
    const Index payload_elements = factor_elements(profile);
    const Index dense = dense_elements(profile);
    LineSamples warm;
    for (Index k = 0; k < options_.warmup; ++k) {
      all_reduce_flat<T>(payload_elements);
      run_exchange(exchange, warm);
    }
    if (options_.base_iterations > 0 && options_.warmup > 0) {
      all_reduce_flat<float>(dense);
      all_reduce_flat<BFloat16>(dense);
    }
    const Index bases = std::min(options_.base_iterations, options_.iterations);
    LineSamples samples;
    repeat(samples.exchange.seconds, [&](Index k) {
      measure_once(samples.ring, [&] { all_reduce_flat<T>(payload_elements); });
      run_exchange(exchange, samples);
      if (k >= options_.iterations ||
          k * bases / options_.iterations == (k + 1) * bases / options_.iterations)
        return;
      measure_once(samples.dense_f32, [&] { all_reduce_flat<float>(dense); });
      measure_once(samples.dense_bf16, [&] { all_reduce_flat<BFloat16>(dense); });
    });
    return samples;
  }

  ExchangeLine measure(const RankProfile& profile, BenchWire wire) {
    std::vector<FactorShape> shapes;
    for (std::size_t i = 0; i < profile.matrices.size(); ++i) shapes.push_back(shape_of(profile, i, *alone_));
    FactorExchange<float> exchange(groups(), shapes, {}, exchange_options(wire));
    fill(exchange, profile, summands(wire, 0));
    products_.reset();
    if (options_.with_products) products_.emplace(profile, world_.device());

    LineSamples samples =
        wire == BenchWire::kBF16 ? sample<BFloat16>(exchange, profile) : sample<float>(exchange, profile);
    ExchangeLine line;
    line.set_profile(profile.name);
    line.set_wire(std::string(wire_name(wire)));
    line.set_smallest_factor_rank(*std::ranges::min_element(profile.factor_ranks));
    line.set_largest_factor_rank(*std::ranges::max_element(profile.factor_ranks));
    line.set_equivalent_factor_rank(static_cast<double>(factor_elements(profile)) / sum_of_sides(profile));
    line.set_dense_bytes(dense_elements(profile) * wire_bytes(wire));
    line.set_payload_bytes(factor_elements(profile) * wire_bytes(wire));
    line.set_dense_over_payload(static_cast<double>(line.dense_bytes()) /
                                static_cast<double>(line.payload_bytes()));
    add_times(line, samples);
    const Index elements = factor_elements(profile);
    *line.mutable_ring() = wire == BenchWire::kBF16 ? all_reduce_line<BFloat16>(elements, samples.ring)
                                                    : all_reduce_line<float>(elements, samples.ring);
    if (world_.size() > 1) add_ratios(line, samples);
    add_wire_bytes(line, samples.exchange);
    line.set_control_wire_bytes(rounded_total(samples.exchange.control_wire_bytes));
    if (options_.checks > 0) {
      line.set_wrong(wrong_in_exchange(exchange, profile, wire) + wrong_in_dense_tensors(profile, wire));
      line.set_relative_error(relative_error(exchange, profile));
    }
    return line;
  }

  // From here on the samples are those of all processes.
  void add_times(ExchangeLine& line, LineSamples& samples) {
    for (Samples* all_reduces : {&samples.ring, &samples.dense_f32, &samples.dense_bf16})
      slowest(all_reduces->seconds);
    dense_f32_.add(samples.dense_f32);
    dense_bf16_.add(samples.dense_bf16);
    Seconds slowest_orthonormalise = samples.orthonormalise;
    slowest(slowest_orthonormalise);
    for (Seconds* seconds : {&samples.pack, &samples.reduce_scatter, &samples.orthonormalise,
                             &samples.all_gather, &samples.unpack, &samples.products})
      average(*seconds);
    ExchangeLine::Phases& phases = *line.mutable_phases();
    phases.set_pack_us(kMicroseconds * median(samples.pack));
    phases.set_reduce_scatter_us(kMicroseconds * median(samples.reduce_scatter));
    phases.set_orthonormalise_us(kMicroseconds * median(samples.orthonormalise));
    phases.set_all_gather_us(kMicroseconds * median(samples.all_gather));
    phases.set_unpack_us(kMicroseconds * median(samples.unpack));
    phases.set_products_us(kMicroseconds * median(samples.products));
    phases.set_slowest_orthonormalise_us(kMicroseconds * median(slowest_orthonormalise));
    *line.mutable_time() = times_of(samples.exchange.seconds);
    const double seconds = median(samples.exchange.seconds);
    line.set_algbw(kGigabytes * static_cast<double>(line.payload_bytes()) / seconds);
    line.set_busbw(line.algbw() * bus_factor());
    line.set_effective_bw(kGigabytes * static_cast<double>(line.dense_bytes()) / seconds);
  }

  static void add_ratios(ExchangeLine& line, const LineSamples& samples) {
    const double seconds = median(samples.exchange.seconds);
    const double transfers =
        seconds - (line.phases().slowest_orthonormalise_us() + line.phases().products_us()) / kMicroseconds;
    line.set_busbw_over_ring(median(samples.ring.seconds) / seconds);
    line.set_busbw_over_ring_without_orthonormalisation(median(samples.ring.seconds) / transfers);
    if (samples.dense_f32.seconds.empty()) return;
    line.set_speedup_over_dense_f32(median(samples.dense_f32.seconds) / seconds);
    line.set_speedup_over_dense_bf16(median(samples.dense_bf16.seconds) / seconds);
  }

  void add_dense_lines() {
    if (dense_f32_.seconds.empty()) return;
    const Index elements = dense_elements(options_.profiles.front());
    *report_.mutable_dense_f32() = all_reduce_line<float>(elements, dense_f32_);
    *report_.mutable_dense_bf16() = all_reduce_line<BFloat16>(elements, dense_bf16_);
    if (!sink_.dense) return;
    sink_.dense(report_.dense_f32());
    sink_.dense(report_.dense_bf16());
  }

  void finish() {
    Index wrong = report_.dense_f32().wrong() + report_.dense_bf16().wrong();
    double busbw = 0;
    double deviation = 0;
    const auto consider = [&](double percent) { deviation = std::max(deviation, std::abs(percent)); };
    for (const ExchangeLine& line : report_.lines()) {
      wrong += line.wrong() + line.ring().wrong();
      busbw += line.busbw();
      consider(line.transport_deviation_percent());
      consider(line.interface_deviation_percent());
    }
    for (const AllReduceLine* line : {&report_.dense_f32(), &report_.dense_bf16()}) {
      consider(line->transport_deviation_percent());
      consider(line->interface_deviation_percent());
    }
    for (const AllReduceLine& line : report_.sizes()) {
      consider(line.transport_deviation_percent());
      wrong += line.wrong();
      busbw += line.busbw();
    }
    report_.set_wrong(wrong);
    report_.set_average_busbw(busbw / std::max(1, report_.lines_size() + report_.sizes_size()));
    report_.set_largest_deviation_percent(deviation);
    report_.set_finished(utc_now());
  }

  Communicator& world_;
  const CommBenchOptions& options_;
  const BenchSink& sink_;
  ProcessDevice device_;  // where options ask for one
  std::optional<DeviceScope> device_of_world_;
  std::unique_ptr<Communicator> alone_;  // a replica is one process
  std::optional<InterfaceCounter> counter_;
  bool counts_interface_ = false;   // of the processes that share it, the first counts
  bool interfaces_shared_ = false;  // anywhere
  Buffer<float> flat_f32_;
  Buffer<BFloat16> flat_bf16_;
  std::optional<Products> products_;
  Samples dense_f32_, dense_bf16_;  // of all lines
  BenchReport report_;
};

}  // namespace

BenchReport run_comm_bench(Communicator& world, const CommBenchOptions& options, const BenchSink& sink) {
  world.set_deadline(options.deadline);
  return CommBench(world, options, sink).run();
}

}  // namespace lowband
