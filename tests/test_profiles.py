"""speed/profiles.py: each kernel is counted once, in the right class."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import profile, record_function

from speed import profiles


def event(key, us, count=1, device=DeviceType.CUDA, is_annotation=False):
    on_device = device != DeviceType.CPU
    return SimpleNamespace(
        key=key,
        count=count,
        device_type=device,
        is_user_annotation=is_annotation,
        self_device_time_total=us,  # operations have it as well: the time of their kernels
        self_cpu_time_total=0 if on_device else 5,
    )


ON_CUDA = [
    event("aten::mm", 3000, 75, DeviceType.CPU),
    event("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", 3000, 75),
    event("aten::_scaled_dot_product_cudnn_attention", 800, 6, DeviceType.CPU),
    event("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", 800, 6),
    event("Torch-Compiled Region: 0/0", 4200, 1, DeviceType.CPU, is_annotation=True),
    event("Torch-Compiled Region: 0/0", 4200, 1, is_annotation=True),
    event("triton_poi_fused__scaled_dot_product_cudnn_attention_gelu_12", 200, 10),
    event("Memcpy DtoD (Device -> Device)", 100, 2),
    event("cudaLaunchKernel", 0, 95, DeviceType.CPU),
]


def test_operations_and_annotations_are_not_counted_beside_their_kernels():
    rows = profiles.rows_of(ON_CUDA, on_device=True, repeats=2)
    assert sum(row.ms for row in rows) == pytest.approx(4.1 / 2) and sum(row.launches for row in rows) == 93 / 2
    assert [row.ms for row in rows] == sorted((row.ms for row in rows), reverse=True)


def test_classes_hold_all_kernels_once():
    rows = profiles.by_class(profiles.rows_of(ON_CUDA, on_device=True))
    assert rows == [
        ("matrix products", 3.0, 75),
        ("attention", 0.8, 6),
        ("norm, dropout, elementwise (Triton)", 0.2, 10),
        ("copies", 0.1, 2),
    ]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<GroupProblemShape>>", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("triton_tem_fused_mm_3", "matrix products"),
        ("up_kernel", "matrix products"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>", "attention"),
        ("triton_red_fused__scaled_dot_product_flash_attention_backward_4", "norm, dropout, elementwise (Triton)"),
        ("triton_poi_fused__to_copy_mm_t_7", "norm, dropout, elementwise (Triton)"),
        ("at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimiser, clipping, totals"),
        ("at::native::multi_tensor_apply_kernel<LpNormFunctor<float, 2>>", "optimiser, clipping, totals"),
        ("Memset (Device)", "copies"),
        ("at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "elementwise (eager)"),
        ("at::native::vectorized_layer_norm_kernel<float>", "elementwise (eager)"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<short>", "other"),
    ],
)
def test_class_of_a_kernel(name, kind):
    assert profiles.class_of(name) == kind


def test_operations_of_a_cpu_profile_are_counted_once():
    """With the time outside of the operations that they call, so that the sum is the time of them all."""
    x = torch.ones(200, 200)
    with profile() as profiler:
        with record_function("annotated"):
            x @ x
    rows = profiles.rows_of(profiler.key_averages(), on_device=False)
    assert {"aten::mm", "aten::matmul"} <= {row.name for row in rows}
    whole = next(event for event in profiler.events() if event.name == "annotated").cpu_time_total / 1000
    assert sum(row.ms for row in rows) == pytest.approx(whole, rel=0.01)


def test_a_table_has_shares_launches_and_ms():
    lines = list(profiles.table_lines("Dense, train", profiles.rows_of(ON_CUDA, True), True))
    assert lines[0] == "Dense, train: 4.10 ms in 93 kernels"
    assert lines[1].split() == ["73.2%", "3.000", "ms", "75", "×", "matrix", "products"]
    assert any("nvjet" in line for line in lines[6:]) and len(lines) == 1 + 4 + 1 + 4
