#pragma once

#include "optimizers/optimizer.h"
#include "optimizers/state_place.h"
#include "trainer/data/safetensors.h"

#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace lowband {

/// A parameter as it stands in a file: a norm gain has one dimension there.
struct RecordedParameter {
  ParameterInfo info;
  std::vector<Index> shape;
};
/// Norm gains have one dimension, everything else rows and columns.
RecordedParameter recorded_parameter(const ParameterInfo& info);

/// What this process holds of a tensor in a file.
template <class Real>
struct TensorPiece {
  std::string name;
  std::vector<Index> shape;  // of the whole
  std::function<PiecePlace(const MeshPosition&)> place;
  std::span<Real> elements;
};

/// The tensor-axis pieces of weights, or of gradients. Pieces have the names and the order of `recorded`.
template <class Real>
std::vector<TensorPiece<Real>> weight_pieces(std::span<const RecordedParameter> recorded,
                                             std::span<const Parameter<Real>> parameters,
                                             const MeshShape& mesh);
/// The state of an optimizer of these parameters. Throws: InvalidArgument for a letter without a known place.
template <class Real>
std::vector<TensorPiece<Real>> state_pieces(std::span<const RecordedParameter> recorded,
                                            const std::vector<StateTensor<Real>>& state,
                                            const MeshShape& mesh);

/// Throws: InvalidArgument unless the file has exactly these tensors, in these shapes.
template <class Real>
void expect_tensors(const SafetensorsFile& file, std::span<const TensorPiece<Real>> pieces);
/// Fills the pieces of the process at `position`. Requires expect_tensors.
template <class Real>
void read_pieces(const SafetensorsFile& file, std::span<const TensorPiece<Real>> pieces,
                 const MeshPosition& position);

/// The whole of a tensor, put together from the pieces of the processes of one replica.
/// Collective: all processes of each replica; equal places.
template <class Real>
std::vector<Real> gather_whole(ProcessMesh& mesh, const TensorPiece<Real>& piece);

/// Writes whole tensors: the first process of every replica that names a file writes it. `begin(i)` is called
/// on all processes before tensor i is gathered, and may communicate.
///
/// Collective: all processes of the mesh, the same tensors. Throws: AgreedFailure when a file cannot be
/// written.
template <class Real>
void write_whole_tensors(ProcessMesh& mesh, const std::filesystem::path& file,
                         std::span<const TensorPiece<Real>> pieces,
                         const std::function<void(std::size_t)>& begin = {});

}  // namespace lowband
