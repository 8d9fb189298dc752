"""The table of supported networks against networks that are asked again."""

import pandas as pd
import pytest
import timm

from cft.evaluate.support import by_family, cost_of, flops, refusal, support, tags_of_timm

AGAIN = ("resnet18", "test_efficientnet", "test_vit", "convnext_atto", "swin_tiny_patch4_window7_224",
         "mobilenetv2_100", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_224", "efficientvim_m1",
         "tnt_s_patch16_224")


def test_the_table_is_whole():
    found, tags = support(), tags_of_timm()
    assert set(tags) <= set(found["model"]) and found["model"].is_unique  # of this version of timm
    assert all(found.set_index("model")["tags"].reindex(tags) == pd.Series(tags))
    families = by_family(found)
    assert families["supported"].sum() >= 0.85 * families["tags"].sum()
    assert (found["refused"].str.len() < 400).all()
    costs = families[families["supported"] > 0][["flops", "memory"]].astype(float)
    assert costs.notna().all().all() and costs["flops"].max() <= 2.6


@pytest.mark.parametrize("name", AGAIN)
def test_a_network_says_again_what_the_table_says(name):
    row = support().set_index("model").loc[name]
    assert refusal(name) == row["refused"]
    if row["flops"] != "":
        assert f"{cost_of(name, flops):.2f}" == row["flops"]


def test_some_are_refused_by_name_and_what_timm_cannot_run_is_told(monkeypatch):
    assert refusal("coat_tiny").startswith("the model is a CoaT: supported here")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: 1 / 0)
    assert refusal("resnet18") == "ZeroDivisionError: division by zero"
