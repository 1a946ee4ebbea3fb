#pragma once

#include "collectives/communicator.h"
#include "runtime/buffer.h"

#include <array>
#include <chrono>
#include <cstddef>
#include <span>
#include <vector>

namespace lowband {

/// The collectives of every backend that moves bytes from process to process: they are written once, here,
/// and a backend only sends and receives. So all such backends give the same bits and send the same bytes.
///
/// n processes, S bytes, ahead(k) and behind(k) the processes k further and k back around the ring of n:
///
/// | operation      | how                                                                  | sent by all |
/// |----------------|----------------------------------------------------------------------|-------------|
/// | reduce_scatter | raw part of ahead(k) goes there, k = 1..n-1; each owner reduces n raw | (n-1) S     |
/// |                | parts as a binary tree over process numbers (tree_reduction.h)        |             |
/// | all_gather     | ring: the own part to ahead(1), then pass on what came from behind(1);| (n-1) S     |
/// |                | little data goes from its owner to everybody                          |             |
/// | all_reduce     | both, on parts cut evenly by elements; two processes with little data | 2 (n-1) S   |
/// |                | swap all of it and reduce twice                                       |             |
/// | all_to_all     | every part from its sender to its receiver, ahead(k), k = 1..n-1      | S less what |
/// |                |                                                                       | stays       |
/// | broadcast      | chain root, root+1, ..., in pieces that overlap                       | (n-1) S     |
/// | barrier        | calls to ahead(1), ahead(2), ahead(4), ...                            | 0           |
///
/// Determinism: exact on every level. Between 2 and 4 processes this is as fast as MPI's own non-blocking
/// all-reduce at 8 bytes to 64 KiB and twice as fast at 64 MiB, so there is nothing faster to fall back to.
///
/// Owners reduce raw parts because a ring that adds at every hop fixes the order of a sum by the place of the
/// element; both send the same bytes.
///
/// The check: the first message that a process sends to another in a call is the `Call` itself, and data is
/// received only from a process whose call has been compared with one's own. Data is sent without waiting for
/// that, and a few bytes of it ride in the same message, so the check costs at most a 128-byte message and no
/// round trip. It is not counted as transport bytes, the data in it is.
class ExchangeCommunicator : public Communicator {
 protected:
  using Communicator::Communicator;
  using Clock = std::chrono::steady_clock;

  /// When the running call has to be over.
  Clock::time_point give_up() const { return give_up_; }
  /// Throws PeerFailed: the running call, and what `peer` did or did not do.
  [[noreturn]] void fail(int peer, std::string_view what) const;

 private:
  // What a backend provides. Messages between two processes arrive in the order of their start and are
  // received with the size they were sent with. Buffers of started messages stay in place until the await, or
  // do_let_go.
  virtual void start_send(int to, std::span<const std::byte> bytes) = 0;
  virtual void start_receive(int from, std::span<std::byte> bytes) = 0;
  /// Both return when all messages started so far, save for the `last` receives, have arrived, or their
  /// buffers may be written again; at `give_up()`, or as soon as a peer is known to be gone or to have
  /// aborted, they throw PeerFailed.
  virtual void await_receives_but(std::size_t last) = 0;
  virtual void await_sends() = 0;
  void await_receives() { await_receives_but(0); }

  Index do_all_reduce(const Call& call, void* data) final;
  Index do_reduce_scatter(const Call& call, const void* send, void* receive,
                          std::span<const Index> counts) final;
  Index do_all_gather(const Call& call, const void* send, void* receive, std::span<const Index> counts) final;
  Index do_all_to_all(const Call& call, const void* send, void* receive, std::span<const Index> counts) final;
  Index do_broadcast(const Call& call, void* data) final;
  void do_barrier(const Call& call) final;
  Determinism do_set_determinism(Determinism asked) final;

  int ahead(int distance) const { return (process() + distance) % size(); }
  int behind(int distance) const { return (process() - distance + size()) % size(); }

  // The first message to another process, always of this size: data longer than `first_data` comes behind it.
  struct Announcement {
    Call call;
    std::array<std::byte, 96> first_data;
  };

  void begin(const Call& call);
  void announce(int distance, std::span<const std::byte> data);
  void send_announced(int distance, std::span<const std::byte> data);
  void compare(int distance) const;
  void take_announced(int distance, std::span<std::byte> data);

  void cut(std::span<const Index> counts);
  void cut_evenly(Index elements);
  template <class Byte>
  std::span<Byte> part(Byte* whole, int process) const;
  void send_data(int to, std::span<const std::byte> bytes);
  void receive_data(int from, std::span<std::byte> bytes);

  std::byte* scratch(Index bytes);
  void scatter_reduce(const std::byte* send, std::byte* own_result, DType result_dtype);
  void swap_reduce(std::span<std::byte> data);
  template <class Byte>
  std::span<Byte> half(std::span<Byte> part, int which) const;
  void send_halves(int to, std::span<const std::byte> part);
  void gather(std::byte* whole);
  void gather_directly(std::byte* whole);

  // Of the running call.
  Call call_;
  Clock::time_point give_up_;
  Index sent_bytes_ = 0;
  std::vector<Index> offsets_;               // in bytes: part p is [offsets_[p], offsets_[p + 1])
  std::vector<Announcement> said_;           // to each process
  std::vector<Announcement> heard_;          // from each process
  std::vector<const std::byte*> raw_parts_;  // of one's own part, by process
  Buffer<std::byte> scratch_;                // grows, never shrinks
};

}  // namespace lowband
