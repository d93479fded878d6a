"""Merging stacked tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeopt.models import merge
from moeopt.models import merging as room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 6, 9), (5, 2, 3, 4)])
@pytest.mark.parametrize("accelerated", [False, True])
def test_merge_is_the_rounded_float32_sum(monkeypatch, dtype, shape, accelerated):
    monkeypatch.setattr(room, "CHUNK_BYTES", 200)  # ten columns a chunk
    monkeypatch.setattr(room, "FUSED_BYTES", 320)  # likewise
    monkeypatch.setattr(room, "is_accelerator", lambda device: accelerated)
    generator = torch.Generator().manual_seed(0)
    tensor, matrix = torch.randn(shape, generator=generator).to(dtype), torch.randn(3, 5, generator=generator)
    exact = torch.einsum("rn,n...->r...", matrix.double(), tensor.double())
    merged = merge(matrix, tensor)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_an_accelerator_mixes_a_whole_tensor_at_once_where_memory_allows(monkeypatch):
    monkeypatch.setattr(room, "is_accelerator", lambda device: True)
    for free, expected in ((1 << 40, 1 << 30), (5 << 30, 1 << 28), (0, 1 << 20)):  # of 4 bytes, 4 GiB at most
        monkeypatch.setattr(room, "free_bytes", lambda device, free=free: free)
        assert room._numbers_at_a_time(3, 5, torch.device("cpu")) == expected // 8


def test_merge_writes_into_the_given_memory():
    tensor, out = torch.randn(5, 4, 4), torch.empty(3, 4, 4)
    assert merge(torch.eye(5)[[4, 0, 0]], tensor, out) is out
    assert torch.equal(out, tensor[[4, 0, 0]])


def test_no_gradient_flows_into_merged_tensors():
    parameter = torch.nn.Parameter(torch.randn(5, 4, 4))
    assert not merge(torch.from_numpy(np.ones((2, 5), np.float32)), parameter).requires_grad
