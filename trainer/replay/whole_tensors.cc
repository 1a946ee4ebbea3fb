#include "trainer/replay/whole_tensors.h"

#include "collectives/agreement.h"
#include "runtime/error.h"

#include <algorithm>
#include <optional>

namespace lowband {
namespace {

const RecordedParameter& parameter_named(std::span<const RecordedParameter> recorded, std::string_view name) {
  const auto found =
      std::ranges::find_if(recorded, [name](const RecordedParameter& p) { return p.info.name == name; });
  LB_EXPECTS(found != recorded.end(), "optimizer state: found one of ", name, ", expected a parameter");
  return *found;
}

/// Moments have the shape of their parameter, and factors their own. A number of updates is a list of one.
std::vector<Index> state_shape(const RecordedParameter& parameter, std::string_view letter,
                               const PiecePlace& place) {
  const ParameterInfo& info = parameter.info;
  if (letter == "t") return {1};
  if (place.rows == info.rows && place.cols == info.cols) return parameter.shape;
  return {place.rows, place.cols};
}

/// Process p of a replica: tensor fastest, as in the mesh.
MeshPosition position_within_replica(const ProcessMesh& mesh, int p) {
  return {.replica = mesh.position().replica,
          .shard = p / mesh.shape().tensor,
          .tensor = p % mesh.shape().tensor};
}

}  // namespace

RecordedParameter recorded_parameter(const ParameterInfo& info) {
  if (info.role == Role::kNorm) return {info, {info.cols}};
  return {info, {info.rows, info.cols}};
}

template <class Real>
std::vector<TensorPiece<Real>> weight_pieces(std::span<const RecordedParameter> recorded,
                                             std::span<const Parameter<Real>> parameters,
                                             const MeshShape& mesh) {
  std::vector<TensorPiece<Real>> pieces;
  for (std::size_t i = 0; i < recorded.size(); ++i) {
    const ParameterInfo& info = recorded[i].info;
    pieces.push_back({.name = info.name,
                      .shape = recorded[i].shape,
                      .place = [info, mesh](const MeshPosition& p) { return parameter_place(info, mesh, p); },
                      .elements = parameters[i].weight.flat()});
  }
  return pieces;
}

template <class Real>
std::vector<TensorPiece<Real>> state_pieces(std::span<const RecordedParameter> recorded,
                                            const std::vector<StateTensor<Real>>& state,
                                            const MeshShape& mesh) {
  std::vector<TensorPiece<Real>> pieces;
  for (const StateTensor<Real>& tensor : state) {
    const std::size_t dot = tensor.name.rfind('.');
    const RecordedParameter& parameter = parameter_named(recorded, tensor.name.substr(0, dot));
    const std::string letter = tensor.name.substr(dot + 1);
    const auto place = [info = parameter.info, letter, cols = tensor.value.cols,
                        mesh](const MeshPosition& p) { return state_place(info, letter, cols, mesh, p); };
    pieces.push_back({.name = tensor.name,
                      .shape = state_shape(parameter, letter, place({})),
                      .place = place,
                      .elements = tensor.value.flat()});
  }
  return pieces;
}

template <class Real>
void expect_tensors(const SafetensorsFile& file, std::span<const TensorPiece<Real>> pieces) {
  for (const TensorPiece<Real>& piece : pieces) file.expect(piece.name, piece.shape);
  for (const StoredTensor& tensor : file.tensors())
    LB_EXPECTS(std::ranges::find(pieces, tensor.name, &TensorPiece<Real>::name) != pieces.end(), file.path(),
               ": found the tensor ", tensor.name, " ", shape_text(tensor.shape), ", expected only the ",
               pieces.size(), " from ", pieces.front().name, " to ", pieces.back().name);
}

template <class Real>
void read_pieces(const SafetensorsFile& file, std::span<const TensorPiece<Real>> pieces,
                 const MeshPosition& position) {
  std::vector<Real> whole;
  for (const TensorPiece<Real>& piece : pieces) {
    const StoredTensor& tensor = file.expect(piece.name, piece.shape);
    whole.resize(static_cast<std::size_t>(tensor.elements()));
    file.read<Real>(tensor, 0, whole);
    take_piece<Real>(piece.place(position), whole, piece.elements);
  }
}

template <class Real>
std::vector<Real> gather_whole(ProcessMesh& mesh, const TensorPiece<Real>& piece) {
  Communicator& replica = mesh.within_replica();
  std::vector<PiecePlace> places;
  std::vector<Index> counts;
  Index received = 0;
  for (int p = 0; p < replica.size(); ++p) {
    places.push_back(piece.place(position_within_replica(mesh, p)));
    counts.push_back(places.back().elements.size());
    received += counts.back();
  }
  std::vector<Real> pieces(static_cast<std::size_t>(received));
  replica.all_gather<Real>(piece.elements, pieces, counts, {Purpose::kPeriodic});
  std::vector<Real> whole(static_cast<std::size_t>(places[0].rows * places[0].cols));
  std::span<const Real> rest = pieces;
  for (std::size_t p = 0; p < places.size(); ++p) {
    put_piece<Real>(places[p], rest, whole);  // equal bits where several processes hold the same
    rest = rest.subspan(static_cast<std::size_t>(counts[p]));
  }
  return whole;
}

template <class Real>
void write_whole_tensors(ProcessMesh& mesh, const std::filesystem::path& file,
                         std::span<const TensorPiece<Real>> pieces,
                         const std::function<void(std::size_t)>& begin) {
  Communicator& world = mesh.world();
  std::optional<SafetensorsWriter<Real>> writer;
  agree(world, [&] {
    if (file.empty() || mesh.within_replica().process() != 0) return;
    std::vector<typename SafetensorsWriter<Real>::Entry> entries;
    for (const TensorPiece<Real>& piece : pieces) entries.push_back({piece.name, piece.shape});
    writer.emplace(file, entries);
  });
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (begin) begin(i);
    const std::vector<Real> whole = gather_whole(mesh, pieces[i]);
    agree(world, [&] {
      if (writer) writer->append(whole);
    });
  }
  agree(world, [&] {
    if (writer) writer->commit();
  });
}

template std::vector<TensorPiece<float>> weight_pieces(std::span<const RecordedParameter>,
                                                       std::span<const Parameter<float>>, const MeshShape&);
template std::vector<TensorPiece<float>> state_pieces(std::span<const RecordedParameter>,
                                                      const std::vector<StateTensor<float>>&,
                                                      const MeshShape&);
template void expect_tensors(const SafetensorsFile&, std::span<const TensorPiece<float>>);
template void read_pieces(const SafetensorsFile&, std::span<const TensorPiece<float>>, const MeshPosition&);
template std::vector<float> gather_whole(ProcessMesh&, const TensorPiece<float>&);
template void write_whole_tensors(ProcessMesh&, const std::filesystem::path&,
                                  std::span<const TensorPiece<float>>,
                                  const std::function<void(std::size_t)>&);
template std::vector<TensorPiece<double>> weight_pieces(std::span<const RecordedParameter>,
                                                        std::span<const Parameter<double>>, const MeshShape&);
template std::vector<TensorPiece<double>> state_pieces(std::span<const RecordedParameter>,
                                                       const std::vector<StateTensor<double>>&,
                                                       const MeshShape&);
template void expect_tensors(const SafetensorsFile&, std::span<const TensorPiece<double>>);
template void read_pieces(const SafetensorsFile&, std::span<const TensorPiece<double>>, const MeshPosition&);
template std::vector<double> gather_whole(ProcessMesh&, const TensorPiece<double>&);
template void write_whole_tensors(ProcessMesh&, const std::filesystem::path&,
                                  std::span<const TensorPiece<double>>,
                                  const std::function<void(std::size_t)>&);

}  // namespace lowband
