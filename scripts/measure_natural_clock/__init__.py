"""MoE kernels timed at the clocks that an NVIDIA GPU takes by itself; sets nothing on it."""
