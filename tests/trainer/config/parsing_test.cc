#include "tests/trainer/config/valid_run.h"
#include "tests/trainer/scratch_directory.h"

#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

TEST(ParseRunConfig, ReadsEverySection) {
  const RunConfig config = parse_run_config(R"(
      # comments and both ways to write a list are fine
      model { vocabulary: 50257 width: 768 layers: 18 heads: 8 kv_heads: 4 head_dim: 128 ffn_width: 2048
              sequence: 1024 rope_base: 5e5 norm_epsilon: 1e-6 tied_head: false }
      mesh { replica: 2 shard: 3 tensor: 4 }
      data { train: ["a.bin", "b_*.bin"] validation: "c.bin" validation: "d.bin" }
      batch { sequences_per_step: 24 sequences_per_micro_batch: 2 }
      optimizer { kind: ADAMW learning_rate: 3e-4 scalar_learning_rate: 1e-4 weight_decay: 0.1
                  adamw_beta1: 0.8 adamw_beta2: 0.99 adamw_epsilon: 1e-9 clip_norm: 0 }
      schedule { steps: 1000 kind: CONSTANT_LINEAR warmup_steps: 10 decay_steps: 200 final_fraction: 0.1 }
      seed: 18446744073709551615 precision: F64 threads: 3)",
                                            "text");
  const ModelConfig model = model_config(config);
  EXPECT_EQ(model.vocabulary, 50257);
  EXPECT_EQ(model.kv_heads, 4);
  EXPECT_EQ(model.head_dim, 128);
  EXPECT_EQ(model.rope_base, 5e5);
  EXPECT_EQ(model.norm_epsilon, 1e-6);
  EXPECT_FALSE(model.tied_head);
  const OptimizerOptions optimizer = optimizer_options(config);
  EXPECT_EQ(optimizer.kind, OptimizerKind::kAdamW);
  EXPECT_EQ(optimizer.weight_decay, 0.1);
  EXPECT_EQ(optimizer.adamw_beta1, 0.8);
  EXPECT_EQ(optimizer.adamw_beta2, 0.99);
  EXPECT_EQ(optimizer.adamw_epsilon, 1e-9);
  EXPECT_EQ(optimizer.clip_norm, 0);
  EXPECT_EQ(optimizer.seed, 18446744073709551615u);
  EXPECT_EQ(scalar_learning_rate(config), 1e-4);
  EXPECT_EQ(mesh_shape(config).processes(), 24);
  EXPECT_THAT(config.data().train(), testing::ElementsAre("a.bin", "b_*.bin"));
  EXPECT_THAT(config.data().validation(), testing::ElementsAre("c.bin", "d.bin"));
  EXPECT_EQ(config.seed(), 18446744073709551615u);
  EXPECT_EQ(config.precision(), RunConfig::F64);
  EXPECT_EQ(sequences_per_micro_batch(config), 2);
  EXPECT_EQ(micro_batches_per_step(config), 2);  // 24 / (2 replicas x 3 shards) = 4 of each process
  EXPECT_NO_THROW(validate(config, 24));
}

TEST(ParseRunConfig, PassesOptionsOfDionOn) {
  RunConfig config = valid_run();
  for (const char* assignment : {"optimizer.mu=0.5", "optimizer.residual=AGGREGATED", "mesh.replica=1",
                                 "optimizer.clip_estimator=TRUE_NORM"})
    apply_override(config, assignment);
  validate(config, 2);
  const OptimizerOptions optimizer = optimizer_options(config);
  EXPECT_EQ(optimizer.kind, OptimizerKind::kDion);
  EXPECT_EQ(optimizer.mu, 0.5);
  EXPECT_EQ(optimizer.residual, Residual::kAggregated);
  EXPECT_EQ(optimizer.clip_estimator, NormEstimator::kTrueNorm);
}

TEST(ParseRunConfig, PassesOptionsOfTheExchangeOn) {
  RunConfig config = valid_run();
  for (const char* assignment :
       {"optimizer.kind=POWERSGD", "optimizer.powersgd_momentum=0.5", "optimizer.exchange=AUTO",
        "optimizer.wire=BF16", "optimizer.overlap=true", "optimizer.bucket_mib=0.5"})
    apply_override(config, assignment);
  validate(config, 4);
  const OptimizerOptions optimizer = optimizer_options(config);
  EXPECT_EQ(optimizer.kind, OptimizerKind::kPowerSgd);
  EXPECT_EQ(optimizer.lambda, 0.5);
  EXPECT_EQ(optimizer.exchange, ExchangeChoice::kAuto);
  EXPECT_EQ(optimizer.wire, FactorWire::kBF16);
  EXPECT_TRUE(optimizer.overlap);
  EXPECT_EQ(optimizer.bucket_elements, 131'072);
  const ReplicaTraffic traffic = replica_traffic(config);
  EXPECT_EQ(traffic.exchange, ExchangeChoice::kAuto);
  EXPECT_EQ(traffic.factor_element_bytes, 2);
  EXPECT_EQ(traffic.dense_element_bytes, 4);

  apply_override(config, "optimizer.wire=AS_COMPUTED");
  apply_override(config, "precision=F64");
  EXPECT_EQ(optimizer_options(config).bucket_elements, 65'536);
  EXPECT_EQ(replica_traffic(config).factor_element_bytes, 8);
  EXPECT_EQ(replica_traffic(config).dense_element_bytes, 8);
}

TEST(ParseRunConfig, PassesOptionsOfSpectraOn) {
  RunConfig config = valid_run();
  config.clear_profile();
  for (const char* assignment : {"optimizer.kind=SPECTRA", "optimizer.spectra_fraction=0.03",
                                 "optimizer.spectra_iterations=2", "optimizer.mu=0.9"})
    apply_override(config, assignment);
  validate(config, 4);
  const OptimizerOptions optimizer = optimizer_options(config);
  EXPECT_EQ(optimizer.kind, OptimizerKind::kSpectra);
  EXPECT_EQ(optimizer.spectra_fraction, 0.03);
  EXPECT_EQ(optimizer.spectra_iterations, 2);
  EXPECT_EQ(optimizer.mu, 0.9);
}

TEST(ParseRunConfig, PassesOptionsOfAcpSgdOn) {
  RunConfig config = valid_run();
  for (const char* assignment :
       {"optimizer.kind=ACPSGD", "optimizer.powersgd_momentum=0.5", "optimizer.wire=BF16"})
    apply_override(config, assignment);
  validate(config, 4);
  const OptimizerOptions optimizer = optimizer_options(config);
  EXPECT_EQ(optimizer.kind, OptimizerKind::kAcpSgd);
  EXPECT_EQ(optimizer.lambda, 0.5);
  EXPECT_EQ(optimizer.wire, FactorWire::kBF16);
}

TEST(ParseRunConfig, PassesOptionsOfGaloreOn) {
  RunConfig config = valid_run();
  for (const char* assignment : {"optimizer.kind=GALORE", "optimizer.galore_scale=0.5",
                                 "optimizer.galore_interval=50", "optimizer.wire=BF16"})
    apply_override(config, assignment);
  validate(config, 4);
  const OptimizerOptions optimizer = optimizer_options(config);
  EXPECT_EQ(optimizer.kind, OptimizerKind::kGalore);
  EXPECT_EQ(optimizer.galore_scale, 0.5);
  EXPECT_EQ(optimizer.galore_interval, 50);
  EXPECT_EQ(optimizer.wire, FactorWire::kBF16);
}

TEST(ParseRunConfig, PassesTheLevelOfDeterminismOn) {
  RunConfig config = valid_run();
  EXPECT_EQ(determinism(config), Determinism::kExact);
  apply_override(config, "determinism=PINNED");
  EXPECT_EQ(determinism(config), Determinism::kPinned);
  apply_override(config, "determinism=FAST");
  EXPECT_EQ(determinism(config), Determinism::kFast);
}

// The two sets of defaults are the same one.
TEST(ParseRunConfig, DefaultsOfTheOptimizerAreThoseOfItsOptions) {
  const OptimizerOptions written = optimizer_options(RunConfig()), own;
  EXPECT_EQ(written.kind, own.kind);
  EXPECT_EQ(written.mu, own.mu);
  EXPECT_EQ(written.lambda, own.lambda);
  EXPECT_EQ(written.spectra_fraction, own.spectra_fraction);
  EXPECT_EQ(written.spectra_iterations, own.spectra_iterations);
  EXPECT_EQ(written.galore_scale, own.galore_scale);
  EXPECT_EQ(written.galore_interval, own.galore_interval);
  EXPECT_EQ(written.exchange, own.exchange);
  EXPECT_EQ(written.wire, own.wire);
  EXPECT_EQ(written.overlap, own.overlap);
  EXPECT_EQ(written.bucket_elements, own.bucket_elements);
  EXPECT_EQ(written.residual, own.residual);
  EXPECT_EQ(written.weight_decay, own.weight_decay);
  EXPECT_EQ(written.adamw_beta1, own.adamw_beta1);
  EXPECT_EQ(written.adamw_beta2, own.adamw_beta2);
  EXPECT_EQ(written.adamw_epsilon, own.adamw_epsilon);
  EXPECT_EQ(written.clip_norm, own.clip_norm);
  EXPECT_EQ(written.clip_estimator, own.clip_estimator);
  EXPECT_EQ(written.seed, own.seed);
}

TEST(ParseRunConfig, FillsDefaultsThatDependOnOtherFields) {
  const RunConfig config = valid_run();
  const ModelConfig model = model_config(config);
  EXPECT_EQ(model.vocabulary, 256);
  EXPECT_EQ(model.kv_heads, 4);
  EXPECT_EQ(model.head_dim, 12);
  EXPECT_EQ(scalar_learning_rate(config), 0.01);
  EXPECT_EQ(sequences_per_micro_batch(config), 4);
  EXPECT_EQ(micro_batches_per_step(config), 1);
  EXPECT_EQ(config.collective_deadline_seconds(), 60);
}

struct BadText {
  const char* text;
  const char* error;
};

class Malformed : public testing::TestWithParam<BadText> {};

TEST_P(Malformed, NamesPlaceFieldFoundAndExpected) {
  EXPECT_EQ(error_of([] { parse_run_config(GetParam().text, "run.txtpb"); }), GetParam().error);
}

INSTANTIATE_TEST_SUITE_P(
    Texts, Malformed,
    testing::Values(
        BadText{"optimizer {\n  learning_rat: 1 }",
                "run.txtpb:2:15: optimizer.learning_rat: found an unknown field, expected for example "
                "optimizer.learning_rate"},
        BadText{"optimiser { }",
                "run.txtpb:1:11: optimiser: found an unknown field, expected for example optimizer"},
        BadText{"seed: 3 # { \"\noptimizer { kind: ADAMW\n   \t   \t   \tlearning_rate: fast }",
                "run.txtpb:3:40: optimizer.learning_rate: found fast, expected a number"},
        BadText{"model { width: 3.5 }",
                "run.txtpb:1:16: model.width: found 3.5, expected an integer of 64 bits"},
        BadText{"mesh { tensor: 3000000000 }",
                "run.txtpb:1:16: mesh.tensor: found 3000000000, expected an integer of 32 bits"},
        BadText{"seed: -1", "run.txtpb:1:7: seed: found -1, expected a non-negative integer of 64 bits"},
        BadText{"trace: maybe", "run.txtpb:1:13: trace: found maybe, expected true or false"},
        BadText{"optimizer { kind: ADAM }",
                "run.txtpb:1:24: optimizer.kind: found ADAM, expected one of DION, ADAMW, POWERSGD, SGD, "
                "LION, MUON, NORMUON, MUONBP, DION2, NORDION2, SPECGD, SPECTRA, ACPSGD, GALORE"},
        BadText{"name: run1", "run.txtpb:1:7: name: found run1, expected a string in quotes"},
        BadText{"data { train: [\"a\", 3] }",
                "run.txtpb:1:21: data.train: found [\"a\", expected a string in quotes"},
        BadText{"profile { match_to { rank: many } }",
                "run.txtpb:1:28: profile.match_to.rank: found many, expected an integer of 64 bits"},
        BadText{"model: 3", "run.txtpb:1:8: model: found 3, expected fields in braces"},
        BadText{"seed: 1 seed: 2",
                "run.txtpb:1:13: seed: Non-repeated field \"seed\" is specified multiple times."},
        BadText{"model { width: 8", "run.txtpb:1:17: model.width: Expected identifier, got: "}));

// Cut anywhere, with any byte changed to one that means something: a configuration or an InvalidArgument.
TEST(ParseRunConfig, SurvivesDamagedText) {
  const std::string whole = std::string(kValidRun) + "data { train: ['a', \"b\\\"\"] } # end\n";
  for (std::size_t i = 0; i < whole.size(); ++i) {
    std::vector<std::string> damaged{whole.substr(0, i), whole.substr(i)};
    for (const char c : std::string("{}[]:<>'\"#\\\t\n-,"))
      damaged.push_back(std::string(whole).replace(i, 1, 1, c));
    for (const std::string& text : damaged) {
      EXPECT_THAT(error_of([&] { parse_run_config(text, "run.txtpb"); }),
                  testing::AnyOf(testing::IsEmpty(), testing::StartsWith("run.txtpb:")));
    }
  }
}

TEST(LoadRunConfig, ReadsAFileAndNamesItInErrors) {
  const ScratchDirectory scratch;
  const std::string path = scratch.path() / "run.txtpb";
  std::ofstream(path) << kValidRun;
  EXPECT_EQ(load_run_config(path).SerializeAsString(), valid_run().SerializeAsString());
  std::ofstream(path) << "sead: 1";
  EXPECT_THAT(error_of([&] { load_run_config(path); }), testing::HasSubstr(path + ":1:5: sead: found"));
}

TEST(LoadRunConfig, SaysWhyAFileCannotBeRead) {
  try {
    load_run_config("/nonexistent/run.txtpb");
    FAIL();
  } catch (const IoError& error) {
    EXPECT_STREQ(error.what(), "/nonexistent/run.txtpb: cannot be read: No such file or directory");
  }
  EXPECT_THROW(load_run_config("/"), IoError);
}

TEST(ApplyOverride, SetsFieldsOfEveryType) {
  RunConfig config = valid_run();
  apply_override(config, "optimizer.learning_rate=2e-2");
  apply_override(config, "optimizer.residual=AGGREGATED");
  apply_override(config, "model.layers=7");
  apply_override(config, "trace=true");
  apply_override(config, "seed=9");
  apply_override(config, "name=a=b");
  apply_override(config, "data.train=x.bin,y_*.bin");
  apply_override(config, "profile={kind: STRUCTURAL match_to { rank: 24 }}");
  EXPECT_EQ(config.optimizer().learning_rate(), 0.02);
  EXPECT_EQ(config.optimizer().residual(), RunConfig::Optimizer::AGGREGATED);
  EXPECT_EQ(config.model().layers(), 7);
  EXPECT_TRUE(config.trace());
  EXPECT_EQ(config.seed(), 9u);
  EXPECT_EQ(config.name(), "a=b");
  EXPECT_THAT(config.data().train(), testing::ElementsAre("x.bin", "y_*.bin"));
  EXPECT_EQ(config.profile().kind(), RunConfig::Profile::STRUCTURAL);
  EXPECT_FALSE(config.profile().has_rank());  // the section was replaced, not merged
  EXPECT_EQ(config.profile().match_to().rank(), 24);
  apply_override(config, "profile=");
  EXPECT_FALSE(config.has_profile());
}

class BadOverride : public testing::TestWithParam<BadText> {};

TEST_P(BadOverride, NamesTheFieldAndChangesNothing) {
  RunConfig config = valid_run();
  EXPECT_EQ(error_of([&] { apply_override(config, GetParam().text); }), GetParam().error);
  EXPECT_EQ(config.SerializeAsString(), valid_run().SerializeAsString());
}

INSTANTIATE_TEST_SUITE_P(
    Overrides, BadOverride,
    testing::Values(
        BadText{"optimizer.learning_rate",
                "override: found optimizer.learning_rate, expected field=value, for example "
                "optimizer.learning_rate=0.02"},
        BadText{"learning_rate=1",
                "learning_rate: found an unknown field, expected for example optimizer.learning_rate"},
        BadText{"mesh.tensors=1", "mesh.tensors: found an unknown field, expected for example mesh.tensor"},
        BadText{"seed.x=1", "seed.x: found an unknown field, expected for example seed"},
        BadText{"data.train.x=1", "data.train.x: found an unknown field, expected for example data.train"},
        BadText{"optimizer.learning_rate=fast", "optimizer.learning_rate: found fast, expected a number"},
        BadText{"optimizer.learning_rate=1 } mesh { tensor: 2",
                "optimizer.learning_rate: found 1 } mesh { tensor: 2, expected a number"},
        BadText{"optimizer.kind=ADAM",
                "optimizer.kind: found ADAM, expected one of DION, ADAMW, POWERSGD, SGD, LION, MUON, "
                "NORMUON, MUONBP, DION2, NORDION2, SPECGD, SPECTRA, ACPSGD, GALORE"},
        BadText{"model.layers=2.5", "model.layers: found 2.5, expected an integer of 64 bits"},
        BadText{"model.layers=", "model.layers: found nothing, expected an integer of 64 bits"},
        BadText{"trace=maybe", "trace: found maybe, expected true or false"},
        BadText{"profile=structural", "profile: found structural, expected fields in braces"},
        BadText{"profile.ranks=4",
                "profile.ranks: found an override, expected the table in the configuration file"},
        BadText{"profile.ranks.value=4",
                "profile.ranks.value: found an override, expected the table in the configuration file"}));

TEST(ParseProfile, ReadsWhatACommandLineSays) {
  using Profile = RunConfig::Profile;
  EXPECT_EQ(parse_profile("uniform:620").rank(), 620);
  EXPECT_EQ(parse_profile("structural").kind(), Profile::STRUCTURAL);
  EXPECT_FALSE(parse_profile("structural").has_scale());
  EXPECT_EQ(parse_profile("inverted*0.125").kind(), Profile::INVERTED);
  EXPECT_EQ(parse_profile("inverted*0.125").scale(), 0.125);
  EXPECT_EQ(parse_profile("fraction:1/4").numerator(), 1);
  EXPECT_EQ(parse_profile("fraction:1/4").denominator(), 4);
  const Profile matched = parse_profile("structural@uniform:24");
  EXPECT_EQ(matched.kind(), Profile::STRUCTURAL);
  EXPECT_EQ(matched.match_to().rank(), 24);
  EXPECT_FALSE(parse_profile("uniform@structural").has_rank());
  EXPECT_EQ(parse_profile("fraction@structural").kind(), Profile::FRACTION);
}

TEST(ParseProfile, RefusesEverythingElse) {
  for (const char* text :
       {"", "uniform", "uniform:", "uniform:12x", "uniform:1.5", "uniform:620:3", "structural:3",
        "structural*", "structural*x", "fraction", "fraction:1", "fraction:1/", "fraction:/4", "explicit",
        "structural@", "@uniform:3", "Structural"}) {
    EXPECT_THAT(
        error_of([&] { parse_profile(text); }),
        testing::AllOf(testing::StartsWith("profile: found "), testing::HasSubstr("expected uniform:RANK")))
        << text;
  }
}

}  // namespace
}  // namespace lowband
