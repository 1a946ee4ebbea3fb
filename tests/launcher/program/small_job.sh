# For the shell tests of the program: a scratch folder, a small corpus and a small configuration.
# Sourced; expects $lowband.

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

# Text-like bytes without a corpus: words of a small vocabulary in a fixed pseudo-random order.
awk 'BEGIN { srand(3); split("the rank of a matrix is low when few directions carry it and bytes move slowly", w, " ");
             for (i = 0; i < 12000; i++) printf "%s%s", w[int(rand() * 15) + 1], (i % 12 == 11) ? "\n" : " " }' >corpus.txt
"$lowband" data prepare --out data corpus.txt >/dev/null

cat >run.txtpb <<'CONFIG'
model { width: 32 layers: 2 heads: 4 ffn_width: 48 sequence: 32 }
mesh { replica: 2 tensor: 2 }
data { train: "data/train.bin" validation: "data/val.bin" }
batch { sequences_per_step: 8 }
optimizer { learning_rate: 0.01 scalar_learning_rate: 0.005 }
profile { kind: UNIFORM rank: 4 }
schedule { steps: 30 }
validation { sequences: 8 }
output_dir: "runs"
CONFIG

failures=0
fail() {
  echo "FAILED: $*"
  failures=$((failures + 1))
}
finish() {
  ((failures == 0)) || exit 1
  echo "$0: passed"
}
