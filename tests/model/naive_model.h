#pragma once

#include "model/transformer.h"

#include <cmath>
#include <map>
#include <string>
#include <vector>

namespace lowband::naive {

/// Weights of a whole model by Hugging Face name, row-major.
using Weights = std::map<std::string, std::vector<double>>;

/// The sum of token losses, written token by token from the formulas, without a line of the model's own code:
/// every query recomputes what it needs, nothing is fused, nothing is split.
class Model {
 public:
  Model(const ModelConfig& config, Weights weights) : c_(config), w_(std::move(weights)) {}

  double loss(const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& targets) const {
    double sum = 0;
    const auto length = static_cast<std::size_t>(c_.sequence);
    for (std::size_t first = 0; first < tokens.size(); first += length) {
      std::vector<Vector> stream;
      for (std::size_t t = 0; t < length; ++t) stream.push_back(embedding(tokens[first + t]));
      for (Index layer = 0; layer < c_.layers; ++layer) stream = decoder_layer(layer, stream);
      for (std::size_t t = 0; t < length; ++t) {
        const Vector x = normed(stream[t], "model.norm.weight");
        Vector logits = times(c_.tied_head ? "model.embed_tokens.weight" : "lm_head.weight", x);
        double z = 0;
        for (const double logit : logits) z += std::exp(logit);
        sum += std::log(z) - logits[static_cast<std::size_t>(targets[first + t])];
      }
    }
    return sum;
  }

 private:
  using Vector = std::vector<double>;

  Vector embedding(std::int32_t id) const {
    const Vector& table = w_.at("model.embed_tokens.weight");
    const auto begin = table.begin() + id * c_.width;
    return {begin, begin + c_.width};
  }

  Vector times(const std::string& name, const Vector& x) const {
    const Vector& w = w_.at(name);
    Vector y(w.size() / x.size());
    for (std::size_t i = 0; i < y.size(); ++i) {
      for (std::size_t j = 0; j < x.size(); ++j) y[i] += w[i * x.size() + j] * x[j];
    }
    return y;
  }

  Vector normed(const Vector& x, const std::string& gain) const {
    double mean = 0;
    for (const double value : x) mean += value * value / static_cast<double>(x.size());
    Vector y = w_.at(gain);
    for (std::size_t j = 0; j < x.size(); ++j) y[j] *= x[j] / std::sqrt(mean + c_.norm_epsilon);
    return y;
  }

  // One head of a projection of x, turned to `position`: element j pairs with j + head_dim / 2.
  Vector head(const Vector& all, Index which, Index position) const {
    const auto begin = all.begin() + which * c_.head_dim;
    Vector part(begin, begin + c_.head_dim);
    if (position < 0) return part;
    const auto half = static_cast<std::size_t>(c_.head_dim / 2);
    for (std::size_t j = 0; j < half; ++j) {
      const double angle =
          static_cast<double>(position) *
          std::pow(c_.rope_base, -2.0 * static_cast<double>(j) / static_cast<double>(c_.head_dim));
      const double a = part[j], b = part[j + half];
      part[j] = a * std::cos(angle) - b * std::sin(angle);
      part[j + half] = b * std::cos(angle) + a * std::sin(angle);
    }
    return part;
  }

  std::vector<Vector> decoder_layer(Index layer, const std::vector<Vector>& stream) const {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    std::vector<Vector> q, k, v, result;
    for (const Vector& x : stream) {
      const Vector y = normed(x, prefix + "input_layernorm.weight");
      q.push_back(times(prefix + "self_attn.q_proj.weight", y));
      k.push_back(times(prefix + "self_attn.k_proj.weight", y));
      v.push_back(times(prefix + "self_attn.v_proj.weight", y));
    }
    for (std::size_t t = 0; t < stream.size(); ++t) {
      Vector attended;
      for (Index h = 0; h < c_.heads; ++h) {
        const Index kv = h / (c_.heads / c_.kv_heads);
        const Vector query = head(q[t], h, static_cast<Index>(t));
        Vector mixed(static_cast<std::size_t>(c_.head_dim));
        double z = 0;
        for (std::size_t past = 0; past <= t; ++past) {
          const Vector key = head(k[past], kv, static_cast<Index>(past)), value = head(v[past], kv, -1);
          double score = 0;
          for (std::size_t j = 0; j < key.size(); ++j) score += query[j] * key[j];
          const double weight = std::exp(score / std::sqrt(static_cast<double>(c_.head_dim)));
          z += weight;
          for (std::size_t j = 0; j < mixed.size(); ++j) mixed[j] += weight * value[j];
        }
        for (const double value : mixed) attended.push_back(value / z);
      }
      Vector x = stream[t];
      add(x, times(prefix + "self_attn.o_proj.weight", attended));

      const Vector y = normed(x, prefix + "post_attention_layernorm.weight");
      Vector gate = times(prefix + "mlp.gate_proj.weight", y);
      const Vector up = times(prefix + "mlp.up_proj.weight", y);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      add(x, times(prefix + "mlp.down_proj.weight", gate));
      result.push_back(x);
    }
    return result;
  }

  static void add(Vector& x, const Vector& y) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }

  ModelConfig c_;
  Weights w_;
};

}  // namespace lowband::naive
