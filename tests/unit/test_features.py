"""Feature networks: the published ones against plain double-precision arithmetic, files that do not fit, and our own."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from muralist.errors import UserError
from muralist.eval.features import i3d, inception, lpips
from muralist.eval.features.mural import WIDTH, Mural, asset, load_mural
from muralist.eval.features.patches import cut, patch_boxes, spread

CPU = torch.device("cpu")
POOL = {"alex": (3, 2), "vgg": (2, 2)}
# (features' index, stride, padding) of the convolutions; "pool" between them; "tap" after the ReLU that is compared
PLAN = {
    "alex": [(0, 4, 2), "tap", "pool", (3, 1, 2), "tap", "pool", (6, 1, 1), "tap", (8, 1, 1), "tap", (10, 1, 1), "tap"],
    "vgg": [
        (0, 1, 1), (2, 1, 1), "tap", "pool", (5, 1, 1), (7, 1, 1), "tap", "pool", (10, 1, 1), (12, 1, 1), (14, 1, 1), "tap", "pool",
        (17, 1, 1), (19, 1, 1), (21, 1, 1), "tap", "pool", (24, 1, 1), (26, 1, 1), (28, 1, 1), "tap",
    ],
}  # fmt: skip


def random_lpips(flavour: str) -> lpips.LPIPS:
    torch.manual_seed(1)
    network = {"alex": lpips.alexnet, "vgg": lpips.vgg16}[flavour]()
    for name, p in network.named_parameters():
        p.data.abs_() if name.startswith("lin") else None
        p.data.mul_(2.0) if name.endswith("weight") and not name.startswith("lin") else None  # so that signals reach the last layer
    return network.eval().requires_grad_(False)


def reference_lpips(weights: dict[str, torch.Tensor], flavour: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """The paper's formula in double precision, the layers written out."""
    total, layer = 0.0, 0
    h = torch.stack([a, b]).double() * 2 - 1
    h = (h - torch.tensor([-0.030, -0.088, -0.188], dtype=torch.double).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450], dtype=torch.double).view(3, 1, 1)
    for step in PLAN[flavour]:
        if step == "pool":
            h = F.max_pool2d(h, *POOL[flavour])
        elif step == "tap":
            f = h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10)
            total += float(((f[0] - f[1]).square() * weights[f"lin{layer}.model.1.weight"].double().view(-1, 1, 1)).sum(dim=0).mean())
            layer += 1
        else:
            index, stride, padding = step
            h = torch.relu(F.conv2d(h, weights[f"features.{index}.weight"].double(), weights[f"features.{index}.bias"].double(), stride, padding))
    return total


@pytest.mark.parametrize("flavour", ["alex", "vgg"])
@pytest.mark.parametrize("size", [(64, 64), (83, 101)])
def test_lpips_is_the_papers_formula(flavour, size):
    network, (a, b) = random_lpips(flavour), torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    (found,) = lpips.distances(network, a, [b])
    assert found == pytest.approx(reference_lpips(network.state_dict(), flavour, a, b), rel=1e-5)
    assert lpips.distances(network, a, [a]) == [0.0]


@pytest.mark.parametrize("name", ["alex", "vgg", "mural"])
def test_tiles_give_the_value_of_the_whole_frame(name):
    torch.manual_seed(2)
    network = Mural().eval() if name == "mural" else random_lpips(name)
    image, *others = torch.rand(2 if name == "vgg" else 3, 3, 271, 165)
    whole, tiled = (lpips.distances(network, image, others, tile=tile) for tile in (4096, 144))
    assert tiled == pytest.approx(whole, rel=1e-6)


def test_lpips_files_of_either_naming_are_accepted(tmp_path):
    network = random_lpips("alex")
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    package = {re.sub(r"^features\.(\d+)", lambda m: f"net.slice{slices[int(m[1])]}.{m[1]}", name): t for name, t in network.state_dict().items()}
    package = {name.replace("lin0.", "lins.0."): t for name, t in package.items()} | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    torchvision = network.state_dict() | {"classifier.1.weight": torch.zeros(4, 4)}
    for number, tensors in enumerate((package, torchvision)):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        loaded = lpips.load_lpips(path, CPU)
        assert all(torch.equal(p, network.state_dict()[name]) for name, p in loaded.state_dict().items())


def write(path, tensors):
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("load", [lpips.load_lpips, inception.load_inception, i3d.load_i3d])
def test_wrong_files_are_one_line(tmp_path, load):
    def message(path) -> str:
        with pytest.raises(UserError) as caught:
            load(path, CPU)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "a.pth").write_bytes(b"x")
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "pickle" in message(tmp_path / "a.pth")
    assert "no such file" in message(tmp_path / "none.safetensors")
    assert "not a readable safetensors file" in message(tmp_path / "text.safetensors")
    assert "not" in message(write(tmp_path / "other.safetensors", {"weight": torch.zeros(2)}))


def test_a_wrong_shape_and_a_missing_name_are_told(tmp_path):
    tensors = random_lpips("vgg").state_dict()
    with pytest.raises(UserError, match=r"features\.5\.bias is missing"):
        lpips.load_lpips(write(tmp_path / "a.safetensors", {n: t for n, t in tensors.items() if n != "features.5.bias"}), CPU)
    with pytest.raises(UserError, match=r"lin2\.model\.1\.weight is \[1, 4, 1, 1\], not \[1, 256, 1, 1\]"):
        lpips.load_lpips(write(tmp_path / "b.safetensors", tensors | {"lin2.model.1.weight": torch.zeros(1, 4, 1, 1)}), CPU)


def test_inception_takes_fids_weights_and_refuses_the_classifier(tmp_path):
    torch.manual_seed(0)
    tensors = inception.Inception().state_dict()
    assert sum(t.numel() for n, t in tensors.items() if "running" not in n and "batches" not in n) == 21_785_568  # Inception-v3 without its classifier
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_6b.branch7x7dbl_5.bn.running_var", "Mixed_7c.branch3x3dbl_3b.conv.weight"} <= set(tensors)
    given = {n: t for n, t in tensors.items() if "batches" not in n}
    network = inception.load_inception(write(tmp_path / "fid.safetensors", given | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}), CPU)
    with torch.inference_mode():
        assert network(torch.rand(2, 3, 64, 80)).shape == (2, inception.WIDTH)
    with pytest.raises(UserError, match="ImageNet classifier"):
        inception.load_inception(write(tmp_path / "tv.safetensors", given | {"AuxLogits.fc.bias": torch.zeros(1000)}), CPU)


def test_i3d_takes_kinetics_weights(tmp_path):
    torch.manual_seed(0)
    tensors = i3d.I3D().state_dict()
    assert {"Conv3d_1a_7x7.conv3d.weight", "Mixed_4f.b2b.bn.running_mean", "logits.conv3d.bias"} <= set(tensors)
    network = i3d.load_i3d(write(tmp_path / "i3d.safetensors", tensors), CPU)
    with torch.inference_mode():
        assert network(torch.rand(1, 3, 9, 224, 224)).shape == (1, i3d.WIDTH)


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize("kernel, stride", [(7, 2), (3, 2), (3, 1), (2, 2), (1, 1)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    x = torch.rand(1, 1, size, size, size)
    padded = i3d._same(x, (kernel,) * 3, (stride,) * 3)
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    before = total // 2
    assert padded.shape[2] == size + total
    assert torch.equal(padded[0, 0, before : before + size, before : before + size, before : before + size], x[0, 0])


def test_the_shipped_network_is_small_and_whole():
    network = load_mural(CPU)
    assert asset().stat().st_size <= 4 * 2**20
    x = torch.rand(2, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert network(x).shape == (2, WIDTH) and bool(network(x).isfinite().all())
    flat = network(torch.full((1, 3, 64, 64), 0.5))
    assert bool(flat.isfinite().all())  # a picture without any detail is a picture too


def test_frames_and_patches_are_spread_evenly():
    assert spread(5, 8) == [0, 1, 2, 3, 4] and spread(161, 3) == [0, 80, 160] and spread(9, 1) == [4]
    boxes = patch_boxes(130, 200, 64, at_most=99)
    assert [(b.y.start, b.x.start) for b in boxes] == [(1, 4), (1, 68), (1, 132), (65, 4), (65, 68), (65, 132)]
    few = [{(b.y.start, b.x.start) for b in patch_boxes(640, 640, 64, at_most=7, turn=turn)} for turn in range(15)]
    assert all(len(f) == 7 for f in few) and len(set.union(*few)) == 100
    frame = torch.arange(12 * 14 * 3).view(12, 14, 3).float()
    patches = cut(frame, patch_boxes(12, 14, 6, at_most=4))
    assert patches.shape == (4, 3, 6, 6) and torch.equal(patches[3], frame[6:12, 7:13].permute(2, 0, 1))
