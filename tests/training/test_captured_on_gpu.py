"""What only a GPU can prove of captured training steps: they compute what plain ones do; a failed capture harms nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.helpers import assert_close_relative, build, gradients, make_input

import unetpp_fast as uf
from unetpp_fast.data.patches import Patches
from unetpp_fast.data.samples import ArraySample
from unetpp_fast.training.recipe import Recipe
from unetpp_fast.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def deterministic():
    """cuDNN's deterministic kernels: a captured training is compared with a plain one."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    yield
    torch.backends.cudnn.deterministic = before


def network(backend: str, **options) -> uf.Network:
    options = {"features": (16, 24, 33), "deep_supervision": True, **options}
    return build(uf.UNetPlusPlus, 2, 3, backend=backend, **options).cuda()


def batch(seed: int, images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """In pinned memory."""
    x, y = make_input(images, 2, 20, 36, seed=seed), (make_input(images, 3, 20, 36, seed=seed + 99) > 0).float()
    return x.pin_memory(), y.pin_memory()


def train(model: uf.Network, dtype: torch.dtype, is_captured: bool, every: int = 1) -> tuple[list[torch.Tensor], str]:
    """The losses of twelve steps on two sizes, with clipping, a schedule and a loss scale."""
    torch.manual_seed(1)
    loss, optimizer = uf.BCEDiceLoss(), torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=4, enabled=dtype == torch.float16)
    step = uf.capture(model, loss, scaler=scaler)
    losses = []
    for number in range(12):
        x, y = batch(number, 3 if number % 3 == 0 else 2)
        if number % every == 0:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            if is_captured:
                losses.append(step(x, y))
            else:
                value = loss(model(x.cuda()), y.cuda())
                losses.append(value.detach())
        if not is_captured:
            scaler.scale(value).backward()
        if (number + 1) % every == 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
    return losses, step.reason


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_captured_training_equals_a_plain_one(backend, dtype, every):
    plain, captured = network(backend), network(backend)
    expected, _ = train(plain, dtype, False, every)
    losses, reason = train(captured, dtype, True, every)
    assert not reason
    bound = 1e-6 if backend == "triton" else 1e-2  # the kernels sum in a fixed order; cuDNN may choose another algorithm
    assert_close_relative(torch.stack(losses), torch.stack(expected), bound)
    for name, value in plain.state_dict().items():
        assert_close_relative(captured.state_dict()[name].double(), value.double(), bound, floor=1.0)


def test_replays_draw_new_random_numbers_and_resume_with_their_state():
    model, loss = network("reference", dropout=0.5), uf.BCEDiceLoss()
    step = uf.capture(model, loss)
    x, y = batch(0)
    for _ in range(4):
        step(x, y)
    state = torch.cuda.get_rng_state()
    one, two = step(x, y).item(), step(x, y).item()
    torch.cuda.set_rng_state(state)
    again, after = step(x, y).item(), loss(model(x.cuda()), y.cuda()).item()
    assert one != two and again == pytest.approx(one, rel=1e-5) and after == pytest.approx(two, rel=1e-5)


def test_running_statistics_follow_replays():
    model = network("triton")
    other, loss = copy.deepcopy(model), uf.BCEDiceLoss()
    step = uf.capture(model, loss)
    for number in range(6):
        x, y = batch(number)
        step(x, y)
        loss(other(x.cuda()), y.cuda()).backward()
    model.eval(), other.eval()
    with torch.no_grad():
        assert_close_relative(model(batch(9)[0].cuda()), other(batch(9)[0].cuda()), 1e-6)


def test_a_failed_capture_harms_nothing():
    def reads_back(outputs, target):
        value = uf.BCEDiceLoss()(outputs, target)
        return value * (2.0 if len(target) == 3 and value.item() > 1e9 else 1.0)

    model = network("triton")
    step = uf.capture(model, reads_back)
    for number in range(4):
        model.zero_grad()
        step(*batch(number, 3))
    assert step.reason.startswith("3x2x20x36 is not captured: ")
    for number in range(5):
        model.zero_grad()
        step(*batch(number))
    other = copy.deepcopy(model)
    x, y = batch(4)
    reads_back(other(x.cuda()), y.cuda()).backward()
    for name, value in gradients(other).items():
        assert_close_relative(gradients(model)[name], value, 1e-5, floor=1e-3)
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and step.reason.count("\n") == 0


def test_the_reference_cannot_be_captured_with_recomputing():
    model = network("reference")
    model.recompute = True
    step = uf.capture(model, uf.BCEDiceLoss())
    for number in range(4):
        step(*batch(number))
    assert "PyTorch reads random states back to recompute a node" in step.reason


def test_the_trainer_captures_its_steps(tmp_path):
    model = build(uf.UNetPlusPlus, 1, 1, features=(16, 24, 33), backend="triton").cuda()
    images = [make_input(1, 48, 48, seed=seed).numpy() for seed in range(4)]
    samples = [ArraySample(str(k), image, (image > 0.3).astype(np.float32)) for k, image in enumerate(images)]
    patches = Patches(samples, 32, per_image=2, seed=0)
    trainer = Trainer(model, patches, samples[:1], Recipe(epochs=4, batch_size=3, dtype="bfloat16"), tmp_path)
    history = trainer.fit(progress=False)
    assert len(trainer.train_step.graphs._sizes) == 2 and not trainer.train_step.reason
    assert all(size.graph for size in trainer.train_step.graphs._sizes.values())
    assert history[-1]["train_loss"] < history[0]["train_loss"]
