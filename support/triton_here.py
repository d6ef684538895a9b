"""Whether Triton is here, and where kernels written in it run."""

try:
    import triton

    AVAILABLE = True  # whether Triton is installed
except ImportError:
    AVAILABLE = False

INTERPRETED = False  # whether TRITON_INTERPRET=1 was set on import, so that kernels run on a CPU

if AVAILABLE:

    @triton.jit
    def nothing():
        pass

    INTERPRETED = not isinstance(nothing, triton.JITFunction)


def uses_triton(x):
    """Whether kernels run on this tensor; their PyTorch twins do elsewhere."""
    return AVAILABLE and (x.is_cuda or INTERPRETED)


def obstacle_to_training(device):
    """Why no run on this device trains with kernels of our own; None where nothing keeps it from that."""
    if device.type != "cuda":
        return "the kernels are for CUDA"
    return None if AVAILABLE else "Triton is not installed"
