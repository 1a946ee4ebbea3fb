#pragma once

#include "sharding/rank_profile.h"

namespace lowband {

/// Payload bytes of layer matrices on the replica axis in one step, summed over the processes of one replica.
struct MatrixBytes {
  Index factor = 0;  // r (m + n) elements of every matrix that travels as factors
  Index dense = 0;   // m n elements of every matrix that travels dense
  Index sum() const { return factor + dense; }
};
MatrixBytes matrix_bytes(const RankProfile& profile, const ReplicaTraffic& traffic);

/// Bytes of `profile` over those of `reference`, both sent as `traffic` says. Where everything travels as
/// factors that is B(profile) / B(reference).
double budget_ratio(const RankProfile& profile, const RankProfile& reference, const ReplicaTraffic& traffic);

/// The uniform rank, 1 to the smallest min(m, n), whose bytes are nearest to those of `reference`; the lowest
/// of several.
RankProfile nearest_uniform(const RankProfile& reference, const ReplicaTraffic& traffic);

/// Refuses a profile whose `budget_ratio` differs from 1 by more than `tolerance`.
///
/// Throws: InvalidArgument "budget.reference: found ..., expected ..." with the bytes of both, their ratio,
/// and ranks that come nearest: the nearest uniform rank, and, where everything travels as factors, the
/// single ranks to change in this profile.
void expect_within_budget(const RankProfile& profile, const RankProfile& reference,
                          const ReplicaTraffic& traffic, double tolerance);

}  // namespace lowband
