#pragma once

#include "launcher/arguments.h"

namespace lowband {

// The subcommands of the program. Each takes the words after its name, prints to standard output and returns
// the exit code. Throws: InvalidArgument, IoError for what the user can mend.

int train_command(Arguments arguments);
int plan_command(Arguments arguments);
int data_command(Arguments arguments);
int info_command(Arguments arguments);
int presets_command(Arguments arguments);
int compare_command(Arguments arguments);
int bench_command(Arguments arguments);
int replay_command(Arguments arguments);

/// Exit codes, after sysexits.h.
inline constexpr int kExitUsage = 64;         // bad input: configuration, data, arguments
inline constexpr int kExitInternal = 70;      // our own failure, or a library's
inline constexpr int kExitTemporary = 75;     // another process failed: run it again, it resumes
inline constexpr int kExitInterrupted = 130;  // stopped by a signal, with a checkpoint

}  // namespace lowband
