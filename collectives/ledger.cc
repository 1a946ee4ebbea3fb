#include "collectives/ledger.h"

#include "runtime/error.h"

#include <cmath>

namespace lowband {

std::string_view purpose_name(Purpose purpose) {
  switch (purpose) {
    case Purpose::kFactor:
      return "factor";
    case Purpose::kDense:
      return "dense";
    case Purpose::kGradient:
      return "gradient";
    case Purpose::kWeight:
      return "weight";
    case Purpose::kUpdate:
      return "update";
    case Purpose::kActivation:
      return "activation";
    case Purpose::kControl:
      return "control";
    case Purpose::kPeriodic:
      return "periodic";
  }
  return "?";
}

std::string_view operation_name(Operation operation) {
  switch (operation) {
    case Operation::kAllReduce:
      return "all_reduce";
    case Operation::kReduceScatter:
      return "reduce_scatter";
    case Operation::kAllGather:
      return "all_gather";
    case Operation::kAllToAll:
      return "all_to_all";
    case Operation::kBroadcast:
      return "broadcast";
    case Operation::kBarrier:
      return "barrier";
  }
  return "?";
}

double wire_bytes_model(Operation operation, Index payload_bytes, int processes) {
  LB_EXPECTS(payload_bytes >= 0 && processes >= 1, "wire_bytes_model: payload ", payload_bytes,
             " bytes over ", processes,
             " processes, expected a non-negative payload over at least one process");
  // One pass of a ring: everything but one process's own part, (n-1)/n S.
  const double pass = static_cast<double>(payload_bytes) * (processes - 1) / processes;
  switch (operation) {
    case Operation::kAllReduce:
      return 2 * pass;
    case Operation::kReduceScatter:
    case Operation::kAllGather:
    case Operation::kBroadcast:
      return pass;
    case Operation::kAllToAll:
      return pass / processes;
    case Operation::kBarrier:
      return 0;
  }
  return 0;
}

TransferTotals& TransferTotals::operator+=(const TransferTotals& other) {
  calls += other.calls;
  payload_bytes += other.payload_bytes;
  modelled_wire_bytes += other.modelled_wire_bytes;
  transport_bytes += other.transport_bytes;
  seconds += other.seconds;
  return *this;
}

TransferTotals& TransferTotals::operator-=(const TransferTotals& other) {
  calls -= other.calls;
  payload_bytes -= other.payload_bytes;
  modelled_wire_bytes -= other.modelled_wire_bytes;
  transport_bytes -= other.transport_bytes;
  seconds -= other.seconds;
  return *this;
}

PurposeBytes payload_by_purpose(const Transfer& transfer, std::span<const PayloadShare> shares,
                                Index element_bytes) {
  PurposeBytes bytes{};
  const auto of = [&](Purpose purpose) -> Index& { return bytes[static_cast<std::size_t>(purpose)]; };
  of(transfer.purpose) = transfer.payload_bytes;
  for (const PayloadShare& share : shares) {
    of(transfer.purpose) -= share.elements * element_bytes;
    of(share.purpose.value_or(transfer.purpose)) += share.elements * element_bytes;
  }
  return bytes;
}

void Ledger::begin_step(std::optional<Index> number) {
  const std::lock_guard lock(mutex_);
  step_.clear();
  step_parameters_.clear();
  step_number_ = number.value_or(step_number_ + 1);
  ++steps_begun_;
}

Index Ledger::step_number() const {
  const std::lock_guard lock(mutex_);
  return step_number_;
}

Index Ledger::steps_begun() const {
  const std::lock_guard lock(mutex_);
  return steps_begun_;
}

Index Ledger::step_parameter(std::string_view axis, Purpose purpose, std::string_view parameter) const {
  const std::lock_guard lock(mutex_);
  const auto found = step_parameters_.find({std::string(axis), purpose, std::string(parameter)});
  return found == step_parameters_.end() ? 0 : found->second;
}

void Ledger::record(const Transfer& transfer, std::span<const PayloadShare> shares, Index element_bytes) {
  const std::string axis(transfer.axis);
  const std::lock_guard lock(mutex_);
  const auto add = [&](Purpose purpose, const TransferTotals& totals) {
    step_[{axis, purpose, transfer.operation}] += totals;
    total_[{axis, purpose, transfer.operation}] += totals;
  };

  if (!transfer.second_half) {
    for (const PayloadShare& share : shares) {
      step_parameters_[{axis, share.purpose.value_or(transfer.purpose), std::string(share.parameter)}] +=
          share.elements * element_bytes;
    }
  }
  const PurposeBytes payload = payload_by_purpose(transfer, shares, element_bytes);
  TransferTotals rest{.calls = 1,
                      .payload_bytes = transfer.second_half ? 0 : transfer.payload_bytes,
                      .modelled_wire_bytes = transfer.modelled_wire_bytes,
                      .transport_bytes = transfer.transport_bytes,
                      .seconds = transfer.seconds};
  for (const Purpose purpose : kPurposes) {
    const Index bytes = payload[static_cast<std::size_t>(purpose)];
    if (bytes == 0 || purpose == transfer.purpose) continue;
    const double fraction = static_cast<double>(bytes) / static_cast<double>(transfer.payload_bytes);
    const TransferTotals part{
        .calls = 0,
        .payload_bytes = transfer.second_half ? 0 : bytes,
        .modelled_wire_bytes = transfer.modelled_wire_bytes * fraction,
        .transport_bytes = std::llround(static_cast<double>(transfer.transport_bytes) * fraction),
        .seconds = transfer.seconds * fraction};
    add(purpose, part);
    rest -= part;
  }
  add(transfer.purpose, rest);
}

// The step that has begun since may not have such a transfer of its own.
void Ledger::add_seconds(const std::string& axis, Purpose purpose, Operation operation, double seconds) {
  const std::lock_guard lock(mutex_);
  const Key key{axis, purpose, operation};
  total_[key].seconds += seconds;
  if (const auto found = step_.find(key); found != step_.end()) found->second.seconds += seconds;
}

namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

Ledger::Presence::Presence(Ledger& ledger) : ledger_(ledger) {
  const std::lock_guard lock(ledger_.mutex_);
  ledger_.inside_[std::this_thread::get_id()].since = std::chrono::steady_clock::now();
}

Ledger::Presence::~Presence() {
  const std::lock_guard lock(ledger_.mutex_);
  Inside& inside = ledger_.inside_[std::this_thread::get_id()];
  inside.seconds += seconds_since(*inside.since);
  inside.since.reset();
}

double Ledger::seconds_inside(std::thread::id thread) const {
  const std::lock_guard lock(mutex_);
  const auto found = inside_.find(thread);
  if (found == inside_.end()) return 0;
  const Inside& inside = found->second;
  return inside.seconds + (inside.since ? seconds_since(*inside.since) : 0);
}

std::map<Ledger::Key, TransferTotals> Ledger::step() const {
  const std::lock_guard lock(mutex_);
  return step_;
}

std::map<Ledger::Key, TransferTotals> Ledger::total() const {
  const std::lock_guard lock(mutex_);
  return total_;
}

std::map<Ledger::ParameterKey, Index> Ledger::step_parameters() const {
  const std::lock_guard lock(mutex_);
  return step_parameters_;
}

namespace {

TransferTotals sum_of(const std::map<Ledger::Key, TransferTotals>& account, std::string_view axis,
                      Purpose purpose) {
  TransferTotals sum;
  for (const auto& [key, totals] : account) {
    if (key.purpose == purpose && (axis.empty() || key.axis == axis)) sum += totals;
  }
  return sum;
}

}  // namespace

TransferTotals Ledger::step_sum(std::string_view axis, Purpose purpose) const {
  const std::lock_guard lock(mutex_);
  return sum_of(step_, axis, purpose);
}

TransferTotals Ledger::step_sum() const {
  const std::lock_guard lock(mutex_);
  TransferTotals sum;
  for (const auto& [key, totals] : step_) sum += totals;
  return sum;
}

TransferTotals Ledger::total_sum(std::string_view axis, Purpose purpose) const {
  const std::lock_guard lock(mutex_);
  return sum_of(total_, axis, purpose);
}

}  // namespace lowband
