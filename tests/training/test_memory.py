import gc
import weakref

import pytest
import torch

from cbnerf.training.memory import free_gpu_memory, gpu_share


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_there_is_no_share():
    assert gpu_share() is None


def test_what_only_a_cycle_holds_is_freed():
    class Holder:
        tensor = torch.ones(3)

    holder = Holder()
    holder.me = holder  # pyright: ignore
    gone = weakref.ref(holder)
    gc.disable()
    try:
        del holder
        assert gone() is not None
        free_gpu_memory()
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_gpu_is_measured_and_given_back():
    before = gpu_share()
    held = torch.ones(2**28, device="cuda")
    after = gpu_share()
    assert before is not None and after is not None and after > before
    del held
    free_gpu_memory()
    assert torch.cuda.memory_reserved() < 2**28
