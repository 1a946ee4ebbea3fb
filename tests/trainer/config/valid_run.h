#pragma once

#include "trainer/config/run_config.h"

#include <string>

namespace lowband {

/// A complete configuration for 4 processes; tests change one thing in it.
inline constexpr std::string_view kValidRun =
    R"(model { width: 48 layers: 2 heads: 4 ffn_width: 100 sequence: 16 }
mesh { replica: 2 tensor: 2 }
data { train: "train.bin" validation: "validation.bin" }
batch { sequences_per_step: 8 }
optimizer { learning_rate: 0.01 }
profile { rank: 6 }
schedule { steps: 100 }
)";

inline RunConfig valid_run() { return parse_run_config(kValidRun, "valid"); }

/// The message of the InvalidArgument that `action` throws; "" when it throws none.
template <class Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

}  // namespace lowband
