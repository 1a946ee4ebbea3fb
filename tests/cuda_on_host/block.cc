#include "tests/cuda_on_host/block.h"

#include "runtime/error.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include <boost/context/fiber.hpp>
#include <boost/context/protected_fixedsize_stack.hpp>

namespace lowband {

alignas(128) thread_local constinit unsigned char dynamic_shared_memory[cuda_on_host::kMostSharedBytes];

namespace cuda_on_host {
namespace {

namespace context = boost::context;

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 64 * 1024;

std::atomic<Order> chosen_order{Order::kForward};

// Numbers 0 ... n-1 in the chosen order; shuffled, a step through them that is prime to n, from a drawn
// start.
class Sequence {
 public:
  Sequence(std::uint64_t n, Order order, std::uint64_t draw) : n_(n) {
    if (order == Order::kBackward) first_ = n - 1, step_ = n - 1;
    if (order == Order::kShuffled) {
      first_ = draw % n;
      for (step_ = draw / n % n + 1; std::gcd(step_, n) != 1;) ++step_;
    }
  }
  std::uint64_t operator[](std::uint64_t i) const { return (first_ + i * step_) % n_; }

 private:
  std::uint64_t n_, first_ = 0, step_ = 1;
};

std::string text_of(const uint3& at) { return cat("(", at.x, ", ", at.y, ", ", at.z, ")"); }
std::string text_of(const std::source_location& site) { return cat(site.file_name(), ":", site.line()); }

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes, zeros;
  void run() const {
    std::memcpy(to, from, bytes - zeros);
    std::memset(static_cast<char*>(to) + (bytes - zeros), 0, zeros);
  }
};

struct Thread {
  context::fiber fiber;  // empty, or where it waits
  uint3 index{};
  unsigned mask = 0;  // of the exchange that it waits for
  std::source_location site;
  unsigned exchanges = 0;
  // Two, in turns: a lane may write its next value while another has yet to read the last one.
  alignas(16) std::array<std::array<std::byte, kExchangeBytes>, 2> slots{};
  std::vector<Copy> begun;                // copies of no batch yet
  std::deque<std::vector<Copy>> batches;  // in their order
};

// Lanes by what they are at; in none of these are those that have ended.
struct Warp {
  unsigned runnable = 0, at_exchange = 0, at_barrier = 0;
};

class Block {
 public:
  void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

  // Called by the fiber that runs.
  void wait_for_block(const std::source_location& site) {
    warp().runnable &= ~bit();
    warp().at_barrier |= bit();
    wait(site);
  }
  void wait_for_warp(unsigned mask, const std::source_location& site) {
    if ((mask & bit()) == 0) fail("a lane that its own mask leaves out calls", site);
    warp().runnable &= ~bit();
    warp().at_exchange |= bit();
    thread().mask = mask;
    wait(site);
  }
  unsigned own_lane() const { return running_ % kWarp; }
  void* slot() { return thread().slots[thread().exchanges % 2].data(); }
  const void* exchanged(unsigned mask, unsigned lane, const std::source_location& site) {
    const std::size_t first = running_ / kWarp * kWarp;
    if ((mask >> lane & 1) == 0 || first + lane >= count_)
      fail(cat("lane ", lane, ", which takes no part, is read by"), site);
    const unsigned which = thread().exchanges++ % 2;
    wait_for_warp(mask, site);
    return threads_[first + lane].slots[which].data();
  }
  const void* given_by(unsigned lane) const {
    return threads_[running_ / kWarp * kWarp + lane].slots[(threads_[running_].exchanges - 1) % 2].data();
  }

  void copy_later(const Copy& copy) {
    if (order_ == Order::kBackward) return copy.run();
    thread().begun.push_back(copy);
  }
  void close_batch_of_copies() { thread().batches.push_back(std::exchange(thread().begun, {})); }
  void finish_copies(std::size_t all_but) {
    for (auto& batches = thread().batches; batches.size() > all_but; batches.pop_front()) {
      for (const Copy& copy : batches.front()) copy.run();
    }
  }

  [[noreturn]] void fail(const std::string& what, const std::source_location& site) {
    note_failure(cat(what, " ", text_of(site)));
    for (;;) scheduler_ = std::move(scheduler_).resume();  // never again
  }

  // Called outside of fibers.
  const std::optional<std::string>& failure() const { return failure_; }

 private:
  Thread& thread() { return threads_[running_]; }
  Warp& warp() { return warps_[running_ / kWarp]; }
  unsigned bit() const { return 1U << own_lane(); }
  void wait(const std::source_location& site) {
    thread().site = site;
    scheduler_ = std::move(scheduler_).resume();
  }
  void note_failure(const std::string& what) {
    if (!failure_) failure_ = cat("block ", text_of(blockIdx), ", thread ", text_of(threadIdx), ": ", what);
  }

  void start(dim3 block);
  bool open_barrier();
  std::optional<std::size_t> choose_warp(std::size_t last);
  void step(std::size_t w);
  bool release(std::size_t w);
  void resume(std::size_t t);
  std::uint64_t draw() { return random_ = random_ * 6364136223846793005 + 1442695040888963407; }

  Order order_ = Order::kForward;
  std::uint64_t random_ = 1;
  const std::function<void()>* body_ = nullptr;
  std::size_t count_ = 0;  // of threads
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::size_t running_ = 0;
  context::fiber scheduler_;
  std::optional<std::string> failure_;
};

void Block::run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
  order_ = chosen_order;
  random_ = 1;
  body_ = &body;
  failure_.reset();
  count_ = std::size_t{block.x} * block.y * block.z;
  if (threads_.size() < count_) threads_.resize(count_);  // and keeps their fibers for smaller blocks
  warps_.resize((count_ + kWarp - 1) / kWarp);
  blockDim = block, gridDim = grid;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  const Sequence sequence(blocks, order_, draw() >> 33);
  for (std::uint64_t i = 0; i < blocks && !failure_; ++i) {
    const std::uint64_t b = sequence[i];
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    std::memset(dynamic_shared_memory, 0xff, shared_bytes);  // NaNs
    start(block);
    for (std::size_t w = 0; !failure_;) {
      if (const auto chosen = choose_warp(w)) {
        step(w = *chosen);
      } else if (!open_barrier()) {
        break;
      }
    }
  }
  if (failure_) threads_.clear();  // unwinds what waits
}

void Block::start(dim3 block) {
  std::size_t t = 0;
  for (Warp& warp : warps_) warp = {};
  for (unsigned z = 0; z < block.z; ++z) {
    for (unsigned y = 0; y < block.y; ++y) {
      for (unsigned x = 0; x < block.x; ++x, ++t) {
        threads_[t].index = {x, y, z};
        threads_[t].begun.clear();
        threads_[t].batches.clear();
        warps_[t / kWarp].runnable |= 1U << t % kWarp;
      }
    }
  }
}

// Forward and backward a warp goes on until it waits at the barrier: as far ahead of the others as it can
// get.
std::optional<std::size_t> Block::choose_warp(std::size_t last) {
  if (order_ != Order::kShuffled && warps_[last].runnable != 0) return last;
  const Sequence sequence(warps_.size(), order_, draw() >> 33);
  for (std::size_t i = 0; i < warps_.size(); ++i) {
    if (warps_[sequence[i]].runnable != 0) return sequence[i];
  }
  return std::nullopt;
}

// Every runnable lane runs until it waits or ends; then exchanges whose lanes are all there are over.
void Block::step(std::size_t w) {
  Warp& warp = warps_[w];
  const Sequence lanes(kWarp, order_, order_ == Order::kShuffled ? draw() >> 33 : 0);
  for (unsigned i = 0; i < kWarp; ++i) {
    const auto lane = static_cast<unsigned>(lanes[i]);
    if ((warp.runnable >> lane & 1) == 0) continue;
    resume(w * kWarp + lane);
    if (failure_) return;
  }
  if (warp.at_exchange != 0 && !release(w)) {
    const Thread& waiting = threads_[w * kWarp + static_cast<unsigned>(std::countr_zero(warp.at_exchange))];
    threadIdx = waiting.index;
    note_failure(
        cat("waits for ever at ", text_of(waiting.site), ": lanes of its mask wait elsewhere or have ended"));
  }
}

bool Block::release(std::size_t w) {
  Warp& warp = warps_[w];
  const std::size_t lanes = std::min<std::size_t>(kWarp, count_ - w * kWarp);
  const unsigned all = lanes == kWarp ? ~0U : (1U << lanes) - 1;
  bool any = false;
  for (unsigned left = warp.at_exchange; left != 0;) {
    const Thread& first = threads_[w * kWarp + static_cast<unsigned>(std::countr_zero(left))];
    const unsigned group = first.mask & all;
    bool complete = (group & ~warp.at_exchange) == 0;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      const Thread& other = threads_[w * kWarp + lane];
      if ((group >> lane & 1) != 0)
        complete = complete && other.mask == first.mask && other.site.line() == first.site.line();
    }
    left &= ~group & (left - 1);
    if (!complete) continue;
    warp.at_exchange &= ~group;
    warp.runnable |= group;
    any = true;
  }
  return any;
}

void Block::resume(std::size_t t) {
  Thread& thread = threads_[t];
  running_ = t;
  threadIdx = thread.index;
  if (!thread.fiber) {
    // One fiber for a thread of every block: it starts again when the scheduler comes back to it.
    thread.fiber = context::fiber(std::allocator_arg, context::protected_fixedsize_stack(kStackBytes),
                                  [this](context::fiber&& scheduler) {
                                    scheduler_ = std::move(scheduler);
                                    for (;;) {
                                      (*body_)();
                                      warp().runnable &= ~bit();
                                      scheduler_ = std::move(scheduler_).resume();
                                    }
                                    return std::move(scheduler_);
                                  });
  }
  thread.fiber = std::move(thread.fiber).resume();
}

// No lane can run. Returns whether threads go on: false when all have ended.
bool Block::open_barrier() {
  const Thread* first = nullptr;
  const Thread* ended = nullptr;
  for (std::size_t t = 0; t < count_; ++t) {
    const bool waits = (warps_[t / kWarp].at_barrier >> t % kWarp & 1) != 0;
    if (waits && first == nullptr) first = &threads_[t];
    if (!waits) ended = &threads_[t];
    if (waits && threads_[t].site.line() != first->site.line()) {
      threadIdx = first->index;
      note_failure(cat("waits at ", text_of(first->site), ", thread ", text_of(threads_[t].index), " at ",
                       text_of(threads_[t].site)));
      return false;
    }
  }
  if (first == nullptr) return false;
  if (ended != nullptr) {
    threadIdx = first->index;
    note_failure(cat("waits at ", text_of(first->site), ", thread ", text_of(ended->index), " has ended"));
    return false;
  }
  for (Warp& warp : warps_) warp.runnable = std::exchange(warp.at_barrier, 0);
  return true;
}

thread_local Block block_of_this_thread;

std::mutex shared_limits_mutex;
std::map<void (*)(), std::size_t> shared_limits;
std::atomic<Index> requests{0};

std::size_t shared_limit(void (*kernel)()) {
  const std::lock_guard lock(shared_limits_mutex);
  const auto set = shared_limits.find(kernel);
  return set == shared_limits.end() ? 48 * 1024 : set->second;
}

}  // namespace

void set_order(Order order) { chosen_order = order; }

cudaError_t allow_shared_bytes(void (*kernel)(), int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > kMostSharedBytes)
    return set_error(cudaErrorInvalidValue, cat(bytes, " bytes of dynamic shared memory"));
  ++requests;
  const std::lock_guard lock(shared_limits_mutex);
  shared_limits[kernel] = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}

Index shared_memory_requests() { return requests; }

cudaError_t run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(),
                     const std::function<void()>& body) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const bool fits = threads >= 1 && threads <= 1024 && block.z <= 64 && grid.x >= 1 && grid.x < 1U << 31 &&
                    grid.y >= 1 && grid.y < 1U << 16 && grid.z >= 1 && grid.z < 1U << 16;
  if (!fits || shared_bytes > shared_limit(kernel)) {
    return set_error(cudaErrorInvalidConfiguration, cat("blocks ", text_of(grid), " of threads ",
                                                        text_of(block), ", shared bytes ", shared_bytes));
  }
  const DeviceAccess access;
  Block& all = block_of_this_thread;
  all.run_grid(grid, block, shared_bytes, body);
  return all.failure() ? set_error(cudaErrorLaunchFailure, *all.failure()) : cudaSuccess;
}

void wait_for_block(const std::source_location& site) { block_of_this_thread.wait_for_block(site); }
void wait_for_warp(unsigned mask, const std::source_location& site) {
  block_of_this_thread.wait_for_warp(mask, site);
}
unsigned own_lane() { return block_of_this_thread.own_lane(); }
void* exchange_slot() { return block_of_this_thread.slot(); }
void fail(const char* what, const std::source_location& site) { block_of_this_thread.fail(what, site); }
const void* given_by(unsigned lane) { return block_of_this_thread.given_by(lane); }
void copy_later(void* to, const void* from, std::size_t bytes, std::size_t zeros,
                const std::source_location& site) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; };
  const bool known = (bytes == 4 || bytes == 8 || bytes == 16) && zeros <= bytes;
  if (!known || !aligned(to) || !aligned(from)) fail("a misaligned copy at", site);
  block_of_this_thread.copy_later({to, from, bytes, zeros});
}
void close_batch_of_copies() { block_of_this_thread.close_batch_of_copies(); }
void finish_copies(std::size_t all_but) { block_of_this_thread.finish_copies(all_but); }
const void* exchanged(unsigned mask, unsigned lane, const std::source_location& site) {
  return block_of_this_thread.exchanged(mask, lane, site);
}

}  // namespace cuda_on_host
}  // namespace lowband
