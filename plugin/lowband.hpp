#ifndef LOWBAND_PLUGIN_LOWBAND_HPP
#define LOWBAND_PLUGIN_LOWBAND_HPP

#include "lowband.h"

#include <memory>
#include <stdexcept>
#include <vector>

// lowband.h for C++17 and later: handles that free themselves, errors as exceptions. All of it is in this
// header, so it does not matter which compiler built the library.

namespace lowband {

/// What a call of lowband.h refused or suffered.
class CallFailed : public std::runtime_error {
 public:
  explicit CallFailed(lowband_status status) : std::runtime_error(lowband_last_error()), status_(status) {}
  lowband_status status() const { return status_; }

 private:
  lowband_status status_;
};

/// Throws: CallFailed, unless `status` is LOWBAND_OK.
inline void check(lowband_status status) {
  if (status != LOWBAND_OK) throw CallFailed(status);
}

/// A struct of lowband.h with its defaults: `auto options = defaults(lowband_options_defaults);`
template <class Struct>
Struct defaults(void (*fill)(Struct*)) {
  Struct filled;
  fill(&filled);
  return filled;
}

/// The processes of a job. Collective.
class World {
 public:
  static World from_mpi() { return World(lowband_world_from_mpi); }
  static World from_environment() { return World(lowband_world_from_environment); }
  explicit World(const lowband_meeting& meeting) {
    lowband_world* world = nullptr;
    check(lowband_world_from_tcp(&meeting, &world));
    handle_.reset(world);
  }
  World(int process, int processes, lowband_all_gather all_gather, void* context) {
    lowband_world* world = nullptr;
    check(lowband_world_from_all_gather(process, processes, all_gather, context, &world));
    handle_.reset(world);
  }

  int process() const { return lowband_world_process(handle_.get()); }
  int processes() const { return lowband_world_processes(handle_.get()); }
  /// Whoever cannot go on says so, or the others wait for it until their deadline.
  void abort(const char* reason) { check(lowband_world_abort(handle_.get(), reason)); }
  lowband_world* handle() const { return handle_.get(); }

 private:
  explicit World(lowband_status (*make)(lowband_world**)) {
    lowband_world* world = nullptr;
    check(make(&world));
    handle_.reset(world);
  }

  struct Free {
    void operator()(lowband_world* world) const { lowband_world_free(world); }
  };
  std::unique_ptr<lowband_world, Free> handle_;
};

/// The optimizer of a world, which must outlive it.
class Optimizer {
 public:
  Optimizer(World& world, const std::vector<lowband_parameter>& parameters, const lowband_options& options) {
    lowband_optimizer* optimizer = nullptr;
    check(lowband_optimizer_create(world.handle(), parameters.data(),
                                   static_cast<std::int64_t>(parameters.size()), &options, &optimizer));
    handle_.reset(optimizer);
  }

  void gradient_ready(std::int64_t parameter) { check(lowband_gradient_ready(handle_.get(), parameter)); }

  /// `stream`: the program's, where the optimizer is on a device.
  lowband_step_report step(std::int64_t step, double learning_rate, double scalar_learning_rate,
                           void* stream = nullptr) {
    auto info = defaults(lowband_step_info_defaults);
    auto report = defaults(lowband_step_report_defaults);
    info.step = step;
    info.learning_rate = learning_rate;
    info.scalar_learning_rate = scalar_learning_rate;
    info.stream = stream;
    check(lowband_step(handle_.get(), &info, &report));
    return report;
  }

  /// Likewise without its report: on a device it does not wait for it.
  void enqueue_step(std::int64_t step, double learning_rate, double scalar_learning_rate,
                    void* stream = nullptr) {
    auto info = defaults(lowband_step_info_defaults);
    info.step = step;
    info.learning_rate = learning_rate;
    info.scalar_learning_rate = scalar_learning_rate;
    info.stream = stream;
    check(lowband_step(handle_.get(), &info, nullptr));
  }
  lowband_step_report last_report() {
    auto report = defaults(lowband_step_report_defaults);
    check(lowband_last_report(handle_.get(), &report));
    return report;
  }

  /// What this process moved in the last step.
  lowband_bytes step_bytes(const char* axis, lowband_purpose purpose) const {
    auto bytes = defaults(lowband_bytes_defaults);
    check(lowband_step_bytes(handle_.get(), axis, purpose, &bytes));
    return bytes;
  }

  /// Read them to save a checkpoint, overwrite what they point at to load one.
  std::vector<lowband_state_piece> state() const {
    std::vector<lowband_state_piece> pieces;
    for (std::int64_t i = 0; i < lowband_state_count(handle_.get()); ++i) {
      pieces.push_back(defaults(lowband_state_piece_defaults));
      check(lowband_state_at(handle_.get(), i, &pieces.back()));
    }
    return pieces;
  }

  lowband_optimizer* handle() const { return handle_.get(); }

 private:
  struct Free {
    void operator()(lowband_optimizer* optimizer) const { lowband_optimizer_free(optimizer); }
  };
  std::unique_ptr<lowband_optimizer, Free> handle_;
};

}  // namespace lowband

#endif
