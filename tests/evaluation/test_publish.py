"""What is sent to the hub: a model that loads, and a card with measured scores."""

import json

from huggingface_hub import HfApi, ModelCard

from diffbuf_lib.evaluation.publish import send, write_model
from diffbuf_lib.model import fingerprint, load_model
from tests.conftest import call, make_model, refused


def test_a_dry_run_writes_a_model_that_loads_and_its_scores(
    finished, model_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(HfApi, "create_repo", None)  # nothing may be sent
    args = "--evaluation", finished, "--dry-run", "--output", tmp_path / "out"
    assert call(monkeypatch, capsys, "push", model_path, "me/mine", *args)[0] == 0
    model = load_model(model_path, "cpu")
    assert fingerprint(load_model(tmp_path / "out", "cpu")) == fingerprint(model)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    summary = json.loads((finished / "summary.json").read_text())
    mean = summary["bands"]["all"]["columns"]["si_sdr"]["methods"]["diffbuf"]["mean"]["mean"]
    assert mean in [x.metric_value for x in card.data.eval_results if x.metric_type == "si_sdr"]
    assert f"{mean:.2f}" in card.text


def test_scores_of_another_model_and_bad_names_are_refused(
    finished, model_path, tmp_path, tiny_cfg
):
    other, own = make_model(tiny_cfg), load_model(model_path, "cpu")
    refused(lambda: write_model(other, "a/b", tmp_path, finished), finished, fingerprint(other))
    refused(lambda: write_model(own, "a/b", tmp_path, tmp_path), tmp_path)
    refused(lambda: write_model(own, "a b/c", tmp_path), "a b/c")
    assert not list(tmp_path.iterdir())


def test_what_is_sent_is_the_folder_and_no_account_is_one_line(tmp_path, monkeypatch):
    sent = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **o: f"https://hub/{name}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: sent.update(options))
    assert send(tmp_path, "me/mine", private=True) == "https://hub/me/mine"
    assert (sent["repo_id"], sent["folder_path"]) == ("me/mine", tmp_path)

    def no_account(self, name, **options):
        raise RuntimeError("401\nno token")

    monkeypatch.setattr(HfApi, "create_repo", no_account)
    refused(lambda: send(tmp_path, "me/mine"), "me/mine", "401", "hf auth login")
