// What launching kernels takes on the host: errors in words, torch's stream, the choice of path.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

namespace kore_fast {

constexpr int kAlignment = 1024;  // bytes that Device::shared() may skip

inline std::string shape(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ")";
  return text.str();
}

// An operation, whose name stands before its errors.
struct Call {
  const char* name;

  template <class... Words>
  [[noreturn]] void fail(const Words&... words) const {
    std::ostringstream message;
    message << name << " (CUDA): ";
    (message << ... << words);
    throw std::runtime_error(message.str());
  }

  void check(cudaError_t error, const char* what) const {
    if (error != cudaSuccess) fail(what, ": ", cudaGetErrorString(error));
  }

  // torch's current stream. libtorch_cuda is looked up, not linked, so that one build serves every torch with CUDA.
  cudaStream_t current_stream(int device) const {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      void* symbol = dlsym(library == nullptr ? RTLD_DEFAULT : library, "aoti_torch_get_current_cuda_stream");
      return reinterpret_cast<Get>(symbol);
    }();
    if (get == nullptr)
      fail("torch's libtorch_cuda.so is not loaded or lacks aoti_torch_get_current_cuda_stream; "
           "install a torch (2.11 or later) built for CUDA");
    void* stream = nullptr;
    if (get(device, &stream) != 0) fail("torch gave no current stream for device ", device);
    return static_cast<cudaStream_t>(stream);
  }

  int attribute(cudaDeviceAttr which, int device) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  }

  // Whether Hopper's path runs: its kernel must have come as sm_90a machine code, not from older PTX.
  template <class Kernel>
  bool use_sm90(int device, Kernel kernel) const {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    if (major < 8) fail("needs compute capability 8.0 or higher, device ", device, " has ", major, ".", minor);
    const char* forced = std::getenv("KORE_FAST_CUDA_PATH");
    const std::string path = forced == nullptr ? "" : forced;
    if (!path.empty() && path != "sm80" && path != "sm90")
      fail("KORE_FAST_CUDA_PATH is '", path, "'; want sm80, sm90, or unset");
    if (path == "sm80") return false;
    bool can = major == 9 && minor == 0;
    if (can) {
      cudaFuncAttributes attributes{};
      check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
      can = attributes.ptxVersion >= 90;
    }
    if (path == "sm90" && !can)
      fail("KORE_FAST_CUDA_PATH=sm90 needs compute capability 9.0 and a build for sm_90a; device ", device, " has ",
           major, ".", minor);
    return can;
  }
};

}  // namespace kore_fast
