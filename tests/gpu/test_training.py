"""Training on a GPU: the reference's run again."""

import pytest
import torch

from megatron_memory.runtime.distributed import shutdown_distributed
from tests.devices import needs_gpu_run
from tests.golden_lingua import CASES
from tests.reference_run import train_like_reference
from tests.training.test_parity_reference import assert_equals_trajectory

pytestmark = [pytest.mark.gpu, needs_gpu_run]

# The GPU sums in yet another order; 24 steps amplify it. A wrong term misses by more in step one.
TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def _leave_run():
    yield
    shutdown_distributed()


@pytest.mark.parametrize("name", CASES)
def test_training_equals_reference(name: str):
    assert not torch.backends.cuda.matmul.allow_tf32
    assert_equals_trajectory(train_like_reference(name, {}, device="cuda"), name, TOLERANCE)
