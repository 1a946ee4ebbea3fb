#pragma once

#include "runtime/types.h"

#include <array>
#include <chrono>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace lowband {

/// Why bytes moved.
enum class Purpose : std::uint8_t {
  kFactor,      // low-rank factors P and R
  kDense,       // gradients of what is not compressed
  kGradient,    // dense gradient reduction inside a replica (shard axis)
  kWeight,      // updated weights gathered inside a replica
  kUpdate,      // updates formed from whole matrices: assembled and spread inside a replica
  kActivation,  // tensor-parallel activations and their gradients
  kControl,     // norms, flags, Gram matrices, hashes, checks
  kPeriodic,    // what is exchanged every so many steps: diagnostics, resyncs
};
inline constexpr std::array kPurposes{Purpose::kFactor,  Purpose::kDense,   Purpose::kGradient,
                                      Purpose::kWeight,  Purpose::kUpdate,  Purpose::kActivation,
                                      Purpose::kControl, Purpose::kPeriodic};
std::string_view purpose_name(Purpose purpose);

enum class Operation : std::uint8_t {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kAllToAll,
  kBroadcast,
  kBarrier
};
std::string_view operation_name(Operation operation);

/// The part of one transfer that belongs to one parameter, and why it moves when that is not the reason of
/// the whole transfer.
struct PayloadShare {
  std::string_view parameter;
  Index elements = 0;
  std::optional<Purpose> purpose = std::nullopt;
};

/// One finished collective as the communicator reports it.
struct Transfer {
  std::string_view axis;
  Purpose purpose;
  Operation operation;
  Index payload_bytes = 0;         // exact: the logical buffer of the collective
  double modelled_wire_bytes = 0;  // sent by this process according to `wire_bytes_model`
  Index transport_bytes = 0;       // handed to the transport for sending by this process, checks excluded
  double seconds = 0;
  bool second_half = false;  // its payload has been recorded already: see `Tag`
};

/// Payload bytes of a transfer by purpose, which is the index.
using PurposeBytes = std::array<Index, kPurposes.size()>;
PurposeBytes payload_by_purpose(const Transfer& transfer, std::span<const PayloadShare> shares,
                                Index element_bytes);

/// Ring traffic sent by one of `processes` processes for a logical buffer of `payload_bytes`:
/// all-reduce 2(n-1)/n, reduce-scatter and all-gather (n-1)/n, broadcast (n-1)/n averaged over processes,
/// all-to-all (n-1)/n^2 for equal parts, barrier 0.
double wire_bytes_model(Operation operation, Index payload_bytes, int processes);

/// Sums over any set of transfers.
struct TransferTotals {
  Index calls = 0;
  Index payload_bytes = 0;
  double modelled_wire_bytes = 0;
  Index transport_bytes = 0;
  double seconds = 0;
  TransferTotals& operator+=(const TransferTotals& other);
  TransferTotals& operator-=(const TransferTotals& other);
};

/// What one process moved: this step, and since construction, by (axis, purpose, operation) and by
/// (axis, purpose, parameter). One ledger serves all communicators of a process.
///
/// Threads: any number at once; readers get copies. A transfer belongs to the step that has begun when it
/// ends.
class Ledger {
 public:
  /// Starts an empty step account; totals go on. Errors name the step by `number`, by default one more than
  /// that of the step before.
  void begin_step(std::optional<Index> number = std::nullopt);
  Index step_number() const;  // 0 before the first step
  Index steps_begun() const;
  /// Shares with a purpose of their own stand under that purpose, with the bytes and seconds of the transfer
  /// in proportion to their elements: payload exactly, transport bytes to the nearest byte. The purpose of
  /// the transfer gets the rest, so that sums are exact, and the call.
  void record(const Transfer& transfer, std::span<const PayloadShare> shares, Index element_bytes);
  /// Of a transfer on a device that was recorded when it was enqueued: how long it took there, from its turn
  /// to its end.
  void add_seconds(const std::string& axis, Purpose purpose, Operation operation, double seconds);

  /// The calling thread is inside a collective as long as this lives; one at a time on a thread.
  class Presence {
   public:
    explicit Presence(Ledger& ledger);
    Presence(const Presence&) = delete;
    Presence& operator=(const Presence&) = delete;
    ~Presence();

   private:
    Ledger& ledger_;
  };
  /// Seconds that a thread has spent inside collectives since construction, including the one it is in now.
  double seconds_inside(std::thread::id thread) const;

  struct Key {
    std::string axis;
    Purpose purpose;
    Operation operation;
    // NOLINTNEXTLINE(modernize-use-nullptr): clang-tidy 14 sees a pointer in <=>
    auto operator<=>(const Key&) const = default;
  };
  struct ParameterKey {
    std::string axis;
    Purpose purpose;
    std::string parameter;
    // NOLINTNEXTLINE(modernize-use-nullptr): clang-tidy 14 sees a pointer in <=>
    auto operator<=>(const ParameterKey&) const = default;
  };
  std::map<Key, TransferTotals> step() const;
  std::map<Key, TransferTotals> total() const;
  /// Payload bytes of the current step by parameter, where the caller named shares.
  std::map<ParameterKey, Index> step_parameters() const;
  Index step_parameter(std::string_view axis, Purpose purpose, std::string_view parameter) const;
  /// This step's sum over operations of one axis and purpose ("" = every axis).
  TransferTotals step_sum(std::string_view axis, Purpose purpose) const;
  TransferTotals step_sum() const;
  TransferTotals total_sum(std::string_view axis, Purpose purpose) const;

 private:
  struct Inside {
    double seconds = 0;  // in collectives that have ended
    std::optional<std::chrono::steady_clock::time_point> since = std::nullopt;
  };

  mutable std::mutex mutex_;
  Index step_number_ = 0;
  Index steps_begun_ = 0;
  std::map<std::thread::id, Inside> inside_;
  std::map<Key, TransferTotals> step_;
  std::map<Key, TransferTotals> total_;
  std::map<ParameterKey, Index> step_parameters_;
};

}  // namespace lowband
