"""What the GPU tests share: batches on a device, passes that read nothing, a ban on waiting."""

import contextlib

import torch

from tests.optimizers.models import batch


def inputs(name, device, step=0, size=6, dtype=torch.float32):
    """The mini-batch of a step, on the device."""
    data = batch(name, step, size=size, dtype=dtype)
    return {key: value.to(device) for key, value in data.items()}


def passes(model, optimizer, data, scaler=None):
    """Forward, probe where the optimizer takes one, backward; the loss stays on the device."""
    context = getattr(optimizer, "curvature_context", contextlib.nullcontext)
    with context():
        loss = model(**data).loss
        if hasattr(optimizer, "probe"):
            optimizer.probe(loss)
        (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach()


@contextlib.contextmanager
def no_waiting(device):
    """Whatever makes the host wait for a CUDA device raises inside; other devices are let be."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
