#include "sharding/parameter.h"

#include <algorithm>
#include <iterator>

namespace lowband {

std::string_view role_name(Role role) {
  switch (role) {
    case Role::kQuery:
      return "query";
    case Role::kKey:
      return "key";
    case Role::kValue:
      return "value";
    case Role::kOutput:
      return "output";
    case Role::kGate:
      return "gate";
    case Role::kUp:
      return "up";
    case Role::kDown:
      return "down";
    case Role::kEmbedding:
      return "embedding";
    case Role::kHead:
      return "head";
    case Role::kNorm:
      return "norm";
  }
  return "?";
}

void validate_blocks(const ParameterInfo& info) {
  if (info.blocks.empty()) return;
  const std::vector<Role>& roles = info.blocks.roles;
  LB_EXPECTS(roles.empty() || roles.size() == info.blocks.ranges.size(), "blocks of ", info.name, ": found ",
             roles.size(), " roles, expected none or ", info.blocks.ranges.size(), ", one for each");
  LB_EXPECTS(std::ranges::all_of(roles, is_layer_matrix), "blocks of ", info.name, ": found the role ",
             role_name(*std::ranges::find_if_not(roles, is_layer_matrix)),
             ", expected roles of layer matrices");
  const Index extent = info.blocks.of_rows ? info.rows : info.cols;
  const char* const lines = info.blocks.of_rows ? "rows" : "columns";
  std::vector<Range> all;
  for (const std::vector<Range>& block : info.blocks.ranges) {
    LB_EXPECTS(!block.empty(), "blocks of ", info.name, ": found one without ", lines,
               ", expected at least one range");
    Index end = 0;
    for (const Range& range : block) {
      LB_EXPECTS(range.begin >= end && range.end > range.begin && range.end <= extent, "blocks of ",
                 info.name, ": found ", lines, " ", range.begin, " to ", range.end,
                 ", expected increasing ranges within 0 to ", extent);
      end = range.end;
      all.push_back(range);
    }
  }
  std::ranges::sort(all, {}, &Range::begin);
  Index covered = 0;
  for (const Range& range : all) {
    LB_EXPECTS(range.begin == covered, "blocks of ", info.name, ": found ", lines, " ",
               std::min(covered, range.begin), " to ", std::max(covered, range.begin), " in ",
               range.begin > covered ? "no block" : "several blocks", ", expected each in one");
    covered = range.end;
  }
  LB_EXPECTS(covered == extent, "blocks of ", info.name, ": found ", lines, " ", covered, " to ", extent,
             " in no block, expected each in one");
}

std::vector<ParameterInfo> matrices_of(const ParameterInfo& info) {
  if (info.blocks.empty()) return {info};
  validate_blocks(info);
  std::vector<ParameterInfo> matrices;
  for (std::size_t j = 0; j < info.blocks.ranges.size(); ++j) {
    ParameterInfo matrix{.name = cat(info.name, "[", j, "]"),
                         .role = info.blocks.roles.empty() ? info.role : info.blocks.roles[j],
                         .rows = info.rows,
                         .cols = info.cols,
                         .cut = info.cut};
    Index& lines = info.blocks.of_rows ? matrix.rows : matrix.cols;
    lines = 0;
    for (const Range& range : info.blocks.ranges[j]) lines += range.size();
    matrices.push_back(std::move(matrix));
  }
  return matrices;
}

std::vector<ParameterInfo> layer_matrices(std::span<const ParameterInfo> parameters) {
  std::vector<ParameterInfo> matrices;
  for (const ParameterInfo& info : parameters) {
    if (is_layer_matrix(info.role)) std::ranges::move(matrices_of(info), std::back_inserter(matrices));
  }
  return matrices;
}

ParameterInfo with_heads(ParameterInfo info, Index head_dim) {
  const bool of_rows = info.role == Role::kQuery || info.role == Role::kKey || info.role == Role::kValue;
  if (!info.blocks.empty() || !(of_rows || info.role == Role::kOutput)) return info;
  const Index extent = of_rows ? info.rows : info.cols;
  LB_EXPECTS(head_dim >= 1 && extent % head_dim == 0, "heads of ", info.name, ": found head_dim ", head_dim,
             ", expected a divisor of its ", extent, of_rows ? " rows" : " columns");
  info.blocks.of_rows = of_rows;
  for (Index begin = 0; begin < extent; begin += head_dim)
    info.blocks.ranges.push_back({{begin, begin + head_dim}});
  return info;
}

}  // namespace lowband
