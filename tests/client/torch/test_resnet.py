"""ResNet-18, as torchvision writes it (BSD-3), with in-place ReLUs: 20 training steps remote, local and in a group."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from batchnorm_client.torch import convert_batchnorm, snapshot

STEPS = 20
WIDTH = 4
"""Of the first stage; torchvision's has 64."""


def conv3x3(in_planes, out_planes, stride=1):
    return nn.Conv2d(in_planes, out_planes, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_planes, out_planes, stride=1):
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, layers, num_classes=10):
        super().__init__()
        self.inplanes = WIDTH
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(WIDTH, layers[0])
        self.layer2 = self._make_layer(2 * WIDTH, layers[1], stride=2)
        self.layer3 = self._make_layer(4 * WIDTH, layers[2], stride=2)
        self.layer4 = self._make_layer(8 * WIDTH, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * WIDTH, num_classes)

    def _make_layer(self, planes, blocks, stride=1):
        downsample = None
        if stride != 1 or self.inplanes != planes:
            downsample = nn.Sequential(conv1x1(self.inplanes, planes, stride), nn.BatchNorm2d(planes))
        layers = [BasicBlock(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes
        layers += [BasicBlock(self.inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18():
    torch.manual_seed(0)
    return ResNet([2, 2, 2, 2])


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)


def step(model, optimizer, x, labels, share=1.0):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), labels) * share
    loss.backward()
    return loss.detach()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


@pytest.fixture(scope="module")
def torchs():
    """torch's own model, and its losses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = resnet18()
    optimizer = sgd(model)
    losses = []
    for x, labels in batches():
        losses.append(step(model, optimizer, x, labels))
        optimizer.step()
    torch.set_num_threads(threads)
    return model, losses


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("compute", ["local", pytest.param("remote", marks=pytest.mark.slow)])
def test_20_steps_are_bit_equal(client, name, torchs, compute):
    """All but running_var, which differs by one unit in the last place per fold at most."""
    model = convert_batchnorm(resnet18(), client, name, compute=compute)
    optimizer = sgd(model)
    for (x, labels), expected in zip(batches(), torchs[1], strict=True):
        assert torch.equal(step(model, optimizer, x, labels), expected)
        optimizer.step()
    copied = snapshot(model)
    for key, value in torchs[0].state_dict().items():
        mine = copied.state_dict()[key]
        if key.endswith("running_var"):
            torch.testing.assert_close(mine, value, rtol=STEPS * torch.finfo().eps, atol=0)
        else:
            assert torch.equal(mine, value), key
    x, _ = next(batches())
    torch.testing.assert_close(model.eval()(x), torchs[0].eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_20_steps_of_two_members_of_a_group(client, name):
    """Each has a shard of 3 or 5; gradients are summed, as a job does it. In float64, which training amplifies less."""
    whole, *members = (resnet18().double() for _ in range(3))
    for member in members:
        convert_batchnorm(member, client, name, existing="adopt", group="run", group_size=2)
    optimizer, *optimizers = (sgd(model) for model in (whole, *members))
    parts = (slice(0, 3), slice(3, 8))
    with ThreadPoolExecutor(2) as pool:
        for x, labels in ((x.double(), labels) for x, labels in batches()):
            expected = step(whole, optimizer, x, labels)

            def work(member, x=x, labels=labels):
                part = parts[member]
                share = len(labels[part]) / len(labels)
                return step(members[member], optimizers[member], x[part], labels[part], share)

            torch.testing.assert_close(sum(pool.map(work, range(2))), expected, rtol=1e-8, atol=0)
            for mine, theirs in zip(*(model.parameters() for model in members), strict=True):
                mine.grad = theirs.grad = mine.grad + theirs.grad
            for each in (optimizer, *optimizers):
                each.step()
    mine = snapshot(members[0]).state_dict()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(mine[key], value, rtol=1e-7, atol=1e-9)
