#include "plugin/boundary.h"

#include "collectives/mpi/mpi_world.h"
#include "collectives/ucx/ucx_world.h"
#include "runtime/cpu.h"
#include "runtime/device.h"
#include "runtime/version.h"

#include <new>

namespace lowband::plugin {
namespace {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

std::string feature_names() {
  std::string names;
  if (mpi_available()) names += "mpi";
  if (ucx_available()) names += names.empty() ? "ucx" : ",ucx";
  if (cuda_status().built_in) names += names.empty() ? "cuda" : ",cuda";
  return names;
}

}  // namespace

lowband_status fail(lowband_status status, std::string_view message) {
  last_error() = message;
  return status;
}

lowband_status fail_with_current_exception() {
  try {
    throw;
  } catch (const BudgetExceeded& error) {
    return fail(LOWBAND_BUDGET_EXCEEDED, error.what());
  } catch (const InvalidArgument& error) {
    return fail(LOWBAND_INVALID_ARGUMENT, error.what());
  } catch (const PeerFailed& error) {
    return fail(LOWBAND_PEER_FAILED, error.what());
  } catch (const CollectiveMismatch& error) {
    return fail(LOWBAND_MISMATCH, error.what());
  } catch (const MpiError& error) {
    return fail(LOWBAND_TRANSPORT, error.what());
  } catch (const UcxError& error) {
    return fail(LOWBAND_TRANSPORT, error.what());
  } catch (const std::bad_alloc&) {
    return fail(LOWBAND_INTERNAL, "out of memory");
  } catch (const std::exception& error) {
    return fail(LOWBAND_INTERNAL, error.what());
  }
}

}  // namespace lowband::plugin

using lowband::plugin::guarded;

const char* lowband_last_error() { return lowband::plugin::last_error().c_str(); }

int lowband_abi_version() { return LOWBAND_ABI_VERSION; }

const char* lowband_version() {
  static const std::string version(lowband::version());
  return version.c_str();
}

const char* lowband_features() {
  static const std::string features = lowband::plugin::feature_names();
  return features.c_str();
}

lowband_status lowband_set_compute_threads(int threads) {
  return guarded([&] { lowband::set_compute_threads(threads); });
}
