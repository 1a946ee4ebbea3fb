#include "launcher/compare/loss_curves.h"

#include "launcher/picture/gnuplot.h"
#include "runtime/error.h"
#include "trainer/progress.h"
#include "trainer/run_record.h"

#include <array>
#include <map>
#include <vector>

namespace lowband {
namespace {

using std::filesystem::path;

std::string run_name(const path& folder) {
  const path normal = folder.lexically_normal();
  return (normal.has_filename() ? normal : normal.parent_path()).filename().string();
}

/// "uniform (uniform:24), B(r) = 1.89 MB"; the name alone where there are no factor ranks.
std::string title_of(const path& folder) {
  const RunSummary summary = read_run_summary(folder);
  std::string name = run_name(folder);
  if (summary.profile().empty()) return name;
  return cat(name, " (", summary.profile(),
             "), B(r) = ", format_quantity(static_cast<double>(summary.counted_factor_bytes()), "B"));
}

// Instructions that read STEM.csv and write STEM.png and STEM.svg, all in the current folder.
std::string instructions(std::span<const path> run_folders, const std::string& stem) {
  constexpr std::array kColours{"#1f5fa8", "#d9652b", "#3c8d40", "#8a4fa3", "#7f7f7f"};
  // More runs than colours: colours come again dashed, and the noise of training is left out.
  const bool many = run_folders.size() > kColours.size();
  std::string curves;
  for (std::size_t i = 0; i < run_folders.size(); ++i) {
    const std::size_t round = i / kColours.size(), place = i % kColours.size();
    const std::string colour = kColours[place];
    // Validation lies above training, so it is drawn later.
    if (!many)
      curves += cat("  csv using 1:", 2 + 2 * i, " with lines linewidth 1 linecolor rgb '#80",
                    colour.substr(1), "' notitle, \\\n");
    curves += cat("  csv using 1:", 3 + 2 * i, " with linespoints linewidth 2 dashtype ", 1 + round,
                  " pointtype ", 4 + 2 * place + (round + 1) % 2, " pointsize 0.9 linecolor rgb '", colour,
                  "' title ", gnuplot_text(title_of(run_folders[i])), ", \\\n");
  }
  return cat("# gnuplot: draws ", stem, ".png and ", stem, ".svg from ", stem, ".csv\n",
             "csv = ", gnuplot_text(stem + ".csv"),
             R"(
set datafile separator comma
set xlabel "step"
set ylabel "loss in nats per token"
set grid linecolor rgb "#dddddd"
set border 3 linecolor rgb "#444444"
set tics nomirror
)",
             "set key ", many ? "outside " : "", "top right noenhanced spacing 1.3\n", "set title '",
             many ? "Validation loss" : "Training and validation loss", "' font 'sans,15'\n",
             "set terminal pngcairo size 1200, 720 font 'sans,12'\nset output ", gnuplot_text(stem + ".png"),
             "\nplot \\\n", curves,
             many ? "  NaN notitle\n"
                  : "  NaN with lines linewidth 1 linecolor rgb '#888888' title 'thin lines: training; "
                    "marks: validation'\n",
             "set terminal svg size 1200, 720 dynamic font 'sans,12' background '#ffffff'\nset output ",
             gnuplot_text(stem + ".svg"), "\nreplot\n");
}

}  // namespace

std::string loss_curves_csv(std::span<const path> run_folders) {
  const std::size_t columns = 2 * run_folders.size();
  std::string text = "step";
  std::map<Index, std::vector<std::string>> rows;
  for (std::size_t i = 0; i < run_folders.size(); ++i) {
    const std::string name = run_name(run_folders[i]);
    text += cat(",", name, " training,", name, " validation");
    const auto put = [&](Index step, std::size_t column, double loss) {
      auto& row = rows[step];
      row.resize(columns);
      row[column] = cat(loss);
    };
    for (const RunLine& line : read_run_lines(run_folders[i])) {
      if (line.has_step() && line.step().has_loss()) put(line.step().step(), 2 * i, line.step().loss());
      if (line.has_validation() && line.validation().has_loss()) {
        put(line.validation().step(), 2 * i + 1, line.validation().loss());
      }
    }
  }
  text += '\n';
  for (const auto& [step, cells] : rows) {
    text += std::to_string(step);
    for (const std::string& cell : cells) text += "," + cell;
    text += '\n';
  }
  return text;
}

void draw_loss_curves(std::span<const path> run_folders, const path& stem) {
  draw_with_gnuplot(stem, loss_curves_csv(run_folders), instructions(run_folders, stem.filename().string()));
}

}  // namespace lowband
