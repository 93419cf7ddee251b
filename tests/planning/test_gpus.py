"""GPUs by the names that people, makers and drivers give them, and what a program has of their memory."""

import pytest

from helpsteer_rloo.planning.gpus import GPUS, known_gpu


@pytest.mark.parametrize("name", GPUS)
def test_every_name_of_the_table_is_itself(name):
    assert known_gpu(name) == known_gpu(name.upper()) == known_gpu(f"NVIDIA {name}") == name


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("RTX 4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("GeForce RTX 3090 24GB", "rtx3090"),
        ("A100", "a100"),
        ("A100 40GB", "a100-40gb"),
        ("A100 80 GB", "a100"),
        ("a100_80g", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200 141GB HBM3e", "h200"),
        ("NVIDIA L4", "l4"),
        ("Nvidia L40S 48GB", "l40s"),
    ],
)
def test_a_gpu_is_known_by_what_it_is_called(name, known):
    assert known_gpu(name) == known


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h1000", "unknown GPU 'h1000'; did you mean 'h100'?"),
        ("NVIDIA H100 NVL", "did you mean 'h100'?"),
        ("A100 60GB", "unknown GPU 'a100-60gb'; did you mean 'a100"),
        ("RTX 4090 Laptop GPU", "unknown GPU 'rtx4090laptop'; did you mean 'rtx4090'?"),
        ("RTX 3090 Ti", "unknown GPU 'rtx3090ti'; did you mean 'rtx3090'?"),
        ("", "unknown GPU ''"),
        ("NVIDIA", "Known are a100,"),
    ],
)
def test_another_gpu_is_refused_with_the_nearest_known(name, says):
    with pytest.raises(
        ValueError, match="--gpu_memory_gb, and to be told times --tflops and --bandwidth_gbs"
    ) as raised:
        known_gpu(name)
    assert says in str(raised.value)


@pytest.mark.parametrize("name", GPUS)
def test_a_program_has_less_than_the_makers_figure_and_not_much_less(name):
    gpu = GPUS[name]
    assert 0.9 * gpu.size < gpu.memory < 0.995 * gpu.size
