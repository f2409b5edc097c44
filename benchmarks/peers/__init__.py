"""What the kernels are measured against, each in a fresh process: `python -m benchmarks.peers.run --help`."""

PEERS = {
    "eager-cast": "eager PyTorch as the official code does it: float32 weights, cast at every call",
    "eager-precast": "eager PyTorch with the weights cast once",
    "compile": "torch.compile, default mode",
    "compile-autotune": "torch.compile, max-autotune, with inductor's freezing (prepacked weights)",
    "torchdeq": "torchdeq's fixed_point_iter around the eager module",
    "official": "the official repository's own code, where EQR_OFFICIAL_REPO names a clone of it",
}
GPU_PEERS = {
    "eager-precast": PEERS["eager-precast"],
    "compile": PEERS["compile"],
    "cudagraph": "eager PyTorch in a CUDA graph of one outer step",
    "compile-cudagraph": "torch.compile in a CUDA graph of one outer step",
}
"""What the GPU kernels are measured against: `python -m benchmarks.gpu_check`."""
OURS = {
    "cuda": "eqr_kernels, backend='cuda'",
    "triton": "eqr_kernels, backend='triton'",
    "cpu": "eqr_kernels, backend='cpu'",
    "reference": "eqr_kernels, backend='reference'",
}
BASELINE = "eager-cast"
"""The one that speeds are stated against."""
