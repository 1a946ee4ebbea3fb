#include "collectives/exchange_communicator.h"

#include "collectives/tree_reduction.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace lowband {
namespace {

// A broadcast travels in pieces: process k starts when the first piece has come k hops. 128 KiB keeps the
// start small against the transfer of any large buffer and the cost of a message small against the piece.
constexpr Index kBroadcastPieceBytes = 128 * 1024;

// Two processes that swap whole buffers send as many bytes as with parts, S each, in half the messages: 8 KiB
// took 15 instead of 25 us, 64 KiB 27 instead of 35 us, but 1 MiB 334 instead of 282 us, since each then
// reads and adds all of it (Open MPI 4.1.4 in shared memory, 2 cores).
constexpr Index kSwapBytes = 64 * 1024;

// Beyond this a reduce-scatter sends in rounds. When three processes send to both others at once, each link
// carries half of what it can: an all-reduce of 1 MiB ran at 0.085 GB/s, in rounds at 0.113, of 512 KiB at
// 0.098 and 0.111; of 256 KiB both ran at 0.120 (1 Gbit/s, perf/netns; Open MPI 4.1.4). In shared memory
// there was no difference beyond the noise.
constexpr Index kAtOnceBytes = 256 * 1024;

// From here on a part goes round the ring in halves.
constexpr std::size_t kHalvedBytes = 128 * 1024;

// Up to here parts go straight from their owners to everybody: as many bytes as round the ring, in one hop.
constexpr Index kDirectBytes = 64 * 1024;

std::size_t position(int process) { return static_cast<std::size_t>(process); }

}  // namespace

void ExchangeCommunicator::fail(int peer, std::string_view what) const {
  throw PeerFailed(cat(describe(call_), " on axis ", axis(), ", call ", call_.sequence, " of process ",
                       process(), " of ", size(), ": process ", peer, " ", what));
}

void ExchangeCommunicator::begin(const Call& call) {
  call_ = call;
  give_up_ = Clock::now() + deadline();
  sent_bytes_ = 0;
  said_.resize(position(size()));
  heard_.resize(position(size()));
}

// Tells ahead(distance) of the call and of `data` for it, which follows by `send_announced`.
void ExchangeCommunicator::announce(int distance, std::span<const std::byte> data) {
  Announcement& said = said_[position(ahead(distance))];
  said.call = call_;
  if (!data.empty() && data.size() <= said.first_data.size()) {
    std::ranges::copy(data, said.first_data.begin());
    sent_bytes_ += static_cast<Index>(data.size());
  }
  start_receive(behind(distance), std::as_writable_bytes(std::span(&heard_[position(behind(distance))], 1)));
  start_send(ahead(distance), std::as_bytes(std::span(&said, 1)));
}

void ExchangeCommunicator::send_announced(int distance, std::span<const std::byte> data) {
  if (data.size() > said_.front().first_data.size()) send_data(ahead(distance), data);
}

// Takes the data that behind(distance) announced; what did not fit into the announcement is on its way.
void ExchangeCommunicator::take_announced(int distance, std::span<std::byte> data) {
  const Announcement& heard = heard_[position(behind(distance))];
  if (data.size() > heard.first_data.size()) return receive_data(behind(distance), data);
  std::copy_n(heard.first_data.begin(), data.size(), data.begin());
}

void ExchangeCommunicator::compare(int distance) const {
  const int other = behind(distance);
  const Call& heard = heard_[position(other)].call;
  if (heard == call_) return;
  throw CollectiveMismatch(cat("process ", process(), " called ", describe(call_), " on axis ", axis(),
                               " as call ", call_.sequence, ", process ", other, " called ", describe(heard),
                               " as call ", heard.sequence));
}

void ExchangeCommunicator::cut(std::span<const Index> counts) {
  offsets_.resize(counts.size() + 1);
  offsets_[0] = 0;
  for (std::size_t p = 0; p < counts.size(); ++p) {
    offsets_[p + 1] = offsets_[p] + counts[p] * dtype_bytes(call_.dtype);
  }
}

// The first elements % n parts are one element longer.
void ExchangeCommunicator::cut_evenly(Index elements) {
  const Index quotient = elements / size();
  const Index remainder = elements % size();
  offsets_.resize(position(size()) + 1);
  for (int p = 0; p <= size(); ++p) {
    offsets_[position(p)] = (p * quotient + std::min<Index>(p, remainder)) * dtype_bytes(call_.dtype);
  }
}

template <class Byte>
std::span<Byte> ExchangeCommunicator::part(Byte* whole, int process) const {
  const Index begin = offsets_[position(process)];
  return {whole + begin, static_cast<std::size_t>(offsets_[position(process) + 1] - begin)};
}

void ExchangeCommunicator::send_data(int to, std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  start_send(to, bytes);
  sent_bytes_ += static_cast<Index>(bytes.size());
}

void ExchangeCommunicator::receive_data(int from, std::span<std::byte> bytes) {
  if (!bytes.empty()) start_receive(from, bytes);
}

std::byte* ExchangeCommunicator::scratch(Index bytes) {
  if (scratch_.size() < bytes) scratch_ = Buffer<std::byte>(bytes);
  return scratch_.data();
}

// own_result <- tree over p of process p's raw part for this process.
//
// The nearest process first, so that no process is the first target of two: all parts at once when there is
// little to send, otherwise in rounds of one part out and one in. The raw parts that come in lie in scratch,
// one behind the other.
void ExchangeCommunicator::scatter_reduce(const std::byte* send, std::byte* own_result, DType result_dtype) {
  const std::span<const std::byte> own = part(send, process());
  const auto own_bytes = static_cast<Index>(own.size());
  std::byte* const received = scratch(own_bytes * (size() - 1));
  raw_parts_.resize(position(size()));
  raw_parts_[position(process())] = own.data();

  // Everything is sent at once; a large part leaves when its receiver asks for it, one after the other.
  const bool in_rounds = call_.elements * dtype_bytes(call_.dtype) > kAtOnceBytes;
  for (int k = 1; k < size(); ++k) announce(k, part(send, ahead(k)));
  for (int k = 1; k < size(); ++k) send_announced(k, part(send, ahead(k)));
  await_receives();
  for (int k = 1; k < size(); ++k) compare(k);
  for (int k = 1; k < size(); ++k) {
    std::byte* const slot = received + own_bytes * (k - 1);
    raw_parts_[position(behind(k))] = slot;
    take_announced(k, {slot, own.size()});
    if (in_rounds) await_receives();
  }
  await_receives();
  reduce_tree(raw_parts_, own_result, own_bytes / dtype_bytes(call_.dtype), call_.dtype, result_dtype,
              call_.reduction);
  await_sends();
}

// data <- reduction of both processes' data, formed by both.
void ExchangeCommunicator::swap_reduce(std::span<std::byte> data) {
  std::byte* const received = scratch(static_cast<Index>(data.size()));
  announce(1, data);
  send_announced(1, data);
  await_receives();
  compare(1);
  take_announced(1, {received, data.size()});
  await_receives();
  await_sends();
  const std::array<const std::byte*, 2> parts{process() == 0 ? data.data() : received,
                                              process() == 0 ? received : data.data()};
  reduce_tree(parts, data.data(), call_.elements, call_.dtype, call_.dtype, call_.reduction);
}

// The halves of a part, cut at a whole cache line; a small part is all in the first.
template <class Byte>
std::span<Byte> ExchangeCommunicator::half(std::span<Byte> part, int which) const {
  const std::size_t cut = part.size() < kHalvedBytes ? part.size() : part.size() / 2 / 64 * 64;
  return which == 0 ? part.first(cut) : part.subspan(cut);
}

void ExchangeCommunicator::send_halves(int to, std::span<const std::byte> part) {
  for (const int which : {0, 1}) send_data(to, half(part, which));
}

// Every part of `whole` comes round the ring; the own part is there and on its way to ahead(1). Parts travel
// in halves, one is asked for before the other has come, and the first is passed on before the second: so
// neither direction of a link is idle while a message is being agreed on.
void ExchangeCommunicator::gather(std::byte* whole) {
  const int halves = 2 * (size() - 1);
  const auto half_of = [&](int h) { return half(part(whole, behind(1 + h / 2)), h % 2); };
  receive_data(behind(1), half_of(0));
  for (int h = 0; h < halves; ++h) {
    const std::span<std::byte> next = h + 1 < halves ? half_of(h + 1) : std::span<std::byte>{};
    receive_data(behind(1), next);
    await_receives_but(next.empty() ? 0 : 1);
    if (h + 2 < halves) send_data(ahead(1), half_of(h));
  }
  await_sends();
}

// The same for little data, among processes whose calls have been compared.
void ExchangeCommunicator::gather_directly(std::byte* whole) {
  for (int k = 1; k < size(); ++k) {
    receive_data(behind(k), part(whole, behind(k)));
    send_data(ahead(k), part(whole, process()));
  }
  await_receives();
  await_sends();
}

Index ExchangeCommunicator::do_all_reduce(const Call& call, void* data) {
  begin(call);
  auto* const whole = static_cast<std::byte*>(data);
  const Index bytes = call.elements * dtype_bytes(call.dtype);
  if (size() == 2 && bytes <= kSwapBytes) {
    swap_reduce({whole, static_cast<std::size_t>(bytes)});
    return sent_bytes_;
  }
  cut_evenly(call.elements);
  const std::span<std::byte> own = part(whole, process());
  scatter_reduce(whole, own.data(), call.dtype);
  if (bytes <= kDirectBytes) {
    gather_directly(whole);
  } else {
    send_halves(ahead(1), own);
    gather(whole);
  }
  return sent_bytes_;
}

Index ExchangeCommunicator::do_reduce_scatter(const Call& call, const void* send, void* receive,
                                              std::span<const Index> counts) {
  begin(call);
  cut(counts);
  scatter_reduce(static_cast<const std::byte*>(send), static_cast<std::byte*>(receive),
                 sum_dtype(call.dtype));
  return sent_bytes_;
}

Index ExchangeCommunicator::do_all_gather(const Call& call, const void* send, void* receive,
                                          std::span<const Index> counts) {
  begin(call);
  cut(counts);
  auto* const whole = static_cast<std::byte*>(receive);
  const std::span<std::byte> own = part(whole, process());
  if (!own.empty() && own.data() != send) std::memcpy(own.data(), send, own.size());

  if (offsets_.back() <= kDirectBytes) {
    for (int k = 1; k < size(); ++k) {
      announce(k, own);
      send_announced(k, own);
    }
    await_receives();
    for (int k = 1; k < size(); ++k) {
      compare(k);
      take_announced(k, part(whole, behind(k)));
    }
    await_receives();
    await_sends();
  } else {
    announce(1, {});
    send_halves(ahead(1), own);
    await_receives();
    compare(1);
    gather(whole);
  }
  return sent_bytes_;
}

// As scatter_reduce: the nearest process first, much data in rounds.
Index ExchangeCommunicator::do_all_to_all(const Call& call, const void* send, void* receive,
                                          std::span<const Index> counts) {
  begin(call);
  const Index bytes = dtype_bytes(call.dtype);
  const auto count = [&](int from, int to) {
    return counts[position(from) * position(size()) + position(to)];
  };
  std::vector<std::span<const std::byte>> outgoing(position(size()));
  std::vector<std::span<std::byte>> incoming(position(size()));
  const auto* out = static_cast<const std::byte*>(send);
  auto* in = static_cast<std::byte*>(receive);
  for (int p = 0; p < size(); ++p) {
    outgoing[position(p)] = {out, static_cast<std::size_t>(count(process(), p) * bytes)};
    incoming[position(p)] = {in, static_cast<std::size_t>(count(p, process()) * bytes)};
    out += outgoing[position(p)].size();
    in += incoming[position(p)].size();
  }

  std::ranges::copy(outgoing[position(process())], incoming[position(process())].begin());
  const bool at_once = call.elements * bytes <= kAtOnceBytes;
  for (int k = 1; k < size(); ++k) announce(k, outgoing[position(ahead(k))]);
  for (int k = 1; k < size() && at_once; ++k) send_announced(k, outgoing[position(ahead(k))]);
  await_receives();
  for (int k = 1; k < size(); ++k) compare(k);
  for (int k = 1; k < size(); ++k) {
    take_announced(k, incoming[position(behind(k))]);
    if (at_once) continue;
    send_announced(k, outgoing[position(ahead(k))]);
    await_receives();
    await_sends();
  }
  await_receives();
  await_sends();
  return sent_bytes_;
}

Index ExchangeCommunicator::do_broadcast(const Call& call, void* data) {
  begin(call);
  announce(1, {});
  await_receives();
  compare(1);

  const int hops = (process() - call.root + size()) % size();  // from the root
  const Index total_bytes = call.elements * dtype_bytes(call.dtype);
  for (Index begin = 0; begin < total_bytes; begin += kBroadcastPieceBytes) {
    const std::span<std::byte> piece(
        static_cast<std::byte*>(data) + begin,
        static_cast<std::size_t>(std::min(kBroadcastPieceBytes, total_bytes - begin)));
    if (hops > 0) {
      receive_data(behind(1), piece);
      await_receives();
    }
    if (hops < size() - 1) send_data(ahead(1), piece);
  }
  await_sends();
  return sent_bytes_;
}

Determinism ExchangeCommunicator::do_set_determinism(Determinism /*asked*/) { return Determinism::kExact; }

// After round k a process has heard, directly or not, from the 2^k processes behind it.
void ExchangeCommunicator::do_barrier(const Call& call) {
  begin(call);
  for (int distance = 1; distance < size(); distance *= 2) {
    announce(distance, {});
    await_receives();
    compare(distance);
  }
  await_sends();
}

}  // namespace lowband
