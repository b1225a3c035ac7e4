"""Devices by name, by the driver's name and by size."""

import pytest

from elip_ds.batching.devices import KAPPA, OUTSIDE_BYTES, USABLE_GIB, find_device
from elip_ds.errors import UserError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a5000", "A5000"),
        ("NVIDIA RTX A5000", "A5000"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla V100-SXM2-16GB", "V100-16"),
        ("v100_32gb", "V100-32"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("A100 80GB", "A100-80"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("h100-80g", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200"),
        ("AMD Instinct MI250X", "MI250"),
    ],
)
def test_names_are_loose(text: str, name: str) -> None:
    device = find_device(text)
    assert device.name == name
    assert device.memory_bytes == int(USABLE_GIB[name] * GIB)


@pytest.mark.parametrize("name", USABLE_GIB)
def test_every_name_finds_itself_and_is_less_than_it_is_sold_as(name: str) -> None:
    device = find_device(name)
    nominal = {"A5000": 24, "RTX 4090": 24, "H100": 80, "H100 NVL": 94, "H200": 141, "MI250": 64}
    sold_as = nominal.get(name) or int(name.split("-")[1])
    assert 0.97 * sold_as < device.memory_bytes / GIB < sold_as
    assert not device.tested


@pytest.mark.parametrize(
    "text",
    ["A100", "B200", "GH200 480GB", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "H100 NVX", "cpu", ""],
)
def test_an_unknown_name_lists_the_known(text: str) -> None:
    with pytest.raises(UserError, match=r"batching\.device_memory=.*A100-40, A100-80.*cpu:16GiB"):
        find_device(text)


def test_a_size_is_a_gpu_of_that_size() -> None:
    device = find_device("24GiB")
    assert device.memory_bytes == 24 * GIB
    assert (device.outside_bytes, device.kappa) == (OUTSIDE_BYTES, KAPPA)


def test_on_a_cpu_all_is_counted() -> None:
    device = find_device("cpu:2GiB")
    assert (device.memory_bytes, device.outside_bytes, device.kappa) == (2 * GIB, 0, 1.0)


@pytest.mark.parametrize("text", ["24", "24G", "cpu:16", "cpu:lots"])
def test_a_size_without_a_known_unit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--device-memory=.* such as 24GiB$"):
        find_device(text, "--device-memory")
