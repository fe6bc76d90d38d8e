"""breakdown.py: labels of what a step launches, and the table of a small run."""

import json
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import bench
from helpers import flag_args
from nanofp8 import epilogues, fused, loss
from nanofp8.breakdown import AUTOGRAD, PREFIX, Labels, collect, gpu_rows, gpu_use, short_name
from nanofp8.config import UserError
from nanofp8.fused import Fp8


def profiled(work):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return profile


def test_labels_of_matmuls_and_their_flops():
    labels, one = Labels(), torch.ones(1)
    a, b = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(4, 8, dtype=torch.bfloat16)
    fp8 = [Fp8(x.to(dtype), one) for x, dtype in ((a, torch.float8_e5m2), (b, torch.float8_e4m3fn))]
    before = fused.matmul
    with labels.applied():
        assert loss.matmul is fused.matmul is not before
        fused.matmul(a, b)
        fused.matmul(*fp8)
        loss.matmul(*fp8, out=torch.zeros(6, 4))
    assert loss.matmul is fused.matmul is before
    assert labels.flops == {f"matmul 6 x 4, sums of 8, {name}": 2 * 6 * 4 * 8
                            for name in ("bf16", "E5M2 x E4M3", "E5M2 x E4M3, added to fp32")}


def test_labels_of_matmuls_by_quack(monkeypatch):
    """The MLP's in bf16."""
    labels, kernel = Labels(), SimpleNamespace(gemm=lambda *_, **__: None)
    quack = SimpleNamespace(relu2_bf16=kernel, relu2_backward_bf16=kernel)
    monkeypatch.setattr(epilogues, "library", lambda: (quack, ""))
    x, weight, grad = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((6, 8), (32, 8), (6, 8)))
    with labels.applied():
        activation = epilogues.relu2_matmul(x, weight, None)
        epilogues.relu2_backward_matmul(grad, weight, activation, None)
    assert labels.flops == {label: 2 * 6 * 32 * 8 for label in (
        "fc1 with relu^2 (QuACK)", "fc2's input gradient with relu^2's (QuACK)")}


def test_a_label_within_another_does_not_count_twice():
    labels, x = Labels(), torch.randn(300, 300)
    inner = labels.named(lambda: x @ x, "inner")
    outer = labels.named(lambda: (inner(), inner()), "outer")
    profile = profiled(lambda: (outer(), inner(), x.exp()))
    found = collect(profile, False, {"inner": 2 * 300 ** 3})
    rows = {row["label"]: row for row in found["rows"]}
    assert set(rows) == {"inner", "outer", "everything else"} and rows["inner"]["calls"] == rows["outer"]["calls"] == 1
    assert rows["inner"]["flops"] == 2 * 300 ** 3 and rows["outer"]["flops"] == 0
    assert found["rows"] == sorted(found["rows"], key=lambda row: -row["ms"])
    assert not any(key.startswith(PREFIX) for key in rows)


def event(name, start, end, thread=1, id=0, linked=0, device=DeviceType.CPU, annotation=False):
    """One of the profiler's raw events, in ms."""
    values = dict(name=name, start_ns=start * 10**6, end_ns=end * 10**6, duration_ns=(end - start) * 10**6,
                  device_resource_id=thread, correlation_id=id, linked_correlation_id=linked, device_type=device,
                  start_thread_id=99, is_user_annotation=annotation)
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def kernel(name, ms, id, linked=0):
    """A kernel on stream 7, long after its launch."""
    return event(name, 1000, 1000 + ms, thread=7, id=id, linked=linked, device=DeviceType.CUDA)


def gpu_times(events):
    return {row["label"]: (row["calls"], row["ms"]) for row in gpu_rows(events)}


def test_kernels_count_for_the_label_that_launched_them():
    found = gpu_times([
        # The main thread waits in `outer` while thread 2 runs the backward pass
        event(PREFIX + "outer", 10, 50), event(PREFIX + "inner", 20, 30), event(PREFIX + "outer", 60, 70),
        event(AUTOGRAD + "FlashAttention4Backward", 10, 20, thread=2), event(PREFIX + "backward", 30, 40, thread=2),
        event(AUTOGRAD + "AddBackward0", 40, 50, thread=2), event(PREFIX + "no kernels", 80, 90),
        event("cudaLaunchKernel", 5, 6, id=1), kernel("other", 1, 1),
        event("cuLaunchKernelEx", 15, 16, id=2), kernel("triton", 2, 2),
        event("cudaLaunchKernelExC", 25, 26, id=3), kernel("cublas", 4, 3),
        event("cudaMemcpyAsync", 35, 36, id=4), kernel("Memcpy DtoD (Device -> Device)", 8, 4),
        event("cudaGraphLaunch", 65, 66, id=5), kernel("first", 16, 5), kernel("second", 32, 5),
        event("cuLaunchKernel", 15, 16, thread=2, id=6), kernel("attention", 64, 6),
        event("cudaLaunchKernel", 35, 36, thread=2, id=7), kernel("other", 128, 7),
        event("cudaLaunchKernel", 45, 46, thread=2, id=8), kernel("other", 256, 8),
        event("cudaLaunchKernel", 35, 36, thread=3, id=9), kernel("other", 512, 9),
        # Operators' ids are another numbering: these three have those of launches
        event("aten::mm", 25, 26, id=1), event("aten::mm", 5, 6, id=2), event("aten::copy_", 25, 26, id=8),
        # The profiler has no call with the id of this kernel, but an operator that it belongs to
        event("aten::add", 61, 62, id=77), kernel("cooperative", 1024, 50, linked=77), kernel("other", 2048, 51),
        event(PREFIX + "outer", 1000, 9000, thread=7, id=3, device=DeviceType.CUDA, annotation=True),
        event("[memory]", 15, 15),
    ])
    assert found == {
        "outer": (2, 2 + 8 + 16 + 32 + 1024), "inner": (1, 4), "attention, backward": (1, 64), "backward": (1, 128),
        "no kernels": (1, 0), "other: other": (4, 1 + 256 + 512 + 2048), "everything else": (None, 0),
    }


def test_what_the_gpu_does_from_the_first_kernel_to_the_last():
    """It computes from 10 to 50 and from 60 to 70, and communicates from 5 to 20 and from 55 to 90."""
    def on_gpu(name, start, end, **options):
        return event(name, start, end, device=DeviceType.CUDA, **options)

    events = [on_gpu("a", 10, 30), on_gpu("b", 20, 50), on_gpu("c", 25, 40), on_gpu("Memcpy DtoD", 60, 70),
              on_gpu("ncclDevKernel_AllGather", 55, 90), on_gpu("ncclDevKernel_ReduceScatter", 5, 20),
              on_gpu("step", 0, 200, annotation=True), event("cudaLaunchKernel", 0, 100)]
    assert gpu_use(events) == dict(computes=50, communicates=5 + 5 + 20, idle=5)
    assert gpu_use([]) == dict(computes=0, communicates=0, idle=0)


def test_the_largest_kernels_without_a_label_have_rows():
    times = dict(a=60, b=50, c=40, d=30, e=20, f=10, small=2)
    kernels = [kernel(name, ms / 2, id) for id, (name, ms) in enumerate(times.items(), 1) for _ in range(2)]
    found = gpu_times([event(PREFIX + "labelled", 0, 1), event("cudaLaunchKernel", 0.5, 0.6, id=1), *kernels])
    assert found == {"labelled": (1, 60), **{f"other: {name}": (2, times[name]) for name in "bcdef"},
                     "everything else": (None, 2)}
    found = gpu_times([kernel("large", 998, 1), kernel("small", 2, 2)])
    assert found == {"other: large": (1, 998), "everything else": (None, 2)}
    assert gpu_times([]) == {"everything else": (None, 0)}


@pytest.mark.parametrize("name, short", [
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >(int, "
     "at::native::FillFunctor<float>, std::array<char*, 1ul>)",
     "vectorized_elementwise_kernel FillFunctor float array char"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
     "TensorListMetadata<1> >(int)", "multi_tensor_apply_kernel TensorListMetadata"),
    ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<at::native::direct_copy_kernel_cuda(at::"
     "TensorIteratorBase&)::{lambda(float)#1}> >(int)", "elementwise_kernel gpu_kernel_impl direct_copy_kernel_cuda"),
    ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_AllGather_RING_LL"),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT"),
    ("Memset (Device)", "Memset Device"),
    ("kernel_cutlass_" + "x" * 200, "kernel_cutlass_" + "x" * 45),
])
def test_short_names_of_kernels(name, short):
    assert short_name(name) == short


def test_raw_events_of_this_torch():
    """Launches in the middle of two ranges, on two threads, that the installed torch recorded."""
    labels, x = Labels(), torch.randn(200, 200)

    def work():
        labels.named(lambda: x @ x, "main")()
        thread = threading.Thread(target=labels.named(lambda: x @ x, "thread"))
        thread.start()
        thread.join()

    events = list(profiled(work).profiler.kineto_results.events())
    ours = [e for e in events if e.name() == PREFIX + "main"]
    assert len(ours) == 1 and ours[0].device_type() == DeviceType.CPU and ours[0].is_user_annotation()
    middle = (ours[0].start_ns() + ours[0].end_ns()) / 2e6
    launches = [event("cudaLaunchKernel", middle, middle, thread=ours[0].device_resource_id() + n, id=1 + n)
                for n in (0, 1)]
    found = gpu_times([*events, *launches, kernel("mine", 1, 1), kernel("another's", 2, 2)])
    assert found["main"] == (1, 1) and found["other: another s"] == (1, 2)


def test_profile_of_a_small_run(fresh, shards, tmp_path, capsys):
    without = ("eval_interval", "max_iters")
    given = [f for f in flag_args(data_dir=shards, out_dir=tmp_path) if f[2:].split("=")[0] not in without]
    bench.main(["profile", f"--out={tmp_path}/p", *given])
    found = json.loads((tmp_path / "p.json").read_text())
    rows = {row["label"]: row for row in found["rows"]}
    assert {"cross-entropy", "attention, forward", "attention, backward", "optimizers", "everything else"} <= set(rows)
    matmuls = [row for row in found["rows"] if row["flops"]]
    assert matmuls and all(row["label"].startswith("matmul") and row["calls"] > 0 for row in matmuls)
    assert all(math.isfinite(row["ms"]) and row["ms"] >= 0 for row in found["rows"]) and found["step_ms"] > 0
    assert sum(row["ms"] for row in found["rows"]) == pytest.approx(found["total"], rel=0.2)
    text = (tmp_path / "p.md").read_text()
    assert text in capsys.readouterr().out and "TFLOP/s" in text and "bench.py profile" in text
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_too_few_steps(fresh):
    with pytest.raises(UserError, match="--max_iters=5"):
        bench.main(["profile", "--max_iters=4", "--preset=tiny"])
