"""The model card of a saved flow, and the sentences on what its fit found."""

from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.flow.card import findings


@pytest.fixture(scope="module")
def flow() -> PreferenceFlow:
    rejected, chosen = torch.randn(2, 40, 1, generator=torch.Generator().manual_seed(0)).sort(0).values
    return PreferenceFlow.fit(EncodedPairs(chosen, rejected), FlowConfig(residual=False), progress=False)


def test_a_card_claims_no_upload_and_leaves_nothing_to_fill_in(flow, tmp_path):
    flow.save_pretrained(tmp_path, model_card_kwargs={"license": "cc-by-4.0", "tags": ["mine"]})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "preference-flow",
        "license": "cc-by-4.0",
        "tags": ["preference-flow", "preference-learning", "mine"],
    }
    for claim in ("More Information Needed", "pushed to the Hub", "No licence"):
        assert claim not in card.text
    assert "fitted on 40 pairs of 40 prompts" in card.text
    assert findings(flow)[0] in card.text
    flow.save_pretrained(tmp_path)
    again = ModelCard.load(tmp_path / "README.md")
    assert "license" not in again.data.to_dict()
    assert "No licence is stated" in again.text


def test_a_card_follows_its_flow_until_a_person_takes_it_over(flow, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("This model has been pushed to the Hub using the [PytorchModelHubMixin](x) integration", "utf-8")
    flow.save_pretrained(tmp_path)
    assert "# Preference flow" in path.read_text("utf-8")
    path.write_text("# My own words\n", "utf-8")
    flow.save_pretrained(tmp_path)
    assert path.read_text("utf-8") == "# My own words\n"
    path.write_bytes(b"\xff\xfe")  # no text of ours
    flow.save_pretrained(tmp_path)
    assert path.read_bytes() == b"\xff\xfe"


def test_a_card_names_the_encoder_without_the_path_of_its_owner(flow, tmp_path):
    flow.metadata["encoder"] = {"name": "/home/anna/secret/model + surface`\n# Heading"}
    try:
        flow.save_pretrained(tmp_path)
    finally:
        del flow.metadata["encoder"]
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "`model + surface" in text
    assert "anna" not in text
    assert "\n# Heading" not in text


def test_findings_say_what_the_guard_lets_through(flow):
    margin = flow.win.margin.clone()
    try:
        said = {}
        for value in (math.inf, 0.0, 0.127):
            flow.win.margin.fill_(value)
            said[value] = findings(flow)
    finally:
        flow.win.margin.copy_(margin)
    assert said[math.inf][0].startswith("Not shown to tell better from worse")
    assert said[math.inf][1] == "Changes nothing: held-out pairs confirm no gain, so every original is kept."
    assert said[0.0][1] == "Changes an output for any gain in win probability."
    assert said[0.127][1] == "Changes an output for a gain in win probability of 0.127 or more."


def test_a_flow_is_not_saved_over_another_kind_of_model(flow, tmp_path):
    whole = {"config.json": b'{"model_type": "llama"}', "README.md": b"mine"}
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    whole["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    for name in ("config.json", "README.md"):
        (tmp_path / name).write_bytes(whole[name])
    with pytest.raises(FileExistsError, match=r"config\.json is not a preference flow's and would be lost"):
        flow.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    (tmp_path / "config.json").unlink()  # tensors alone are kept too
    with pytest.raises(FileExistsError, match=r"model\.safetensors is not a preference flow's"):
        flow.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    for _ in range(2):  # then over itself
        flow.save_pretrained(tmp_path)
    assert PreferenceFlow.from_pretrained(tmp_path).event_shape == (1,)
