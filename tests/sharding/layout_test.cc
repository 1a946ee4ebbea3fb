#include "sharding/layout.h"

#include <limits>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

TEST(SplitRange, GivesTheLargerRangesFirst) {
  EXPECT_EQ(split_range(10, 4, 0), (Range{0, 3}));
  EXPECT_EQ(split_range(10, 4, 1), (Range{3, 6}));
  EXPECT_EQ(split_range(10, 4, 2), (Range{6, 8}));
  EXPECT_EQ(split_range(10, 4, 3), (Range{8, 10}));
}

TEST(SplitRange, PiecesFollowEachOtherAndDifferByAtMostOne) {
  for (Index extent : {0, 1, 2, 3, 5, 6, 7, 12, 13, 97}) {
    for (Index pieces = 1; pieces <= 9; ++pieces) {
      Index end = 0;
      for (Index piece = 0; piece < pieces; ++piece) {
        const Range range = split_range(extent, pieces, piece);
        EXPECT_EQ(range.begin, end);
        EXPECT_GE(range.size(), extent / pieces);
        EXPECT_LE(range.size(), (extent + pieces - 1) / pieces);
        end = range.end;
      }
      EXPECT_EQ(end, extent);
    }
  }
}

TEST(SplitRange, IsExactBeyond32Bits) {
  const Index extent = Index{320} * 2560 * 3072;  // 2.5e9
  EXPECT_EQ(split_range(extent, 3, 2), (Range{1677721600, extent}));
  const Index huge = std::numeric_limits<Index>::max();
  EXPECT_EQ(split_range(huge, 2, 1).end, huge);
}

TEST(SplitRange, NamesWhatItRefuses) {
  const auto message = [](Index extent, Index pieces, Index piece) -> std::string {
    try {
      split_range(extent, pieces, piece);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message(-1, 2, 0), "split_range: found extent -1, expected at least 0");
  EXPECT_EQ(message(5, 0, 0), "split_range: found 0 pieces, expected at least 1");
  EXPECT_EQ(message(5, 3, 3), "split_range: found piece 3, expected 0 to 2");
  EXPECT_EQ(message(5, 3, -1), "split_range: found piece -1, expected 0 to 2");
}

class EveryCut : public testing::TestWithParam<TensorCut> {};

// Counts how often each element is owned. Extents of 1 to 5 under up to 7 pieces leave some pieces empty.
TEST_P(EveryCut, OwnedPiecesTileTheMatrixExactlyOnce) {
  for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{{1, 9}, {5, 3}, {7, 11}, {16, 6}}) {
    for (Index tensor_pieces = 1; tensor_pieces <= 7; ++tensor_pieces) {
      for (Index shard_pieces = 1; shard_pieces <= 7; ++shard_pieces) {
        const MatrixLayout layout(rows, cols, GetParam(), tensor_pieces, shard_pieces);
        // A matrix that the tensor axis does not cut is whole on each of its processes: look at one.
        const Index tensor_end = GetParam() == TensorCut::kNone ? 1 : tensor_pieces;
        std::vector<int> owners(static_cast<std::size_t>(rows * cols), 0);
        for (Index tensor = 0; tensor < tensor_end; ++tensor) {
          for (Index shard = 0; shard < shard_pieces; ++shard) {
            const Range i_range = layout.owned_rows(shard, tensor),
                        j_range = layout.owned_cols(shard, tensor);
            for (Index i = i_range.begin; i < i_range.end; ++i)
              for (Index j = j_range.begin; j < j_range.end; ++j)
                ++owners[static_cast<std::size_t>(i * cols + j)];
          }
        }
        EXPECT_THAT(owners, testing::Each(1)) << rows << " x " << cols << " on " << tensor_pieces
                                              << " tensor x " << shard_pieces << " shard pieces";
      }
    }
  }
}

TEST_P(EveryCut, OwnedPiecesLieInsideTheTensorPiece) {
  const MatrixLayout layout(7, 11, GetParam(), 3, 5);
  for (Index tensor = 0; tensor < 3; ++tensor) {
    for (Index shard = 0; shard < 5; ++shard) {
      EXPECT_GE(layout.owned_rows(shard, tensor).begin, layout.tensor_rows(tensor).begin);
      EXPECT_LE(layout.owned_rows(shard, tensor).end, layout.tensor_rows(tensor).end);
      EXPECT_GE(layout.owned_cols(shard, tensor).begin, layout.tensor_cols(tensor).begin);
      EXPECT_LE(layout.owned_cols(shard, tensor).end, layout.tensor_cols(tensor).end);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Layout, EveryCut,
                         testing::Values(TensorCut::kNone, TensorCut::kRows, TensorCut::kCols));

TEST(MatrixLayout, ShardsCutWhatTheTensorAxisLeavesWhole) {
  const MatrixLayout column_parallel(8, 6, TensorCut::kRows, 2, 3);
  EXPECT_EQ(column_parallel.tensor_rows(1), (Range{4, 8}));
  EXPECT_EQ(column_parallel.tensor_cols(1), (Range{0, 6}));
  EXPECT_EQ(column_parallel.owned_rows(2, 1), (Range{4, 8}));
  EXPECT_EQ(column_parallel.owned_cols(2, 1), (Range{4, 6}));

  const MatrixLayout row_parallel(8, 6, TensorCut::kCols, 2, 3);
  EXPECT_EQ(row_parallel.tensor_rows(1), (Range{0, 8}));
  EXPECT_EQ(row_parallel.tensor_cols(1), (Range{3, 6}));
  EXPECT_EQ(row_parallel.owned_rows(2, 1), (Range{6, 8}));
  EXPECT_EQ(row_parallel.owned_cols(2, 1), (Range{3, 6}));

  const MatrixLayout replicated(1, 6, TensorCut::kNone, 2, 3);
  EXPECT_EQ(replicated.owned_rows(2, 1), (Range{0, 1}));
  EXPECT_EQ(replicated.owned_cols(2, 1), (Range{4, 6}));
}

TEST(MatrixLayout, RefusesPiecesThatDoNotExist) {
  EXPECT_THROW(MatrixLayout(4, 4, TensorCut::kRows, 0, 1), InvalidArgument);
  EXPECT_THROW(MatrixLayout(4, 4, TensorCut::kRows, 1, 0), InvalidArgument);
  EXPECT_THROW(MatrixLayout(-4, 4, TensorCut::kRows, 1, 1), InvalidArgument);
  const MatrixLayout layout(4, 4, TensorCut::kNone, 2, 2);
  EXPECT_THROW(layout.tensor_rows(2), InvalidArgument);
  EXPECT_THROW(layout.owned_cols(2, 0), InvalidArgument);
}

}  // namespace
}  // namespace lowband
