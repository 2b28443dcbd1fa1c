"""The compiled kernels: C++ on the CPU, CUDA on NVIDIA GPUs, under the same file names as the operations."""
