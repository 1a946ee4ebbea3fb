#include "collectives/byte_budget.h"

#include "runtime/error.h"

#include <algorithm>

namespace lowband {
namespace {

void require(Index spent, Index asked, Index planned, const Ledger& ledger, std::string_view axis,
             Purpose purpose, std::string_view parameter, std::string_view period) {
  if (spent + asked <= planned) return;
  throw BudgetExceeded(cat("byte budget: step ", ledger.step_number(), ", axis ", axis, ", purpose ",
                           purpose_name(purpose), parameter.empty() ? "" : ", parameter ", parameter,
                           ": found ", asked, " bytes asked with ", spent, " spent, expected at most ",
                           planned, " planned ", period, "; the transfer was not sent"));
}

}  // namespace

void ByteBudget::allow(std::string_view axis, Purpose purpose, Index bytes_per_step,
                       std::string_view parameter, StepPhase phase) {
  LB_EXPECTS(purpose != Purpose::kPeriodic,
             "byte budget: found periodic bytes by step, expected allow_every");
  LB_EXPECTS(bytes_per_step >= 0, "byte budget: found ", bytes_per_step, " bytes, expected at least 0");
  LB_EXPECTS(phase.period >= 0 && phase.offset >= 0, "byte budget: found steps ", phase.offset, " + k ",
             phase.period, ", expected numbers of at least 0");
  Line& line = lines_[{std::string(axis), purpose}];
  line.all.add(bytes_per_step, phase);
  if (!parameter.empty()) line.of_parameter[std::string(parameter)].add(bytes_per_step, phase);
}

void ByteBudget::Entries::add(Index bytes_per_step, StepPhase phase) {
  const auto same = std::ranges::find(entries, phase, &Entry::phase);
  if (same == entries.end()) {
    entries.push_back({bytes_per_step, phase});
  } else {
    same->bytes_per_step += bytes_per_step;
  }
}

Index ByteBudget::Entries::in_step(Index step) const {
  Index bytes = 0;
  for (const Entry& entry : entries) bytes += entry.phase.contains(step) ? entry.bytes_per_step : 0;
  return bytes;
}

void ByteBudget::allow_every(std::string_view axis, Index interval_steps, Index bytes) {
  LB_EXPECTS(interval_steps >= 1 && bytes >= 0, "byte budget: found ", bytes, " bytes every ", interval_steps,
             " steps, expected at least 0 bytes and 1 step");
  periodic_[std::string(axis)].push_back({interval_steps, bytes});
}

void ByteBudget::check(const Ledger& ledger, const Transfer& transfer, std::span<const PayloadShare> shares,
                       Index element_bytes) const {
  if (empty() || transfer.second_half) return;
  const PurposeBytes asked = payload_by_purpose(transfer, shares, element_bytes);
  for (const Purpose purpose : kPurposes) {
    const Index bytes = asked[static_cast<std::size_t>(purpose)];
    if (bytes == 0) continue;
    if (purpose == Purpose::kPeriodic) {
      check_periodic(ledger, transfer.axis, bytes);
    } else {
      check_step(ledger, transfer, purpose, bytes, shares, element_bytes);
    }
  }
}

// Parameters first: they say more than their sum.
void ByteBudget::check_step(const Ledger& ledger, const Transfer& transfer, Purpose purpose,
                            Index asked_bytes, std::span<const PayloadShare> shares,
                            Index element_bytes) const {
  const auto found = lines_.find({std::string(transfer.axis), purpose});
  if (found == lines_.end()) return;
  const Line& line = found->second;
  const Index step = ledger.step_number() - 1;
  if (!line.of_parameter.empty()) {
    std::map<std::string_view, Index> asked_of;
    for (const PayloadShare& share : shares) {
      if (share.purpose.value_or(transfer.purpose) == purpose)
        asked_of[share.parameter] += share.elements * element_bytes;
    }
    for (const auto& [parameter, asked] : asked_of) {
      const auto planned = line.of_parameter.find(parameter);
      require(ledger.step_parameter(transfer.axis, purpose, parameter), asked,
              planned == line.of_parameter.end() ? 0 : planned->second.in_step(step), ledger, transfer.axis,
              purpose, parameter, "in a step");
    }
  }
  require(ledger.step_sum(transfer.axis, purpose).payload_bytes, asked_bytes, line.all.in_step(step), ledger,
          transfer.axis, purpose, "", "in a step");
}

void ByteBudget::check_periodic(const Ledger& ledger, std::string_view axis, Index asked_bytes) const {
  const auto intervals = periodic_.find(axis);
  if (intervals == periodic_.end()) return;
  const Index steps = std::max<Index>(1, ledger.steps_begun());
  Index planned = 0;
  for (const Interval& interval : intervals->second)
    planned += (steps + interval.steps - 1) / interval.steps * interval.bytes;
  require(ledger.total_sum(axis, Purpose::kPeriodic).payload_bytes, asked_bytes, planned, ledger, axis,
          Purpose::kPeriodic, "", cat("in ", steps, " steps"));
}

}  // namespace lowband
