#include "launcher/compare/loss_curves.h"

#include "tests/launcher/compare/finished_run.h"

#include <cstdlib>
#include <vector>

#include <gmock/gmock.h>

namespace lowband {
namespace {

using std::filesystem::path;
using testing::HasSubstr;

TEST(LossCurvesCsv, JoinsRunsOverTheirSteps) {
  const ScratchDirectory scratch;
  const auto write = [&scratch](const std::string& name, const std::string& lines) {
    return scratch.write(name + "/run.jsonl", lines).parent_path();
  };
  const std::vector<path> folders{
      write("a",
            "{\"start\":{}}\n{\"step\":{\"step\":1,\"loss\":5.5}}\n{\"step\":{\"step\":2,\"loss\":null}}\n"
            "{\"validation\":{\"step\":2,\"loss\":5.25}}\n"),
      write("b", "{\"step\":{\"step\":2,\"loss\":4}}\n{\"step\":{\"step\":10,\"loss\":3}}\n") / ""};
  EXPECT_EQ(loss_curves_csv(folders),
            "step,a training,a validation,b training,b validation\n"
            "1,5.5,,,\n"
            "2,,5.25,4,\n"
            "10,,,3,\n");
}

TEST(DrawLossCurves, WritesBothPictures) {
  if (std::system("command -v gnuplot >/dev/null") != 0) GTEST_SKIP() << "no gnuplot";
  const ScratchDirectory scratch;
  const std::vector<path> folders{finished_run(scratch, "uniform", "uniform:24", 2.2, 1890000),
                                  finished_run(scratch, "structural", "it's_matched", 2.1, 1889055)};
  const path stem = scratch.path() / "pictures" / "losses";
  draw_loss_curves(folders, stem);
  EXPECT_THAT(read_text(stem.string() + ".png"), testing::StartsWith("\x89PNG"));
  EXPECT_GT(std::filesystem::file_size(stem.string() + ".png"), 10000u);
  const std::string svg = read_text(stem.string() + ".svg");
  EXPECT_THAT(svg, HasSubstr("uniform (uniform:24), B(r) = 1.89 MB"));
  EXPECT_THAT(svg, HasSubstr("structural (it's_matched), B(r) = 1.89 MB"));
  EXPECT_THAT(svg, HasSubstr("loss in nats per token"));
  EXPECT_THAT(svg, HasSubstr("</svg>"));
}

TEST(DrawLossCurves, TellsManyRunsApart) {
  if (std::system("command -v gnuplot >/dev/null") != 0) GTEST_SKIP() << "no gnuplot";
  const ScratchDirectory scratch;
  std::vector<path> folders;
  for (int i = 0; i < 6; ++i) folders.push_back(finished_run(scratch, cat("muon", i), "", 2.0 + 0.1 * i, 0));
  const path stem = scratch.path() / "losses";
  draw_loss_curves(folders, stem);
  const std::string svg = read_text(stem.string() + ".svg");
  EXPECT_THAT(svg, HasSubstr(">muon5<"));
  EXPECT_THAT(svg, HasSubstr("Validation loss"));
  EXPECT_THAT(svg, HasSubstr("stroke-dasharray"));
  EXPECT_THAT(svg, testing::Not(HasSubstr("B(r)")));
  EXPECT_THAT(svg, testing::Not(HasSubstr("thin lines")));
}

TEST(DrawLossCurves, SaysThatGnuplotIsMissing) {
  const ScratchDirectory scratch;
  const std::vector<path> folders{finished_run(scratch, "uniform", "uniform:24", 2.2, 1890000)};
  const std::string search_path = std::getenv("PATH");
  ::setenv("PATH", scratch.path().c_str(), 1);
  const std::string message =
      thrown_message<IoError>([&] { draw_loss_curves(folders, scratch.path() / "losses"); });
  ::setenv("PATH", search_path.c_str(), 1);
  EXPECT_THAT(message,
              HasSubstr("gnuplot: not found, expected it to draw the picture (Debian: gnuplot-nox)"));
}

}  // namespace
}  // namespace lowband
