#include "launcher/plan/plan.h"

#include "runtime/json.h"
#include "trainer/config/presets.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using testing::HasSubstr;

PlanReport plan_of(std::string_view preset, std::string_view profile,
                   std::string_view reference = "structural") {
  RunConfig config = parse_run_config(preset_text(preset), preset);
  *config.mutable_profile() = parse_profile(profile);
  return make_plan(config, parse_profile(reference));
}

struct Published {
  const char* profile;
  Index layer_elements;
  const char* ratio_to_structural;
  const char* ratio_to_dense;
  Index cheaper_elements;
  int above_break_even;
};

class Rank166M : public testing::TestWithParam<Published> {};

TEST_P(Rank166M, HasThePublishedBudget) {
  const Published& expected = GetParam();
  const PlanReport report = plan_of("rank166m", expected.profile);
  ASSERT_EQ(report.layers_size(), 18);
  for (const LayerPlan& layer : report.layers()) {
    EXPECT_EQ(layer.factor_elements(), expected.layer_elements);
    EXPECT_EQ(layer.dense_elements(), 7'077'888);
    EXPECT_EQ(layer.cheaper_bytes(), 4 * expected.cheaper_elements);
    EXPECT_EQ(layer.reference_factor_elements(), 9'043'968);
    EXPECT_EQ(layer.ratio_to_reference(), report.ratio_to_reference());
  }
  EXPECT_EQ(report.factor_elements(), 18 * expected.layer_elements);
  EXPECT_EQ(report.factor_bytes(), 18 * 4 * expected.layer_elements);
  EXPECT_EQ(report.dense_bytes(), 18 * 4 * 7'077'888);
  EXPECT_EQ(report.cheaper_bytes(), 18 * 4 * expected.cheaper_elements);
  EXPECT_EQ(report.uncompressed_elements(), 50257 * 768 + 37 * 768);
  EXPECT_EQ(report.parameters(), 18 * 7'077'888 + 50257 * 768 + 37 * 768);

  const std::string table = plan_table(report);
  EXPECT_THAT(table, HasSubstr("layers 0-17, each"));
  EXPECT_THAT(table, HasSubstr(cat("ratio to structural ", expected.ratio_to_structural)));
  EXPECT_THAT(table, HasSubstr(cat("exceed the dense gradient: they are ", expected.ratio_to_dense,
                                   " times its size")));
  EXPECT_THAT(table, HasSubstr(cat(expected.above_break_even,
                                   " of 126 matrices have a rank at or above break-even")));
}

// Figures of numerics.md 4.1 and algorithms.md 4.2: 7, 6 and 4 matrices of a layer lie above break-even.
INSTANTIATE_TEST_SUITE_P(
    Profiles, Rank166M,
    testing::Values(Published{"uniform:620", 9'047'040, "1.0003", "1.2782", 7'077'888, 126},
                    Published{"structural", 9'043'968, "1.0000", "1.2778", 6'684'672, 108},
                    Published{"inverted", 8'257'536, "0.9130", "1.1667", 5'898'240, 72}));

TEST(Plan, SaysWhichProfilesMatch) {
  EXPECT_TRUE(plan_of("rank166m", "uniform:620").matches_reference());
  EXPECT_FALSE(plan_of("rank166m", "uniform:619").matches_reference());
  EXPECT_THAT(plan_table(plan_of("rank166m", "uniform:619")),
              HasSubstr("ratio to structural 0.9987: not matched within 0.0005"));
}

TEST(Plan, ListsEveryMatrixWithItsBreakEvenRank) {
  const PlanReport report = plan_of("rank166m", "structural");
  ASSERT_EQ(report.matrices_size(), 126);
  const MatrixPlan& value = report.matrices(2);
  EXPECT_EQ(value.name(), "model.layers.0.self_attn.v_proj.weight");
  EXPECT_EQ(value.factor_rank(), 128);
  EXPECT_EQ(value.break_even_rank(), 384);
  EXPECT_EQ(value.factor_elements(), 128 * 1536);
  EXPECT_EQ(value.cheaper(), "factors");
  const MatrixPlan& down = report.matrices(125);
  EXPECT_EQ(down.layer(), 17);
  EXPECT_EQ(down.rows(), 768);
  EXPECT_EQ(down.cols(), 2048);
  EXPECT_EQ(down.cheaper(), "dense");
}

// At equality nothing is gained by factors: 384 x 1536 = 768 x 768.
TEST(Plan, TakesDenseAtBreakEven) {
  EXPECT_EQ(plan_of("rank166m", "uniform:384").matrices(0).cheaper(), "dense");
  EXPECT_EQ(plan_of("rank166m", "uniform:383").matrices(0).cheaper(), "factors");
}

TEST(Plan, SaysNothingAboutTheDenseGradientWhereFactorsAreSmaller) {
  const PlanReport report = plan_of("quickstart", "uniform:24", "structural@uniform:24");
  EXPECT_EQ(report.ratio_to_reference(), 1.0);
  EXPECT_THAT(report.remarks(), testing::IsEmpty());
}

TEST(Plan, ShowsLayersThatDifferSeparately) {
  RunConfig config = parse_run_config(preset_text("smoke"), "smoke");
  apply_override(config, "model.layers=4");
  config.mutable_profile()->Clear();
  config.mutable_profile()->set_kind(RunConfig::Profile::EXPLICIT);
  for (const ParameterInfo& info : parameter_table(model_config(config)))
    if (is_layer_matrix(info.role)) (*config.mutable_profile()->mutable_ranks())[info.name] = 5;
  (*config.mutable_profile()->mutable_ranks())["model.layers.2.mlp.up_proj.weight"] = 6;
  const std::string table = plan_table(make_plan(config, parse_profile("uniform:5")));
  EXPECT_THAT(table, HasSubstr("layers 0-1, each\n"));
  EXPECT_THAT(table, HasSubstr("layer 2\n"));
  EXPECT_THAT(table, HasSubstr("layer 3\n"));
}

TEST(Plan, CountsBytesInThePrecisionOfTheRun) {
  RunConfig config = parse_run_config(preset_text("smoke"), "smoke");
  const PlanReport f32 = make_plan(config, config.profile());
  config.set_precision(RunConfig::F64);
  const PlanReport f64 = make_plan(config, config.profile());
  EXPECT_EQ(f64.factor_elements(), f32.factor_elements());
  EXPECT_EQ(f64.factor_bytes(), 2 * f32.factor_bytes());
}

// Two layers of width 64: five norm gains, which both processes of the tensor axis send.
TEST(Plan, CountsNormGainsOncePerProcessOfTheTensorAxis) {
  RunConfig config = parse_run_config(preset_text("smoke"), "smoke");
  EXPECT_EQ(make_plan(config, config.profile()).uncompressed_elements(), 256 * 64 + 5 * 64);
  config.mutable_mesh()->set_tensor(2);
  EXPECT_EQ(make_plan(config, config.profile()).uncompressed_elements(), 256 * 64 + 2 * 5 * 64);
}

RunConfig rank166m_with(std::vector<const char*> assignments) {
  RunConfig config = parse_run_config(preset_text("rank166m"), "rank166m");
  *config.mutable_profile() = parse_profile("structural");
  for (const char* assignment : assignments) apply_override(config, assignment);
  return config;
}

// By bytes: an element of a factor in bfloat16 costs half of one of the matrix in float32. 768 x 768 breaks
// even at rank 384 or 768, its full rank; 768 x 2048 at 558.5 or 1117.1, which no rank reaches.
TEST(Plan, BreaksEvenByBytes) {
  struct Case {
    const char *wire, *rank, *square_cheaper, *square_choice, *gate_cheaper, *gate_choice;
  };
  for (const auto& [wire, rank, square_cheaper, square_choice, gate_cheaper, gate_choice] :
       {Case{"optimizer.wire=AS_COMPUTED", "profile.rank=384", "dense", "dense", "factors", "factors"},
        Case{"optimizer.wire=AS_COMPUTED", "profile.rank=385", "dense", "dense", "factors", "factors"},
        Case{"optimizer.wire=AS_COMPUTED", "profile.rank=559", "dense", "dense", "dense", "dense"},
        Case{"optimizer.wire=BF16", "profile.rank=559", "factors", "factors", "factors", "factors"},
        Case{"optimizer.wire=BF16", "profile.rank=768", "dense", "dense", "factors", "factors"}}) {
    SCOPED_TRACE(cat(wire, " ", rank));
    const RunConfig config =
        rank166m_with({"profile={kind: UNIFORM rank: 1}",
                       "optimizer={kind: POWERSGD learning_rate: 0.01 exchange: AUTO}", wire, rank});
    const PlanReport report = make_plan(config, parse_profile("structural"));
    const Index factor = config.optimizer().wire() == RunConfig::Optimizer::BF16 ? 2 : 4;
    const MatrixPlan &square = report.matrices(0), &gate = report.matrices(6);
    ASSERT_EQ(square.dense_elements(), 768 * 768);
    ASSERT_EQ(gate.dense_elements(), 768 * 2048);
    EXPECT_EQ(square.break_even_rank(), 384 * 4 / factor);
    EXPECT_NEAR(gate.break_even_rank(), 558.545 * 4 / static_cast<double>(factor), 1e-3);
    EXPECT_EQ(square.cheaper(), square_cheaper);
    EXPECT_EQ(square.choice(), square_choice);
    EXPECT_EQ(gate.cheaper(), gate_cheaper);
    EXPECT_EQ(gate.choice(), gate_choice);
    EXPECT_EQ(report.cheaper_bytes(), report.sent_factor_bytes() + report.sent_dense_matrix_bytes());
    EXPECT_DOUBLE_EQ(report.ratio_to_dense(), static_cast<double>(report.factor_elements() * factor) /
                                                  static_cast<double>(report.dense_elements() * 4));
  }
}

// A layer of `structural`: q, k, o at rank 512, v at 128, break-even 384; feed-forward at 768, break-even
// 558.5.
TEST(Plan, SaysHowEveryMatrixTravels) {
  const RunConfig config = rank166m_with({"optimizer={kind: POWERSGD learning_rate: 0.01 exchange: AUTO}"});
  const PlanReport report = make_plan(config, parse_profile("structural"));
  EXPECT_EQ(report.optimizer(), "POWERSGD");
  EXPECT_EQ(report.matrices(0).choice(), "dense");
  EXPECT_EQ(report.matrices(0).sent_bytes(), 768 * 768 * 4);
  EXPECT_EQ(report.matrices(2).choice(), "factors");
  EXPECT_EQ(report.matrices(2).sent_bytes(), 128 * 1536 * 4);
  EXPECT_EQ(report.sent_factor_bytes(), 18 * 128 * 1536 * 4);
  EXPECT_EQ(report.sent_dense_matrix_bytes(), 18 * (3 * 768 * 768 + 3 * 768 * 2048) * 4);
  EXPECT_EQ(report.sent_bytes(),
            report.sent_factor_bytes() + report.sent_dense_matrix_bytes() + (50257 + 37) * 768 * 4);
  EXPECT_EQ(report.factor_bytes(), 18 * 9'043'968 * 4) << "B(r) is what it was";
  const std::string table = plan_table(report);
  EXPECT_THAT(table, HasSubstr("exchange AUTO: 108 of 126 matrices travel dense."));
  EXPECT_THAT(table, testing::ContainsRegex("factors, f32 +14,155,776\n"));
  EXPECT_THAT(table, testing::ContainsRegex("layer matrices that travel dense, f32 +467,140,608\n"));
}

TEST(Plan, EverythingTravelsAsFactorsOrDenseWhenAskedFor) {
  const PlanReport factors = make_plan(rank166m_with({}), parse_profile("structural"));
  EXPECT_EQ(factors.sent_factor_bytes(), factors.factor_bytes());
  EXPECT_EQ(factors.sent_dense_matrix_bytes(), 0);
  EXPECT_EQ(factors.matrices(0).choice(), "factors");
  const PlanReport dense =
      make_plan(rank166m_with({"optimizer.exchange=DENSE"}), parse_profile("structural"));
  EXPECT_EQ(dense.sent_factor_bytes(), 0);
  EXPECT_EQ(dense.sent_dense_matrix_bytes(), dense.dense_bytes());
}

TEST(Plan, CountsFactorsInTheTypeOfTheWire) {
  const PlanReport report = make_plan(rank166m_with({"optimizer.wire=BF16"}), parse_profile("structural"));
  EXPECT_EQ(report.wire_dtype(), "bf16");
  EXPECT_EQ(report.dtype(), "f32");
  EXPECT_EQ(report.factor_bytes(), 18 * 9'043'968 * 2);
  EXPECT_EQ(report.dense_bytes(), 18 * 7'077'888 * 4);
  EXPECT_EQ(report.matrices(0).sent_bytes(), 512 * 1536 * 2);
}

// The tensor axis cuts all matrices, and none is long enough to be signed by Gram matrices.
TEST(Plan, ShowsWhatAnOptimizerWithoutRanksSends) {
  RunConfig config = rank166m_with(
      {"profile=", "mesh.replica=2", "mesh.tensor=2", "optimizer={kind: MUON learning_rate: 0.02}"});
  const PlanReport report = make_plan(config, parse_profile("structural"));
  EXPECT_EQ(report.profile(), "");
  EXPECT_EQ(report.matrices_size(), 126);
  EXPECT_EQ(report.matrices(0).sent_bytes(), 768 * 768 * 4);
  EXPECT_EQ(report.sent_factor_bytes(), 0);
  EXPECT_EQ(report.sent_dense_matrix_bytes(), report.dense_bytes());
  EXPECT_EQ(report.update_bytes(), 2 * report.dense_bytes());  // to the owners and back
  EXPECT_EQ(report.assemblies(), "owner 126");
  const std::string table = plan_table(report);
  EXPECT_THAT(table, HasSubstr("optimizer MUON; 126 matrices in 18 layers"));
  EXPECT_THAT(table,
              testing::ContainsRegex("within a replica, of every process: owner 126 +1,019,215,872\n"));
  EXPECT_THAT(table, testing::Not(HasSubstr("factors")));
  EXPECT_THAT(table, HasSubstr("optimizer.kind MUON has no factor ranks.\n"));
  apply_override(config, "optimizer={kind: ADAMW learning_rate: 0.002}");
  const PlanReport adamw = make_plan(config, parse_profile("structural"));
  EXPECT_EQ(adamw.sent_bytes(), report.sent_bytes());
  EXPECT_EQ(adamw.update_bytes(), 0);
  // Process 0 holds half of every layer matrix, 25,129 rows of the embedding and all 37 gains. Muon keeps one
  // number for each element, AdamW two and a counter for each parameter.
  const Index matrices = 18 * 7'077'888 / 2, others = 2 * (25129 + 37) * 768 + 38;
  EXPECT_EQ(report.state_bytes(), 4 * (matrices + others));
  EXPECT_EQ(adamw.state_bytes(), 4 * (2 * matrices + 126 + others));
  EXPECT_THAT(plan_table(adamw), testing::Not(HasSubstr("within a replica")));
}

TEST(Plan, ShowsControlAndAmortisesWhatIsPeriodic) {
  RunConfig config =
      rank166m_with({"mesh.replica=2", "hash_interval_steps=1000", "diagnostics.interval_steps=500"});
  const PlanReport report = make_plan(config, parse_profile("structural"));
  // A flag for each of 18 x 9 + 2 parameters, a norm with a sketch of 4,096 numbers, 7 sums; an outcome and r
  // flags for each matrix, 3 x 512 + 128 + 3 x 768 of them in a layer.
  EXPECT_EQ(report.control_bytes(), 164 + 8 * (1 + 4096) + 8 * 7 + 4 * 18 * (7 + 3968));
  EXPECT_EQ(report.diagnostics().bytes(), 2 * 18 * 7'077'888 * 4);
  EXPECT_EQ(report.diagnostics().bytes_per_step(), static_cast<double>(report.diagnostics().bytes()) / 500);
  EXPECT_EQ(report.weight_hashes().bytes(), 2 * 8);
  const std::string table = plan_table(report);
  EXPECT_THAT(table, HasSubstr("periodic, amortised: diagnostics, of one replica"));
  EXPECT_THAT(table, HasSubstr("2,038,432  1,019,215,872 every 500 steps\n"));
  EXPECT_THAT(table, HasSubstr("0.016           16 every 1,000 steps\n"));
}

TEST(Plan, ShowsTheBudgetThatIsMetAndRefusesAnother) {
  const PlanReport report =
      make_plan(rank166m_with({"budget={reference: \"uniform:620\"}"}), parse_profile("uniform:24"));
  EXPECT_EQ(report.budget().bytes(), 18 * 9'043'968 * 4);
  EXPECT_EQ(report.budget().reference_bytes(), 18 * 9'047'040 * 4);
  EXPECT_THAT(plan_table(report),
              HasSubstr("budget: 651,165,696 bytes of layer matrices against 651,386,880 of "
                        "uniform:620: ratio 0.9997, within 0.0005\n"));
  EXPECT_THROW(make_plan(rank166m_with({"budget={reference: \"uniform:619\"}"}), parse_profile("structural")),
               InvalidArgument);
}

TEST(Plan, IsAMessageThatBecomesJson) {
  const std::string json = to_json(plan_of("rank166m", "inverted"));
  EXPECT_THAT(json, HasSubstr("\"factor_elements\":148635648"));
  EXPECT_THAT(json, HasSubstr("\"profile\":\"inverted\""));
}

// On a device, of 4 sequences in bf16: as DeviceMemory.OfAKnownModel adds it up.
TEST(PlanOnADevice, SaysWhatTheModelTakes) {
  RunConfig config = parse_run_config(preset_text("rank166m"), "rank166m");
  EXPECT_FALSE(make_plan(config, parse_profile("structural")).has_device_memory());
  for (const char* setting : {"device=CUDA", "precision=BF16", "batch={sequences_per_step: 4}", "mesh={}"})
    apply_override(config, setting);
  const PlanReport report = make_plan(config, parse_profile("structural"));
  EXPECT_EQ(report.device_memory().weights(), 6 * report.parameters());
  EXPECT_EQ(report.device_memory().gradients(), 4 * report.parameters());
  EXPECT_THAT(plan_table(report), HasSubstr("model on a device: weights 996,"));
  const Index kept = report.device_memory().activations();
  config.set_recompute_activations(true);
  const Index of_a_layer_and_token = 2 * (2 * 768 + 4 * 768 + 3 * 2048) + 4 * (2 + 768 + 12);
  EXPECT_EQ(kept - make_plan(config, parse_profile("structural")).device_memory().activations(),
            17 * 4096 * of_a_layer_and_token);
}

}  // namespace
}  // namespace lowband
