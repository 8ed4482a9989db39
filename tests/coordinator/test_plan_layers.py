"""Every layer a plan may have: ten steps in onnxruntime against ten steps in torch."""

import numpy as np
import pytest
import torch
from torch import nn

from covey_coordinator.plans.trace import Sgd
from plan_support import agree_for_ten_steps, train_step

MOMENTUM = Sgd(momentum=0.9, weight_decay=1e-3)


def images(channels=2, side=9, classes=3):
    generator = torch.Generator().manual_seed(5)

    def batch(size):
        x = torch.randn(size, channels, side, side, generator=generator)
        return x, torch.randint(0, classes, (size,), generator=generator)

    return batch


def vectors(*shape, classes=3):
    generator = torch.Generator().manual_seed(5)

    def batch(size):
        x = torch.randn(size, *shape, generator=generator)
        return x, torch.randint(0, classes, (size,), generator=generator)

    return batch


def net(batch, *layers, classes=3):
    """The layers, then a dense one on what comes out of them."""
    torch.manual_seed(3)
    body = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        width = body.eval()(batch(4)[0]).shape[1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, classes))


class Branches(nn.Module):
    """Each layer behind one of its own, so that a slot's name tells whose gradient is wrong."""

    def __init__(self, batch, first, layers):
        super().__init__()
        torch.manual_seed(3)
        self.branches = nn.ModuleDict(
            {name: nn.Sequential(first(), nn.Tanh(), layer) for name, layer in layers.items()}
        )
        with torch.no_grad():
            self.head = nn.Linear(self.body(batch(4)[0]).shape[1], 3)

    def body(self, x):
        return torch.cat([branch(x).flatten(1) for branch in self.branches.values()], 1)

    def forward(self, x):
        return self.head(self.body(x))


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "no bias": {"kernel_size": 3, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2},
    "stride that drops the edge": {"kernel_size": 2, "stride": 3},
    "padding": {"kernel_size": 3, "padding": 2},
    "dilation": {"kernel_size": 3, "dilation": 2},
    "unequal": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1), "dilation": (1, 2)},
    "groups": {"kernel_size": 3, "groups": 2, "stride": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4},
    "pointwise": {"kernel_size": 1},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


def test_conv2d():
    batch = images()
    layers = {name: nn.Conv2d(4, 8, **options) for name, options in CONVOLUTIONS.items()}
    agree_for_ten_steps(Branches(batch, lambda: nn.Conv2d(2, 4, 1), layers), batch)


def test_conv1d():
    batch = vectors(2, 12)
    layers = {
        "plain": nn.Conv1d(4, 4, 3),
        "stride": nn.Conv1d(4, 4, 3, stride=2, padding=1),
        "dilation": nn.Conv1d(4, 4, 3, dilation=2, groups=2),
    }
    agree_for_ten_steps(Branches(batch, lambda: nn.Conv1d(2, 4, 3), layers), batch)


def test_transposed_convolution():
    batch = images()
    layers = {
        "plain": nn.ConvTranspose2d(4, 4, 3),
        "stride": nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
    }
    agree_for_ten_steps(Branches(batch, lambda: nn.Conv2d(2, 4, 3), layers), batch)


POOLS = {
    "max": {
        "plain": nn.MaxPool2d(2),
        "three": nn.MaxPool2d(3),
        "a rest at the edge": nn.MaxPool2d(4),
        "not square": nn.MaxPool2d((2, 3)),
        "overlapping": nn.MaxPool2d(3, 2),
        "padded": nn.MaxPool2d(3, 2, 1),
        "gaps": nn.MaxPool2d(2, 3),
        "dilated": nn.MaxPool2d(2, 2, dilation=2),
        "ceiling": nn.MaxPool2d(2, ceil_mode=True),
    },
    "mean": {
        "plain": nn.AvgPool2d(2),
        "a rest at the edge": nn.AvgPool2d(4),
        "not square": nn.AvgPool2d((2, 3)),
        "overlapping": nn.AvgPool2d(3, 2),
        "padded": nn.AvgPool2d(3, 2, 1),
        "padding not counted": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        "own divisor": nn.AvgPool2d(2, divisor_override=3),
    },
    "adaptive": {
        "one": nn.AdaptiveAvgPool2d(1),
        "even": nn.AdaptiveAvgPool2d((4, 2)),
        "uneven": nn.AdaptiveAvgPool2d((3, 5)),
    },
}


@pytest.mark.parametrize("pools", POOLS.values(), ids=POOLS)
def test_pooling(pools):
    batch = images()
    agree_for_ten_steps(Branches(batch, lambda: nn.Conv2d(2, 4, 2), pools), batch)


@pytest.mark.parametrize(("kernel", "relu_first"), [(2, True), (3, False), ((3, 1), False)])
def test_max_pooling_of_ties_takes_the_first(kernel, relu_first):
    """Constant patches tie everywhere; a convolution's ReLU makes windows of zeros."""

    def batch(size):
        generator = torch.Generator().manual_seed(size)
        x = torch.randint(-1, 2, (size, 2, 7, 7), generator=generator).float()
        return x, torch.randint(0, 3, (size,), generator=generator)

    convolution = nn.Conv2d(2, 4, 1, bias=False)
    middle = [nn.ReLU()] if relu_first else []
    model = net(batch, convolution, *middle, nn.MaxPool2d(kernel))
    nn.init.constant_(convolution.weight, 0.5)
    agree_for_ten_steps(model, batch)


def test_batch_norm_2d():
    batch = images()
    layers = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    _, step = agree_for_ten_steps(net(batch, *layers), batch, sgd=MOMENTUM)
    roles = {slot.name: slot.role for slot in step._header.layout.slots}
    assert roles["1.running_var"] == "buffer"
    assert "1.num_batches_tracked" not in roles


@pytest.mark.parametrize("shape", [(5,), (4, 6)])
def test_batch_norm_1d(shape):
    batch = vectors(*shape)
    layers = nn.Linear(shape[-1], 4, bias=len(shape) > 1), nn.BatchNorm1d(4), nn.Sigmoid()
    agree_for_ten_steps(net(batch, *layers), batch)


def test_batch_norm_of_one_value_stays_finite():
    """torch refuses this batch; a device may be left with it."""
    batch = vectors(5)
    step, _ = train_step(net(batch, nn.Linear(5, 4), nn.BatchNorm1d(4)), *batch(4))
    x, y = batch(1)
    assert np.isfinite(step.step(x.numpy(), y.numpy()))
    assert np.isfinite(step.parameters()).all()


def test_norms():
    batch = images(side=4)
    layers = {
        "layer norm": nn.LayerNorm(4),
        "layer norm over two": nn.LayerNorm((4, 4)),
        "group norm": nn.GroupNorm(2, 4),
        "batch norm without weights": nn.BatchNorm2d(4, affine=False),
        "dropout of nothing": nn.Dropout(0.0),
    }
    agree_for_ten_steps(
        Branches(batch, lambda: nn.Conv2d(2, 4, 1, bias=False), layers), batch, lr=0.1
    )


@pytest.mark.parametrize(
    ("batch", "layers"),
    [
        (vectors(5), [nn.Linear(5, 4)]),
        (vectors(3, 5), [nn.Linear(5, 4, bias=False), nn.Tanh()]),
        (vectors(5), [nn.Linear(5, 4), nn.LayerNorm(4)]),
    ],
    ids=["linear", "linear on sequences", "layer norm on vectors"],
)
def test_linear(batch, layers):
    agree_for_ten_steps(net(batch, *layers), batch, sgd=MOMENTUM, lr=0.1)


def test_activations():
    batch = vectors(5)
    layers = {
        "relu": nn.ReLU(),
        "gelu": nn.GELU(),
        "gelu by tanh": nn.GELU(approximate="tanh"),
        "silu": nn.SiLU(),
        "tanh": nn.Tanh(),
        "sigmoid": nn.Sigmoid(),
        "leaky relu": nn.LeakyReLU(),
        "elu": nn.ELU(),
        "softmax": nn.Softmax(1),
    }
    agree_for_ten_steps(Branches(batch, lambda: nn.Linear(5, 4), layers), batch, lr=0.2)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, words):
        return self.head(self.embed(words).mean(1))


def test_embedding():
    generator = torch.Generator().manual_seed(5)

    def batch(size):
        words = torch.randint(0, 11, (size, 7), generator=generator)
        return words, torch.randint(0, 3, (size,), generator=generator)

    torch.manual_seed(3)
    agree_for_ten_steps(Words(), batch, sgd=MOMENTUM, lr=0.5)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(5, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, sequence):
        return self.head(self.cells(sequence)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent(kind):
    torch.manual_seed(3)
    agree_for_ten_steps(Recurrent(kind), vectors(2, 5), sgd=MOMENTUM, lr=0.2)


class Attention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, sequence):
        return self.head(self.encoder(self.embed(sequence)).mean(1))


def test_transformer_encoder():
    torch.manual_seed(3)
    agree_for_ten_steps(Attention(), vectors(3, 5), sgd=MOMENTUM)


class Tied(nn.Module):
    """One weight in two places, and one that is not used at all."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.head = nn.Linear(4, 3)

    def forward(self, features):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(features)))))


def test_tied_weights_are_one_slot():
    torch.manual_seed(3)
    _, step = agree_for_ten_steps(Tied(), vectors(4), sgd=MOMENTUM)
    names = [slot.name for slot in step._header.layout.slots]
    assert names == ["one.weight", "one.bias", "two.bias", "head.weight", "head.bias"]


OPTIMIZERS = {
    "plain": Sgd(),
    "momentum": Sgd(momentum=0.9),
    "weight decay": Sgd(weight_decay=0.1),
    "both": Sgd(momentum=0.5, weight_decay=0.1),
    "nesterov": Sgd(momentum=0.9, weight_decay=0.01, nesterov=True),
}


@pytest.mark.parametrize("sgd", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer(sgd):
    batch = vectors(5)
    agree_for_ten_steps(net(batch, nn.Linear(5, 4), nn.Tanh()), batch, sgd=sgd, lr=0.1)


@pytest.mark.parametrize(("loss", "shape"), [("mse", (2, 3)), ("bce_with_logits", (3,))])
def test_loss_on_real_labels(loss, shape):
    generator = torch.Generator().manual_seed(5)

    def batch(size):
        x = torch.randn(size, *shape[:-1], 4, generator=generator) * 3
        return x, torch.rand(size, *shape, generator=generator)

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    agree_for_ten_steps(model, batch, loss=loss, sgd=MOMENTUM, lr=0.2)


def test_cross_entropy_of_extreme_outputs_is_finite():
    batch = vectors(5)
    model = net(batch, nn.Linear(5, 4))
    step, _ = train_step(model, *batch(4))
    x, y = batch(4)
    assert np.isfinite(step.step(x.numpy() * 1e4, y.numpy()))
    assert np.isfinite(step.parameters()).all()


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout_in_distribution(p):
    """Keeps 1 - p of the elements and scales them up; draws afresh in every step.

    With a weight of ones and a gradient of ones, the update of each weight is the scaled mask.
    """

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2000))
            self.dropout = nn.Dropout(p)

        def forward(self, features):
            return self.dropout(features + self.weight)

    x = torch.zeros(4, 2000)
    step, _header = train_step(Masked(), x, torch.full((4, 2000), -1.0), loss="mse")
    masks = []
    for _ in range(3):
        step.load(np.zeros(2000, np.float32))
        step.step(x[:1].numpy(), np.full((1, 2000), -1, np.float32), {"lr": 1000.0})
        masks.append(step.parameters())
    for mask in masks:
        # The gradient of mean((d(w) + 1)^2) by w is 2 / 2000 * scale where kept, 0 elsewhere.
        kept = mask != 0
        np.testing.assert_allclose(mask[kept], -1 / (1 - p), rtol=1e-5)
        assert abs(kept.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / 2000)
    assert (masks[0] != masks[1]).any()
    assert (masks[1] != masks[2]).any()
