#include "tests/trainer/config/valid_run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

TEST(Validate, AcceptsTheRunThatTheCasesChange) { EXPECT_NO_THROW(validate(valid_run(), 4)); }

TEST(Validate, AcceptsARunWithinItsBudget) {
  RunConfig config = valid_run();
  for (const char* assignment : {"budget={reference: \"uniform:6\" tolerance: 0}", "optimizer.kind=POWERSGD"})
    apply_override(config, assignment);
  EXPECT_NO_THROW(validate(config, 4));
}

struct BadRun {
  std::vector<const char*> overrides;
  const char* error;
  int processes = 4;
};

class Refused : public testing::TestWithParam<BadRun> {};

TEST_P(Refused, NamesFieldFoundAndExpected) {
  RunConfig config = valid_run();
  for (const char* assignment : GetParam().overrides) apply_override(config, assignment);
  EXPECT_EQ(error_of([&] { validate(config, GetParam().processes); }), GetParam().error);
}

INSTANTIATE_TEST_SUITE_P(
    Model, Refused,
    testing::Values(
        BadRun{{"model={}"}, "model.width: found nothing, expected a value: it has no default"},
        BadRun{{"model.width=0"}, "model.width: found 0, expected 1 to 4194304"},
        BadRun{{"model.layers=-2"}, "model.layers: found -2, expected 1 to 10000"},
        BadRun{{"model.sequence=9000000000000000000"},
               "model.sequence: found 9000000000000000000, expected 1 to 4194304"},
        BadRun{
            {"model.width=50"},
            "model.width: found 50, expected a multiple of model.heads = 4 unless model.head_dim is given"},
        BadRun{{"model.head_dim=5"},
               "model.head_dim: found 5, expected an even number (rotary positions turn pairs)"},
        BadRun{{"model.kv_heads=3"}, "model.heads: found 4, expected a multiple of model.kv_heads = 3"},
        BadRun{{"model.kv_heads=8"}, "model.kv_heads: found 8, expected 1 to 4"},
        BadRun{{"model.kv_heads=1"}, "model.kv_heads: found 1, expected a multiple of mesh.tensor = 2"},
        BadRun{{"mesh.tensor=3", "mesh.replica=1"},
               "model.heads: found 4, expected a multiple of mesh.tensor = 3",
               3},
        BadRun{{"model.norm_epsilon=nan"}, "model.norm_epsilon: found nan, expected a number in (0, 1)"},
        BadRun{{"model.rope_base=inf"}, "model.rope_base: found inf, expected a finite number"}));

INSTANTIATE_TEST_SUITE_P(
    MeshAndBatch, Refused,
    testing::Values(
        BadRun{{}, "mesh: found replica 2 x shard 1 x tensor 2 = 4, expected the 3 processes of this job", 3},
        BadRun{{"mesh.shard=0"}, "mesh.shard: found 0, expected at least 1"},
        BadRun{{"batch={}"}, "batch.sequences_per_step: found nothing, expected a value: it has no default"},
        BadRun{{"batch.sequences_per_step=0"}, "batch.sequences_per_step: found 0, expected 1 to 4194304"},
        BadRun{{"batch.sequences_per_step=7"},
               "batch.sequences_per_step: found 7, expected a multiple of mesh.replica x mesh.shard x "
               "batch.sequences_per_micro_batch = 2"},
        BadRun{{"batch.sequences_per_micro_batch=3"},
               "batch.sequences_per_step: found 8, expected a multiple of mesh.replica x mesh.shard x "
               "batch.sequences_per_micro_batch = 6"},
        BadRun{{"batch.sequences_per_micro_batch=0"},
               "batch.sequences_per_micro_batch: found 0, expected 1 to 4194304"}));

INSTANTIATE_TEST_SUITE_P(
    Data, Refused,
    testing::Values(BadRun{{"data={validation: \"v.bin\"}"},
                           "data.train: found nothing, expected the path of a token shard"},
                    BadRun{{"data.train=a.bin,,b.bin"},
                           "data.train: found an empty path, expected the path of a token shard"},
                    BadRun{{"data={train: \"t.bin\"}", "validation.interval_steps=5"},
                           "validation.interval_steps: found a value, expected none without data.validation"},
                    BadRun{{"validation.sequences=-1"},
                           "validation.sequences: found -1, expected at least 0"}));

INSTANTIATE_TEST_SUITE_P(
    Optimizer, Refused,
    testing::Values(
        BadRun{{"optimizer={}"},
               "optimizer.learning_rate: found nothing, expected a value: it has no default"},
        BadRun{{"optimizer.learning_rate=-1"},
               "optimizer.learning_rate: found -1, expected a positive number"},
        BadRun{{"optimizer.learning_rate=inf"},
               "optimizer.learning_rate: found inf, expected a positive number"},
        BadRun{{"optimizer.scalar_learning_rate=0"},
               "optimizer.scalar_learning_rate: found 0, expected a positive number"},
        BadRun{{"optimizer.weight_decay=-0.1"}, "optimizer.weight_decay: found -0.1, expected a number >= 0"},
        BadRun{{"optimizer.mu=1"}, "optimizer.mu: found 1, expected 0 <= mu < 1"},
        BadRun{{"optimizer.adamw_beta2=1.5"},
               "optimizer.adamw_beta2: found 1.5, expected 0 <= adamw_beta2 < 1"},
        BadRun{{"optimizer.adamw_epsilon=0"}, "optimizer.adamw_epsilon: found 0, expected a positive number"},
        BadRun{{"optimizer.clip_norm=-1"},
               "optimizer.clip_norm: found -1, expected a number >= 0 (0 = no clipping)"},
        BadRun{{"optimizer.clip_estimator=TRUE_NORM"},
               "optimizer.clip_estimator: found TRUE_NORM, expected SKETCH with optimizer.kind DION and "
               "mesh.replica = 2: no process has the mean gradient"},
        BadRun{{"optimizer.kind=ADAMW"}, "profile: found a value, expected none with optimizer.kind ADAMW"},
        BadRun{{"optimizer.kind=ADAMW", "optimizer.residual=LOCAL"},
               "optimizer.residual: found a value, expected none with optimizer.kind ADAMW"},
        BadRun{{"optimizer.kind=ADAMW", "optimizer.clip_estimator=SKETCH"},
               "optimizer.clip_estimator: found a value, expected none with optimizer.kind ADAMW"},
        BadRun{{"optimizer.kind=ADAMW", "optimizer.mu=0.9"},
               "optimizer.mu: found a value, expected none with optimizer.kind ADAMW"},
        BadRun{{"optimizer.kind=POWERSGD", "optimizer.mu=0.9"},
               "optimizer.mu: found a value, expected none with optimizer.kind POWERSGD"},
        BadRun{{"optimizer.kind=POWERSGD", "optimizer.clip_estimator=SKETCH"},
               "optimizer.clip_estimator: found a value, expected none with optimizer.kind POWERSGD"},
        BadRun{{"optimizer.kind=POWERSGD", "profile={}"},
               "profile.rank: found nothing, expected a value: it has no default"},
        BadRun{{"optimizer.kind=POWERSGD", "optimizer.powersgd_momentum=1"},
               "optimizer.powersgd_momentum: found 1, expected 0 <= value < 1"},
        BadRun{{"optimizer.powersgd_momentum=0.9"},
               "optimizer.powersgd_momentum: found a value, expected none with optimizer.kind DION"}));

/// The valid run with AdamW, which has no profile.
BadRun adamw_run(const char* assignment, const char* error) {
  return {{"optimizer={kind: ADAMW learning_rate: 0.01}", assignment}, error};
}

INSTANTIATE_TEST_SUITE_P(
    Spectra, Refused,
    testing::Values(
        BadRun{{"optimizer.spectra_fraction=0.1"},
               "optimizer.spectra_fraction: found a value, expected none with optimizer.kind DION"},
        adamw_run("optimizer.spectra_iterations=2",
                  "optimizer.spectra_iterations: found a value, expected none with optimizer.kind ADAMW"),
        BadRun{{"optimizer={kind: SPECTRA learning_rate: 0.01 spectra_fraction: 0}"},
               "optimizer.spectra_fraction: found 0, expected 0.000001 to 1"},
        BadRun{{"optimizer={kind: SPECTRA learning_rate: 0.01 spectra_iterations: 0}"},
               "optimizer.spectra_iterations: found 0, expected 1 to 100"},
        BadRun{{"optimizer={kind: SPECTRA learning_rate: 0.01 nesterov: true}"},
               "optimizer.nesterov: found a value, expected none with optimizer.kind SPECTRA"},
        BadRun{{"optimizer={kind: SPECTRA learning_rate: 0.01}"},
               "profile: found a value, expected none with optimizer.kind SPECTRA"}));

INSTANTIATE_TEST_SUITE_P(
    AcpSgd, Refused,
    testing::Values(
        BadRun{{"optimizer.kind=ACPSGD", "optimizer.residual=LOCAL"},
               "optimizer.residual: found a value, expected none with optimizer.kind ACPSGD"},
        BadRun{{"optimizer.kind=ACPSGD", "optimizer.exchange=FACTORS"},
               "optimizer.exchange: found a value, expected none with optimizer.kind ACPSGD"},
        BadRun{{"optimizer.kind=ACPSGD", "budget={reference: \"uniform:6\"}"},
               "budget: found a value, expected none with optimizer.kind ACPSGD"},
        BadRun{{"optimizer.kind=ACPSGD", "optimizer.mu=0.9"},
               "optimizer.mu: found a value, expected none with optimizer.kind ACPSGD"},
        BadRun{{"optimizer.kind=ACPSGD", "optimizer.clip_estimator=SKETCH"},
               "optimizer.clip_estimator: found a value, expected none with optimizer.kind ACPSGD"}));

INSTANTIATE_TEST_SUITE_P(
    Galore, Refused,
    testing::Values(
        BadRun{{"optimizer.galore_scale=0.5"},
               "optimizer.galore_scale: found a value, expected none with optimizer.kind DION"},
        adamw_run("optimizer.galore_interval=20",
                  "optimizer.galore_interval: found a value, expected none with optimizer.kind ADAMW"),
        BadRun{{"optimizer.kind=GALORE", "optimizer.galore_interval=0"},
               "optimizer.galore_interval: found 0, expected at least 1"},
        BadRun{{"optimizer.kind=GALORE", "optimizer.galore_scale=-1"},
               "optimizer.galore_scale: found -1, expected a positive number"},
        BadRun{{"optimizer.kind=GALORE", "optimizer.exchange=DENSE"},
               "optimizer.exchange: found dense or auto, expected factors with an optimizer that does not "
               "exchange both of them in every step"},
        BadRun{{"optimizer.kind=GALORE", "diagnostics={interval_steps: 5}"},
               "diagnostics: found a value, expected none with optimizer.kind GALORE"},
        BadRun{{"optimizer.kind=GALORE", "optimizer.powersgd_momentum=0.5"},
               "optimizer.powersgd_momentum: found a value, expected none with optimizer.kind GALORE"}));

INSTANTIATE_TEST_SUITE_P(
    Elementwise, Refused,
    testing::Values(
        adamw_run("optimizer.scalar_optimizer=LION",
                  "optimizer.scalar_optimizer: found a value, expected none with optimizer.kind ADAMW"),
        adamw_run("optimizer.sgd_momentum=0.5",
                  "optimizer.sgd_momentum: found a value, expected none with optimizer.kind ADAMW"),
        BadRun{{"optimizer.scalar_optimizer=POWERSGD"},
               "optimizer.scalar_optimizer: found POWERSGD, expected ADAMW, LION or SGD"},
        BadRun{{"optimizer.scalar_optimizer=LION", "optimizer.adamw_beta1=0.9"},
               "optimizer.adamw_beta1: found a value, expected none with optimizer.scalar_optimizer LION"},
        BadRun{{"optimizer.lion_beta1=0.9"},
               "optimizer.lion_beta1: found a value, expected none with optimizer.scalar_optimizer ADAMW"},
        BadRun{{"optimizer={kind: SGD learning_rate: 0.1}", "optimizer.lion_beta2=0.9"},
               "optimizer.lion_beta2: found a value, expected none with optimizer.kind SGD"},
        BadRun{{"optimizer={kind: SGD learning_rate: 0.1}", "optimizer.sgd_momentum=1"},
               "optimizer.sgd_momentum: found 1, expected 0 <= sgd_momentum < 1"},
        BadRun{{"optimizer.scalar_optimizer=SGD", "optimizer.sgd_momentum=0", "optimizer.sgd_nesterov=true"},
               "optimizer.sgd_nesterov: found true with sgd_momentum 0, expected a positive momentum"},
        BadRun{{"optimizer.nesterov=true"},
               "optimizer.nesterov: found a value, expected none with optimizer.kind DION"},
        BadRun{{"optimizer.sign=POLAR_EXPRESS_8"},
               "optimizer.sign: found a value, expected none with optimizer.kind DION"},
        BadRun{{"optimizer.update_scale=NONE"},
               "optimizer.update_scale: found a value, expected none with optimizer.kind DION"},
        BadRun{{"optimizer={kind: MUON learning_rate: 0.1}", "optimizer.dion2_selection=RANDOM"},
               "optimizer.dion2_selection: found a value, expected none with optimizer.kind MUON"},
        BadRun{{"optimizer={kind: LION learning_rate: 0.1}", "optimizer.blocks=PER_HEAD"},
               "optimizer.blocks: found a value, expected none with optimizer.kind LION"},
        BadRun{{"optimizer={kind: DION2 learning_rate: 0.1}", "optimizer.nesterov=true"},
               "optimizer.nesterov: found a value, expected none with optimizer.kind DION2"},
        BadRun{{"optimizer={kind: DION2 learning_rate: 0.1}", "optimizer.normuon_beta2=0.9"},
               "optimizer.normuon_beta2: found a value, expected none with optimizer.kind DION2"},
        BadRun{{"optimizer={kind: NORDION2 learning_rate: 0.1 dion2_numerator: 5}"},
               "optimizer.dion2_numerator: found 5, expected 1 to 4, the denominator"},
        BadRun{{"optimizer={kind: DION2 learning_rate: 0.1 dion2_denominator: 0}"},
               "optimizer.dion2_denominator: found 0, expected 1 to 1000000"},
        BadRun{{"optimizer={kind: SPECGD learning_rate: 0.1}", "optimizer.mu=0.9"},
               "optimizer.mu: found a value, expected none with optimizer.kind SPECGD"},
        BadRun{{"optimizer={kind: SPECGD learning_rate: 0.1}", "optimizer.update_scale=NONE"},
               "optimizer.update_scale: found a value, expected none with optimizer.kind SPECGD"},
        BadRun{{"optimizer={kind: MUON learning_rate: 0.1}", "optimizer.muonbp_period=2"},
               "optimizer.muonbp_period: found a value, expected none with optimizer.kind MUON"},
        BadRun{{"optimizer={kind: MUONBP learning_rate: 0.1 muonbp_block_learning_rate: 0.1}"},
               "optimizer.muonbp_period: found nothing, expected a value: it has no default"},
        BadRun{{"optimizer={kind: MUONBP learning_rate: 0.1 muonbp_period: 2}"},
               "optimizer.muonbp_block_learning_rate: found nothing, expected a value: it has no default"},
        BadRun{
            {"optimizer={kind: MUONBP learning_rate: 0.1 muonbp_period: 0 muonbp_block_learning_rate: 0.1}"},
            "optimizer.muonbp_period: found 0, expected at least 1"},
        BadRun{{"optimizer={kind: MUONBP learning_rate: 0.1 muonbp_period: 2 muonbp_block_learning_rate: 0}"},
               "optimizer.muonbp_block_learning_rate: found 0, expected a positive number"},
        BadRun{{"optimizer={kind: MUON learning_rate: 0.1}", "optimizer.mu=1"},
               "optimizer.mu: found 1, expected 0 <= mu < 1"},
        BadRun{{"optimizer={kind: MUON learning_rate: 0.1}", "optimizer.residual=LOCAL"},
               "optimizer.residual: found a value, expected none with optimizer.kind MUON"},
        BadRun{{"optimizer={kind: MUON learning_rate: 0.1}"},
               "profile: found a value, expected none with optimizer.kind MUON"},
        BadRun{{"optimizer={kind: LION learning_rate: 0.1}", "optimizer.lion_beta2=2"},
               "optimizer.lion_beta2: found 2, expected 0 <= lion_beta2 < 1"}));

INSTANTIATE_TEST_SUITE_P(
    Device, Refused,
    testing::Values(
        BadRun{{"precision=BF16"}, "precision: found BF16, expected F32 or F64 with device CPU"},
        BadRun{{"recompute_activations=true"},
               "recompute_activations: found a value, expected none with device CPU"},
        BadRun{{"device=CUDA", "precision=F64"},
               "precision: found F64, expected F32 or BF16 with device CUDA"},
        BadRun{{"device=CUDA", "model.head_dim=24"},
               "model.head_dim: found 24, expected a multiple of 16 up to 128 with device CUDA"},
        BadRun{
            {"device=CUDA", "model.head_dim=16", "optimizer.overlap=true"},
            "optimizer.overlap: found true, expected false with device CUDA: gradients are complete when the "
            "device has ended the backward pass"}));

INSTANTIATE_TEST_SUITE_P(
    Exchange, Refused,
    testing::Values(
        adamw_run("optimizer.exchange=FACTORS",
                  "optimizer.exchange: found a value, expected none with optimizer.kind ADAMW"),
        adamw_run("optimizer.wire=AS_COMPUTED",
                  "optimizer.wire: found a value, expected none with optimizer.kind ADAMW"),
        BadRun{{"optimizer.wire=BF16", "precision=F64"},
               "optimizer.wire: found BF16, expected AS_COMPUTED with precision F64"},
        BadRun{
            {"optimizer.wire=BF16", "optimizer.exchange=DENSE"},
            "optimizer.wire: found a value, expected none with optimizer.exchange DENSE: no factors travel"},
        BadRun{{"optimizer.bucket_mib=8"},
               "optimizer.bucket_mib: found a value, expected none without optimizer.overlap"},
        BadRun{{"optimizer.overlap=true", "optimizer.bucket_mib=nan"},
               "optimizer.bucket_mib: found nan, expected more than 0, at most 65536"},
        BadRun{{"optimizer.overlap=true", "optimizer.bucket_mib=0"},
               "optimizer.bucket_mib: found 0, expected more than 0, at most 65536"},
        BadRun{{"diagnostics.interval_steps=-1"},
               "diagnostics.interval_steps: found -1, expected at least 0"}));

// The run sends 6 x 828 elements as factors of 2 x (4 x 96 + 3 x 148) rows and columns.
INSTANTIATE_TEST_SUITE_P(
    Budget, Refused,
    testing::Values(
        BadRun{{"budget={}"}, "budget.reference: found nothing, expected a value: it has no default"},
        BadRun{{"budget.reference=uniform"},
               "budget.reference: profile: found uniform, expected uniform:RANK, fraction:N/D, structural, "
               "inverted, structural*SCALE or inverted*SCALE, with @PROFILE to match it to another"},
        BadRun{{"budget.reference=uniform:49"},
               "budget.reference: profile.rank: found 49, expected 1 to min(m, n) = 48 of "
               "model.layers.0.self_attn.q_proj.weight"},
        BadRun{{"budget.reference=uniform:6", "budget.tolerance=-1"},
               "budget.tolerance: found -1, expected a number of at least 0"},
        BadRun{
            {"budget.reference=uniform:5"},
            "budget.reference: found 39744 bytes per step and replica of uniform:6, expected 33120 of "
            "uniform:5 within 0.0005: ratio 1.2; nearest uniform rank 5: ratio 1; nearest ranks of this "
            "shape: model.layers.0.self_attn.q_proj.weight 6 -> 5, model.layers.0.self_attn.k_proj.weight "
            "6 -> 5, model.layers.0.self_attn.v_proj.weight 6 -> 5, model.layers.0.self_attn.o_proj.weight "
            "6 -> 5 and 10 more: ratio 1"},
        BadRun{
            {"budget.reference=uniform:5", "optimizer.wire=BF16"},
            "budget.reference: found 19872 bytes per step and replica of uniform:6, expected 16560 of "
            "uniform:5 within 0.0005: ratio 1.2; nearest uniform rank 5: ratio 1; nearest ranks of this "
            "shape: model.layers.0.self_attn.q_proj.weight 6 -> 5, model.layers.0.self_attn.k_proj.weight "
            "6 -> 5, model.layers.0.self_attn.v_proj.weight 6 -> 5, model.layers.0.self_attn.o_proj.weight "
            "6 -> 5 and 10 more: ratio 1"}));

INSTANTIATE_TEST_SUITE_P(
    Profile, Refused,
    testing::Values(
        BadRun{{"profile={}"}, "profile.rank: found nothing, expected a value: it has no default"},
        BadRun{{"profile.rank=49"},
               "profile.rank: found 49, expected 1 to min(m, n) = 48 of "
               "model.layers.0.self_attn.q_proj.weight"},
        BadRun{{"profile.scale=2"}, "profile.scale: found a value, expected none with profile.kind UNIFORM"},
        BadRun{{"profile={kind: STRUCTURAL scale: 0}"}, "profile.scale: found 0, expected a positive number"},
        BadRun{{"profile={kind: INVERTED rank: 3}"},
               "profile.rank: found a value, expected none with profile.kind INVERTED"},
        BadRun{{"profile={kind: FRACTION numerator: 1}"},
               "profile.denominator: found nothing, expected a value: it has no default"},
        BadRun{{"profile={kind: FRACTION numerator: 5 denominator: 4}"},
               "profile.numerator: found 5, expected 1 to the denominator 4"},
        BadRun{{"profile={kind: EXPLICIT ranks { key: \"model.norm.weight\" value: 1 }}"},
               "profile: found no rank for model.layers.0.self_attn.q_proj.weight, expected 1 to 48"},
        BadRun{{"profile={kind: STRUCTURAL ranks { key: \"x\" value: 1 }}"},
               "profile.ranks: found 1 ranks, expected none with profile.kind STRUCTURAL"},
        BadRun{{"profile={rank: 3 match_tolerance: 0.1}"},
               "profile.match_tolerance: found a value, expected none without profile.match_to"},
        BadRun{{"profile={kind: STRUCTURAL scale: 2 match_to { rank: 3 }}"},
               "profile.scale: found a value, expected none with profile.match_to"},
        BadRun{{"profile={kind: STRUCTURAL match_to { rank: 3 match_to { rank: 4 } }}"},
               "profile.match_to.match_to: found a value, expected none in a profile that another is matched "
               "to"},
        BadRun{{"profile={kind: STRUCTURAL match_to { rank: 99 }}"},
               "profile.match_to.rank: found 99, expected 1 to min(m, n) = 48 of "
               "model.layers.0.self_attn.q_proj.weight"},
        BadRun{{"profile={kind: UNIFORM match_to { kind: STRUCTURAL scale: 0.25 }}"},
               "profile.match_to: found B(r) ratio 1.003968254 as the nearest that uniform:11 reaches to "
               "structural*0.25, expected 1 within 0.0005"}));  // 11 x 828 elements against 9,072

INSTANTIATE_TEST_SUITE_P(
    ScheduleAndOutput, Refused,
    testing::Values(
        BadRun{{"schedule={}"}, "schedule.steps: found nothing, expected a value: it has no default"},
        BadRun{{"schedule.steps=0"}, "schedule.steps: found 0, expected at least 1"},
        BadRun{{"schedule.warmup_steps=101"}, "schedule.warmup_steps: found 101, expected 0 to 100"},
        BadRun{{"schedule.final_fraction=1.1"},
               "schedule.final_fraction: found 1.1, expected 0 <= value <= 1"},
        BadRun{{"schedule.decay_fraction=0.1"},
               "schedule.decay_fraction: found a value, expected none with schedule.kind COSINE"},
        BadRun{{"schedule.kind=CONSTANT_LINEAR", "schedule.decay_fraction=0.1", "schedule.decay_steps=3"},
               "schedule.decay_fraction: found a value, expected none beside schedule.decay_steps"},
        BadRun{
            {"schedule.kind=CONSTANT_LINEAR", "schedule.warmup_steps=81"},
            "schedule.warmup_steps: found 81 before a decay of 20 steps, expected at most schedule.steps = "
            "100 together"},
        BadRun{{"name=a/b"}, "name: found \"a/b\", expected a plain file name"},
        BadRun{{"output_dir="}, "output_dir: found nothing, expected the path of a folder"},
        BadRun{{"checkpoint.keep=0"}, "checkpoint.keep: found 0, expected at least 1"},
        BadRun{{"checkpoint.resume="},
               "checkpoint.resume: found nothing, expected none, auto or the path of a checkpoint"},
        BadRun{{"log_interval_steps=0"}, "log_interval_steps: found 0, expected at least 1"},
        BadRun{{"collective_deadline_seconds=nan"},
               "collective_deadline_seconds: found nan, expected 0.001 to 31536000"},
        BadRun{{"collective_deadline_seconds=1e300"},
               "collective_deadline_seconds: found 1e+300, expected 0.001 to 31536000"},
        BadRun{{"collective_deadline_seconds=0.0001"},
               "collective_deadline_seconds: found 0.0001, expected 0.001 to 31536000"},
        BadRun{{"threads=-1"}, "threads: found -1, expected 0 to 4096"}));

// ---- Profiles of a configuration ----

TEST(RankProfileOfARun, QuickStartPairIsMatchedExactly) {
  RunConfig config = valid_run();
  apply_override(config, "model={width: 256 layers: 4 heads: 8 ffn_width: 704 sequence: 256}");
  config.mutable_profile()->set_rank(24);
  const auto parameters = parameter_table(model_config(config));
  const RankProfile uniform = rank_profile(config, parameters);
  *config.mutable_profile() = parse_profile("structural@uniform:24");
  const RankProfile structural = rank_profile(config, parameters);
  EXPECT_EQ(budget_ratio(structural, uniform), 1.0);
  EXPECT_NE(structural.factor_ranks, uniform.factor_ranks);
  EXPECT_NO_THROW(validate(config, 4));
}

TEST(RankProfileOfARun, ExplicitTableComesFromTheMessage) {
  RunConfig config = valid_run();
  const auto parameters = parameter_table(model_config(config));
  config.mutable_profile()->Clear();
  config.mutable_profile()->set_kind(RunConfig::Profile::EXPLICIT);
  Index rank = 0;
  for (const ParameterInfo& info : parameters)
    if (is_layer_matrix(info.role)) (*config.mutable_profile()->mutable_ranks())[info.name] = ++rank;
  validate(config, 4);
  EXPECT_THAT(rank_profile(config, parameters).factor_ranks,
              testing::ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14));
}

TEST(RankProfileOfARun, ToleranceDecidesWhetherAMatchIsAccepted) {
  RunConfig config = valid_run();
  *config.mutable_profile() = parse_profile("uniform@structural*0.25");
  EXPECT_THROW(validate(config, 4), InvalidArgument);
  config.mutable_profile()->set_match_tolerance(0.004);
  EXPECT_NO_THROW(validate(config, 4));
}

TEST(RankProfileOfARun, AdamWHasNone) {
  RunConfig config = valid_run();
  config.mutable_optimizer()->set_kind(RunConfig::Optimizer::ADAMW);
  EXPECT_THROW(rank_profile(config, parameter_table(model_config(config))), InvalidArgument);
}

}  // namespace
}  // namespace lowband
