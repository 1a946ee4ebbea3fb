#include "collectives/call.h"

#include "runtime/error.h"

namespace lowband {

std::string_view reduction_name(Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
      return "sum";
    case Reduction::kMax:
      return "max";
  }
  return "?";
}

std::uint64_t hash_counts(std::span<const Index> counts) {
  // FNV-1a over the bytes of the counts: 64-bit offset basis and prime.
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const Index count : counts) {
    for (int shift = 0; shift < 64; shift += 8) {
      hash = (hash ^ (static_cast<std::uint64_t>(count) >> shift & 0xff)) * 0x100000001b3;
    }
  }
  return hash;
}

std::string describe(const Call& call) {
  const auto sized = [&](std::string_view before) {
    return cat(operation_name(call.operation), "(", before, dtype_name(call.dtype), ", ", call.elements,
               " elements");
  };
  const std::string reduced = cat(reduction_name(call.reduction), ", ");
  std::string text;
  switch (call.operation) {
    case Operation::kAllReduce:
      text = sized(reduced);
      break;
    case Operation::kReduceScatter:
      text = cat(sized(reduced), ", counts ", std::hex, call.counts_hash);
      break;
    case Operation::kAllGather:
    case Operation::kAllToAll:
      text = cat(sized(""), ", counts ", std::hex, call.counts_hash);
      break;
    case Operation::kBroadcast:
      text = cat(sized(""), ", root ", call.root);
      break;
    case Operation::kBarrier:
      return "barrier()";
  }
  return cat(text, ", ", purpose_name(call.purpose), ")");
}

}  // namespace lowband
