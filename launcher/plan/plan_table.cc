#include "launcher/plan/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <tuple>
#include <vector>

namespace lowband {

namespace {

/// 9,047,040
std::string grouped(Index number) {
  std::string digits = std::to_string(number);
  for (Index at = std::ssize(digits) - 3; at > 0; at -= 3) digits.insert(static_cast<std::size_t>(at), ",");
  return digits;
}

std::string fixed(double number, int decimals) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, number);
  return text;
}

/// Rows of cells: the first column to the left, the others to the right.
class AlignedRows {
 public:
  void add(std::vector<std::string> cells) {
    widths_.resize(std::max(widths_.size(), cells.size()));
    for (std::size_t j = 0; j < cells.size(); ++j) widths_[j] = std::max(widths_[j], cells[j].size());
    rows_.push_back(std::move(cells));
  }
  std::string text() const {
    std::string out;
    for (const auto& cells : rows_) {
      std::string line;
      for (std::size_t j = 0; j < cells.size(); ++j) {
        const std::string padding(widths_[j] - cells[j].size(), ' ');
        line += j == 0 ? cells[j] + padding : "  " + padding + cells[j];
      }
      out += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
    }
    return out;
  }

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<std::size_t> widths_;
};

std::vector<MatrixPlan> matrices_of(const PlanReport& report, Index layer) {
  std::vector<MatrixPlan> matrices;
  std::ranges::copy_if(report.matrices(), std::back_inserter(matrices),
                       [layer](const MatrixPlan& matrix) { return matrix.layer() == layer; });
  return matrices;
}

bool alike(const std::vector<MatrixPlan>& a, const std::vector<MatrixPlan>& b) {
  return std::ranges::equal(a, b, [](const MatrixPlan& x, const MatrixPlan& y) {
    return std::tuple(x.role(), x.rows(), x.cols(), x.factor_rank()) ==
           std::tuple(y.role(), y.rows(), y.cols(), y.factor_rank());
  });
}

/// "self_attn.q_proj" of "model.layers.17.self_attn.q_proj.weight".
std::string name_in_layer(const MatrixPlan& matrix) {
  const std::string prefix = cat("model.layers.", matrix.layer(), ".");
  const std::string name = matrix.name().substr(prefix.size());
  return name.substr(0, name.rfind(".weight"));
}

/// Layers first .. last, which are alike: a heading, a line per matrix, their sum.
void add_layer_rows(AlignedRows& rows, const LayerPlan& first, const LayerPlan& last,
                    const std::vector<MatrixPlan>& matrices) {
  const bool one = first.layer() == last.layer();
  rows.add({one ? cat("layer ", first.layer()) : cat("layers ", first.layer(), "-", last.layer(), ", each")});
  for (const MatrixPlan& matrix : matrices) {
    if (matrix.factor_rank() == 0) {
      rows.add({"  " + name_in_layer(matrix), grouped(matrix.rows()), grouped(matrix.cols()),
                grouped(matrix.dense_elements()), matrix.choice(), grouped(matrix.sent_bytes())});
      continue;
    }
    rows.add({"  " + name_in_layer(matrix), grouped(matrix.rows()), grouped(matrix.cols()),
              grouped(matrix.factor_rank()), fixed(matrix.break_even_rank(), 1),
              grouped(matrix.factor_elements()), grouped(matrix.dense_elements()), matrix.cheaper(),
              matrix.choice(), grouped(matrix.sent_bytes())});
  }
  if (first.factor_elements() == 0) {
    rows.add({"  sum", "", "", grouped(first.dense_elements())});
  } else {
    rows.add({"  sum", "", "", "", "", grouped(first.factor_elements()), grouped(first.dense_elements())});
  }
}

std::string layers_text(const PlanReport& report) {
  AlignedRows rows;
  if (report.profile().empty()) {
    rows.add({"", "m", "n", "elements", "travels", "bytes"});
  } else {
    rows.add({"", "m", "n", "rank", "break-even", "factor elements", "dense elements", "cheaper",
              "travels as", "bytes"});
  }
  for (int begin = 0, end = 0; begin < report.layers_size(); begin = end) {
    const auto matrices = matrices_of(report, report.layers(begin).layer());
    for (end = begin + 1; end < report.layers_size(); ++end)
      if (!alike(matrices, matrices_of(report, report.layers(end).layer()))) break;
    add_layer_rows(rows, report.layers(begin), report.layers(end - 1), matrices);
  }
  return rows.text();
}

/// What the profile costs by itself, whatever `exchange` chooses.
std::string profile_text(const PlanReport& report) {
  const Index factor_bytes = report.factor_bytes() / report.factor_elements();
  const Index dense_bytes = report.dense_bytes() / report.dense_elements();
  AlignedRows rows;
  const auto add = [&](const std::string& label, Index elements, Index element_bytes,
                       const std::string& ratio) {
    rows.add({label, grouped(elements), grouped(elements * element_bytes), ratio});
  };
  const auto ratio_to = [&](Index bytes) {
    return fixed(static_cast<double>(report.factor_bytes()) / static_cast<double>(bytes), 4);
  };
  const bool one_type = report.wire_dtype() == report.dtype();
  rows.add({"all layers, per step and replica", "elements",
            one_type ? cat("bytes, ", report.dtype()) : cat("bytes, factors ", report.wire_dtype()),
            "B(r) / it"});
  add("B(r), factors of " + report.profile(), report.factor_elements(), factor_bytes, "");
  add("B(r) of the reference " + report.reference(), report.reference_factor_elements(), factor_bytes,
      ratio_to(report.reference_factor_elements() * factor_bytes));
  add("dense gradient of the same matrices", report.dense_elements(), dense_bytes,
      ratio_to(report.dense_bytes()));
  rows.add({"fewer bytes of the two, per matrix",
            one_type ? grouped(report.cheaper_bytes() / dense_bytes) : "", grouped(report.cheaper_bytes()),
            ratio_to(report.cheaper_bytes())});
  add("not compressed: embedding, head, gains", report.uncompressed_elements(), dense_bytes, "");
  rows.add({"payload: B(r) + not compressed",
            grouped(report.factor_elements() + report.uncompressed_elements()),
            grouped(report.factor_bytes() + report.uncompressed_bytes()), ""});
  return rows.text();
}

/// 2,038,432 or 0.016.
std::string amortised_text(const PeriodicPlan& plan) {
  const double bytes = plan.bytes_per_step();
  return bytes < 100 ? fixed(bytes, 3) : grouped(std::llround(bytes));
}

/// "4,096 every 100 steps".
std::string period_text(const PeriodicPlan& plan) {
  return plan.interval_steps() == 0
             ? "never"
             : cat(grouped(plan.bytes()), " every ", grouped(plan.interval_steps()), " steps");
}

/// What goes from replica to replica in this run.
std::string traffic_text(const PlanReport& report) {
  AlignedRows rows;
  const bool has_ranks = !report.profile().empty();
  rows.add({has_ranks ? cat(report.optimizer(), " with exchange ", report.exchange()) : report.optimizer(),
            "bytes per step"});
  if (has_ranks) rows.add({cat("factors, ", report.wire_dtype()), grouped(report.sent_factor_bytes())});
  rows.add(
      {cat("layer matrices that travel dense, ", report.dtype()), grouped(report.sent_dense_matrix_bytes())});
  rows.add({cat("not compressed: embedding, head, gains, ", report.dtype()),
            grouped(report.uncompressed_bytes())});
  rows.add({"payload on the replica axis, of one replica", grouped(report.sent_bytes())});
  if (report.update_bytes() > 0)
    rows.add({cat("within a replica, of every process", report.assemblies().empty() ? "" : ": ",
                  report.assemblies()),
              grouped(report.update_bytes())});
  rows.add({"control, of every process", grouped(report.control_bytes())});
  if (has_ranks)
    rows.add({"periodic, amortised: diagnostics, of one replica", amortised_text(report.diagnostics()),
              period_text(report.diagnostics())});
  rows.add({"periodic, amortised: weight hashes, of every process", amortised_text(report.weight_hashes()),
            period_text(report.weight_hashes())});
  return rows.text();
}

}  // namespace

std::string plan_table(const PlanReport& report) {
  const bool has_ranks = !report.profile().empty();
  std::string text =
      cat(has_ranks ? "profile " : "optimizer ", has_ranks ? report.profile() : report.optimizer(), "; ",
          report.matrices_size(), " matrices in ", report.layers_size(), " layers, ",
          grouped(report.parameters()), " parameters\n\n", layers_text(report), "\n");
  if (has_ranks) text += profile_text(report) + "\n";
  text += traffic_text(report) + "\n";
  if (has_ranks)
    text += cat("ratio to ", report.reference(), " ", fixed(report.ratio_to_reference(), 4),
                report.matches_reference() ? ": matched within " : ": not matched within ",
                report.match_tolerance(), "\n");
  if (report.has_budget())
    text += cat("budget: ", grouped(report.budget().bytes()), " bytes of layer matrices against ",
                grouped(report.budget().reference_bytes()), " of ", report.budget().reference(), ": ratio ",
                fixed(report.budget().ratio(), 4), ", within ", report.budget().tolerance(), "\n");
  text += cat("optimizer state: ", grouped(report.state_bytes()), " bytes on the process that has most\n");
  if (report.has_device_memory()) {
    const DeviceMemoryPlan& memory = report.device_memory();
    text += cat("model on a device: weights ", grouped(memory.weights()), ", gradients ",
                grouped(memory.gradients()), ", activations ", grouped(memory.activations()), ", workspace ",
                grouped(memory.workspace()), " bytes on the process that has most\n");
  }
  for (const std::string& remark : report.remarks()) text += remark + "\n";
  return text;
}

}  // namespace lowband
