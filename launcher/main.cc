#include "launcher/commands.h"
#include "runtime/cpu.h"
#include "runtime/error.h"
#include "runtime/version.h"

#include <iostream>
#include <map>

namespace {

constexpr const char* kUsage = R"(lowband: communication-efficient training of large transformers

  lowband train CONFIG | --preset NAME     train; under lowband-run or mpirun on all processes of the job
      --profile PROFILE                    rank profile: uniform:24, structural, inverted*0.125, fraction:1/4,
                                           structural@uniform:24 (the first shape, the communication of the second)
      --set FIELD=VALUE                    change one field of the configuration, may be repeated
      --backend mpi|ucx|nccl|local         how bytes move between processes (default: mpi under mpirun; ucx with
                                           RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; else local)
      --threads-as-processes N             N processes as threads of this one, without MPI
  lowband plan CONFIG | --preset NAME      ranks, bytes and break-even of every matrix before anything runs
      --profile PROFILE[,PROFILE...]       other profiles than the configuration's
      --reference PROFILE                  what the ratios are relative to (default: structural)
      --set FIELD=VALUE  --json
  lowband data prepare FILE|FOLDER ...     text to token shards of a byte vocabulary
      --out FOLDER  --suffix .txt  --validation-fraction 0.05  --json
  lowband compare RUN_FOLDER ...           runs side by side
      --picture PATH                       loss curves as PATH.png and PATH.svg
      --json
  lowband bench comm CONFIG | --preset NAME | --sizes 8:64M:2     communication across rank profiles and sizes;
                                           under lowband-run or mpirun on all processes of the job
      --profile PROFILE[,PROFILE...]  --ranks 4,16,64   what is exchanged (default: the configuration's profile)
      --wire f32,bf16                      element types of what is sent
      --sizes BEGIN:END[:FACTOR]           plain all-reduces of these bytes as well
      --warmup 5  --iterations 20  --min-time SECONDS  --check 1  --base-iterations 5
      --with-products                      B Q and B^T P belong to the time
      --device cpu|cuda                    where what is exchanged lies (default: cpu)
      --interface eth0  --link LABEL       compare with this interface's counter; a label for the header
      --json | --json=FILE  --picture PATH --threads-as-processes N  --set FIELD=VALUE
  lowband replay FOLDER --out FOLDER       apply an optimizer to recorded gradients (weights.safetensors, step-000000...);
                                           under lowband-run or mpirun on all processes of the job, else as threads
      --optimizer dion|powersgd|...        (default: the configuration's, else dion)
      --profile PROFILE  --set FIELD=VALUE as for train; of the configuration: mesh, optimizer, profile, schedule,
                                           diagnostics, seed, precision, device, determinism, threads
      --replicas N                         recorded replicas (default: as many as the files say)
      --state FILE                         initial optimizer state, FILE or FILE with .replica-0 ... before its suffix
      --scalar-parameters PATTERN          matrices that are updated as what is no matrix, may be repeated
      --config CONFIG | --preset NAME      the run that was recorded: its model, mesh, optimizer and schedule
      --backend mpi|ucx|nccl|local  --json
  lowband presets [NAME | --json]          named configurations that come with the program
  lowband info [--json]                    what is built in, versions, kernels, devices

Several processes: launcher/lowband-run -np N -- train CONFIG
)";

const std::map<std::string, int (*)(lowband::Arguments)> kCommands{
    {"train", lowband::train_command}, {"plan", lowband::plan_command},
    {"data", lowband::data_command},   {"compare", lowband::compare_command},
    {"info", lowband::info_command},   {"presets", lowband::presets_command},
    {"bench", lowband::bench_command}, {"replay", lowband::replay_command},
};

int run(const std::vector<std::string>& words) {
  if (words.empty() || words[0] == "--help" || words[0] == "-h" || words[0] == "help") {
    std::cout << kUsage;
    return words.empty() ? lowband::kExitUsage : 0;
  }
  if (words[0] == "--version") {
    std::cout << "lowband " << lowband::version() << "\n";
    return 0;
  }
  const auto command = kCommands.find(words[0]);
  LB_EXPECTS(command != kCommands.end(), "found the command '", words[0],
             "', expected train, plan, data, compare, bench, replay, presets or info (lowband --help)");
  return command->second(lowband::Arguments({words.begin() + 1, words.end()}));
}

}  // namespace

int main(int argc, char** argv) {
  lowband::ensure_fast_blas_kernels(argv);
  try {
    return run({argv + 1, argv + argc});
  } catch (const lowband::InvalidArgument& error) {
    std::cerr << "lowband: " << error.what() << "\n";
    return lowband::kExitUsage;
  } catch (const lowband::IoError& error) {
    std::cerr << "lowband: " << error.what() << "\n";
    return lowband::kExitUsage;
  } catch (const std::exception& error) {
    std::cerr << "lowband: " << error.what() << "\n";
    return lowband::kExitInternal;
  }
}
