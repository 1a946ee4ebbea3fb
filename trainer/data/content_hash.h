#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace lowband {

/// 64-bit XXH64 of `bytes`. Finds accidental damage; no protection against intent.
///
/// Reference: Collet, xxHash fast digest algorithm, XXH64.
std::uint64_t content_hash(std::span<const std::byte> bytes, std::uint64_t seed = 0);
std::uint64_t content_hash(std::string_view text, std::uint64_t seed = 0);

/// Sixteen lower-case hexadecimal digits, as manifests print a hash.
std::string hash_text(std::uint64_t hash);

}  // namespace lowband
