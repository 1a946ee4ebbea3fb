# As seen from model/.
set(cuda_sources
    cuda/attention.cu
    cuda/device_model.cc
    cuda/device_transformer.cc
    cuda/half_attention.cu
    cuda/layers.cu)
