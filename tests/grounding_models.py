"""What every grounder must keep (`check_grounder`), and small random networks for the backend of transformers."""
import hashlib
import json

import pytest
import torch

from cft.concepts.grounding import (
    PAPER_GROUNDING,
    SMALL,
    WEIGHTS,
    GroundedSAM,
    Grounding,
    SegmentAnything2,
    TransformersDino,
    _turn_up,
    small_grounded_sam,
    small_tokenizer,
)


def check_grounder(grounder, image, phrases=("wing", "a beak", "tail"), absent=()):
    """Hold a grounder against its contract on one RGB picture. `absent` are phrases that it must not find there."""
    assert isinstance(grounder.name, str) and grounder.name
    settings = grounder.settings()
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings, "settings are plain JSON"
    assert grounder(image, []) == []

    asked = [*phrases, *absent, phrases[0]]
    results = grounder(image, asked)
    assert [result.phrase for result in results] == asked, "one result for each phrase, in order"
    for result in results:
        check_grounding(result, image)
    for result in results[len(phrases):-1]:
        assert not len(result.boxes), f"{result.phrase} is absent"
    assert same(results[0], results[-1]), "a phrase that comes twice gets the same result twice"
    for result, again in zip(results, reversed(grounder(image, asked[::-1])), strict=True):
        assert same(result, again), "the order of the phrases does not matter"
    assert grounder.settings() == settings, "a call changes no setting"

    for bad in (["wing", ""], [" \t "], ["wing " * 200], "wing"):
        with pytest.raises(ValueError):
            grounder(image, bad)


def check_grounding(result, image):
    """Shapes, types and ranges of one result; a phrase without a box has an empty mask."""
    assert isinstance(result, Grounding) and isinstance(repr(result), str)
    boxes, scores = result.boxes, result.scores
    assert boxes.shape == (len(scores), 4) and boxes.is_floating_point() and scores.is_floating_point()
    assert result.mask.shape == (image.height, image.width) and result.mask.dtype == torch.bool
    assert not any(value.requires_grad or value.is_cuda for value in (boxes, scores, result.mask))
    assert (scores >= 0).all() and (scores <= 1).all() and (scores[:-1] >= scores[1:]).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2] <= image.width).all() and (boxes[:, 3] <= image.height).all()
    assert len(result.words) in (0, len(boxes))
    if not len(boxes):
        assert not result.mask.any()


def same(a, b, pixels=0):
    """Whether two results agree, but for so many pixels of the mask and the last digits."""
    return (a.boxes.shape == b.boxes.shape and torch.allclose(a.boxes, b.boxes, atol=1e-3)
            and torch.allclose(a.scores, b.scores, atol=1e-5) and int((a.mask ^ b.mask).sum()) <= pixels)


def small_dino():
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    tokenizer = small_tokenizer()
    model = GroundingDinoForObjectDetection(GroundingDinoConfig(
        SwinConfig(image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                   drop_path_rate=0.0,
                   out_indices=[2, 3, 4]),
        text_config=BertConfig(vocab_size=len(tokenizer), **SMALL["bert"]).to_dict(), num_queries=20, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
        dropout=0.0, fusion_droppath=0.0, disable_custom_kernels=True))
    fusion = model.model.encoder.layers[0].fusion_layer
    heads = (model.bbox_embed[0], model.model.encoder_output_bbox_embed)
    _turn_up(model.model.text_backbone.embeddings.word_embeddings, (fusion.vision_param, fusion.text_param),
             [head.layers[-1] for head in heads], model.model.decoder.layer_norm)
    return TransformersDino(model, "small-grounding-dino", 64, 128, tokenizer)


def small_sam2():
    from transformers import Sam2Config, Sam2ImageProcessorFast, Sam2Model, Sam2Processor

    eyes = dict(model_type="sam2_hiera_det_model", hidden_size=16, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
                window_positional_embedding_background_size=[4, 4], embed_dim_per_stage=[16, 32, 64, 128],
                num_attention_heads_per_stage=[1, 1, 2, 2], window_size_per_stage=[4, 4, 4, 2],
                global_attention_blocks=[3])
    model = Sam2Model(Sam2Config(
        dict(backbone_config=eyes, backbone_channel_list=[128, 64, 32, 16], fpn_hidden_size=32,
             backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]]),
        dict(hidden_size=32, image_size=64, mask_input_channels=4),
        dict(hidden_size=32, mlp_dim=64, num_hidden_layers=1, num_attention_heads=2, iou_head_depth=2,
             iou_head_hidden_dim=32)))
    return SegmentAnything2(model, Sam2Processor(Sam2ImageProcessorFast(size=dict(height=64, width=64))), "small-sam2")


def small_transformers(config=PAPER_GROUNDING, seed=0):
    """As `small_grounded_sam`, for the backend of transformers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GroundedSAM(small_dino(), small_sam2(), config, {"random": f"seed {seed}"})


BACKENDS = {"groundingdino": small_grounded_sam, "transformers": small_transformers}


def publish(monkeypatch, folder, name):
    """Pretend that the files in the folder are the published ones."""
    def fact(w):
        data = (folder / w.files[0]).read_bytes()
        return w._replace(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    monkeypatch.setitem(WEIGHTS, name, tuple(fact(w) for w in WEIGHTS[name]))


def small_weights(folder, monkeypatch):
    """Fills a folder with weights of small networks for both backends, believed to be the published ones."""
    import groundingdino.models
    import segment_anything
    from transformers import BertConfig, BertModel

    text = folder / "bert-base-uncased"
    small_tokenizer().save_pretrained(text)
    BertModel(BertConfig(vocab_size=len(small_tokenizer()), **SMALL["bert"])).save_pretrained(text)
    recipes = []
    monkeypatch.setattr(groundingdino.models, "build_model",
                        lambda recipe: recipes.append(recipe) or small_grounded_sam(seed=9).detector.model)
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b",
                        lambda: small_grounded_sam(seed=9).segmenter.model)
    small = small_grounded_sam(seed=3)
    state = {f"module.{key}": value for key, value in small.detector.model.state_dict().items()}
    torch.save({"model": state | {"module.label_enc.weight": torch.zeros(2)}}, folder / "groundingdino_swint_ogc.pth")
    torch.save(small.segmenter.model.state_dict(), folder / "sam_vit_b_01ec64.pth")
    torch.manual_seed(3)
    dino, sam2 = small_dino(), small_sam2()
    dino.model.save_pretrained(folder / "grounding-dino-base")
    dino.tokenizer.save_pretrained(folder / "grounding-dino-base")
    sam2.model.save_pretrained(folder / "sam2.1-hiera-large")
    sam2.processor.save_pretrained(folder / "sam2.1-hiera-large")
    for name in ("groundingdino-swint", "sam-vit-b", "grounding-dino-base", "sam2.1-hiera-large"):
        publish(monkeypatch, folder, name)
    return folder, recipes, (small.detector.model, small.segmenter.model, dino.model, sam2.model)
