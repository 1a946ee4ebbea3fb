#pragma once

#include "plugin/lowband.h"
#include "runtime/error.h"

#include <algorithm>
#include <exception>
#include <initializer_list>
#include <string>
#include <string_view>

namespace lowband::plugin {

/// Keeps `message` for lowband_last_error and returns `status`.
lowband_status fail(lowband_status status, std::string_view message);
/// The status of the exception in flight, whose message is kept. Call it in a handler.
lowband_status fail_with_current_exception();

/// Runs `body` and turns what it throws into a status: what every function of the C interface does.
template <class Body>
lowband_status guarded(Body body) noexcept {
  try {
    body();
    return LOWBAND_OK;
  } catch (...) {
    return fail_with_current_exception();
  }
}

/// Throws: InvalidArgument "lowband_step, info: found NULL, expected ..." .
template <class T>
void expect_pointer(const T* pointer, std::string_view field) {
  LB_EXPECTS(pointer != nullptr, field, ": found NULL, expected a pointer");
}

/// Throws: InvalidArgument, also when the struct is not as large as this version's, or as one of
/// `earlier_bytes`, an earlier version's.
template <class Struct>
void expect_struct(const Struct* pointer, std::string_view field,
                   std::initializer_list<std::size_t> earlier_bytes = {}) {
  expect_pointer(pointer, field);
  const auto found = static_cast<std::size_t>(pointer->struct_bytes);
  LB_EXPECTS(
      found == sizeof(Struct) || std::ranges::find(earlier_bytes, found) != earlier_bytes.end(), field,
      ".struct_bytes: found ", pointer->struct_bytes, ", expected ", sizeof(Struct),
      ": fill it in with its _defaults function, from the lowband.h of this library or an earlier one");
}

/// What `*_defaults` of a struct without other defaults does.
template <class Struct>
void clear(Struct* pointer) {
  *pointer = Struct{};
  pointer->struct_bytes = static_cast<int64_t>(sizeof(Struct));
}

}  // namespace lowband::plugin
