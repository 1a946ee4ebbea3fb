// A data-parallel trainer of one's own with lowband in it: a network of two layers learns what another one
// computes. Every process sees other data; lowband exchanges rank-2 factors of the two weight matrices and
// the bias, and updates the weights.
//
//     cmake -S plugin/example -B build/example -DCMAKE_PREFIX_PATH=<where lowband is installed>
//     cmake --build build/example
//     for RANK in 0 1; do
//       RANK=$RANK WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500 build/example/trainer &
//     done; wait

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include <lowband/lowband.hpp>

namespace {

constexpr int kInputs = 16, kHidden = 32, kOutputs = 8, kBatch = 64, kSteps = 200;

struct Network {
  std::vector<float> w1 = std::vector<float>(kHidden * kInputs);   // (hidden, inputs)
  std::vector<float> b1 = std::vector<float>(kHidden);             // (hidden)
  std::vector<float> w2 = std::vector<float>(kOutputs * kHidden);  // (outputs, hidden)
};

Network random_network(unsigned seed) {
  Network network;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (float& w : network.w1) w = normal(random) / std::sqrt(float(kInputs));
  for (float& w : network.w2) w = normal(random) / std::sqrt(float(kHidden));
  return network;
}

// hidden <- tanh(w1 x + b1); output <- w2 hidden
void forward(const Network& network, const float* x, float* hidden, float* output) {
  for (int h = 0; h < kHidden; ++h) {
    float sum = network.b1[h];
    for (int i = 0; i < kInputs; ++i) sum += network.w1[h * kInputs + i] * x[i];
    hidden[h] = std::tanh(sum);
  }
  for (int o = 0; o < kOutputs; ++o) {
    float sum = 0;
    for (int h = 0; h < kHidden; ++h) sum += network.w2[o * kHidden + h] * hidden[h];
    output[o] = sum;
  }
}

// Mean squared error of a batch that depends on (process, step); its gradients.
double loss_and_gradients(const Network& student, const Network& teacher, int process, int step,
                          Network& to) {
  for (std::vector<float>* part : {&to.w1, &to.b1, &to.w2}) std::fill(part->begin(), part->end(), 0.0F);
  std::mt19937 random(1000003u * unsigned(step) + unsigned(process));
  std::normal_distribution<float> normal;
  double loss = 0;
  for (int sample = 0; sample < kBatch; ++sample) {
    float x[kInputs], hidden[kHidden], output[kOutputs], wanted[kOutputs], unused[kHidden];
    for (float& value : x) value = normal(random);
    forward(teacher, x, unused, wanted);
    forward(student, x, hidden, output);
    for (int o = 0; o < kOutputs; ++o) {
      const float error = output[o] - wanted[o];
      loss += double(error) * error / kBatch;
      output[o] = 2 * error / kBatch;
    }
    for (int h = 0; h < kHidden; ++h) {
      float d_hidden = 0;
      for (int o = 0; o < kOutputs; ++o) {
        to.w2[o * kHidden + h] += output[o] * hidden[h];
        d_hidden += output[o] * student.w2[o * kHidden + h];
      }
      const float d_sum = d_hidden * (1 - hidden[h] * hidden[h]);
      to.b1[h] += d_sum;
      for (int i = 0; i < kInputs; ++i) to.w1[h * kInputs + i] += d_sum * x[i];
    }
  }
  return loss;
}

void train(lowband::World& world) {
  const Network teacher = random_network(1);
  Network student = random_network(2);  // equal on all processes
  Network gradient;

  auto options = lowband::defaults(lowband_options_defaults);
  options.uniform_rank = 2;
  options.clip_norm = 0;
  options.weight_decay = 0;
  const auto described = [](const char* name, lowband_role role, int rows, int cols, auto& weight,
                            auto& gradient) {
    lowband_parameter parameter{};
    parameter.name = name;
    parameter.role = role;
    parameter.rows = rows;
    parameter.cols = cols;
    parameter.weight = weight.data();
    parameter.gradient = gradient.data();
    return parameter;
  };
  lowband::Optimizer optimizer(world,
                               {described("w1", LOWBAND_MATRIX, kHidden, kInputs, student.w1, gradient.w1),
                                described("b1", LOWBAND_NORM, 1, kHidden, student.b1, gradient.b1),
                                described("w2", LOWBAND_MATRIX, kOutputs, kHidden, student.w2, gradient.w2)},
                               options);

  for (int step = 0; step < kSteps; ++step) {
    const double loss = loss_and_gradients(student, teacher, world.process(), step, gradient);
    const double rate = 0.06 * (1 - double(step) / kSteps);
    optimizer.step(step, rate, rate);
    if (world.process() == 0 && (step % 50 == 0 || step == kSteps - 1)) {
      const auto factors = optimizer.step_bytes("replica", LOWBAND_FACTOR);
      std::printf("step %3d  loss %.4f  %lld bytes of factors instead of %zu\n", step, loss,
                  static_cast<long long>(factors.payload_bytes),
                  sizeof(float) * (student.w1.size() + student.w2.size()));
    }
  }
  double checksum = 0;
  for (const float w : student.w1) checksum += w;
  for (const float w : student.w2) checksum += w;
  std::printf("process %d of %d ends with weights that sum to %.9g\n", world.process(), world.processes(),
              checksum);
}

}  // namespace

int main() {
  try {
    lowband::World world = lowband::World::from_environment();
    train(world);
  } catch (const lowband::CallFailed& error) {
    std::fprintf(stderr, "trainer: %s\n", error.what());
    return 1;
  }
}
