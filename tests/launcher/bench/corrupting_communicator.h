#pragma once

#include "collectives/communicator.h"

#include <memory>
#include <string>

namespace lowband {

/// Passes everything on to another communicator. On process 1 it adds one to the first value that each
/// transfer of factors or dense tensors by `corrupted` delivers.
class CorruptingCommunicator final : public Communicator {
 public:
  /// Ownership: borrows `inner`.
  CorruptingCommunicator(Communicator& inner, Operation corrupted)
      : Communicator(inner.process(), inner.size(), inner.axis(), std::make_shared<Ledger>(),
                     inner.deadline()),
        inner_(inner),
        corrupted_(corrupted) {}

  std::string_view backend() const override { return "corrupting"; }

 private:
  template <class T>
  static std::span<T> values(void* data, Index elements) {
    return {static_cast<T*>(data), static_cast<std::size_t>(elements)};
  }
  template <class T>
  static std::span<const T> values(const void* data, Index elements) {
    return {static_cast<const T*>(data), static_cast<std::size_t>(elements)};
  }
  template <class T>
  void corrupt(const Call& call, std::span<T> delivered) const {
    const bool counted = call.purpose == Purpose::kFactor || call.purpose == Purpose::kDense;
    if (process() != 1 || call.operation != corrupted_ || !counted || delivered.empty()) return;
    if constexpr (std::is_same_v<T, BFloat16>) {
      delivered[0] = to_bfloat16(to_float(delivered[0]) + 1);
    } else {
      delivered[0] = static_cast<T>(delivered[0] + 1);
    }
  }
  /// Calls action(T{}) with the type of the call.
  template <class Action>
  static Index with_type(const Call& call, Action action) {
    switch (call.dtype) {
      case DType::kF32:
        action(float{});
        break;
      case DType::kF64:
        action(double{});
        break;
      case DType::kBF16:
        action(BFloat16{});
        break;
      case DType::kU8:
        action(std::uint8_t{});
        break;
      case DType::kI64:
        action(Index{});
        break;
    }
    return 0;
  }

  Index do_all_reduce(const Call& call, void* data) override {
    return with_type(call, [&]<class T>(T) {
      const std::span<T> all = values<T>(data, call.elements);
      inner_.all_reduce<T>(all, call.reduction, {call.purpose});
      corrupt(call, all);
    });
  }
  Index do_reduce_scatter(const Call& call, const void* send, void* receive,
                          std::span<const Index> counts) override {
    return with_type(call, [&]<class T>(T) {
      const auto own = values<SumOf<T>>(receive, counts[static_cast<std::size_t>(process())]);
      inner_.reduce_scatter<T>(values<T>(send, call.elements), own, counts, call.reduction, {call.purpose});
      corrupt(call, own);
    });
  }
  Index do_all_gather(const Call& call, const void* send, void* receive,
                      std::span<const Index> counts) override {
    return with_type(call, [&]<class T>(T) {
      const std::span<T> all = values<T>(receive, call.elements);
      inner_.all_gather<T>(values<T>(send, counts[static_cast<std::size_t>(process())]), all, counts,
                           {call.purpose});
      corrupt(call, all);
    });
  }
  Index do_all_to_all(const Call&, const void*, void*, std::span<const Index>) override {
    throw Error("all_to_all: not measured");
  }
  Index do_broadcast(const Call& call, void* data) override {
    return with_type(call, [&]<class T>(T) {
      inner_.broadcast<T>(values<T>(data, call.elements), call.root, {call.purpose});
    });
  }
  void do_barrier(const Call&) override { inner_.barrier(); }
  std::unique_ptr<Communicator> do_split(std::span<const int> members, std::string axis) override {
    return inner_.split(members.front(), 0, std::move(axis));
  }
  Determinism do_set_determinism(Determinism asked) override {
    inner_.set_determinism(asked);
    return inner_.determinism();
  }
  void do_abort(std::string_view reason) override { inner_.abort(reason); }

  Communicator& inner_;
  Operation corrupted_;
};

}  // namespace lowband
