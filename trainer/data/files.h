#pragma once

#include "runtime/types.h"

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace lowband {

/// A file that appears under its name complete or not at all: it is written beside it as
/// "<name>.<process id>.tmp", flushed to disk, and renamed by `commit`. Without `commit` nothing remains.
class DurableFile {
 public:
  /// Creates the temporary file. Throws: IoError naming the path.
  explicit DurableFile(std::filesystem::path path);
  DurableFile(const DurableFile&) = delete;
  DurableFile& operator=(const DurableFile&) = delete;
  ~DurableFile();

  void append(std::span<const std::byte> bytes);
  void append(std::string_view text) { append(std::as_bytes(std::span(text))); }
  /// Replaces bytes that were appended before.
  void overwrite(Index offset_bytes, std::span<const std::byte> bytes);
  Index size_bytes() const { return size_bytes_; }
  /// Flushes to disk and gives the file its name. Nothing may follow.
  void commit();

 private:
  std::filesystem::path path_, temporary_;
  int descriptor_ = -1;
  Index size_bytes_ = 0;
};

/// A whole regular file mapped into memory for reading.
class MappedFile {
 public:
  /// Throws: IoError when the file is missing, unreadable or not a regular file.
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return bytes_; }
  std::string_view text() const { return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()}; }

 private:
  std::span<const std::byte> bytes_;
};

/// Keeps other processes from locking the same directory, until it is destroyed or this process ends. On a
/// file system without locks it does nothing.
class DirectoryLock {
 public:
  /// Throws: IoError naming the directory when it cannot be opened or is locked already.
  explicit DirectoryLock(const std::filesystem::path& directory);
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;
  ~DirectoryLock();

 private:
  int descriptor_ = -1;
};

/// Makes the entries of a directory (creations, renames) survive a power failure.
void flush_directory(const std::filesystem::path& directory);

/// Creates `directory` with its parents and proves that a file can be created in it.
/// Throws: IoError naming the directory and the system's reason.
void require_writable_directory(const std::filesystem::path& directory);

}  // namespace lowband
