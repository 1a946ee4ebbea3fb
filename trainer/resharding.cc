#include "trainer/resharding.h"

#include <cstring>
#include <numeric>
#include <utility>

namespace lowband {

ReshardedFiles::ReshardedFiles(const MeshShape& mesh, std::vector<std::unique_ptr<TensorFile>> files,
                               TensorPlaces places)
    : mesh_(mesh), files_(std::move(files)), places_(std::move(places)) {}

std::vector<int> ReshardedFiles::sources(const NamedTensor& tensor, const MeshShape& to,
                                         const MeshPosition& position) const {
  if (!places_.differs_between_replicas(tensor)) return {0};
  if (mesh_.replica == to.replica) return {position.replica};
  std::vector<int> all(static_cast<std::size_t>(mesh_.replica));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

template <class Visit>
void ReshardedFiles::for_each_piece(Index i, const NamedTensor& tensor, int replica, Visit visit) const {
  const int processes = mesh_.shard * mesh_.tensor;
  for (int process = replica * processes; process < (replica + 1) * processes; ++process) {
    const PiecePlace place = places_.place(tensor, mesh_, mesh_position(mesh_, process));
    visit(place, files_[static_cast<std::size_t>(process)]->expect(i, tensor.name, tensor.dtype,
                                                                   place.elements.size()));
  }
}

void ReshardedFiles::check(std::span<const NamedTensor> tensors, const MeshShape& to,
                           const MeshPosition& position) const {
  for (const auto& file : files_) file->expect_count(std::ssize(tensors));
  for (Index i = 0; i < std::ssize(tensors); ++i) {
    const NamedTensor& tensor = tensors[static_cast<std::size_t>(i)];
    for (const int replica : sources(tensor, to, position))
      for_each_piece(i, tensor, replica, [](auto&&...) {});
  }
}

template <class Real>
void ReshardedFiles::fill(Index i, const NamedTensor& tensor, const MeshShape& to,
                          const MeshPosition& position) const {
  const PiecePlace own = places_.place(tensor, to, position);
  const std::vector<int> replicas = sources(tensor, to, position);
  const auto elements = static_cast<std::size_t>(own.rows * own.cols);
  std::vector<Real> mean(elements), whole(elements), piece;
  for (const int replica : replicas) {
    for_each_piece(i, tensor, replica, [&](const PiecePlace& place, std::span<const std::byte> bytes) {
      piece.resize(bytes.size() / sizeof(Real));
      if (!bytes.empty()) std::memcpy(piece.data(), bytes.data(), bytes.size());
      put_piece<Real>(place, piece, whole);
    });
    for (std::size_t k = 0; k < elements; ++k) mean[k] += whole[k];
  }
  if (replicas.size() > 1) {
    for (Real& x : mean) x /= static_cast<Real>(replicas.size());
  }
  take_piece<Real>(own, mean,
                   {reinterpret_cast<Real*>(tensor.data), static_cast<std::size_t>(own.elements.size())});
}

void ReshardedFiles::copy_to(std::span<const NamedTensor> tensors, const MeshShape& to,
                             const MeshPosition& position) const {
  for (Index i = 0; i < std::ssize(tensors); ++i) {
    const NamedTensor& tensor = tensors[static_cast<std::size_t>(i)];
    tensor.dtype == DType::kF64 ? fill<double>(i, tensor, to, position)
                                : fill<float>(i, tensor, to, position);
  }
}

}  // namespace lowband
