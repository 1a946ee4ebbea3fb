#include "tests/runtime/cuda/device_checks.h"

#include <numeric>

namespace lowband {
namespace {

using namespace test;

void buffers_begin_as_zeros_and_keep_what_they_are_given(const CudaStream& stream) {
  DeviceBuffer<float> buffer(1'000'003, stream);
  expect_near(on_host(buffer), std::vector<float>(1'000'003), 0, "a fresh buffer");
  std::vector<float> numbers(1'000'003);
  std::iota(numbers.begin(), numbers.end(), -5.0F);
  buffer.fill_from(numbers);
  expect_near(on_host(buffer), numbers, 0, "a filled buffer");
  // Memory of a freed buffer comes back zeroed.
  buffer = DeviceBuffer<float>();
  expect_near(on_host(DeviceBuffer<float>(1'000'003, stream)), std::vector<float>(1'000'003), 0,
              "a second buffer");
}

void a_move_leaves_one_owner(const CudaStream& stream) {
  DeviceBuffer<Index> first = on_device<Index>({3, 1, 4}, stream);
  DeviceBuffer<Index> second = std::move(first);
  expect(first.data() == nullptr && first.size() == 0, "the source still owns ", first.size(), " elements");
  expect(on_host(second) == std::vector<Index>{3, 1, 4}, "the elements did not move along");
}

void pinned_memory_travels_both_ways(const CudaStream& stream) {
  PinnedBuffer<double> there(1000), back(1000);
  std::iota(there.span().begin(), there.span().end(), 0.25);
  DeviceBuffer<double> device(1000, stream);
  cuda_copy(device.data(), there.data(), 8000, stream);
  cuda_copy(back.data(), device.data(), 8000, stream);
  stream.synchronize();
  for (Index i = 0; i < 1000; ++i)
    expect(back.data()[i] == there.data()[i], "element ", i, " is ", back.data()[i]);
}

void streams_wait_for_each_others_events(const CudaStream& stream) {
  const CudaStream other(stream.device(), CudaStream::Priority::kHigh);
  CudaEvent filled(stream);
  expect(filled.over(), "an event that was never recorded is not over");
  // Long enough that a copy that did not wait would come first.
  const Index n = 3 * kManyElements;
  DeviceBuffer<float> numbers(n, stream);
  const std::vector<float> ones(static_cast<std::size_t>(n), 1.0F);
  numbers.fill_from(ones);
  filled.record(stream);
  DeviceBuffer<float> copy(n, other);
  other.wait_for(filled);
  cuda_copy(copy.data(), numbers.data(), 4 * n, other);
  expect(on_host(copy) == ones, "the copy came before what it copies");
  expect(filled.over() && other.finished(), "work is left after a wait");
  CudaEvent begin(stream), end(stream);
  begin.record(stream);
  numbers.fill_from(ones);
  end.record(stream);
  expect(end.seconds_since(begin) > 1e-5, 4 * n, " bytes were copied in ", end.seconds_since(begin), " s");
}

void a_graph_repeats_what_was_recorded(const CudaStream& stream) {
  auto from = on_device<Index>({3, 1, 4}, stream);
  DeviceBuffer<Index> to(3, stream);
  {
    const CudaGraph graph(stream, [&] { cuda_copy(to.data(), from.data(), 24, stream); });
    expect(on_host(to) == std::vector<Index>(3), "what was recorded ran");
    graph.launch(stream);
    expect(on_host(to) == std::vector<Index>{3, 1, 4}, "what was recorded did not run");
    from.fill_from(std::vector<Index>{2, 7, 1});
    graph.launch(stream);
    expect(on_host(to) == std::vector<Index>{2, 7, 1}, "it did not run again");
  }
  try {
    const CudaGraph graph(stream, [&] { stream.synchronize(); });
    throw CheckFailed("a wait was recorded");
  } catch (const CudaError& error) {
    const std::string text = error.what();
    expect(text.starts_with("cudaStreamSynchronize: code 900, "), "the message is ", text);
  }
  expect(on_host(to) == std::vector<Index>{2, 7, 1}, "the stream does not work any more");
}

void errors_name_the_call_and_the_code(const CudaStream&) {
  try {
    const CudaStream nowhere(1000);
    throw CheckFailed("a stream on device 1000");
  } catch (const CudaError& error) {
    const std::string text = error.what();
    expect(text.starts_with("cudaSetDevice: code 101, cudaErrorInvalidDevice: "), "the message is ", text);
  }
  const CudaStream stream;  // the error is gone
  expect_near(on_host(DeviceBuffer<float>(3, stream)), std::vector<float>(3), 0, "a buffer afterwards");
}

constexpr DeviceCheck kChecks[] = {
    {"buffers_begin_as_zeros_and_keep_what_they_are_given",
     buffers_begin_as_zeros_and_keep_what_they_are_given},
    {"a_move_leaves_one_owner", a_move_leaves_one_owner},
    {"pinned_memory_travels_both_ways", pinned_memory_travels_both_ways},
    {"streams_wait_for_each_others_events", streams_wait_for_each_others_events},
    {"a_graph_repeats_what_was_recorded", a_graph_repeats_what_was_recorded},
    {"errors_name_the_call_and_the_code", errors_name_the_call_and_the_code},
};

}  // namespace
}  // namespace lowband

int main() { return lowband::test::run_device_checks(lowband::kChecks); }
