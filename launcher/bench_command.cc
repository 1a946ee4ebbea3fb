#include "collectives/agreement.h"
#include "launcher/bench/bench_picture.h"
#include "launcher/bench/bench_table.h"
#include "launcher/bench/comm_bench.h"
#include "launcher/commands.h"
#include "launcher/job_world.h"
#include "runtime/cpu.h"
#include "runtime/error.h"
#include "runtime/json.h"
#include "trainer/data/files.h"

#include <filesystem>
#include <iostream>
#include <utility>

namespace lowband {
namespace {

void require_writable_folder_of(const std::string& file) {
  if (file.empty()) return;
  const std::filesystem::path folder = std::filesystem::path(file).parent_path();
  require_writable_directory(folder.empty() ? "." : folder);
}

/// Writes results as they come in, without buffering: a sweep may take long.
BenchSink table_sink() {
  BenchSink sink;
  sink.begun = [](const BenchReport& report) {
    std::cout << bench_header(report) << (report.matrices() > 0 ? exchange_headings() : "") << std::flush;
  };
  sink.line = [](const ExchangeLine& line) { std::cout << exchange_row(line) << std::flush; };
  sink.dense = [](const AllReduceLine& line) { std::cout << dense_row(line) << std::flush; };
  sink.size = [first = true](const AllReduceLine& line) mutable {
    if (std::exchange(first, false)) std::cout << size_headings();
    std::cout << size_row(line) << std::flush;
  };
  return sink;
}

void write_results(const BenchReport& report, const CommBenchOptions& options) {
  if (options.json_to_output) {
    std::cout << to_json(report) << "\n";
  } else {
    std::cout << bench_footer(report);
  }
  if (!options.json_file.empty()) {
    DurableFile file(options.json_file);
    file.append(to_json(report) + "\n");
    file.commit();
  }
  if (options.picture.empty()) return;
  draw_bench(report, options.picture);
  if (!options.json_to_output) std::cout << "# picture: " << options.picture << ".png, .svg, .csv\n";
}

/// The whole benchmark as one process sees it.
int bench_in(Communicator& world, Arguments& arguments) {
  CommBenchOptions options;
  agree(world, [&] {
    options = comm_bench_options(arguments, world.size());
    set_compute_threads(threads_per_process(options.threads, world.size()));
    if (world.process() != 0) return;
    require_writable_folder_of(options.json_file);
    require_writable_folder_of(options.picture);
  });
  const bool shows = world.process() == 0 && !options.json_to_output;
  const BenchReport report = run_comm_bench(world, options, shows ? table_sink() : BenchSink{});
  agree(world, [&] {
    if (world.process() == 0) write_results(report, options);
  });
  world.barrier();  // mpirun ends the job when the first process leaves with an error; everything is out by
                    // then
  return report.wrong() == 0 ? 0 : kExitInternal;
}

}  // namespace

int bench_command(Arguments arguments) {
  const std::string what = arguments.word();
  LB_EXPECTS(what == "comm", "bench: found ", what.empty() ? "nothing" : what, ", expected comm");
  return run_job(std::move(arguments), bench_in);
}

}  // namespace lowband
