# As seen from runtime/.
set(cuda_sources
    cuda/blas.cc
    cuda/device.cc
    cuda/kernels.cu
    cuda/matrix_sign.cc
    cuda/numbers.cu
    cuda/orthonormalise.cu
    cuda/passes.cu
    cuda/stream.cc
    cuda/stream_device.cc)
