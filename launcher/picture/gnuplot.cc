#include "launcher/picture/gnuplot.h"

#include "runtime/error.h"
#include "trainer/data/files.h"

#include <cerrno>
#include <cstring>

#include <sys/wait.h>
#include <unistd.h>

namespace lowband {
namespace {

using std::filesystem::path;

void write_file(const path& name, std::string_view text) {
  DurableFile file(name);
  file.append(text);
  file.commit();
}

// Runs gnuplot on a file, in the folder where that lies.
void run_gnuplot(const path& folder, const std::string& file) {
  const pid_t child = ::fork();
  if (child < 0) throw IoError(cat("gnuplot: cannot start: ", std::strerror(errno)));
  if (child == 0) {
    if (::chdir(folder.c_str()) == 0)
      ::execlp("gnuplot", "gnuplot", file.c_str(), static_cast<char*>(nullptr));
    ::_exit(127);
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) throw IoError(cat("gnuplot: cannot wait for it: ", std::strerror(errno)));
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 127) {
    throw IoError("gnuplot: not found, expected it to draw the picture (Debian: gnuplot-nox)");
  }
  if (status != 0)
    throw IoError(cat("gnuplot: failed on ", (folder / file).string(), ", wait status ", status));
}

}  // namespace

// In single quotes only the quote itself is special.
std::string gnuplot_text(std::string_view text) {
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? "''" : std::string(1, c);
  return out + "'";
}

void draw_with_gnuplot(const path& stem, std::string_view csv, std::string_view instructions) {
  const path folder = stem.has_parent_path() ? stem.parent_path() : path(".");
  const std::string name = stem.filename().string();
  LB_EXPECTS(!name.empty(), "picture: found '", stem.string(),
             "', expected a path to put .png and .svg behind");
  require_writable_directory(folder);
  write_file(folder / (name + ".csv"), csv);
  write_file(folder / (name + ".gp"), instructions);
  run_gnuplot(folder, name + ".gp");
}

}  // namespace lowband
