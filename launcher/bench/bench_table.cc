#include "launcher/bench/bench_table.h"

#include "runtime/error.h"
#include "runtime/types.h"

#include <array>
#include <cstdio>

namespace lowband {
namespace {

std::string fixed(double number, int decimals) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, number);
  return text;
}

std::string scientific(double number) {
  char text[64];
  std::snprintf(text, sizeof text, "%.1e", number);
  return text;
}

/// As nccl-tests: digits where they say something.
std::string microseconds(double number) { return fixed(number, number < 100 ? 2 : number < 10000 ? 1 : 0); }

struct Column {
  const char* heading;
  const char* unit;
  int width;
};

// Of exchanges; the first is to the left.
constexpr Column kExchange[] = {{"profile", "", 22},     {"wire", "", 4},        {"r", "", 8},
                                {"dense", "(B)", 11},    {"payload", "(B)", 11}, {"ratio", "", 6},
                                {"pack", "(us)", 8},     {"RS", "(us)", 9},      {"ortho", "(us)", 9},
                                {"AG", "(us)", 9},       {"unpack", "(us)", 8},  {"p50", "(us)", 9},
                                {"p99", "(us)", 9},      {"algbw", "(GB/s)", 7}, {"busbw", "(GB/s)", 7},
                                {"ring", "(GB/s)", 7},   {"/ring", "", 6},       {"/ring", "-ortho", 6},
                                {"eff.bw", "(GB/s)", 7}, {"x f32", "", 6},       {"x bf16", "", 6},
                                {"wire", "(B)", 12},     {"model", "(B)", 12},   {"d", "(%)", 5},
                                {"if", "(B)", 12},       {"if d", "(%)", 6},     {"relerr", "", 7},
                                {"#wrong", "", 6}};
constexpr Column kSize[] = {{"size", "(B)", 12},    {"count", "", 12},      {"type", "", 5},
                            {"redop", "", 6},       {"root", "", 5},        {"p50", "(us)", 10},
                            {"p99", "(us)", 10},    {"min", "(us)", 10},    {"cv", "(%)", 6},
                            {"algbw", "(GB/s)", 8}, {"busbw", "(GB/s)", 8}, {"wire", "(B)", 12},
                            {"model", "(B)", 12},   {"d", "(%)", 5},        {"if", "(B)", 12},
                            {"if d", "(%)", 8},     {"#wrong", "", 7}};

// Two characters in front of every row stand for the '#' of the headings.
template <std::size_t N>
std::string row(const Column (&columns)[N], const std::array<std::string, N>& cells, const char* mark,
                bool first_to_left) {
  std::string text = mark;
  for (std::size_t j = 0; j < N; ++j) {
    const auto width = static_cast<std::size_t>(columns[j].width);
    const std::string padding(cells[j].size() < width ? width - cells[j].size() : 0, ' ');
    text += (j > 0 ? " " : "") + (j == 0 && first_to_left ? cells[j] + padding : padding + cells[j]);
  }
  return text.substr(0, text.find_last_not_of(' ') + 1) + "\n";
}

/// One cell for each column, no more and no fewer.
template <std::size_t N, class... Cells>
std::array<std::string, N> cells_of(const Column (&)[N], const Cells&... cells) {
  static_assert(sizeof...(cells) == N);
  return {cells...};
}

template <std::size_t N>
std::string headings(const Column (&columns)[N], bool first_to_left) {
  std::array<std::string, N> names;
  std::array<std::string, N> units;
  for (std::size_t j = 0; j < N; ++j) {
    names[j] = columns[j].heading;
    units[j] = columns[j].unit;
  }
  return row(columns, names, "# ", first_to_left) + row(columns, units, "# ", first_to_left);
}

// Those of an exchange or an all-reduce.
template <class Line>
std::string interface_cell(const Line& line) {
  return line.has_interface_bytes() ? fixed(line.interface_bytes(), 0) : "-";
}
template <class Line>
std::string interface_deviation_cell(const Line& line) {
  return line.has_interface_deviation_percent() ? fixed(line.interface_deviation_percent(), 2) : "-";
}

std::string wrong_cell(bool checked, Index wrong) { return checked ? std::to_string(wrong) : "N/A"; }

}  // namespace

std::string bench_header(const BenchReport& report) {
  std::string text = cat("# lowband ", report.version(), " revision ", report.revision(),
                         ", bench comm, started ", report.started(), "\n# backend: ", report.backend(),
                         report.backend_version().empty() ? "" : ", " + report.backend_version(),
                         "\n# algorithm: ", report.algorithm(), "\n# processes: ", report.processes_size(),
                         " of ", report.threads_per_process(), " compute threads; process 0 has ",
                         report.cores(), " cores, ", report.cpu(), "\n");
  for (int p = 0; p < report.processes_size(); ++p)
    text +=
        cat("#   process ", p, " pid ", report.processes(p).pid(), " on ", report.processes(p).host(), "\n");
  for (const std::string& entry : report.environment()) text += cat("# environment: ", entry, "\n");
  if (!report.device().empty())
    text += cat("# device of process 0: ", report.device(),
                "; times end when it has ended its work, phases are those of the host's calls\n");
  if (!report.link().empty()) text += cat("# link: ", report.link(), "\n");
  if (!report.interface().empty()) text += cat("# interface: ", report.interface(), "\n");
  text += cat("# warm-up ", report.warmup(), ", iterations ", report.iterations(), ", at least ",
              report.min_time_seconds(), " s, checks ", report.checks(),
              "; isolated: a barrier before each; time = maximum over processes\n");
  if (report.matrices() == 0) return text;
  return text +
         cat("# model: ", report.model(), ", ", report.matrices(), " matrices, break-even at rank ",
             fixed(report.break_even_rank(), 1), "; every process is a replica\n",
             "# an exchange is exchange_left and exchange_right with orthonormalisation, ",
             report.with_products() ? "and the products B Q and B^T P\n"
                                    : "without the products B Q and B^T P\n",
             "# ratio = dense / payload; busbw = payload / p50 x 2(n-1)/n; ring = busbw of an all-reduce of "
             "as many bytes, in turns with the line; -ortho: without the slowest orthonormalisation\n",
             "# eff.bw = dense / p50; x f32, x bf16 = time of the dense all-reduce between the iterations / "
             "p50; wire, model, if: sent by all processes\n");
}

std::string exchange_headings() { return "#\n" + headings(kExchange, true); }
std::string size_headings() { return "#\n# all-reduce, in place\n" + headings(kSize, false); }

std::string exchange_row(const ExchangeLine& line) {
  const auto& phases = line.phases();
  const Index low = line.smallest_factor_rank();
  const Index high = line.largest_factor_rank();
  const bool alone = !line.has_busbw_over_ring();
  return row(kExchange,
             cells_of(kExchange, line.profile(), line.wire(), low == high ? cat(low) : cat(low, "-", high),
                      cat(line.dense_bytes()), cat(line.payload_bytes()), fixed(line.dense_over_payload(), 2),
                      microseconds(phases.pack_us()), microseconds(phases.reduce_scatter_us()),
                      microseconds(phases.orthonormalise_us()), microseconds(phases.all_gather_us()),
                      microseconds(phases.unpack_us()), microseconds(line.time().p50_us()),
                      microseconds(line.time().p99_us()), fixed(line.algbw(), 3), fixed(line.busbw(), 3),
                      fixed(line.ring().busbw(), 3), alone ? "-" : fixed(line.busbw_over_ring(), 3),
                      alone ? "-" : fixed(line.busbw_over_ring_without_orthonormalisation(), 3),
                      fixed(line.effective_bw(), 3),
                      line.has_speedup_over_dense_f32() ? fixed(line.speedup_over_dense_f32(), 2) : "-",
                      line.has_speedup_over_dense_bf16() ? fixed(line.speedup_over_dense_bf16(), 2) : "-",
                      cat(line.transport_bytes()), cat(line.modelled_wire_bytes()),
                      fixed(line.transport_deviation_percent(), 2), interface_cell(line),
                      interface_deviation_cell(line),
                      line.has_relative_error() ? scientific(line.relative_error()) : "N/A",
                      wrong_cell(line.has_wrong(), line.wrong())),
             "  ", true);
}

std::string dense_row(const AllReduceLine& line) {
  std::array<std::string, std::size(kExchange)> cells;
  cells.fill("-");
  cells[0] = "dense all-reduce";
  cells[1] = line.dtype();
  cells[3] = cells[4] = cat(line.bytes());
  cells[5] = fixed(1, 2);
  cells[11] = microseconds(line.time().p50_us());
  cells[12] = microseconds(line.time().p99_us());
  cells[13] = fixed(line.algbw(), 3);
  cells[14] = fixed(line.busbw(), 3);
  cells[18] = fixed(line.algbw(), 3);
  cells[21] = cat(line.transport_bytes());
  cells[22] = cat(line.modelled_wire_bytes());
  cells[23] = fixed(line.transport_deviation_percent(), 2);
  cells[24] = interface_cell(line);
  cells[25] = interface_deviation_cell(line);
  cells[27] = wrong_cell(line.has_wrong(), line.wrong());
  return row(kExchange, cells, "  ", true);
}

std::string size_row(const AllReduceLine& line) {
  const Index element_bytes = line.dtype() == "bf16" ? 2 : 4;
  return row(
      kSize,
      cells_of(kSize, cat(line.bytes()), cat(line.bytes() / element_bytes), line.dtype(), "sum", "-1",
               microseconds(line.time().p50_us()), microseconds(line.time().p99_us()),
               microseconds(line.time().min_us()), fixed(line.time().cv_percent(), 1), fixed(line.algbw(), 3),
               fixed(line.busbw(), 3), cat(line.transport_bytes()), cat(line.modelled_wire_bytes()),
               fixed(line.transport_deviation_percent(), 2), interface_cell(line),
               interface_deviation_cell(line), wrong_cell(line.has_wrong(), line.wrong())),
      "  ", false);
}

std::string bench_footer(const BenchReport& report) {
  constexpr double kWorthWarning = 2;  // percent
  return cat("#\n# Out of bounds values : ", report.wrong(), report.wrong() == 0 ? " OK" : " FAILED",
             report.checks() == 0 ? " (not checked)" : "",
             "\n# Average bus bandwidth : ", fixed(report.average_busbw(), 4),
             " GB/s\n# Largest deviation of wire bytes from the model : ",
             fixed(report.largest_deviation_percent(), 2), " %",
             report.largest_deviation_percent() > kWorthWarning ? " WARN" : "", "\n");
}

}  // namespace lowband
