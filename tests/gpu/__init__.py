"""What runs on a machine with one GPU, torch and cupy, without vLLM and Ray: `make test-gpu`.

The same tests run without a GPU too, in `make test`: with the caches in torch's CPU tensors, copied
by kvray's threads, and by kvray's CUDA code on a driver whose device is the host (host_cuda.c).
"""
