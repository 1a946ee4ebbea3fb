/* A job of processes in C99: half of the data on each, one matrix and one vector, twenty steps towards a
 * target. Exits with 0 when the distance fell and every step sent exactly what was planned.
 *
 * Usage: plugin_c_job environment|mpi */
#include "plugin/lowband.h"

#include <stdio.h>
#include <string.h>

enum { kRows = 12, kCols = 7, kSteps = 20 };

static int report(const char* what) {
  fprintf(stderr, "%s: %s\n", what, lowband_last_error());
  return 1;
}

static float target(int i) { return (float)((i * 7919 + 13) % 101) / 50 - 1; }

static double gradients(const float* weights, float* to, int count, int process) {
  double distance = 0;
  for (int i = 0; i < count; ++i) {
    const float difference = weights[i] - target(i);
    to[i] = difference + (process == 0 ? 0.25F : -0.25F); /* the mean over both is the difference */
    distance += (double)difference * difference;
  }
  return distance;
}

static int train(lowband_world* world) {
  static float weights[kRows * kCols + kCols], gradient[kRows * kCols + kCols];
  const int process = lowband_world_process(world);
  lowband_parameter parameters[2] = {
      {"matrix", LOWBAND_MATRIX, LOWBAND_UNCUT, kRows, kCols, weights, gradient, 0, NULL, 0, 0},
      {"bias", LOWBAND_NORM, LOWBAND_UNCUT, 1, kCols, weights + kRows * kCols, gradient + kRows * kCols, 0,
       NULL, 0, 0}};
  lowband_options options;
  lowband_optimizer* optimizer;
  lowband_step_info info;
  int64_t factor_bytes, dense_bytes;
  double first = 0, last = 0;

  lowband_options_defaults(&options);
  options.uniform_rank = 2;
  if (lowband_optimizer_create(world, parameters, 2, &options, &optimizer)) return report("create");
  if (lowband_planned_bytes(optimizer, &factor_bytes, &dense_bytes)) return report("planned bytes");
  if (factor_bytes != 4 * 2 * (kRows + kCols) || dense_bytes != 4 * kCols) {
    fprintf(stderr, "planned %ld and %ld bytes\n", (long)factor_bytes, (long)dense_bytes);
    return 1;
  }
  lowband_step_info_defaults(&info);
  info.learning_rate = info.scalar_learning_rate = 0.1;
  for (info.step = 0; info.step < kSteps; ++info.step) {
    lowband_bytes factors, dense;
    last = gradients(weights, gradient, kRows * kCols + kCols, process);
    if (info.step == 0) first = last;
    if (lowband_step(optimizer, &info, NULL)) return report("step");
    lowband_bytes_defaults(&factors);
    lowband_bytes_defaults(&dense);
    if (lowband_step_bytes(optimizer, "replica", LOWBAND_FACTOR, &factors)) return report("bytes");
    if (lowband_step_bytes(optimizer, "replica", LOWBAND_DENSE, &dense)) return report("bytes");
    if (factors.payload_bytes != factor_bytes || dense.payload_bytes != dense_bytes) {
      fprintf(stderr, "sent %ld and %ld bytes, planned %ld and %ld\n", (long)factors.payload_bytes,
              (long)dense.payload_bytes, (long)factor_bytes, (long)dense_bytes);
      return 1;
    }
  }
  lowband_optimizer_free(optimizer);
  if (!(last < 0.5 * first)) {
    fprintf(stderr, "squared distance %g at first, %g at last\n", first, last);
    return 1;
  }
  return 0;
}

int main(int argc, char** argv) {
  lowband_world* world;
  int failed;
  if (argc != 2) return 64;
  lowband_set_compute_threads(1);
  if (strcmp(argv[1], "mpi") == 0 ? lowband_world_from_mpi(&world) : lowband_world_from_environment(&world))
    return report("world");
  failed = train(world) || lowband_world_processes(world) != 2;
  if (failed) lowband_world_abort(world, "this process failed");
  lowband_world_free(world);
  return failed;
}
