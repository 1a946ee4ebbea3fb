#include "trainer/data/files.h"

#include "runtime/error.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace lowband {
namespace {

[[noreturn]] void throw_io(const std::filesystem::path& path, std::string_view what) {
  const int code = errno;
  throw IoError(cat(path.string(), ": cannot ", what, ": ", std::strerror(code)));
}

}  // namespace

DurableFile::DurableFile(std::filesystem::path path)
    : path_(std::move(path)), temporary_(cat(path_.string(), ".", ::getpid(), ".tmp")) {
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) throw_io(path_, "create");
}

DurableFile::~DurableFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

void DurableFile::append(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw_io(path_, "write");
    size_bytes_ += written;
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void DurableFile::overwrite(Index offset_bytes, std::span<const std::byte> bytes) {
  LB_EXPECTS(offset_bytes >= 0 && offset_bytes + std::ssize(bytes) <= size_bytes_, path_.string(),
             ": overwrite of ", bytes.size(), " bytes at ", offset_bytes, ", expected to end within ",
             size_bytes_);
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(descriptor_, bytes.data(), bytes.size(), offset_bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw_io(path_, "write");
    offset_bytes += written;
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void DurableFile::commit() {
  if (::fsync(descriptor_) != 0) throw_io(path_, "flush");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) throw_io(path_, "rename to");
  ::close(std::exchange(descriptor_, -1));
  flush_directory(path_.parent_path());
}

MappedFile::MappedFile(const std::filesystem::path& path) {
  // O_NONBLOCK: opening a pipe nobody writes to must not wait; it is refused below.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) throw_io(path, "open");
  struct stat status {};
  if (::fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor);
    throw IoError(cat(path.string(), ": found something that is no regular file, expected a file"));
  }
  if (status.st_size > 0) {
    const auto size = static_cast<std::size_t>(status.st_size);
    void* memory = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (memory == MAP_FAILED) {
      ::close(descriptor);
      throw_io(path, "map");
    }
    bytes_ = {static_cast<const std::byte*>(memory), size};
  }
  ::close(descriptor);
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

DirectoryLock::DirectoryLock(const std::filesystem::path& directory) {
  descriptor_ = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor_ < 0) throw_io(directory, "open");
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
  ::close(descriptor_);
  throw IoError(cat(directory.string(), ": found another run that is writing here, expected none"));
}

DirectoryLock::~DirectoryLock() { ::close(descriptor_); }

void flush_directory(const std::filesystem::path& directory) {
  const std::filesystem::path name = directory.empty() ? "." : directory;
  const int descriptor = ::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) throw_io(name, "open");
  const bool failed = ::fsync(descriptor) != 0;
  const int code = errno;
  ::close(descriptor);
  errno = code;
  if (failed) throw_io(name, "flush");
}

void require_writable_directory(const std::filesystem::path& directory) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw IoError(cat(directory.string(), ": cannot create: ", error.message()));
  const DurableFile probe(directory / ".writable");
}

}  // namespace lowband
